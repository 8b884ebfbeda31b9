"""How much of its gap to a teacher a student closes by distillation, at as many steps as without.

Tokens come from a source that is known: each pair of tokens has a distribution of its own over
those that follow. A teacher is trained on many of them; then students of a third of its size on the
same few batches, alone and by each divergence. The gap is the difference of the last validation
losses. Runs are ordinary ones, made with `megalite train` on one core each; a run that is there
already is not made again. Writes report.md.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from runs import train

from megalite.data.indexed_writer import IndexedWriter

VOCAB, LENGTH, BATCH = 24, 32, 32
TEACHER = {
    "family": "llama", "vocab_size": VOCAB, "hidden_size": 96, "intermediate_size": 192, "num_layers": 3,
    "num_attention_heads": 4, "max_positions": LENGTH,
}  # fmt: skip
STUDENT = TEACHER | {"hidden_size": 56, "intermediate_size": 108}
SPREAD = 0.15
"""Concentration of the source's distributions: the smaller, the fewer tokens follow a pair."""


def write_tokens(prefix: Path, count: int, seed: int) -> None:
    """Write `count` documents of the source. `seed` draws them; the source itself is always the
    same."""
    if prefix.with_suffix(".idx").exists():
        return
    follow = np.random.default_rng(0).dirichlet(np.full(VOCAB, SPREAD), VOCAB * VOCAB).cumsum(1)
    draw = np.random.default_rng(seed)
    tokens = draw.integers(VOCAB, size=(count, LENGTH + 1))
    for at in range(2, LENGTH + 1):
        rows = follow[tokens[:, at - 2] * VOCAB + tokens[:, at - 1]]
        tokens[:, at] = (draw.random((count, 1)) > rows).sum(1).clip(max=VOCAB - 1)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in tokens:
            writer.add_document(document)


def config_of(
    folder: Path, model: dict[str, Any], steps: int, objective: dict[str, Any]
) -> dict[str, Any]:
    return {
        "model": model,
        "data": {
            "train": [{"path": str(folder / "tokens" / "train")}],
            "valid": [{"path": str(folder / "tokens" / "valid")}],
            "seq_length": LENGTH, "order": "sequential",
        },
        "objective": objective,
        "train": {"steps": steps, "global_batch_size": BATCH, "micro_batch_size": BATCH, "precision": "fp32"},
        "optimizer": {"lr": 4e-3, "schedule": {"name": "cosine", "warmup_steps": 0.05, "min_lr": 4e-4}},
        "checkpoint": {"every": 0, "keep": 1},
        "observe": {"log_every": 50, "eval_every": 0, "eval_batches": 40},
    }  # fmt: skip


def last_loss(name: str, config: dict[str, Any], folder: Path) -> float:
    lines = train(name, config, folder)
    return next(line["valid_loss"] for line in reversed(lines) if "valid_loss" in line)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for tokens, runs and the report")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument(
        "--steps", type=int, default=300, help="of each student (default: %(default)s)"
    )
    parser.add_argument(
        "--weight", type=float, default=0.9, help="of the divergence (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at a time, a core each (default: %(default)s)"
    )
    arguments = parser.parse_args()
    folder, steps = arguments.folder, arguments.steps
    write_tokens(
        folder / "tokens" / "train", BATCH * max(arguments.teacher_steps, steps) + 1, seed=1
    )
    write_tokens(folder / "tokens" / "valid", BATCH * 41, seed=2)
    teacher = last_loss("teacher", config_of(folder, TEACHER, arguments.teacher_steps, {}), folder)
    checkpoint = folder / "runs" / "teacher" / "checkpoints" / f"step-{arguments.teacher_steps:08d}"
    asked: dict[str, dict[str, Any]] = {"alone": {}}
    for loss in ("forward_kl", "reverse_kl", "jsd"):
        asked[loss] = {
            "name": "distill",
            "teacher": str(checkpoint),
            "loss": loss,
            "weight": arguments.weight,
        }
    with ThreadPoolExecutor(arguments.jobs) as pool:
        each = [
            pool.submit(last_loss, name, config_of(folder, STUDENT, steps, how), folder)
            for name, how in asked.items()
        ]
        losses = dict(zip(asked, (future.result() for future in each), strict=True))
    gap = losses["alone"] - teacher
    lines = [f"teacher: {teacher:.4f} after {arguments.teacher_steps} steps", ""]
    lines += [f"| student, {steps} steps | validation loss | of the gap closed |", "|---|---|---|"]
    lines += [
        f"| {name} | {loss:.4f} | {(losses['alone'] - loss) / gap:.0%} |"
        for name, loss in losses.items()
    ]
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
