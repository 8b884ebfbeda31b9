"""What a pruned model is worth: distilled from the large one, against a model of the same shape from
scratch, at equal steps.

On the source of distillation.py. A teacher is trained; a part of it is left out in several ways
(`megalite prune`), and what stays is distilled for a few steps; beside it a model of the same shape
is trained on the same batches, alone and by distillation. Runs are ordinary ones on one core each;
one that is there already is not made again. Writes report.md: the validation losses.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from math import log
from pathlib import Path
from typing import Any

from distillation import BATCH, TEACHER, config_of, last_loss, write_tokens

FIELDS = {
    "--layers": "num_layers", "--hidden": "hidden_size", "--kv-heads": "num_kv_heads", "--inner": "intermediate_size"
}  # fmt: skip
WAYS = {
    "inner": ["--inner", "96"],
    "depth": ["--layers", "2"],
    "width": ["--hidden", "64", "--inner", "128"],
}
LARGE = TEACHER | {"num_kv_heads": TEACHER["num_attention_heads"], "head_dim": 24}


def prune(folder: Path, teacher: Path, name: str, given: list[str]) -> tuple[float, float]:
    """Prune the teacher; return the validation losses before and after, by the rows held out."""
    out, said = folder / "pruned" / name, folder / f"pruned-{name}.txt"
    if not out.exists():
        data = ["--data", str(folder / "tokens" / "valid"), "--rows", "256", "--length", "31"]
        command = [sys.executable, "-m", "megalite", "prune", str(teacher), str(out), *given, *data]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        said.write_text(done.stdout)
    before, after = said.read_text().split("held out: ")[1].split(" → ")
    return log(float(before)), log(float(after))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for tokens, runs and the report")
    parser.add_argument("--teacher-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    folder, steps = arguments.folder, arguments.steps
    write_tokens(folder / "tokens" / "train", BATCH * (arguments.teacher_steps + steps) + 1, seed=1)
    write_tokens(folder / "tokens" / "valid", BATCH * 41, seed=2)
    large = last_loss("teacher", config_of(folder, LARGE, arguments.teacher_steps, {}), folder)
    teacher = folder / "runs" / "teacher" / "checkpoints" / f"step-{arguments.teacher_steps:08d}"
    distil = {"name": "distill", "teacher": str(teacher), "weight": 0.9}
    lines = [
        f"teacher: {large:.4f} after {arguments.teacher_steps} steps", "",
        f"| left out | pruned | distilled {steps} steps | the same shape from scratch | and distilled |",
        "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, given in WAYS.items():
        _, pruned = prune(folder, teacher, name, given)
        shape: dict[str, Any] = LARGE | {
            FIELDS[option]: int(number)
            for option, number in zip(given[::2], given[1::2], strict=True)
        }
        small = {"hf": str(folder / "pruned" / name)}
        losses = [
            last_loss(f"{name}-pruned", config_of(folder, small, steps, distil), folder),
            last_loss(f"{name}-alone", config_of(folder, shape, steps, {}), folder),
            last_loss(f"{name}-distilled", config_of(folder, shape, steps, distil), folder),
        ]
        lines.append(f"| {name} | {pruned:.4f} | " + " | ".join(f"{x:.4f}" for x in losses) + " |")
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
