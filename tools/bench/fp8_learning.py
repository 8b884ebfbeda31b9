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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress
from runs import SPLITS, train

RECIPES = ("blockwise", "mxfp8", "rowwise", "current")
COLORS = {"blockwise": "#2a6fbb", "mxfp8": "#3a8f5c", "rowwise": "#d9661f", "current": "#8e44ad"}
BOUND = 0.005
"""Most that blockwise may be from bf16, as a share of the loss."""
MODEL = {
    "family": "llama", "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_layers": 8,
    "num_attention_heads": 8, "num_kv_heads": 4, "max_positions": 2048, "tie_embeddings": True,
}  # fmt: skip
SHORT = MODEL | {"num_layers": 4, "hidden_size": 128, "intermediate_size": 384}
SHORT |= {"num_attention_heads": 4, "num_kv_heads": 4}


class Curve(NamedTuple):
    """Validation losses of a run."""

    steps: list[int]
    losses: list[float]


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


def run_all(arguments: argparse.Namespace) -> dict[tuple[str, int], Curve]:
    """Return the curve of each recipe, bf16 among them, and seed."""
    cases = [(name, seed) for seed in range(1, arguments.seeds + 1) for name in ("bf16", *RECIPES)]
    with Progress() as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(cases))

        def one(case: tuple[str, int]) -> Curve:
            name, seed = case
            config = config_of(None if name == "bf16" else name, seed, arguments)
            lines = train(f"{name}-seed{seed}", config, arguments.output)
            found = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
            steps, losses = [step for step, _ in found], [loss for _, loss in found]
            curve = Curve(steps, losses)
            progress.advance(task)
            progress.print(f"{name}, seed {seed}: {curve.losses[-1]:.4f}")
            return curve

        return dict(zip(cases, pool.map(one, cases), strict=True))


def gaps(curves: dict[tuple[str, int], Curve], recipe: str, seeds: int) -> list[list[float]]:
    """Return for each seed how far the recipe's losses are from bf16's, as shares of it."""
    pairs = ((curves[recipe, s].losses, curves["bf16", s].losses) for s in range(1, seeds + 1))
    return [[a / b - 1 for a, b in zip(*pair, strict=True)] for pair in pairs]


def spread(curves: dict[tuple[str, int], Curve], seeds: int) -> list[float]:
    """Return the standard deviation of bf16's losses over seeds, as shares of their mean."""
    losses = zip(*(curves["bf16", seed].losses for seed in range(1, seeds + 1)), strict=True)
    return [statistics.stdev(at) / statistics.mean(at) if seeds > 1 else 0.0 for at in losses]


def report(curves: dict[tuple[str, int], Curve], arguments: argparse.Namespace) -> str:
    seeds = arguments.seeds
    bf16 = [curves["bf16", seed].losses[-1] for seed in range(1, seeds + 1)]
    lines = [
        f"{arguments.steps} steps of {arguments.batch} × 256 tokens, {seeds} seed(s); bf16's last validation loss "
        f"{statistics.mean(bf16):.4f}, whose spread over seeds is {spread(curves, seeds)[-1]:.2%} of it",
        "",
        "| recipe | last loss from bf16's, mean of the seeds | least and most |",
        "|---|---|---|",
    ]
    for recipe in RECIPES:
        last = [gap[-1] for gap in gaps(curves, recipe, seeds)]
        lines.append(
            f"| {recipe} | {statistics.mean(last):+.2%} | {min(last):+.2%} to {max(last):+.2%} |"
        )
    return "\n".join(lines) + "\n"


def draw(path: Path, curves: dict[tuple[str, int], Curve], seeds: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = curves["bf16", 1].steps
    noise = spread(curves, seeds)
    axes.fill_between(
        steps, [-x for x in noise], noise, color="0.9", label="bf16: spread over seeds"
    )
    axes.axhline(0, color="0.6", linewidth=0.8)
    for bound in (-BOUND, BOUND):
        axes.axhline(bound, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate("the bound of blockwise", (steps[0], BOUND), fontsize=8, va="bottom", color="0.4")
    for recipe in RECIPES:
        of_seeds = gaps(curves, recipe, seeds)
        for gap in of_seeds:
            axes.plot(steps, gap, color=COLORS[recipe], alpha=0.3, linewidth=0.8)
        mean = [statistics.mean(at) for at in zip(*of_seeds, strict=True)]
        axes.plot(steps, mean, color=COLORS[recipe], linewidth=1.8, label=recipe)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set(xlabel="step", ylabel="validation loss, from bf16's of the same seed")
    figure.legend(loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("fp8-learning"), help="folder for runs")
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
    draw(arguments.output / "gap.png", curves, arguments.seeds)
    print(text)
    last = [gap[-1] for gap in gaps(curves, "blockwise", arguments.seeds)]
    return int(abs(statistics.mean(last)) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
