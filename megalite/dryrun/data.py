"""What stands for the data of a config: small token files of the same kind, and settings without
what a dry run has no use for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.checkpoint.folder import step_folder
from megalite.config import Config
from megalite.data.indexed import token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.tokenizer import write_tokenizer_config
from megalite.data.tokenizer_training import BERT, SENTINELS, T5_SPECIAL
from megalite.errors import ConfigError
from megalite.utils.keys import key_of

DOCUMENTS = 64
"""Documents of each token file."""
HIDING = ("masked", "seq2seq")
"""Tasks of models whose objectives hide tokens."""


class Start(NamedTuple):
    """One start of a run that is run dry."""

    steps: int
    """Steps that it makes."""
    number: int = 0
    """0, or above that for a restart, which resumes where the start before it ended."""
    of: int = 1
    """Starts in all."""

    @property
    def begins_at(self) -> int:
        """Return the step of the checkpoint that it resumes from; 0 for none."""
        return self.number * self.steps


def dry_checkpoint(run: Path, step: int) -> Path:
    """Return the folder of a checkpoint of a run that is run dry. None is among those that the run
    would find by itself: all ranks of a start begin from the one that they are told."""
    return step_folder(run / "saved", step)


def dry_config(config: Config, folder: Path, start: Start) -> Config:
    """Return `config` with token files in `folder` instead of its own, a run folder there, and the
    steps of `start`. Raise ConfigError where made-up tokens cannot stand for those of the run."""
    if key := config.objective.made_of_tokens():
        raise ConfigError(
            f"{key} is of the run's own tokens, and a dry run has others; `megalite plan` takes it, or leave it out"
        )
    data = config.data
    shares = data.split or (1.0, 0.0, 0.0)
    sources = {
        "train": data.train,
        "valid": data.valid or (data.train if shares[1] else ()),
        "test": data.test or (data.train if shares[2] else ()),
    }
    found = {
        name: tuple(_stand_in(each, config, folder) for each in each_of)
        for name, each_of in sources.items()
    }
    # Objectives that hide tokens ask the tokenizer for those that stand for them.
    tokenizer = (
        write_tokenizer(folder / "tokenizer", config) if config.model.task in HIDING else None
    )
    document = {
        "document_mask": data.document_mask,
        "split": None,
        "tokenizer": tokenizer,
        "fim": None,
        "augment": None,
    }
    run = config.run.model_copy(update={"dir": folder / "runs"})
    resume = dry_checkpoint(run.folder, start.begins_at) if start.number else "never"
    return _updated(
        config,
        {
            "run": {"dir": run.dir},
            # Made-up tokens need no tokenizer, no split and nothing rearranged: shapes are what
            # counts.
            "data": found | document,
            "train": {
                "stop_at": start.begins_at + start.steps,
                # Of a run of one step there would be nothing to say: its steps after the first are
                # what a plan is about.
                "steps": max(config.train.steps or 0, start.steps * start.of),
                "epochs": None,
                "compile": False,
            },
            "checkpoint": {"resume": resume},
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
        "target_rows": 0,
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


def write_tokenizer(folder: Path, config: Config) -> Path:
    """Write a tokenizer of as many tokens as the model has, the first of which are those that
    objectives ask for."""
    import tokenizers

    special = [T5_SPECIAL["eos"], BERT["mask"], *SENTINELS][: config.model.vocab_size - 1]
    others = (f"token {number}" for number in range(config.model.vocab_size - len(special)))
    words = {name: number for number, name in enumerate([*special, *others])}
    folder.mkdir(parents=True)
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token=special[0])).save(
        str(folder / "tokenizer.json")
    )
    write_tokenizer_config(folder, special[0], more={"mask_token": BERT["mask"]})
    return folder


def write_tokens(prefix: Path, config: Config) -> None:
    """Write a token file with the labels and the note that the config's task or objective asks
    for."""
    kind = config.model.task if config.model.has_classes else config.objective.DATA
    length = max(config.data.seq_length // 4, 2)
    # Short enough for several documents in a sample; plain text, which is cut, needs more of them.
    lengths = [length] * DOCUMENTS * (1 if kind != "text" else 8)
    size = sum(lengths)
    dtype = token_dtype(config.model.vocab_size)
    with IndexedWriter(prefix, dtype, np.uint8 if kind != "text" else None) as writer:
        # One token everywhere, since no number is computed with: no special one of
        # `write_tokenizer`.
        tokens = np.full(size, config.model.vocab_size - 1, dtype)
        writer.add_documents(tokens, lengths, _mask(kind, lengths))
    note: dict[str, Any] = {"vocab_size": config.model.vocab_size}
    if kind != "text":
        note["format"] = kind
    if config.model.labels:
        note |= {"labels": list(config.model.labels), "problem": config.model.problem}
    Path(f"{prefix}.json").write_text(json.dumps(note))


def _mask(kind: str, lengths: Sequence[int]) -> Any:
    """Return what is learned of each token: of a class its last one, of the others all but the
    first; of a source and its target the second half."""
    if kind == "text":
        return None
    masks = []
    for length in lengths:
        mask = np.full(length, kind != "classification", np.uint8)
        mask[0], mask[-1] = 0, 1
        if kind == "seq2seq":
            mask[: length // 2] = 0
        if kind == "answers":  # of one token, the last
            mask[:-1], mask[-1] = 0, 3
        masks.append(mask)
    return np.concatenate(masks)
