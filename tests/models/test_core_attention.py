"""The one mixer of all families: what a cache continues, what another sequence gives, what does not
go together."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megalite.config import TrainConfig
from megalite.infer.cache import Row, add_cache, lay_out
from megalite.kernels.attention_kinds import AttentionKind
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.layers import SequenceInfo
from megalite.parallel.apply import apply_recompute

CPU = torch.device("cpu")
LENGTHS = (23, 9)
KINDS = [AttentionKind(*kind) for kind in product((None, 4), (None, 1.5), (None, 0.5))]
KINDS += [AttentionKind(window, sinks=True) for window in (None, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def parts(length: int, groups: int, sizes: tuple[int, int], seed: int) -> list[Tensor]:
    heads = ((4, sizes[0]), (groups, sizes[0]), (groups, sizes[1]))
    return [
        random(1, length, *shape, seed=10 * seed + number) for number, shape in enumerate(heads)
    ]


@pytest.mark.parametrize("sizes", [(16, 16), (24, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.inference_mode()
def test_a_cache_gives_what_the_whole_sequences_give(
    kind: AttentionKind, sizes: tuple[int, int]
) -> None:
    """Two sequences in a prompt of two pieces, then token by token; one begins while the other goes
    on."""
    for groups in (4, 1):
        core, cached = (CoreAttention(kind=kind, num_heads=4) for _ in range(2))
        if kind.sinks:
            core.sinks = cached.sinks = nn.Parameter(random(4, seed=99))
        add_cache(cached, 3)
        whole = [parts(length, groups, sizes, seed) for seed, length in enumerate(LENGTHS)]
        wanted = [core.attend(*x, SequenceInfo.whole(x[0].shape[1], CPU)) for x in whole]
        done = [0, 0]
        for counts in ((11, 0), (6, 0), (1, 5), *((1, 1),) * 4, (1, 0)):
            rows = [Row(2 * s, done[s], [0] * n, LENGTHS[s]) for s, n in enumerate(counts) if n]
            which = [s for s, n in enumerate(counts) if n]
            _, places, _ = lay_out(rows, CPU)
            width = max(counts)
            given = [
                torch.cat(
                    [nn.functional.pad(x[:, d : d + n], (0, 0, 0, 0, 0, width - n))
                     for x, d, n in ((whole[s][number], done[s], counts[s]) for s in which)]
                )
                for number in range(3)
            ]  # fmt: skip
            found = forward(cached, given, places)
            for row, s in enumerate(which):
                new = slice(done[s], done[s] + counts[s])
                # fp32 sums of at most 23 values near 1, in another order.
                torch.testing.assert_close(
                    found[row, : counts[s]], wanted[s][0, new], rtol=1e-5, atol=1e-5
                )
                done[s] += counts[s]
        assert done == [23, 9]


def forward(core: Any, given: list[Tensor], places: SequenceInfo) -> Tensor:
    """By the fused projection where there can be one, as families call it."""
    q, k, v = given
    if k.shape == v.shape:
        return core(torch.cat(given, 2), q.shape[2], k.shape[2], places)
    return core.attend(q, k, v, places)


@pytest.mark.parametrize("dropout", [False, True])
def test_attention_to_another_sequence(dropout: bool) -> None:
    """Documents of queries meet the same documents of the source, each as if it were alone. A cache
    and a ring concern a sequence's own keys: what has a source of its own is given no cache, and
    needs none."""
    core = CoreAttention(
        Dropout(1e-9, "a", over_heads=True) if dropout else None, AttentionKind(causal=False)
    ).train()
    add_cache(core, 2)
    assert core.strategy is None
    q, (_, k, v) = random(1, 9, 4, 8, seed=7), parts(12, 2, (8, 6), 3)
    of_queries, of_keys = torch.tensor([[0] * 4 + [1] * 5]), torch.tensor([[0] * 7 + [1] * 5])
    places, source = (
        SequenceInfo(*[torch.arange(x.shape[1])[None]] * 2, x, torch.tensor([5]))
        for x in (of_queries, of_keys)
    )
    found = core.attend(q, k, v, places, source)
    for queries, keys in ((slice(0, 4), slice(0, 7)), (slice(4, 9), slice(7, 12))):
        scores = (
            torch.einsum("bthk,bshk->bhts", q[:, queries], k[:, keys].repeat_interleave(2, 2))
            * 8**-0.5
        )
        wanted = torch.einsum(
            "bhts,bshv->bthv", scores.softmax(-1), v[:, keys].repeat_interleave(2, 2)
        ).flatten(2)
        torch.testing.assert_close(found[:, queries], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_selective_recomputation_keeps_no_scores(fused: bool) -> None:
    """However the mixer is called. What is kept for the backward pass is seen by the hooks, what a
    recomputed function would keep is not."""
    kept: list[list[torch.Size]] = []
    for recompute in ("none", "selective"):
        core = CoreAttention(kind=AttentionKind(softcap=1.0))
        model: Any = SimpleNamespace(layers={"0": nn.ModuleList([core])})
        apply_recompute(model, TrainConfig(steps=1, global_batch_size=1, recompute=recompute))  # type: ignore[arg-type]
        shapes: list[torch.Size] = []
        kept.append(shapes)

        def keep(x: Tensor, shapes: list[torch.Size] = shapes) -> Tensor:
            shapes.append(x.shape)
            return x

        given = [x.requires_grad_() for x in parts(13, 2, (8, 8), 0)]
        with saved_tensors_hooks(keep, lambda x: x):
            found = (
                forward(core, given, SequenceInfo.whole(13, CPU))
                if fused
                else core.attend(*given, SequenceInfo.whole(13, CPU))
            )
        found.sum().backward()
    scores = torch.Size((1, 4, 13, 13))
    assert [scores in shapes for shapes in kept] == [True, False]


def test_what_does_not_go_together_is_refused() -> None:
    q, k, v = parts(6, 2, (8, 8), 0)
    places = SequenceInfo.whole(6, CPU)
    # As many keys as queries, so that no shape gives the mistake away.
    with pytest.raises(ValueError, match="to another sequence must be neither causal nor windowed"):
        CoreAttention().attend(q, k, v, places, SequenceInfo.whole(6, CPU))
    packed = SequenceInfo(places.index_BT, places.position_BT, torch.zeros(1, 6, dtype=torch.int64))
    with pytest.raises(
        ValueError, match="give the documents of queries and of keys, or of neither"
    ):
        CoreAttention(kind=AttentionKind(causal=False)).attend(q, k, v, packed, places)
    core = CoreAttention()
    add_cache(core, 2)
    with pytest.raises(ValueError, match="KVCache knows no bias of the scores"):
        core.attend(q, k, v, places, bias=torch.zeros(1, 1, 6, 6))
