"""How soon optimizers come to AdamW's loss: the same small model, data and schedule, each at its
own tuned rate.

Every optimizer is first trained at each of as many learning rates; the best goes on with further
seeds. Then, by seed: after how many steps, and seconds of training, its validation loss is down to
AdamW's last. Runs are ordinary ones, made with `megalite train` side by side on one core each; a
run that is there already is not made again, and one that was stopped goes on. Needs the data of
tools/quickstart.sh. Writes report.md, runs.json and losses.png.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress
from runs import SPLITS, train

LRS = {"adamw": (1e-3, 2e-3, 4e-3), "muon": (2e-3, 4e-3, 8e-3)}
"""Learning rates that are tried, as many of each."""
COLORS = {"adamw": "tab:gray", "muon": "tab:red"}


@dataclass(frozen=True)
class Case:
    optimizer: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.optimizer}-{self.lr:g}-seed{self.seed}"


@dataclass(frozen=True)
class Curve:
    """Validation losses of a run."""

    case: Case
    steps: list[int]
    losses: list[float]
    seconds_a_step: float

    @property
    def last(self) -> float:
        return self.losses[-1]

    def steps_to(self, loss: float) -> float | None:
        """Return the step at which the curve, straight between its points, is down to `loss`; None
        if never."""
        before = None
        for step, value in zip(self.steps, self.losses, strict=True):
            if value <= loss:
                if before is None:
                    return float(step)
                return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
            before = step, value
        return None


def config_of(case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    schedule = {"name": "cosine", "warmup_steps": 0.08, "min_lr": case.lr / 10}
    return {
        "model": {"preset": arguments.preset},
        "data": SPLITS | {"seq_length": 256},
        "train": {
            "steps": arguments.steps, "global_batch_size": arguments.batch, "micro_batch_size": arguments.batch,
            "precision": arguments.precision, "seed": case.seed,
        },
        "optimizer": {"name": case.optimizer, "lr": case.lr, "schedule": schedule},
        # A run that is stopped goes on from here, to the same bits.
        "checkpoint": {"every": max(1, arguments.steps // 8), "keep": 1},
        "observe": {"log_every": 50, "eval_every": max(1, arguments.steps // 30), "eval_batches": 20},
    }  # fmt: skip


def run(case: Case, folder: Path, arguments: argparse.Namespace) -> Curve:
    """Train one run, or go on with it."""
    lines = train(case.name, config_of(case, arguments), folder)
    found = [(line["step"], line["valid_loss"]) for line in lines if "valid_loss" in line]
    seconds = statistics.median(line["step_time_s"] for line in lines if "step_time_s" in line)
    return Curve(case, [step for step, _ in found], [loss for _, loss in found], seconds)


def run_all(cases: Iterable[Case], folder: Path, arguments: argparse.Namespace) -> list[Curve]:
    cases = list(cases)
    with Progress() as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        task = progress.add_task("runs", total=len(cases))

        def one(case: Case) -> Curve:
            curve = run(case, folder, arguments)
            progress.advance(task)
            progress.print(f"{case.name}: {curve.last:.4f}")
            return curve

        return list(pool.map(one, cases))


def draw(path: Path, best: dict[str, list[Curve]], target: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for name, curves in best.items():
        for number, curve in enumerate(curves):
            label = f"{name}, lr {curve.case.lr:g}" if number == 0 else None
            axes.plot(curve.steps, curve.losses, color=COLORS.get(name), alpha=0.7, label=label)
    axes.axhline(target, color="0.6", linewidth=0.8, linestyle=":")
    axes.annotate(
        "AdamW's last, mean of its seeds", (0, target), fontsize=8, va="bottom", color="0.4"
    )
    axes.set(xlabel="step", ylabel="validation loss")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def report(swept: list[Curve], best: dict[str, list[Curve]]) -> str:
    lines = ["| optimizer | lr | last validation loss, first seed |", "|---|---|---|"]
    lines += [f"| {c.case.optimizer} | {c.case.lr:g} | {c.last:.4f} |" for c in swept]
    lines += [
        "",
        "| optimizer | seed | last loss | steps to AdamW's last | of its steps | of its seconds |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    shares: dict[str, list[float]] = {}
    for name, curves in best.items():
        for curve, adamw in zip(curves, best["adamw"], strict=True):
            steps = curve.steps_to(adamw.last)
            if steps is None:
                lines.append(f"| {name} | {curve.case.seed} | {curve.last:.4f} | never | | |")
                continue
            share = steps / adamw.steps[-1]
            seconds = share * curve.seconds_a_step / adamw.seconds_a_step
            shares.setdefault(name, []).append(share)
            lines.append(
                f"| {name} | {curve.case.seed} | {curve.last:.4f} | {steps:.0f} | {share:.2f} | {seconds:.2f} |"
            )
    lines += [
        "",
        *(
            f"{name}: {statistics.mean(x):.2f} of AdamW's steps, mean of {len(x)}"
            for name, x in shares.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--preset", default="llama-8m")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=8, help="sequences of 256 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--optimizers", nargs="*", choices=list(LRS), default=list(LRS))
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("optimizers"),
        help="folder for runs, report and picture",
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sweep = [Case(name, lr, 1) for name in arguments.optimizers for lr in LRS[name]]
    swept = run_all(sweep, arguments.output, arguments)
    chosen = {
        name: min((c for c in swept if c.case.optimizer == name), key=lambda c: c.last)
        for name in arguments.optimizers
    }
    further = [
        Case(name, curve.case.lr, seed)
        for name, curve in chosen.items()
        for seed in range(2, arguments.seeds + 1)
    ]
    others = run_all(further, arguments.output, arguments)
    best = {
        name: [first, *(c for c in others if c.case.optimizer == name)]
        for name, first in chosen.items()
    }
    text = report(swept, best)
    (arguments.output / "report.md").write_text(text)
    (arguments.output / "runs.json").write_text(
        json.dumps([asdict(curve) for curve in (*swept, *others)])
    )
    draw(
        arguments.output / "losses.png",
        best,
        statistics.mean(curve.last for curve in best["adamw"]),
    )
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
