"""A first config: what every run needs, and beside it, commented out, what many change."""

from __future__ import annotations

import json
import textwrap
from typing import Any

from megalite.config import ModelConfig
from megalite.config.catalog import REQUIRED, Key, catalog

WIDTH = 98
OBJECTIVES = {"masked": "masked_lm", "seq2seq": "span_corruption"}
"""Objective by the task of a model; others learn the next token."""
OFFERED = (
    "run.dir",
    "model.hf",
    "data.valid",
    "data.packing",
    "data.document_mask",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.context",
    "parallel.zero_stage",
    "train.tokens",
    "train.epochs",
    "train.precision",
    "train.recompute",
    "train.seed",
    "train.patience",
    "optimizer.name",
    "optimizer.weight_decay",
    "optimizer.clip",
    "checkpoint.keep",
    "checkpoint.resume",
    "observe.log_every",
    "observe.eval_batches",
    "observe.wandb.mode",
    "observe.tensorboard",
)
"""Keys that are written commented out, with their defaults."""


def starter(preset: str, model: ModelConfig, name: str) -> str:
    """Return a config as commented YAML that trains `model`, that of a preset, from scratch, in a
    run called `name`."""
    chosen = _chosen(preset, model, name)
    keys = {key.name: key for keys in catalog().values() for key in keys if not key.kinds}
    # In the schema's order, so that a section comes once.
    order = [key for key in keys if key in chosen or key in OFFERED]
    lines = [
        f"# megalite train {name}.yaml. `megalite config` shows every key, docs/config.md too.",
        "# Any of them can also be given behind the command: train.steps=2000",
    ]
    above: list[str] = []
    for key in order:
        *sections, last = key.split(".")
        for depth, section in enumerate(sections):
            if above[: depth + 1] != sections[: depth + 1]:
                # A section of which nothing is set is commented out with what is in it.
                prefix = ".".join(sections[: depth + 1]) + "."
                is_set = any(each.startswith(prefix) for each in chosen)
                lines += [""] * (depth == 0)
                lines.append(f"{'  ' * depth}{'' if is_set else '# '}{section}:")
        above = sections
        lines += _setting(keys[key], "  " * len(sections), last, chosen.get(key))
    return "\n".join(lines) + "\n"


def _setting(key: Key, indent: str, last: str, value: str | None) -> list[str]:
    """Return the lines of one setting: what it means, and `value`, or its default commented out."""
    # The presets are too many to be listed.
    kind = "`megalite config presets` shows them" if key.name == "model.preset" else key.type
    told = f"{key.description} ({kind})"
    wrapped = textwrap.wrap(told, WIDTH - len(indent), break_on_hyphens=False)
    given = (
        f"{last}: {value}"
        if value
        else f"# {last}: {'' if key.default == REQUIRED else key.default}"
    )
    return [*(f"{indent}# {line}" for line in wrapped), f"{indent}{given}"]


def _chosen(preset: str, model: ModelConfig, name: str) -> dict[str, str]:
    """Return what a starter sets, as YAML by key."""
    length = min(model.max_positions, 512 if model.hidden_size < 1024 else 4096)
    # Wider models bear lower learning rates (Brown et al. 2020, table 2.1).
    lr = 1e-3 if model.hidden_size < 1024 else 3e-4
    chosen: dict[str, Any] = {
        "run.name": json.dumps(name),  # 010, yes and 1e3 are no text to YAML
        "model.preset": preset,
        "model.vocab_size": model.vocab_size,
        "data.train": "[{path: data/web_text_document}]  # what `megalite preprocess` wrote",
        "data.split": "[98, 2, 0]",
        "data.seq_length": length,
        "data.tokenizer": "data/tokenizer",
        "train.steps": 1000,
        "train.global_batch_size": 16,
        "train.micro_batch_size": 1,
        "optimizer.lr": f"{lr:.1e}",
        "optimizer.schedule.name": "cosine",
        "optimizer.schedule.warmup_steps": 100,
        "optimizer.schedule.min_lr": f"{lr / 10:.1e}",
        "checkpoint.every": 200,
        "observe.eval_every": 100,
    }
    if model.task in OBJECTIVES:
        chosen["objective.name"] = OBJECTIVES[model.task]
    return {key: str(value) for key, value in chosen.items()}
