"""Predicted memory under DeepSpeed against what its own code needs when it is run dry: a sample of
layouts, and with --whole all of them."""

from __future__ import annotations

import pytest

from dry_runs import GPT2, LLAMA, Case, Dry, built, run_dry
from megalite.planner.estimate import memory_of

pytestmark = built

WITHIN = {1: 0.01, 2: 0.01, 3: 0.02}
"""By stage. Most are within 0.3%; stage 3 prefetches weights in an order of its own."""
FURTHER = {
    (3, "large buckets"): 0.055,  # as much as a bucket holds is prefetched
    # A model of 0.1B, whose one table is half of it: several of its weights lie in a share.
    (2, "tied, short"): 0.075,
    (3, "tied, short"): 0.04,
}
SAVED_WITHIN = 0.01
SAVED_AT_STAGE_3 = (-0.04, 0.13)
"""It keeps up to so many weights that a validation has gathered."""
SHORT = ("train.recompute=full", "data.seq_length=512")
SAMPLE = {
    "passes": Case(LLAMA, 8, (), "0,7"),
    "short": Case(LLAMA, 4, SHORT, "0,3"),
}
OTHERS = {
    "one micro-batch": Case(LLAMA, 8, ("train.global_batch_size=8",), "0,7"),
    "full": Case(LLAMA, 8, ("train.recompute=full",), "0,7"),
    "tensor": Case(LLAMA, 8, ("parallel.tensor=2",), "0,7"),
    "large buckets": Case(LLAMA, 8, ("parallel.bucket_mb=2000",), "0,7"),
    "fp32": Case(LLAMA, 4, ("train.precision=fp32",), "0,3"),
    "tied, short": Case(GPT2, 8, SHORT, "0,7"),
    "tied": Case(GPT2, 8, ("data.seq_length=1024",), "0,7"),
}


@pytest.fixture(scope="module")
def dry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[int, str], Dry]:
    pytest.importorskip("deepspeed")
    rows = SAMPLE | (OTHERS if request.config.getoption("--whole") else {})
    keys = [(stage, name) for stage in WITHIN for name in rows]
    cases = {}
    for stage, name in keys:
        engine = ("parallel.engine=deepspeed", f"parallel.zero_stage={stage}")
        cases[f"{stage} {name}"] = rows[name]._replace(overrides=(*rows[name].overrides, *engine))
    found = run_dry(cases, tmp_path_factory.mktemp("deepspeed"))
    return {(stage, name): found[f"{stage} {name}"] for stage, name in keys}


@pytest.mark.parametrize("stage", WITHIN)
def test_memory_of_a_step_is_that_of_the_plan(stage: int, dry: dict[tuple[int, str], Dry]) -> None:
    for (its, name), each in dry.items():
        if its != stage:
            continue
        (memory,) = memory_of(each.config, each.plan)
        # Planned for the rank that needs most: which gradients a rank owns makes a difference.
        peak = max(record.peaks["training"] for record in each.records)
        print(f"{stage} {name}: {peak / 2**30:.3f} GiB, planned {memory.step / peak - 1:+.2%}")
        within = FURTHER.get((stage, name), WITHIN[stage])
        assert memory.step == pytest.approx(peak, rel=within), (name, memory, each.records[0])


@pytest.mark.parametrize("stage", WITHIN)
def test_memory_of_a_save_is_that_of_the_plan(stage: int, dry: dict[tuple[int, str], Dry]) -> None:
    low, high = SAVED_AT_STAGE_3 if stage == 3 else (-SAVED_WITHIN, SAVED_WITHIN)
    for (its, name), each in dry.items():
        if its == stage:
            (memory,) = memory_of(each.config, each.plan)
            peak = max(record.peaks["saving"] for record in each.records)
            print(f"{stage} {name}: {peak / 2**30:.3f} GiB, planned {memory.save / peak - 1:+.2%}")
            assert low <= memory.save / peak - 1 <= high, (name, memory)
