"""Ring and Ulysses attention on real ranks against the same mixer on one process over the whole
sequence.

All ranks draw the same numbers, so each works out the whole on its own, takes its tokens of it, and
returns what it found and what it wanted by name. All cases of a number of ranks share one spawn.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from megalite.comm.collectives import start_shift
from megalite.comm.mesh import Axis
from megalite.errors import ConfigError
from megalite.kernels.attention_kinds import PLAIN, AttentionKind, attention_mask
from megalite.kernels.partial_attention import attend, attend_backward
from megalite.models.context_cut import Block, ContextCut, take
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.layers import SequenceInfo
from megalite.parallel.context import RingAttention
from megalite.parallel.rules import apply_rules
from megalite.parallel.ulysses import UlyssesAttention
from ranks import run_ranks

WORLDS = (2, 4)
BATCH, HEADS, SIZE = 2, 4, 16
Result = dict[str, tuple[Tensor, Tensor]]
Attend = Callable[..., Tensor]

# 48 tokens are chunks of 12 over 2 ranks and of 6 over 4. The lengths of the documents of both
# samples:
DOCUMENTS = {
    "one": None,
    # Begins inside chunks; documents of one token, at both ends too; some documents span several
    # ranks.
    "uneven": ((1, 10, 22, 1, 13, 1), (17, 31)),
    # Shorter than a chunk and as long as one: of almost every other block, all is masked for some
    # or all queries.
    "short": ((5,) * 9 + (3,), (6,) * 8),
    "single tokens": ((1,) * 48, (48,)),
}


class Case(NamedTuple):
    length: int
    groups: int
    documents: str
    dtype: torch.dtype
    kind: AttentionKind = PLAIN
    v_size: int = SIZE


CASES = [
    *itertools.starmap(
        Case, itertools.product((48,), (4, 2, 1), DOCUMENTS, (torch.float32, torch.float64))
    ),
    *itertools.starmap(
        Case, itertools.product((48,), (4, 2), ("one", "uneven"), (torch.bfloat16,))
    ),
    # Windows that end inside chunks, at one and beyond; of a token, every other block is masked.
    *(
        Case(48, 2, documents, torch.float64, AttentionKind(window, scale=scale))
        for documents, (window, scale) in itertools.product(
            ("one", "uneven"), ((1, None), (6, 0.5), (13, None), (47, None), (None, 0.5))
        )
    ),
    Case(48, 2, "uneven", torch.bfloat16, AttentionKind(13, scale=0.5)),
    # Latent attention, whose values have smaller heads, or larger ones; and what is not causal.
    *(
        Case(
            48,
            groups,
            documents,
            torch.float64,
            AttentionKind(window, scale=scale, causal=causal),
            v_size,
        )
        for documents, causal in itertools.product(("one", "uneven"), (True, False))
        for groups, window, scale, v_size in (
            (4, None, None, 10),
            (2, 13, 0.5, 24),
            (1, 1, None, SIZE),
        )
    ),
    Case(48, 2, "uneven", torch.bfloat16, AttentionKind(causal=False), 10),
    *(
        Case(
            48,
            groups,
            documents,
            torch.float64,
            AttentionKind(window, scale=scale, sinks=True),
            v_size,
        )
        for documents, (groups, window, scale, v_size) in itertools.product(
            ("one", "uneven"), ((4, None, None, SIZE), (2, 13, 0.5, SIZE), (4, 1, None, 10))
        )
    ),
    # Longer than the blocks of 512 keys in which the CPU kernel works, at a block size that no
    # power of 2 divides.
    *(Case(16 * 123, 2, documents, torch.float32) for documents in ("one", "uneven")),
]

# fp64: far below any mistake, far above its roundings. It holds the algorithm. fp32: sums of up to
# 2,000 terms in another order, some ten roundings of 6e-8 relative to the largest number; measured
# 8e-7. bf16, against fp64 attention to the same bf16 numbers: each block's output, or its part of a
# gradient, is rounded to 2⁻⁹ of itself, then their sum, and the kernel rounds the probabilities.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-6}


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def document_numbers(case: Case) -> Tensor | None:
    lengths = DOCUMENTS[case.documents]
    if lengths is None:
        return None
    scale = case.length // 48
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row) * scale) for row in lengths]
    )


def whole_of(case: Case) -> SequenceInfo:
    index = torch.arange(case.length)[None]
    return SequenceInfo(index, index, document_numbers(case))


def places_of(case: Case, axis: Axis, by_documents: bool = False) -> SequenceInfo:
    document = document_numbers(case)
    cut = ContextCut.of(case.length, axis.size, document, by_documents)
    index = cut.index_RBT[axis.rank]
    here = None if document is None else take(document, index)
    return SequenceInfo(index, index, here, whole_document_BT=document, cut=cut)


def inputs_of(case: Case) -> list[Tensor]:
    """Queries, keys and values. Where their heads have one size, they are views of one projection,
    not contiguous."""
    heads, sizes = (HEADS, case.groups, case.groups), (SIZE, SIZE, case.v_size)
    if case.v_size == SIZE:
        fused = numbers(0, BATCH, case.length, sum(heads), SIZE, dtype=case.dtype)
        return list(fused.split(heads, dim=2))
    shapes = enumerate(zip(heads, sizes, strict=True), 10)
    return [numbers(seed, BATCH, case.length, *shape, dtype=case.dtype) for seed, shape in shapes]


def mixer(
    case: Case,
    axis: Axis | None = None,
    method: type[RingAttention] | type[UlyssesAttention] = RingAttention,
) -> CoreAttention:
    """Attention of the case's kind on one process, or over the ranks of an axis."""
    core = CoreAttention(kind=case.kind, num_heads=HEADS)
    if core.sinks is not None:
        core.sinks = nn.Parameter(numbers(2, HEADS, dtype=case.dtype))
    core.strategy = None if axis is None else method(axis)
    return core


def run(
    attention: CoreAttention | Attend, parts: list[Tensor], places: SequenceInfo, weights: Tensor
) -> dict[str, Tensor]:
    """Output and gradients of the loss ⟨weights, output⟩. A mixer takes the fused projection where
    there can be one."""
    parts = [x.detach().requires_grad_() for x in parts]
    if isinstance(attention, CoreAttention) and parts[0].shape[-1] == parts[2].shape[-1]:
        out = attention(torch.cat(parts, 2), parts[0].shape[2], parts[1].shape[2], places)
    else:
        out = (attention.attend if isinstance(attention, CoreAttention) else attention)(
            *parts, places
        )
    (out * weights).sum().backward()
    assert out.dtype == parts[0].dtype
    found = {"out": out.detach()} | {
        f"d{name}": x.grad for name, x in zip("qkv", parts, strict=True)
    }
    if isinstance(attention, CoreAttention) and attention.sinks is not None:
        found["sinks"] = attention.sinks.grad
    return found  # type: ignore[return-value]


def compare(
    case: Case,
    attention: CoreAttention | Attend,
    axis: Axis,
    by_documents: bool = False,
    order: Tensor | None = None,
) -> Result:
    """What `attention` gives to this rank's tokens of the sequence, and what it should. `order`:
    other tokens than those that it takes them for."""
    places = places_of(case, axis, by_documents)
    index = places.index_BT if order is None else order[None]
    parts, weights = (
        inputs_of(case),
        numbers(1, BATCH, case.length, HEADS * case.v_size, dtype=case.dtype),
    )
    reference = torch.float64 if case.dtype == torch.bfloat16 else case.dtype
    whole = [x.to(reference) for x in parts]
    wanted = run(mixer(case), whole, whole_of(case), weights.to(reference))

    def own(x: Tensor) -> Tensor:
        return torch.stack([row[at] for row, at in zip(x, index.expand(BATCH, -1), strict=True)])

    found = run(attention, [own(x) for x in parts], places, own(weights))
    return {key: (found[key], wanted[key] if key == "sinks" else own(wanted[key])) for key in found}


def saved_bytes(axis: Axis) -> tuple[int, int]:
    """Of the memory that tensors saved for the backward pass keep alive: found and wanted."""
    case = Case(48, 2, "uneven", torch.float32)
    places = places_of(case, axis)
    qkv = torch.cat(inputs_of(case), 2)[:, places.index_BT[0]].requires_grad_()
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        out = mixer(case, axis)(qkv, HEADS, 2, places)
    log_sum_exp = 4 * BATCH * places.index_BT.shape[1] * HEADS
    return sum(kept.values()), sum(4 * x.numel() for x in (qkv, out)) + log_sum_exp


PACKED = [case for case in CASES if case.documents != "one" and case.groups != 1]
"""Of which each document is cut, too."""

SOFTCAPPED = Case(48, 4, "uneven", torch.float64, AttentionKind(13, 1.5))


def cases_by_heads(world_size: int) -> list[Case]:
    """Those whose key/value heads the ranks divide; and one that no ring can compute."""
    return [*(case for case in CASES if case.groups % world_size == 0), SOFTCAPPED]


class Found(NamedTuple):
    cases: dict[Case, Result]
    by_documents: dict[Case, Result]
    by_heads: dict[Case, Result]
    recomputed: Result
    wrong_order: Result
    strided: Result
    shifted: Tensor
    saved: tuple[int, int]


def on_rank(rank: int, world_size: int) -> Found:
    axis = Axis(world_size, rank, dist.group.WORLD)
    some = Case(48, 2, "one", torch.float64)
    ring = mixer(some, axis)
    # Where tensor ranks are neighbours, context ranks are not: their places in the group are not
    # those in the world.
    groups = [dist.new_group(list(range(first, world_size, 2))) for first in (0, 1)]
    strided = Axis(world_size // 2, rank // 2, groups[rank % 2])

    def recomputing(*arguments: Any) -> Tensor:
        return checkpoint(ring.attend, *arguments, use_reentrant=False)

    return Found(
        {case: compare(case, mixer(case, axis), axis) for case in CASES},
        {case: compare(case, mixer(case, axis), axis, by_documents=True) for case in PACKED},
        {
            case: compare(case, mixer(case, axis, UlyssesAttention), axis)
            for case in cases_by_heads(world_size)
        },
        compare(some, recomputing, axis),
        compare(some, ring, axis, order=torch.arange(48).chunk(world_size)[rank]),
        compare(some, mixer(some, strided), strided),
        start_shift(torch.tensor([float(rank)]), axis)(),
        saved_bytes(axis),
    )


@cache
def results_of(world_size: int) -> list[Found]:
    return run_ranks(world_size, on_rank)


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative to the largest number wanted. Where it is rounding alone, as the gradient of queries
    with a window of one token, relative to a tenth of the inputs."""
    return (
        (found.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=0.1)
    ).item()


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_equals_one_process(case: Case, world_size: int) -> None:
    for rank, results in enumerate(results_of(world_size)):
        for kind in ("cases", "by_documents"):
            for key, (found, wanted) in getattr(results, kind).get(case, {}).items():
                if key == "sinks":  # of each rank's queries, or heads
                    found = sum(
                        getattr(of_rank, kind)[case][key][0] for of_rank in results_of(world_size)
                    )
                assert found.shape == wanted.shape
                off = error(found, wanted)
                # Fails for NaN too.
                assert off <= TOLERANCE[case.dtype], (
                    f"{kind}: {key} on rank {rank} is off by {off:.1e}"
                )


@pytest.mark.parametrize("world_size", WORLDS)
def test_heads_over_ranks_equal_one_process(world_size: int) -> None:
    for rank, results in enumerate(results_of(world_size)):
        assert len(results.by_heads) == len(cases_by_heads(world_size))
        for case, result in results.by_heads.items():
            for key, (found, wanted) in result.items():
                if key == "sinks":
                    found = sum(
                        of_rank.by_heads[case][key][0] for of_rank in results_of(world_size)
                    )  # type: ignore[assignment]
                off = error(found, wanted)
                assert off <= TOLERANCE[case.dtype], (
                    f"{case}: {key} on rank {rank} is off by {off:.1e}"
                )


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("field", ["recomputed", "strided"])
def test_under_recomputation_and_in_a_strided_group(field: str, world_size: int) -> None:
    for results in results_of(world_size):
        for found, wanted in getattr(results, field).values():
            assert error(found, wanted) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("world_size", WORLDS)
def test_another_order_of_chunks_is_noticed(world_size: int) -> None:
    """The comparison above has teeth: consecutive chunks, one a rank, give quite other numbers."""
    worst = max(
        error(*pair) for results in results_of(world_size) for pair in results.wrong_order.values()
    )
    assert worst > 0.1


@pytest.mark.parametrize("world_size", WORLDS)
def test_shift_passes_to_the_next_rank(world_size: int) -> None:
    assert [int(results.shifted) for results in results_of(world_size)] == [
        (rank - 1) % world_size for rank in range(world_size)
    ]


@pytest.mark.parametrize("world_size", WORLDS)
def test_only_local_tensors_are_saved(world_size: int) -> None:
    for results in results_of(world_size):
        found, wanted = results.saved
        assert found == wanted


@pytest.mark.parametrize(
    "core",
    [
        CoreAttention(kind=AttentionKind(softcap=1.0)),
        CoreAttention(Dropout(0.1, "a", over_heads=True)),
    ],
)
def test_what_has_no_ring_is_refused(core: CoreAttention) -> None:
    """Also for a family whose config the plan does not know."""
    layout = SimpleNamespace(
        context=Axis(2, 0), context_method="ring", take_locals=lambda module: None
    )
    with pytest.raises(
        ConfigError, match=r"parallel.context = 2 must be 1 for this model: ring attention has no"
    ):
        apply_rules([nn.ModuleList([core])], layout)  # type: ignore[arg-type]
    layout.context_method = "ulysses"
    if core.dropout:
        with pytest.raises(ConfigError, match="for this model: Ulysses attention drops nothing"):
            apply_rules([nn.ModuleList([core])], layout)  # type: ignore[arg-type]
    else:
        apply_rules([nn.ModuleList([core])], layout)  # type: ignore[arg-type]
        assert isinstance(core.strategy, UlyssesAttention)


def test_heads_that_ranks_do_not_divide_are_refused() -> None:
    q, k = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 1, 8)
    with pytest.raises(
        ValueError, match="4 and 1 heads of queries and keys do not divide by 2 ranks"
    ):
        UlyssesAttention(Axis(2, 0)).attend(q, k, k, SequenceInfo.whole(4, q.device), PLAIN)


@pytest.mark.parametrize("by_documents", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 5, 13, 40])
@pytest.mark.parametrize("documents", DOCUMENTS)
def test_blocks_hold_every_pair_once(
    documents: str, window: int | None, causal: bool, by_documents: bool
) -> None:
    """For each rank: the pairs of all blocks are those of one process's mask, and the first blocks
    of its own keys hold each query once."""
    kind = AttentionKind(window, causal=causal)
    whole = document_numbers(Case(48, 2, documents, torch.float32))
    none = torch.zeros(BATCH, 48, dtype=torch.int64)
    mask = attention_mask(*[none if whole is None else whole] * 2, kind)[:, 0]
    for ranks in (1, 2, 3, 4):
        cut = ContextCut.of(48, ranks, whole, by_documents)
        index = cut.index_RBT.expand(-1, BATCH, -1)
        assert torch.equal(
            index.transpose(0, 1).flatten(1).sort().values, torch.arange(48).expand(BATCH, -1)
        )
        assert torch.equal(index, index.sort(2).values)
        work = []
        for rank in range(ranks):
            found, begun = (
                torch.zeros_like(mask, dtype=torch.int64),
                torch.zeros(BATCH, 48 // ranks),
            )
            for source in range(ranks):
                for block in cut.blocks(rank, source, kind):
                    here = found_here(block, cut, rank, source, kind)
                    assert here.any()
                    for row in range(*block.batch.indices(BATCH)):
                        at = index[rank, row, block.rows, None], index[source, row, block.keys]
                        found[row][at] += here[min(row, len(here) - 1)]
                    begun[block.batch, block.rows] += block.first
                    assert rank == source or not block.first
            mine = torch.zeros_like(mask).scatter(
                1, index[rank][..., None].expand(-1, -1, 48), True
            )
            assert torch.equal(found, (mask & mine).long())
            assert (begun == 1).all()
            work.append(int(found.sum()))
        # Where one document is all, its pairs are counted for one row.
        rows = BATCH if whole is None else 1
        assert (cut.pairs(causal, window) * rows).tolist() == work


def found_here(
    block: Block, cut: ContextCut, rank: int, source: int, kind: AttentionKind
) -> Tensor:
    """The pairs of a block that attend, [B or 1,rows,keys]."""
    mask = cut.mask(block, rank, source, kind)
    if mask is not None:
        return mask[:, 0]
    shape = [
        len(range(*each.indices(48 // len(cut.index_RBT)))) for each in (block.rows, block.keys)
    ]
    ones = torch.ones(1, *shape, dtype=torch.bool)
    return ones.tril() if block.causal else ones


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_zigzag_shares_the_work_of_one_document_evenly(ranks: int) -> None:
    # A token at place i attends to i + 1 tokens.
    assert (ContextCut.of(48, ranks).pairs() * ranks == 48 * 49 // 2).all()


def test_documents_are_cut_into_equal_work() -> None:
    """Of documents of any lengths, each rank has as many tokens as the others, and its pairs differ
    by the few tokens that pieces differ by; cut as one sequence, they differ by a factor."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 200, (40,), generator=generator)
    documents = torch.arange(40).repeat_interleave(lengths)[None, :2048]
    for ranks in (2, 4, 8):
        for by_documents, most in ((True, 1.01), (False, 10.0)):
            pairs = ContextCut.of(2048, ranks, documents, by_documents).pairs()
            worst = pairs.max() / pairs.mean()
            assert worst < most
            assert by_documents == (worst < 1.01)


def test_short_documents_are_computed_together() -> None:
    """Not in a call for each of them, and never with far ones."""
    documents = torch.arange(1024)[None] // 8
    cut = ContextCut.of(1024, 2, documents, by_documents=True)
    blocks = cut.blocks(0, 0, PLAIN)
    assert len(blocks) == 2
    assert all(block.rows == block.keys for block in blocks)


def test_zigzag_of_two_ranks() -> None:
    assert ContextCut.of(8, 2).index_RBT.tolist() == [[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 2]])
    # Pieces of document 0: tokens 0 and 1, 2, 3, 4; of document 1, at the second and third piece: 5
    # and 6; of document 2, at the fourth: 7.
    cut = ContextCut.of(8, 2, documents, by_documents=True)
    assert cut.index_RBT.tolist() == [[[0, 1, 4, 7]], [[2, 3, 5, 6]]]
    with pytest.raises(ValueError, match="6 tokens cannot be cut into 2 × 2"):
        ContextCut.of(6, 2)


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_a_ring_of_one(documents: str) -> None:
    case = Case(48, 2, documents, torch.float64)
    for found, wanted in compare(case, mixer(case, Axis()), Axis()).values():
        assert error(found, wanted) <= TOLERANCE[torch.float64]


def test_gradient_without_strides() -> None:
    """Of a plain sum the gradient is one number expanded, whose strides are 0."""
    case = Case(48, 4, "one", torch.float64)
    grads = []
    for attention in (mixer(case), mixer(case, Axis())):
        qkv = torch.cat(inputs_of(case), 2).requires_grad_()
        attention(qkv, HEADS, HEADS, whole_of(case)).sum().backward()
        grads.append(qkv.grad)
    torch.testing.assert_close(*grads)


def test_queries_with_nothing_to_attend_to() -> None:
    q, k, v = (numbers(seed, 1, 2, 6, SIZE) for seed in range(3))
    mask = torch.zeros(1, 1, 6, 6, dtype=torch.bool)
    mask[..., 3:, :2] = True
    out, lse = attend(q, k, v, False, mask)
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -torch.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    # Elsewhere these queries have found something, so that the log-sum-exp of all keys is finite.
    dq, dk, dv = attend_backward(out + 1, q, k, v, out, lse.clamp(min=0.0), False, mask)
    assert (dq[:, :, :3] == 0).all()
    assert (dk[:, :, 2:] == 0).all()
    assert (dv[:, :, 2:] == 0).all()
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("v_size", [SIZE, 10])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_calls_for_a_gpu_fit_their_kernels(dtype: torch.dtype, masked: bool, v_size: int) -> None:
    """No numbers here, only names, arguments and shapes: what can be checked on the meta device of
    CUDA's path."""
    q, k, v = (
        torch.empty(2, length, heads, size, dtype=dtype, device="meta").transpose(1, 2)
        for length, heads, size in ((40, 4, SIZE), (20, 2, SIZE), (20, 2, v_size))
    )
    mask = torch.empty(2, 1, 40, 20, dtype=torch.bool, device="meta") if masked else None
    out, lse = attend(q, k, v, False, mask)
    assert (out.shape, out.dtype) == ((*q.shape[:3], v_size), dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    grads = attend_backward(out, q, k, v, out, lse, False, mask)
    assert [(x.shape, x.dtype) for x in grads] == [(x.shape, dtype) for x in (q, k, v)]
