"""What stands for the data of a config: small token files of the same kind, and settings without what a dry run has no
use for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megalite.config import Config
from megalite.data.indexed import IndexedWriter, token_dtype
from megalite.utils.keys import key_of

DOCUMENTS = 64
"""Documents of each token file."""


def dry_config(config: Config, folder: Path, steps: int) -> Config:
    """Return `config` with token files in `folder` instead of its own, a run folder there, and `steps` steps."""
    data = config.data
    shares = data.split or (1.0, 0.0, 0.0)
    sources = {
        "train": data.train,
        "valid": data.valid or (data.train if shares[1] else ()),
        "test": data.test or (data.train if shares[2] else ()),
    }
    found = {name: tuple(_stand_in(each, config, folder) for each in each_of) for name, each_of in sources.items()}
    document = {"document_mask": data.document_mask, "split": None, "tokenizer": None, "fim": None}
    return _updated(
        config,
        {
            "run": {"dir": folder / "runs"},
            # Made-up tokens need no tokenizer, no split and nothing rearranged: shapes are what
            # counts.
            "data": found | document,
            "train": {"stop_at": steps, "steps": config.train.steps or steps, "epochs": None, "compile": False},
            "checkpoint": {"resume": "never"},
            "observe": _without_tracking(config),
            "health": {"hang_timeout_s": 0},
            "profile": {"steps": ()},
        },
    )


def _without_tracking(config: Config) -> dict[str, Any]:
    observe = config.observe
    return {
        "wandb": observe.wandb.model_copy(update={"mode": "disabled"}),
        "tensorboard": False,
        "eval_batches": 1,
        "tasks": observe.tasks.model_copy(update={"names": ()}),
        "samples": observe.samples.model_copy(update={"prompts": ()}),
    }


def _updated(config: Config, changes: dict[str, dict[str, Any]]) -> Config:
    sections = {
        name: section.model_copy(update=changes[name])
        for name in changes
        if (section := getattr(config, name)) is not None
    }
    return config.model_copy(update=sections)


def _stand_in(source: Any, config: Config, folder: Path) -> Any:
    """Return `source` with the path of a token file of the kind that the run learns from."""
    prefix = folder / "data" / f"{key_of(source.path):x}" / Path(source.path).name
    if not Path(f"{prefix}.idx").exists():
        write_tokens(prefix, config)
    return source.model_copy(update={"path": str(prefix)})


def write_tokens(prefix: Path, config: Config) -> None:
    """Write a token file with the labels and the note that the config's task or objective asks for."""
    kind = config.objective.DATA if config.model.task == "causal" else config.model.task
    length = max(config.data.seq_length // 4, 2)
    # Short enough for several documents in a sample; plain text, which is cut, needs more of them.
    lengths = [length] * DOCUMENTS * (1 if kind != "text" else 8)
    size = sum(lengths)
    dtype = token_dtype(config.model.vocab_size)
    with IndexedWriter(prefix, dtype, np.uint8 if kind != "text" else None) as writer:
        # Token 0 everywhere: no number is computed with.
        writer.add_documents(np.zeros(size, dtype), lengths, _mask(kind, lengths))
    note: dict[str, Any] = {"vocab_size": config.model.vocab_size}
    if kind != "text":
        note["format"] = kind
    if config.model.labels:
        note |= {"labels": list(config.model.labels), "problem": config.model.problem}
    Path(f"{prefix}.json").write_text(json.dumps(note))


def _mask(kind: str, lengths: Sequence[int]) -> Any:
    """Return what is learned of each token: of a class its last one, of the others all but the first."""
    if kind == "text":
        return None
    masks = []
    for length in lengths:
        mask = np.full(length, kind != "classification", np.uint8)
        mask[0], mask[-1] = 0, 1
        masks.append(mask)
    return np.concatenate(masks)
