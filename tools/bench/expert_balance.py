"""How evenly experts are used with a selection bias and without: the same small DeepSeek-V3 kin,
data and seed.

The bias (Wang et al. 2024, auxiliary-loss-free balancing) moves by `router_bias_rate` a step; no
loss asks for balance. Runs are made side by side on one core each, and one that is there already is
not made again. Needs the data of tools/quickstart.sh. Prints the loads over the last tenth of the
steps, and draws balance.png."""

from __future__ import annotations

import argparse
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from runs import SPLITS, train

RATES = (0.0, 1e-3)
COLORS = ("tab:gray", "tab:red")
MODEL = {
    "family": "deepseek_v3", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 256, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": 256, "moe_intermediate_size": 64, "num_experts": 16,
    "experts_per_token": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 48,
    "kv_lora_rank": 32, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 24, "router_aux_loss_coef": 0.0,
}  # fmt: skip


def config_of(rate: float, arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "model": MODEL | {"router_bias_rate": rate},
        "data": SPLITS | {"seq_length": 256},
        "train": {
            "steps": arguments.steps, "global_batch_size": 8, "micro_batch_size": 8, "precision": "fp32", "seed": 1,
        },
        "optimizer": {"lr": 2e-3, "schedule": {"name": "cosine", "warmup_steps": 0.08, "min_lr": 2e-4}},
        "checkpoint": {"every": 0, "keep": 1},
        "observe": {"log_every": 1, "layers_every": arguments.every, "eval_every": arguments.steps},
    }  # fmt: skip


def layers_of(record: dict[str, Any]) -> list[float]:
    """Return the largest load over the mean of each layer with experts."""
    return [value for name, value in record.items() if name.startswith("expert_load/")]


def draw(path: Path, runs: dict[float, list[dict[str, Any]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for (rate, records), color in zip(runs.items(), COLORS, strict=True):
        steps = [record["step"] for record in records]
        layers = list(zip(*map(layers_of, records), strict=True))
        for number, loads in enumerate(layers):
            label = f"bias moves by {rate:g} a step" if rate else "no bias"
            axes.plot(
                steps,
                loads,
                color=color,
                alpha=0.7,
                linewidth=1.3,
                label=label if number == 0 else None,
            )
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set(xlabel="step", ylabel="largest load of an expert over the mean, by layer")
    axes.set_ylim(bottom=0.9)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--every", type=int, default=5, help="steps from one measured step to the next"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("expert-balance"), help="folder for runs and picture"
    )
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)

    def one(rate: float) -> list[dict[str, Any]]:
        return train(f"bias-{rate:g}", config_of(rate, arguments), arguments.output)

    with ThreadPoolExecutor(len(RATES)) as pool:
        runs = dict(zip(RATES, pool.map(one, RATES), strict=True))
    for rate, records in runs.items():
        measured = [record for record in records if layers_of(record)]
        runs[rate] = measured
        end = [load for r in measured if r["step"] > 0.9 * arguments.steps for load in layers_of(r)]
        dead = sum(
            value for name, value in measured[-1].items() if name.startswith("dead_experts/")
        )
        (loss,) = (record["valid_loss"] for record in records[-1:])
        print(
            f"bias rate {rate:g}: the largest load is {statistics.mean(end):.2f} of the mean over the last tenth of "
            f"the steps; experts without a token in the last: {dead:.0f}; validation loss {loss:.4f}"
        )
    draw(arguments.output / "balance.png", runs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
