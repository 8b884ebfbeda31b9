"""Pipelines beyond the parity of their numbers: the memory they hold, and what a trace shows of
them."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from live_bytes import measure_step
from megalite.config import Config
from megalite.config_file import parse_config
from ranks import run_ranks
from small_runs import make_config, train_on_rank

MODEL: dict[str, Any] = {
    "family": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": 128,
}  # fmt: skip
SCHEDULES = [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zero_bubble", 2)]


def config_of(schedule: str, virtual: int, micro_batches: int) -> Config:
    return parse_config(
        {
            "run": {"name": "test"},
            "model": MODEL,
            "data": {"train": [{"path": "-"}], "seq_length": 128},
            "train": {"steps": 2, "global_batch_size": micro_batches, "precision": "fp32"},
            "parallel": {"pipeline": 2, "schedule": schedule, "virtual": virtual},
            "optimizer": {"lr": 1e-3},
        }
    )


def measure_all(rank: int, world_size: int) -> list[tuple[int, int]]:
    """Bytes that 4 and 16 micro-batches add to what stays between steps, for each schedule."""
    found = []
    for schedule in SCHEDULES:
        few, many = (
            measure_step(rank, world_size, config_of(*schedule, count)) for count in (4, 16)
        )
        found.append((few["peak"] - few["resident"], many["peak"] - many["resident"]))
    return found


def test_what_a_stage_holds_is_bounded_by_the_schedule() -> None:
    """Four times the micro-batches need no more memory. Their tokens, labels and places, 4 KiB
    each, are all there from the beginning; a single activation that was kept for each would be 32
    KiB."""
    for rank, of_rank in enumerate(run_ranks(2, measure_all)):
        for schedule, (few, many) in zip(SCHEDULES, of_rank, strict=True):
            assert few > 1_000_000, "activations are there to be seen"
            assert many - few < 12 * 12_000, f"{schedule} on rank {rank}: {few} bytes became {many}"


def test_a_trace_names_every_pass(tmp_path: Path) -> None:
    overrides = ("parallel.pipeline=2", "parallel.schedule=zero_bubble", "train.steps=4")
    config = make_config(tmp_path, "llama", *overrides, "profile={steps: [2, 3], ranks: [0, 1]}")
    run_ranks(2, train_on_rank, [config])
    for rank in (0, 1):
        path = config.run.folder / "trace" / f"steps-2-3-rank-{rank}.json.gz"
        names = Counter(
            event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        )
        passes = {name: count for name, count in names.items() if re.match(r"stage \d", name)}
        kinds = ("forward", "backward", "weights")
        assert passes == {
            f"stage {rank} {kind} {number}": 2 for kind in kinds for number in range(4)
        }


@pytest.mark.parametrize(
    ("steps", "word"), [("[3, 2]", "first <= last"), ("[1]", "first <= last"), ("[0, 1]", "1 <=")]
)
def test_impossible_steps_to_profile_are_refused(tmp_path: Path, steps: str, word: str) -> None:
    with pytest.raises(ValueError, match=word):
        make_config(tmp_path, "llama", f"profile.steps={steps}")
