"""What fp8 costs in loss: the same small Llama in bf16 and in each recipe of `train.fp8`, with the
same seeds, data and schedule.

Drawn is how far each recipe's validation loss is from bf16's of the same seed, as a share of it,
beside what seeds alone change: the spread of bf16's own losses over seeds. Runs are ordinary ones,
made with `megalite train` side by side on one core each; a run that is there already is not made
again. Needs the data of tools/quickstart.sh. Writes report.md and gap.png; status 1 where
blockwise's last loss is more than 0.5% from bf16's.

    python tools/bench/fp8_learning.py --output fp8-learning            # 300 steps of 8M, 3 seeds
    python tools/bench/fp8_learning.py --output fp8-learning --short    # 40 steps of 2M, 2 seeds
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from runs import SPLITS

from megalite.kernels.recipes import RECIPES
from megalite.precision.curves import BF16, Curves, draw, gaps, last_gap, seeds_of, spread
from megalite.precision.run import train_all
from megalite.sweep.side_by_side import Job

BOUND = 0.005
"""Most that blockwise may be from bf16, as a share of the loss."""
MODEL = {
    "family": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_layers": 8,
    "num_attention_heads": 8, "num_kv_heads": 4, "max_positions": 2048, "tie_embeddings": True,
}  # fmt: skip
SHORT = MODEL | {"num_layers": 4, "hidden_size": 128, "intermediate_size": 384}
SHORT |= {"num_attention_heads": 4, "num_kv_heads": 4}


def config_of(recipe: str | None, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    schedule = {"name": "cosine", "warmup_steps": 0.08, "min_lr": arguments.lr / 10}
    return {
        "model": SHORT if arguments.short else MODEL,
        "data": SPLITS | {"seq_length": 256},
        "train": {
            "steps": arguments.steps, "global_batch_size": arguments.batch, "micro_batch_size": arguments.batch,
            "precision": "bf16", "seed": seed, "fp8": recipe and {"recipe": recipe},
        },
        "optimizer": {"lr": arguments.lr, "schedule": schedule},
        "checkpoint": {"every": 0, "keep": 1},
        "observe": {"log_every": 50, "eval_every": max(4, arguments.steps // 30), "eval_batches": 20},
    }  # fmt: skip


def run_all(arguments: argparse.Namespace) -> Curves:
    """Return the curve of each recipe, bf16 among them, and seed."""
    seeds, runs = range(1, arguments.seeds + 1), arguments.output / "runs"
    cases = [(name, seed) for seed in seeds for name in (BF16, *arguments.recipes)]
    jobs = []
    for name, seed in cases:
        run = {"name": f"{name}-seed{seed}", "dir": str(runs)}
        config = config_of(None if name == BF16 else name, seed, arguments)
        jobs.append(Job(run["name"], {"run": run, **config}))
    return train_all(runs, cases, jobs, arguments.jobs)


def report(curves: Curves, arguments: argparse.Namespace) -> str:
    seeds = seeds_of(curves, BF16)
    of_bf16 = [curves[BF16, seed].losses[-1] for seed in seeds]
    lines = [
        f"{arguments.steps} steps of {arguments.batch} × 256 tokens, {len(seeds)} seed(s); bf16's last validation loss "
        f"{statistics.mean(of_bf16):.4f}, whose spread over seeds is {spread(curves)[-1]:.2%} of it",
        "",
        "| recipe | last loss from bf16's, mean of the seeds | least and most |",
        "|---|---|---|",
    ]
    for recipe in arguments.recipes:
        last = [gap[-1] for gap in gaps(curves, recipe)]
        lines.append(
            f"| {recipe} | {statistics.mean(last):+.2%} | {min(last):+.2%} to {max(last):+.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("fp8-learning"), help="folder for runs")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=RECIPES,
        default=[*RECIPES],
        metavar="NAME",
        help="(default: all)",
    )
    parser.add_argument("--steps", type=int, help="(default 300)")
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, help="(default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--short", action="store_true", help="40 steps of a smaller model")
    arguments = parser.parse_args()
    arguments.steps = arguments.steps or (40 if arguments.short else 300)
    arguments.seeds = arguments.seeds or (2 if arguments.short else 3)
    arguments.output.mkdir(parents=True, exist_ok=True)
    curves = run_all(arguments)
    text = report(curves, arguments)
    (arguments.output / "report.md").write_text(text)
    draw(arguments.output / "gap.png", curves, tuple(arguments.recipes), BOUND)
    print(text)
    return int(abs(last_gap(curves, "blockwise")) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
