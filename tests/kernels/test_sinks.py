"""Attention sinks against a softmax with one more column."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from exactness import DTYPES, check_against_float64, device  # noqa: F401, device: a fixture
from megalite.kernels.attention import eager_heads, split_heads
from megalite.kernels.attention_kinds import AttentionKind, attention_mask
from megalite.kernels.sinks import attention_with_sinks, self_attention_with_sinks

DOCUMENT = torch.tensor([0] * 9 + [1] * 20 + [2] * 8)[None].repeat(2, 1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_a_column(
    q: Tensor, k: Tensor, v: Tensor, sinks_H: Tensor, documents: Tensor, kind: AttentionKind
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.transpose(-1, -2)) * kind.scale_of(q.shape[-1])
    scores = scores.masked_fill(~attention_mask(documents, documents, kind), -torch.inf)
    column = sinks_H[:, None, None].expand(len(q), -1, q.shape[2], 1)
    return (torch.cat((scores, column), -1).softmax(-1)[..., :-1] @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    "kind",
    [
        AttentionKind(sinks=True),
        AttentionKind(window=7, sinks=True),
        AttentionKind(scale=0.4, sinks=True),
    ],
    ids=["plain", "window", "scale"],
)
def test_equals_a_softmax_with_one_more_column(
    kind: AttentionKind,
    documents: bool,
    dtype: torch.dtype,
    device: torch.device,  # noqa: F811
) -> None:
    given = DOCUMENT.to(device) if documents else None
    same = DOCUMENT if documents else torch.zeros_like(DOCUMENT)
    check_against_float64(
        lambda qkv, sinks: self_attention_with_sinks(qkv, 4, 2, sinks, given, kind),
        lambda qkv, sinks: with_a_column(*split_heads(qkv, 4, 2), sinks, same, kind),
        [random(2, 37, 8, 16), 2 * random(4, seed=1)],
        dtype,
        device,
    )


def test_values_may_have_another_size() -> None:
    kind = AttentionKind(window=7, sinks=True)
    check_against_float64(
        lambda *parts: attention_with_sinks(*parts, DOCUMENT, kind),
        lambda *parts: with_a_column(*parts, DOCUMENT, kind),
        [
            random(2, 37, 4, 16),
            random(2, 37, 2, 16, seed=1),
            random(2, 37, 2, 10, seed=2),
            random(4, seed=3),
        ],
        torch.float32,
        torch.device("cpu"),
    )


def test_materialized_scores_have_sinks_too() -> None:
    q, k, v, sinks = (
        random(2, 4, 5, 8),
        random(2, 4, 6, 8, seed=1),
        random(2, 4, 6, 8, seed=2),
        random(4, seed=3),
    )
    column = sinks[None, :, None, None]
    scores = torch.cat(((q @ k.transpose(-1, -2)) * 8**-0.5, column.expand(2, 4, 5, 1)), -1)
    found = eager_heads(q, k, v, None, AttentionKind(sinks=True), sinks=column)
    # Scores are fp32.
    torch.testing.assert_close(found, scores.softmax(-1)[..., :-1] @ v, rtol=0, atol=1e-6)


def test_soft_capped_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks beside soft-capped scores are not computed"):
        self_attention_with_sinks(
            random(1, 3, 3, 8), 1, 1, random(1), None, AttentionKind(softcap=3.0, sinks=True)
        )
