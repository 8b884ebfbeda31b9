"""Which learning rate is best at which width, with muP and without it.

A narrow Llama and wider ones are trained on the source of distillation.py at a grid of learning
rates, each an ordinary run on one core; a run that is there already is not made again. Writes
transfer.png and report.md: the best learning rate of each width by the mean loss of the last tenth
of its steps.
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from distillation import BATCH, LENGTH, VOCAB, config_of, write_tokens
from runs import train

matplotlib.use("Agg")
from matplotlib import pyplot as plt

Losses = dict[tuple[bool, int], list[float]]
"""By whether muP is on, and width: the loss at each learning rate."""


def model_of(width: int, base: int | None) -> dict[str, Any]:
    return {
        "family": "llama", "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 2 * width, "num_layers": 2,
        "num_attention_heads": width // 16, "max_positions": LENGTH, "mup": base and {"base_hidden": base},
    }  # fmt: skip


def loss_of(
    folder: Path, optimizer: str, width: int, base: int | None, lr: float, steps: int
) -> float:
    config = config_of(folder, model_of(width, base), steps, {})
    config["optimizer"] = {
        "name": optimizer, "lr": lr, "schedule": {"name": "constant", "warmup_steps": 0.1}
    }  # fmt: skip
    name = f"{optimizer}-{width}-{'mup' if base else 'plain'}-{lr:.3g}"
    try:
        lines = train(name, config, folder)
    except SystemExit:  # it diverged
        return float("nan")
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    return float(np.mean(losses[-max(1, steps // 10) :]))


def draw(losses: Losses, rates: list[float], picture: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, is_mup in zip(panels, (False, True), strict=True):
        found = {width: each for (mup, width), each in losses.items() if mup == is_mup}
        for number, (width, each) in enumerate(found.items()):
            color = plt.get_cmap("viridis")(number / max(1, len(found) - 1) * 0.85)
            axes.plot(rates, each, "o-", color=color, label=f"hidden {width}")
            best = int(np.nanargmin(each))
            axes.plot(rates[best], each[best], "*", color=color, markersize=16)
        axes.set(
            xscale="log", xlabel="learning rate", title="muP" if is_mup else "as given at any width"
        )
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss, last tenth of the steps")
    panels[0].legend(frameon=False)
    # Rates that hardly learn, or diverge, would press together those that matter.
    every = np.array([x for each in losses.values() for x in each])
    panels[0].set_ylim(np.nanmin(every) - 0.03, np.nanmin(every) + 0.6)
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="for tokens, runs, the picture and the report")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256, 512])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, a core each")
    arguments = parser.parse_args()
    folder, steps, widths = arguments.folder, arguments.steps, arguments.widths
    rates = [2.0**power for power in range(-10, -2)]
    write_tokens(folder / "tokens" / "train", BATCH * steps + 1, seed=1)
    write_tokens(folder / "tokens" / "valid", BATCH * 41, seed=2)
    asked = [(mup, width) for mup in (False, True) for width in widths]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        each = {
            # At the base's own width muP changes nothing.
            (mup, width): [
                pool.submit(
                    loss_of,
                    folder,
                    arguments.optimizer,
                    width,
                    widths[0] if mup and width != widths[0] else None,
                    lr,
                    steps,
                )
                for lr in rates
            ]
            for mup, width in asked
        }
        losses = {key: [future.result() for future in found] for key, found in each.items()}
    draw(losses, rates, folder / "transfer.png")
    lines = [
        "| hidden size | best without muP | loss | best with muP | loss |",
        "|---|---|---|---|---|",
    ]
    for width in widths:
        best = [int(np.nanargmin(losses[mup, width])) for mup in (False, True)]
        cells = [
            f"2^{int(np.log2(rates[b]))} | {losses[bool(m), width][b]:.4f}"
            for m, b in enumerate(best)
        ]
        lines.append(f"| {width} | {' | '.join(cells)} |")
    (folder / "report.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
