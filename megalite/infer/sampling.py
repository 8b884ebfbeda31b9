"""Choice of the next token from logits, for many sequences at a time.

A sequence's tokens depend only on its logits, its seed and their position in it: the random number
of a token is a function of (seed, position), so that it is the same whatever else is generated
beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.infer.rules import NO_RULES, Rules
from megalite.utils.counter_random import random_bits, uniform
from megalite.utils.keys import key_of

LIKELIEST = 256
"""Number of tokens that are sorted first to find the top-p cut; all are sorted only if these do not
reach it."""
SITE = key_of("generate")
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Sampling:
    """Holds the settings of sampling. Raises ConfigError for a value out of range."""

    temperature: float = 1.0
    """0 means greedy decoding."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have at least this probability (nucleus: Holtzman et
    al. 2020)."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the likeliest one (Nguyen et al. 2024)."""
    repetition_penalty: float = 1.0
    """Divide logits of earlier tokens by this, multiply negative ones (Keskar et al. 2019)."""
    seed: int = 0
    rules: Rules = NO_RULES
    """Tokens that must not come next."""

    @property
    def is_restricted(self) -> bool:
        """Return whether the tokens so far have a say in what comes next."""
        return self.repetition_penalty != 1 or self.rules != NO_RULES

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf") or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ConfigError(
                f"temperature {self.temperature} and top-k {self.top_k} must be at least 0, "
                f"top-p {self.top_p} above 0 and at most 1"
            )
        if not 0 <= self.min_p <= 1 or not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(
                f"min-p {self.min_p} must be at least 0 and at most 1, "
                f"the repetition penalty {self.repetition_penalty} above 0"
            )
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError(f"the seed {self.seed} must fit into 64 bits, from -2^63 to 2^63 - 1")


def choose(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    ids: Sequence[Sequence[int]],
    num_new: Sequence[int] = (),
    ends: Sequence[frozenset[int]] = (),
) -> Tensor:
    """Return the next token of each sequence, int64 [B], from fp32 logits [B,V].

    `samplings` are the settings and `ids` the token ids so far of each, prompt included. For their
    rules, `num_new` says how many of the ids belong to the answer, and `ends` which tokens would
    end it."""
    # In transformers' order, for each step changes what the next one sees: penalty, rules,
    # temperature, top-k, top-p, min-p.
    logits_BV = follow_rules(logits_BV, samplings, ids, num_new, ends)
    likeliest_B = logits_BV.argmax(-1)
    drawn = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not drawn:
        return likeliest_B
    if len(drawn) < len(samplings):
        logits_BV = logits_BV[drawn]
    samplings = [samplings[row] for row in drawn]
    draws = _draw(
        warp(logits_BV, samplings), [s.seed for s in samplings], [len(ids[row]) for row in drawn]
    )
    return likeliest_B.index_copy(0, torch.tensor(drawn, device=draws.device), draws)


def follow_rules(
    logits_BV: Tensor,
    samplings: Sequence[Sampling],
    ids: Sequence[Sequence[int]],
    num_new: Sequence[int],
    ends: Sequence[frozenset[int]],
) -> Tensor:
    """Return logits, or log probabilities, [B,V], with repetition penalties, and -inf for tokens
    that the rules forbid. Arguments are those of `choose`."""
    penalized = [row for row, sampling in enumerate(samplings) if sampling.repetition_penalty != 1]
    ruled = [row for row, sampling in enumerate(samplings) if sampling.rules != NO_RULES]
    if penalized or ruled:
        logits_BV = logits_BV.clone()
    for row in penalized:
        seen = torch.tensor(sorted(set(ids[row])), device=logits_BV.device)
        logits, penalty = logits_BV[row, seen], samplings[row].repetition_penalty
        # Clamped, because a penalty close to 0 overflows fp32.
        logits_BV[row, seen] = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(
            -LARGEST, LARGEST
        )
    for row in ruled:
        found = samplings[row].rules.forbidden(ids[row], num_new[row], ends[row])
        known = [token for token in found if 0 <= token < logits_BV.shape[1]]
        # If all were forbidden, nothing could be drawn: the rules are ignored.
        if len(known) < logits_BV.shape[1]:
            logits_BV[row, known] = -torch.inf
    return logits_BV


def warp(logits_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Return logits [B,V] to draw from: divided by temperature, and -inf for tokens that
    `samplings` exclude (top-k, top-p, min-p)."""
    column = partial(_column, device=logits_BV.device)
    # With the largest logit at 0, a temperature close to 0 sends all others to -inf and never
    # produces NaN.
    temperature_B1 = column([sampling.temperature for sampling in samplings]).clamp(min=SMALLEST)
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature_B1
    top_k = [
        min(sampling.top_k or logits_BV.shape[1], logits_BV.shape[1]) for sampling in samplings
    ]
    if min(top_k) < logits_BV.shape[1]:
        # Rows without top-k ask for 1, so that one such row does not make topk sort the whole
        # vocabulary.
        asked = [k if k < logits_BV.shape[1] else 1 for k in top_k]
        least_B1 = logits_BV.topk(max(asked)).values.gather(1, column(asked, torch.int64) - 1)
        cut_B1 = column(top_k, torch.int64) < logits_BV.shape[1]
        logits_BV = logits_BV.masked_fill(cut_B1 & (logits_BV < least_B1), -torch.inf)
    if min(sampling.top_p for sampling in samplings) < 1:
        top_p = column([sampling.top_p for sampling in samplings])
        logits_BV = logits_BV.masked_fill(logits_BV < _least_of_top_p(logits_BV, top_p), -torch.inf)
    if max(sampling.min_p for sampling in samplings) > 0:
        min_p = column([sampling.min_p for sampling in samplings])
        # The logarithm of rows without min-p is -inf, below which there is nothing.
        logits_BV = logits_BV.masked_fill(
            logits_BV < logits_BV.amax(-1, keepdim=True) + min_p.log(), -torch.inf
        )
    return logits_BV


def _draw(logits_BV: Tensor, seeds: Sequence[int], places: Sequence[int]) -> Tensor:
    """Draw a token per row, int64 [B], by inverting the cumulative distribution at the random
    number of (seed, position)."""
    # In float64: over a large vocabulary, fp32's rounding of the cumulative sum would swallow
    # unlikely tokens.
    sums_BV = logits_BV.softmax(-1).double().cumsum(-1)
    seed_B1, index_B1 = (
        _column(numbers, torch.int64, logits_BV.device) for numbers in (seeds, places)
    )
    # Times the last sum, which rounding may leave a little below or above 1.
    place_B1 = uniform(random_bits(SITE, seed_B1), index_B1).double() * sums_BV[:, -1:]
    # right=True: a random number of exactly 0 must not draw a first token of probability 0.
    return torch.searchsorted(sums_BV, place_B1, right=True)[:, 0]


def _column(
    values: Sequence[float], dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Return `values` as a column [B,1]."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None]


def _least_of_top_p(logits_BV: Tensor, top_p_B1: Tensor) -> Tensor:
    """Return the lowest logit inside the nucleus, [B,1]; equal logits are inside as well. -inf for
    rows with top_p 1."""
    whole_B1 = logits_BV.logsumexp(-1, keepdim=True)
    # Nearly always the first few hundred reach top_p; else once more over the whole vocabulary.
    for count in (min(LIKELIEST, logits_BV.shape[1]), logits_BV.shape[1]):
        best = logits_BV.topk(count).values
        probabilities = (best - whole_B1).exp()
        # The token that crosses top_p is still in.
        before = probabilities.cumsum(-1) - probabilities
        inside_B1 = (before < top_p_B1).sum(-1, keepdim=True).clamp(min=1)
        if bool((inside_B1 < count).logical_or(top_p_B1 >= 1).all()):
            break
    least = best.gather(1, inside_B1 - 1)
    return least.masked_fill(top_p_B1 >= 1, -torch.inf)
