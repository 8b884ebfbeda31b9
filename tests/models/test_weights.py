"""The table of weights: cutting, reading, assembling and converting, each against the plainest way
to say it."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalite.config import ModelConfig
from megalite.models import build_model, from_hf_config, model_config, to_hf_config, weight_table
from megalite.models.sharding import assemble, read_local
from megalite.models.weights import VOCAB_MULTIPLE, Weight, layer_rows
from megalite.plan import Cut
from tiny_models import CASES, IDS, as_stored, auto_class

TENSOR = (1, 2, 3, 4)


@st.composite
def weights(draw: st.DrawFn) -> tuple[Weight, Cut]:
    """Any row a family could declare, and the ranks it can be cut over."""
    tensor, unit = draw(st.sampled_from(TENSOR)), draw(st.sampled_from([1, 3]))
    shard = draw(st.sampled_from(["column", "row", "vocab", "expert", None]))
    matrix = shard in ("row", "vocab") or draw(st.booleans())
    leading: tuple[int, ...] = ()
    expert = 1
    if shard != "vocab" and (shard == "expert" or draw(st.booleans())):
        expert = draw(st.sampled_from([1, 2, 3])) if shard or tensor == 1 else 1
        first = draw(st.integers(1, 2)) * (tensor * unit if shard == "expert" else 1) * expert
        leading = (first, *draw(st.lists(st.integers(1, 2), max_size=1)))
    if shard == "vocab":
        parts: tuple[int, ...] = ()
        rows = draw(st.integers(1, 3 * VOCAB_MULTIPLE))
    else:
        multiple = tensor * unit if shard == "column" else 1
        equal = st.integers(1, 4).flatmap(
            lambda size: st.lists(st.just(size), min_size=2, max_size=3)
        )
        groups = [
            multiple * size
            for size in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3) | equal)
        ]
        parts, rows = tuple(groups) if len(groups) > 1 else (), sum(groups)
    columns = draw(st.integers(1, 4)) * (tensor * unit if shard == "row" else 1)
    separate = bool(parts or leading) and draw(st.booleans())
    count = prod(leading) * max(len(parts), 1)
    names = tuple(f"hf.{i}" for i in range(count if separate else 1))
    transpose = matrix and draw(st.booleans())
    by_unit = (
        shard == "column"
        and len(parts) > 0
        and not any(size % min(parts) for size in parts)
        and not (separate or transpose or leading)
        and draw(st.booleans())
    )
    behind = draw(st.lists(st.integers(1, 3), max_size=1)) if matrix and not transpose else []
    shape = (*leading, rows, columns, *behind) if matrix else (*leading, rows)
    return Weight(
        "w", shape, names, shard, parts, unit, transpose, by_unit, stack=len(leading)
    ), Cut(tensor, expert)


def logical_of(weight: Weight) -> Tensor:
    return torch.arange(1.0, weight.numel + 1).view(weight.shape)


def local_of(weight: Weight, rank: int, cut: Cut) -> Tensor:
    """What a rank holds, by whole-tensor operations."""
    logical, outputs, tensor = logical_of(weight), weight.stack, cut.tensor
    if cut.expert > 1:
        logical = logical.chunk(cut.expert)[rank // tensor]
    rank %= tensor
    if weight.shard == "column":
        parts = logical.split(weight.parts or (weight.shape[outputs],), outputs)
        return torch.cat([part.chunk(tensor, outputs)[rank] for part in parts], outputs)
    if weight.shard == "row":
        return logical.chunk(tensor, outputs + 1)[rank]
    if weight.shard == "expert":
        return logical.chunk(tensor)[rank]
    if weight.shard == "vocab" and tensor > 1:
        padded = torch.zeros(weight.local_shape(tensor)[0] * tensor, *weight.shape[1:])
        padded[: weight.shape[0]] = logical
        return padded.chunk(tensor)[rank]
    return logical


@given(case=weights(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_every_range_of_a_local_tensor_is_read_from_hugging_face_tensors(
    case: tuple[Weight, Cut], data: st.DataObject
) -> None:
    weight, cut = case
    stored, fetched = weight.to_hf(logical_of(weight)), 0

    def fetch(name: str, where: tuple[slice, ...]) -> Tensor:
        nonlocal fetched
        fetched += stored[name][where].numel()
        return stored[name][where]

    rank = data.draw(st.integers(0, cut.holders - 1))
    local = local_of(weight, rank, cut)
    assert local.shape == weight.local_shape(*cut)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, local.numel())] * 2)))
    found = read_local(
        weight,
        lambda w, *where: w.rows_from_hf(fetch, *where),
        rank,
        cut.tensor,
        start,
        stop,
        cut.expert,
    )
    assert torch.equal(found, local.flatten()[start:stop])
    width = local.flatten(0, weight.stack)[0].numel()
    assert fetched <= (stop - start) + 2 * (width - 1), "whole rows at the ends, nothing else"


@given(case=weights())
@settings(max_examples=150, deadline=None)
def test_the_parts_of_all_ranks_make_the_whole(case: tuple[Weight, Cut]) -> None:
    weight, cut = case
    locals_ = [local_of(weight, rank, cut) for rank in range(cut.holders)]
    assert torch.equal(assemble(weight, locals_, cut.expert), logical_of(weight))


@given(case=weights(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_hugging_face_and_back(case: tuple[Weight, Cut], data: st.DataObject) -> None:
    weight, logical = case[0], logical_of(case[0])
    stored = weight.to_hf(logical)
    assert {name: tuple(tensor.shape) for name, tensor in stored.items()} == weight.hf_shapes()
    assert all(tensor.is_contiguous() for tensor in stored.values()), (
        "safetensors refuses anything else"
    )
    logical = logical.flatten(0, weight.stack)
    rows = sorted(data.draw(st.tuples(*[st.integers(0, len(logical))] * 2)))
    if rows[0] == rows[1]:
        rows = [0, len(logical)]
    columns = None
    if logical.dim() > 1:
        left = data.draw(st.integers(0, logical.shape[1] - 1))
        columns = (left, data.draw(st.integers(left + 1, logical.shape[1])))
    found = weight.rows_from_hf(lambda name, where: stored[name][where], rows[0], rows[1], columns)
    assert torch.equal(
        found, logical[slice(*rows)] if columns is None else logical[slice(*rows), slice(*columns)]
    )


def test_experts_are_one_tensor_or_many() -> None:
    """[experts, out, in] from the tensors of each expert, from one, and from one of the other
    order."""
    logical = torch.arange(2.0 * 4 * 3).view(2, 4, 3)
    names = tuple(f"experts.{expert}.{part}" for expert in range(2) for part in ("gate", "up"))
    many = Weight("w", (2, 4, 3), names, "column", (2, 2), stack=1).to_hf(logical)
    assert torch.equal(many["experts.0.up"], logical[0, 2:])
    assert torch.equal(many["experts.1.gate"], logical[1, :2])
    assert torch.equal(
        Weight("w", (2, 4, 3), ("h",), "expert", stack=1).to_hf(logical)["h"], logical
    )
    turned = Weight("w", (2, 4, 3), ("h",), "row", transpose=True, stack=1)
    assert torch.equal(turned.to_hf(logical)["h"], logical.transpose(1, 2))


@given(case=weights(), seed=st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_initial_values_do_not_depend_on_the_layout(case: tuple[Weight, Cut], seed: int) -> None:
    weight, cut = case
    whole = weight.initial_rows(seed, 0, weight.num_rows, None).view(weight.shape)
    shape = torch.Size(weight.local_shape(*cut))
    locals_ = [
        read_local(
            weight,
            lambda w, *where: w.initial_rows(seed, *where),
            rank,
            cut.tensor,
            0,
            shape.numel(),
            cut.expert,
        ).view(shape)
        for rank in range(cut.holders)
    ]
    assert torch.equal(assemble(weight, locals_, cut.expert), whole)


def test_initial_values_are_those_of_the_row() -> None:
    weight = Weight("w", (200, 50), ("h",), init=0.3)
    values = weight.initial_rows(0, 0, 200, None)
    # 10,000 values: the sample's standard deviation is within 0.7 % of the true one; four times
    # that.
    assert values.std().item() == pytest.approx(0.3, rel=0.03)
    assert not torch.equal(values, weight.initial_rows(1, 0, 200, None)), "another seed"
    assert not torch.equal(values, replace(weight, name="v").initial_rows(0, 0, 200, None)), (
        "another name"
    )
    assert replace(weight, init="ones").initial_rows(0, 0, 1, None).unique().tolist() == [1.0]
    assert replace(weight, init="zeros").initial_rows(0, 0, 1, None).unique().tolist() == [0.0]


@pytest.mark.parametrize(
    ("vocab", "tensor", "rows"),
    [(193, 1, 193), (193, 2, 128), (193, 4, 64), (128, 2, 64), (129, 2, 128), (5, 4, 64)],
)
def test_padding_of_the_vocabulary(vocab: int, tensor: int, rows: int) -> None:
    weight = Weight("w", (vocab, 3), ("h",), "vocab")
    assert weight.local_shape(tensor) == (rows, 3)
    assert rows * tensor >= vocab


@pytest.mark.parametrize(
    ("weight", "what"),
    [
        (Weight("layers.0.out", (8, 9), ("h",), "row"), "9 features"),
        (Weight("layers.0.up", (9, 8), ("h",), "column"), "9 features"),
        # 12 rows, uneven parts.
        (
            Weight("layers.0.qkv", (12, 4), ("q", "k", "v"), "column", (6, 3, 3)),
            "3 features",
        ),
        (
            Weight("layers.0.qkv", (16, 4), ("q", "k", "v"), "column", (8, 4, 4), unit=4),
            "1 heads of 4",
        ),
        (Weight("layers.0.out", (4, 12), ("h",), "row", unit=4), "3 heads of 4"),
        (Weight("layers.0.up", (3, 8, 8), ("h",), "expert", stack=1), "3 experts"),
        (Weight("layers.0.up", (2, 8, 9), ("h",), "row", stack=1), "9 features"),
    ],
)
def test_an_uneven_cut_is_refused_by_name(weight: Weight, what: str) -> None:
    with pytest.raises(ValueError, match=rf"{weight.name} has {what}, .*divide by 2"):
        weight.local_shape(2)
    assert weight.local_shape(1) == weight.shape


def test_rows_of_a_layer_are_named_after_it() -> None:
    [row] = layer_rows(
        3, "model.layers", [Weight("up.weight", (4, 2), ("a.weight", "b.weight"), None, (2, 2))]
    )
    assert row.place == 3
    assert (row.name, row.hf) == (
        "layers.3.up.weight",
        ("model.layers.3.a.weight", "model.layers.3.b.weight"),
    )


def test_parts_side_by_side_in_each_unit() -> None:
    weight = Weight("w", (12, 1), ("h",), "column", parts=(4, 4, 4), unit=2, by_unit=True)
    stored = weight.to_hf(torch.arange(12.0)[:, None])["h"]
    assert stored.flatten().tolist() == [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]


def test_heads_of_queries_beside_the_key_and_value_that_they_share() -> None:
    """Falcon's: three heads of queries, one of keys, one of values; then those of the second
    group."""
    weight = Weight("w", (20, 1), ("h",), "column", parts=(12, 4, 4), unit=2, by_unit=True)
    stored = weight.to_hf(torch.arange(20.0)[:, None])["h"]
    assert stored.flatten().tolist() == [*range(6), 12, 13, 16, 17, *range(6, 12), 14, 15, 18, 19]


TIED = {
    "gpt_neox": ("embed_out.weight",),
    "bert": ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias"),
    "modernbert": ("decoder.weight",),
    "roberta": ("lm_head.decoder.weight", "lm_head.decoder.bias"),
}
"""Tensors that are another's, by family."""


def config_of(case: str) -> tuple[Any, ModelConfig]:
    """transformers' config of a tiny model, and megalite's."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.for_model(**CASES[case])
    return theirs, model_config(from_hf_config(theirs.to_dict()))


@pytest.mark.parametrize("case", CASES)
def test_table_lists_every_parameter_of_the_model(case: str) -> None:
    config = config_of(case)[1]
    parameters = build_model(config).named_parameters()
    table = weight_table(config)
    assert {w.name: w.shape for w in table} == {name: tuple(p.shape) for name, p in parameters}
    assert len({w.name for w in table}) == len(table)
    for weight in table:
        # A rank sees all that a cut weight is used on, and of what a replicated one is: a part of
        # the sequence under sequence parallelism, or its own heads.
        assert (weight.partial_grad is None) == (weight.shard is not None), weight.name


@pytest.mark.parametrize("case", CASES)
def test_table_names_every_tensor_of_transformers(case: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = config_of(case)[1]
    with torch.device("meta"):
        again = transformers.AutoConfig.for_model(**to_hf_config(config) | IDS)
        theirs = auto_class(again.model_type).from_config(again)
    stored = as_stored(config.family, theirs.state_dict())
    state = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    for name in (
        *config.COPIES,
        *(TIED.get(config.family, ("lm_head.weight",)) if config.tie_embeddings else ()),
    ):
        del state[name]
    ours = [item for weight in weight_table(config) for item in weight.hf_shapes().items()]
    assert dict(ours) == state
    assert len(ours) == len(state), "each tensor belongs to one weight"
