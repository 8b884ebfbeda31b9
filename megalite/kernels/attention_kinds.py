"""What a query attends to: kinds of attention, and their masks.

Letters in shapes are those of `kernels.attention`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class AttentionKind:
    """Describe a model's attention: sliding window, soft-capping and scale of the scores, and
    whether it is causal."""

    window: int | None = None
    """Size of the sliding window in tokens, the attending token included: as many before it and,
    where attention is not causal, as many behind it. None: no window."""
    softcap: float | None = None
    """Cap c of the scores: s becomes c · tanh(s / c) (Gemma 2). None: no cap."""
    scale: float | None = None
    """Factor of the scores. None: 1/√K."""
    causal: bool = True
    """Tokens attend to none behind them. False: an encoder's attention, or attention to another
    sequence."""
    sinks: bool = False
    """Each head has one more logit, a sink, that takes a share of the probability and has no value
    (gpt-oss); see `kernels.sinks`."""

    def within(self, length: int) -> AttentionKind:
        """Return this kind for sequences of `length` tokens, without a window that would cover them
        whole."""
        if self.window is None or self.window < length:
            return self
        return replace(self, window=None)

    def scale_of(self, head_size: int) -> float:
        """Return the factor of the scores, for queries and keys of `head_size`."""
        return self.scale or head_size**-0.5


PLAIN = AttentionKind()


def check_cross(document_BT: Tensor | None, source_BS: Tensor | None, kind: AttentionKind) -> None:
    """Raise ValueError where a kind, or the documents of queries and keys, are not for keys of
    another sequence."""
    # Positions of two sequences cannot be compared: no key is "before" a query.
    if kind.causal or kind.window is not None:
        raise ValueError(
            f"attention to another sequence must be neither causal nor windowed, but is {kind}"
        )
    if (source_BS is None) != (document_BT is None):
        raise ValueError(
            "attention to another sequence: give the documents of queries and of keys, or of neither"
        )


def attention_mask(document_BT: Tensor, source_BS: Tensor, kind: AttentionKind) -> Tensor:
    """Return a mask [B,1,T,S] bool, true where a query (third dimension) may attend to a key (last
    one), from the numbers of their documents."""
    mask = document_BT[:, None, :, None] == source_BS[:, None, None, :]
    if kind.causal:
        mask = mask.tril()
    if kind.window is not None:
        # A key may lie up to window - 1 behind the query: the diagonal -(window - 1) is the last
        # kept.
        mask = mask.triu(1 - kind.window)
        if not kind.causal:
            mask = mask.tril(kind.window - 1)
    return mask
