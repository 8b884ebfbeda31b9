"""The engine's layout is arithmetic: nothing overlaps, nothing is forgotten, everything is
aligned."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.config import OptimizerConfig
from megalite.engine.layout import ALIGNMENT, Bucket, bucket_elements, choose_owners, make_buckets
from megalite.models.weights import Weight
from megalite.plan import Cut, Plan, StageSpan
from small_runs import make_config

Kind = tuple[bool, bool, bool, bool]
ADAMW = OptimizerConfig.model_validate({"lr": 1.0})


def plan_of(tensor: int, data: int, pipeline: int = 1) -> Plan:
    stages = tuple(StageSpan(i, i, i + 1, i == 0, i == pipeline - 1) for i in range(pipeline))
    return Plan(
        world_size=pipeline * tensor * data, pipeline=pipeline, data=data, context=1, tensor=tensor,
        context_method="ring", context_balance="sequence", experts=Cut(tensor), sequence=False,
        tensor_overlap=False, engine="native", zero_stage=1,
        schedule="1f1b", virtual=1, stages=stages, micro_batch_size=1, micro_batches=1, tokens_per_step=1, steps=1,
        tokens=1, num_params=1, params_per_rank=1, num_trained=1, memory_bytes={},
    )  # fmt: skip


def test_buckets_grow_with_the_replicas_that_share_one(tmp_path: Path) -> None:
    def megabytes(data: int, *overrides: str) -> float:
        return (
            bucket_elements(make_config(tmp_path, "llama", *overrides), plan_of(2, data))
            * 4
            / 2**20
        )

    usual = "parallel.bucket_mb=null"
    assert [megabytes(data, usual) for data in (1, 40, 512)] == [40, 40, 512]
    assert megabytes(512, "parallel.bucket_mb=25") == 25


PARTIAL: dict[str | None, Any] = {"column": None, "row": None, "vocab": None, None: "heads"}


@st.composite
def tables(draw: st.DrawFn) -> tuple[Weight, ...]:
    rows = draw(
        st.lists(
            st.tuples(
                st.integers(1, 12),
                st.integers(1, 12),
                st.sampled_from(["column", "row", "vocab", None]),
                st.booleans(),
            ),
            min_size=1,
            max_size=12,
        )
    )
    return tuple(
        Weight(
            f"w{i}",
            (4 * height, 4 * width),
            (f"h{i}",),
            shard,
            decay=decay,
            partial_grad=PARTIAL[shard],
        )
        for i, (height, width, shard, decay) in enumerate(rows)
    )


TENSOR, DATA, MOST = st.sampled_from([1, 2, 4]), st.integers(1, 8), st.integers(1, 4000)


def kind_of(weight: Weight, tensor: int) -> Kind:
    return (
        weight.decay,
        weight.shard is not None and tensor > 1,
        weight.sums_over_tensor_ranks(sequence=False),
        False,
    )


def bucket_kind(bucket: Bucket) -> Kind:
    return bucket.treatment.weight_decay > 0, bucket.cut, bucket.partial_grad, bucket.tied


@given(table=tables(), tensor=TENSOR, data=DATA, most=MOST)
@settings(max_examples=200, deadline=None)
def test_buckets_hold_every_weight_once_aligned_and_apart(
    table: tuple[Weight, ...], tensor: int, data: int, most: int
) -> None:
    buckets = make_buckets(table, plan_of(tensor, data), ADAMW, most)
    assert sorted(s.weight.name for b in buckets for s in b.slots) == sorted(w.name for w in table)
    for bucket in buckets:
        end = 0
        for slot in bucket.slots:
            assert slot.start % ALIGNMENT == 0
            assert end <= slot.start < end + ALIGNMENT, (
                "slots follow one another, with no more room than alignment needs"
            )
            assert slot.stop - slot.start == prod(slot.weight.local_shape(tensor))
            assert kind_of(slot.weight, tensor) == bucket_kind(bucket)
            end = slot.stop
        assert end <= bucket.size < end + ALIGNMENT * data
        assert len(bucket.slots) == 1 or end <= most, (
            "only a weight larger than the limit may exceed it"
        )


@given(table=tables(), tensor=TENSOR, data=DATA, most=MOST)
@settings(max_examples=200, deadline=None)
def test_buckets_follow_the_backward_pass(
    table: tuple[Weight, ...], tensor: int, data: int, most: int
) -> None:
    buckets = make_buckets(table, plan_of(tensor, data), ADAMW, most)
    for kind in {bucket_kind(b) for b in buckets}:
        found = [slot.weight.name for b in buckets if bucket_kind(b) == kind for slot in b.slots]
        assert found == [w.name for w in reversed(table) if kind_of(w, tensor) == kind]


@given(table=tables(), tensor=TENSOR, data=DATA, most=MOST)
@settings(max_examples=100, deadline=None)
def test_shards_are_equal_aligned_and_cover_the_bucket(
    table: tuple[Weight, ...], tensor: int, data: int, most: int
) -> None:
    for bucket in make_buckets(table, plan_of(tensor, data), ADAMW, most):
        shards = [bucket.shard(rank, data) for rank in range(data)]
        assert shards[0][0] == 0
        assert shards[-1][1] == bucket.size
        assert all(
            low % ALIGNMENT == 0 and high - low == bucket.size // data for low, high in shards
        )
        assert all(a[1] == b[0] for a, b in pairwise(shards))


@given(table=tables(), tensor=TENSOR, data=DATA, most=MOST)
@settings(max_examples=200, deadline=None)
def test_one_rank_writes_each_weight(
    table: tuple[Weight, ...], tensor: int, data: int, most: int
) -> None:
    buckets = make_buckets(table, plan_of(tensor, data), ADAMW, most)
    owners = choose_owners(plan_of(tensor, data), table, ADAMW, most)
    assert owners.keys() == {w.name for w in table}
    assert all(0 <= rank < data * tensor for rank in owners.values())
    for bucket in buckets:
        assert len({owners[slot.weight.name] // tensor for slot in bucket.slots}) == 1, (
            "one data rank a bucket"
        )


def test_stages_of_a_pipeline_write_their_own() -> None:
    embedding = Weight("e", (8, 8), ("e",), "vocab", place="both")
    table = [embedding, *(Weight(f"layers.{i}.w", (8, 8), (f"w{i}",), place=i) for i in range(2))]
    plan = plan_of(tensor=2, data=2, pipeline=2)
    owners = choose_owners(plan, table, ADAMW, 1000)
    assert owners["e"] // 4 == 0, "the first stage writes a tied weight"
    assert owners["layers.0.w"] // 4 == 0
    assert owners["layers.1.w"] // 4 == 1
    for pipeline_rank in (0, 1):
        buckets = make_buckets(plan.weights_of(pipeline_rank, table), plan, ADAMW, 1000)
        assert [slot.weight.name for slot in buckets[-1].slots] == ["e"], (
            "its gradient is complete last"
        )
        assert [bucket.tied for bucket in buckets] == [False, True]


def test_an_example_by_hand() -> None:
    """Two data ranks, at most 100 elements: `c` and `b` (32 + 40, then padded to 128) fit together,
    `a` follows."""
    a, b, c = (Weight(name, (rows, 8), (name,)) for name, rows in (("a", 5), ("b", 5), ("c", 2)))
    first, second = make_buckets([a, b, c], plan_of(1, 2), ADAMW, 100)
    assert [(slot.weight.name, slot.start, slot.stop) for slot in first.slots] == [
        ("c", 0, 16),
        ("b", 32, 72),
    ]
    assert (first.size, second.size) == (128, 64)
    assert [first.shard(rank, 2) for rank in (0, 1)] == [(0, 64), (64, 128)]
    assert choose_owners(plan_of(1, 2), [a, b, c], ADAMW, 100) == {"b": 0, "c": 0, "a": 1}
