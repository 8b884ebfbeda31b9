"""The planner's MFU against Megatron-LM's published one, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.observe.throughput import model_flops_per_token
from megalite.plan import make_plan
from megalite.planner.estimate import Estimate, Outlook, estimate
from megalite.planner.hardware import find_hardware
from megalite.planner.kernels import MEGATRON
from megalite.planner.shapes import ModelTable

ROWS: list[dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parent / "megatron_h100.yaml").read_text()
)

MISSED: dict[str, str] = {}
"""Rows that are further off than WITHIN, and why. None at present."""

WITHIN = 0.15  # what the issue asks for, relative


def config_of(row: dict[str, Any], micro_batch_size: int, virtual: int, recompute: str) -> Config:
    stages = row["pipeline"] * virtual
    return parse_config(
        {
            "run": {"name": "published"},
            "model": {
                "family": "gpt2", "vocab_size": 131072, "hidden_size": row["hidden"], "num_layers": row["layers"],
                "num_attention_heads": row["heads"], "max_positions": 4096, "tie_embeddings": False,
            },
            "data": {"train": [{"path": "x"}], "seq_length": 4096},
            "parallel": {
                "tensor": row["tensor"], "pipeline": row["pipeline"], "virtual": virtual,
                "schedule": "interleaved" if virtual > 1 else "1f1b",
                "stage_layers": [row["layers"] // stages] * stages,  # Megatron's stages are equal
            },
            "train": {
                "steps": 1, "global_batch_size": row["batch"], "micro_batch_size": micro_batch_size,
                "recompute": recompute,
            },
            "optimizer": {"lr": 1e-4},
        }
    )  # fmt: skip


@cache
def quickest(size: str) -> Estimate:
    """What is not published is taken as whoever tunes a benchmark would: the quickest that fits
    into memory."""
    row = next(row for row in ROWS if row["size"] == size)
    fitting = [one for one in choices(row) if one.fits]
    return min(fitting, key=lambda one: one.step_time_s)


def choices(row: dict[str, Any]) -> Iterator[Estimate]:
    layers = row["layers"] // row["pipeline"]
    for virtual in range(1, layers + 1 if row["pipeline"] > 1 else 2):
        for micro_batch_size in (1, 2, 4) if layers % virtual == 0 else ():
            for recompute in ("none", "selective", "full"):
                config = config_of(row, micro_batch_size, virtual, recompute)
                table = ModelTable(config)
                try:
                    plan = make_plan(config, table.weights, row["gpus"])
                except ConfigError:
                    continue
                outlook = Outlook(config, plan, find_hardware("h100"), table, MEGATRON)
                one = outlook.estimate()
                yield one
                if one.fits:
                    break  # more recomputation is only slower


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["size"])
def test_mfu_is_near_the_published_one(row: dict[str, Any]) -> None:
    found = quickest(row["size"])
    off = found.mfu / row["mfu"] - 1
    print(f"{row['size']}: {found.mfu:.3f}, published {row['mfu']:.2f}, {off:+.1%}")
    if row["size"] in MISSED:
        assert abs(off) > WITHIN, f"no longer missed: {MISSED[row['size']]}"
    else:
        assert abs(off) <= WITHIN, f"{found.mfu:.3f}, published {row['mfu']}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["size"])
def test_model_has_the_published_size_and_operations(row: dict[str, Any]) -> None:
    config = config_of(row, 1, 1, "none")
    size = sum(weight.numel for weight in weight_table(config.model))
    # Sizes are cut to two or three digits: the 1.7B has 1.745e9, or with learned positions 1.754e9.
    assert size == pytest.approx(float(row["size"][:-1]) * 1e9, rel=0.035)
    # TFLOP/s ÷ MFU is the peak, so both count operations as Megatron does; the MFUs have two
    # digits.
    assert row["tflops"] / row["mfu"] == pytest.approx(989.5, rel=0.02)
    # Megatron's own formula, num_floating_point_operations of r0.8.0: 12·L·h²·(1 + 1 + s/h + 4 +
    # V/(2·L·h)) a token.
    hidden, layers = row["hidden"], row["layers"]
    theirs = 12 * layers * hidden**2 * (2 + 4096 / hidden + 4 + 131072 / (2 * layers * hidden))
    # Ours counts biases and norms as well.
    assert model_flops_per_token(config) == pytest.approx(theirs, rel=1e-3)


def test_predictions_do_not_lean() -> None:
    """Nothing was calibrated on these rows: what the chip sustains comes from
    test_planner_published.py."""
    errors = [quickest(row["size"]).mfu / row["mfu"] - 1 for row in ROWS]
    assert min(errors) < 0 < max(errors)


# docs/performance.md of pytorch/torchtitan: Llama on 64 A100 80GB, FSDP2 (weights sharded, no other
# parallelism), the rows that recompute nothing or everything; its "selective" recomputes products,
# which ours never does. The network is not named; the messages are hidden behind the work at any of
# today's.
TORCHTITAN = [("llama-13b", 4096, 2, "none", 0.611), ("llama-70b", 8192, 1, "full", 0.517)]


@pytest.mark.parametrize(
    ("preset", "seq_length", "micro_batch_size", "recompute", "mfu"), TORCHTITAN
)
def test_another_chip_and_trainer(
    preset: str, seq_length: int, micro_batch_size: int, recompute: str, mfu: float
) -> None:
    """Nothing was calibrated on these."""
    config = parse_config(
        {
            "run": {"name": "published"},
            "model": {"preset": preset},
            "data": {"train": [{"path": "x"}], "seq_length": seq_length},
            "parallel": {"engine": "deepspeed", "zero_stage": 3},
            "train": {
                "steps": 1, "global_batch_size": 64 * micro_batch_size, "micro_batch_size": micro_batch_size,
                "recompute": recompute,
            },
            "optimizer": {"lr": 1e-4},
        }
    )  # fmt: skip
    plan = make_plan(config, weight_table(config.model), 64)
    found = estimate(config, plan, find_hardware("a100-80gb", 8, "ib-hdr"))
    print(f"{preset}: {found.mfu:.3f}, published {mfu}, {found.mfu / mfu - 1:+.1%}")
    assert found.mfu == pytest.approx(mfu, rel=WITHIN)
    assert found.fits, "as it did"
