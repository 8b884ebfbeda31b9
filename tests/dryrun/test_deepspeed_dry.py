"""DeepSpeed's engine runs dry: what it allocates and sends at each stage of ZeRO."""

from __future__ import annotations

from pathlib import Path

import pytest

from dry_runs import Case, Dry, built, config_of, run_dry
from megalite.dryrun.match import bytes_by_axis, compare, play
from megalite.dryrun.run import check_possible
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.planner.estimate import estimate
from megalite.planner.hardware import find_hardware

pytestmark = built

MODEL = {
    "family": "llama", "vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 2816, "num_layers": 2,
    "num_attention_heads": 8, "num_kv_heads": 4, "max_positions": 512,
}  # fmt: skip
GPUS = {1: 8, 2: 2, 3: 2}
CASES = {
    stage: Case(
        MODEL,
        gpus,
        (
            "parallel.engine=deepspeed",
            f"parallel.zero_stage={stage}",
            "data.seq_length=256",
            f"train.global_batch_size={2 * gpus}",
        ),
        "all" if stage == 3 else "1",
    )
    for stage, gpus in GPUS.items()
}
BYTES = {1: 2 + 4 + 12 / 8, 2: 2 + 4 / 2 + 12 / 2, 3: (2 + 4 + 12) / 2}
"""Of each weight: in bf16, its fp32 gradient, and its master copy with two moments."""


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Dry]:
    pytest.importorskip("deepspeed")
    folder: Path = tmp_path_factory.mktemp("deepspeed")
    found = run_dry({str(stage): case for stage, case in CASES.items()}, folder)
    return {stage: found[str(stage)] for stage in CASES}


@pytest.mark.parametrize("stage", CASES)
def test_it_trains_validates_and_saves_and_all_collectives_match(
    stage: int, dry: dict[int, Dry]
) -> None:
    numel = sum(weight.numel for weight in weight_table(dry[stage].config.model))
    for record in dry[stage].records:
        assert {"training", "validating", "saving"} <= record.peaks.keys()
        assert record.peaks["training"] > BYTES[stage] * numel
    assert compare(dry[stage].traffics) == []
    assert play(dry[stage].traffics) == []


@pytest.mark.parametrize("stage", [1, 2])
def test_bytes_are_those_of_the_plan(stage: int, dry: dict[int, Dry]) -> None:
    """DeepSpeed sums gradients by all-reduces there."""
    planned = estimate(dry[stage].config, dry[stage].plan, find_hardware("h200")).volume["data"]
    for record in dry[stage].records:
        sent = bytes_by_axis(record.traffic, "training")["data"]
        # Padding of flat partitions; and single numbers.
        assert planned == pytest.approx(sent, rel=0.005)


@pytest.mark.parametrize("what", ["optimizer", "parameters"])
def test_offload_is_refused(what: str) -> None:
    overrides = (
        "parallel.engine=deepspeed",
        "parallel.zero_stage=3",
        f"parallel.offload.{what}=cpu",
        "data.seq_length=256",
    )
    with pytest.raises(ConfigError, match=f"parallel.offload.{what}: cpu cannot be run dry"):
        check_possible(config_of(MODEL, *overrides))
