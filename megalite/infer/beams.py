"""Beam search, for decoders and encoder-decoders alike: which beams go on, given the model's logits.

It follows transformers' `generate` step by step, so that the same tokens are found. B counts the
sequences that are searched for at a time, W the beams of each, C the tokens that a beam may have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from megalite.errors import ConfigError
from megalite.infer.sampling import Sampling, follow_rules

WORST = -1e9
"""Stands for a score that no beam has, as in transformers."""
EarlyStopping = bool | Literal["never"]


class Beams(NamedTuple):
    """Settings of beam search, with transformers' names and meanings."""

    width: int
    length_penalty: float = 1.0
    """Sums of log-probabilities are divided by the number of tokens to this power."""
    early_stopping: EarlyStopping = False
    """True: end once as many beams have ended as are searched. False: once the best running one, as
    long as it is now, is no better than the worst ended. "never": once it could not become better at
    any length."""


class Found(NamedTuple):
    """A beam that has ended, without the token that ends it."""

    tokens: list[int]
    logprob: float
    """Sum of its tokens' log-probabilities, that of the end token included."""


class BeamSearch:
    """Searches for the continuations of B sequences, as far as they have come."""

    def __init__(
        self,
        num_sequences: int,
        beams: Beams,
        room: int,
        ends: frozenset[int],
        device: torch.device,
    ):
        """Begin, with no token. A beam ends with a token of `ends`, or when it has `room` tokens."""
        self.beams, self.room, self.ends, self.length = beams, room, ends, 0
        count = beams.width
        self._all_ends = torch.tensor(sorted(ends), device=device)
        self._first_B1 = torch.arange(num_sequences, device=device)[:, None] * count
        shape = (num_sequences, count)
        self.running_BWC = torch.zeros(*shape, room, dtype=torch.int64, device=device)
        self._scores_BW = torch.full(shape, WORST, device=device)
        self._scores_BW[:, 0] = 0.0  # at first all beams are the same: one counts
        self._ended_BWC = self.running_BWC.clone()
        self._of_ended_BW = torch.full_like(self._scores_BW, WORST)
        self._lengths_BW = torch.zeros(shape, dtype=torch.int64, device=device)
        self._has_ended_BW = torch.zeros(shape, dtype=torch.bool, device=device)
        self._may_improve_B1 = torch.ones_like(self._first_B1, dtype=torch.bool)

    def advance(
        self, logits: Tensor, sampling: Sampling, prompts: Sequence[Sequence[int]]
    ) -> Tensor:
        """Take the logits behind each beam, fp32 [B·W,V]. Return of which beams those that go on are
        continuations, [B·W]; their latest tokens are `tokens`. None goes on once it `is_done`.

        Of `sampling` the repetition penalty and the rules count, for which `prompts` are what each of
        the B sequences begins with."""
        count, vocab_size = self.beams.width, logits.shape[-1]
        logprobs = logits.log_softmax(-1)
        if sampling.is_restricted:
            logprobs = follow_rules(logprobs, *self._rules_of(sampling, prompts))
        total = logprobs.view(-1, count, vocab_size) + self._scores_BW[..., None]  # of whole beams
        # Every beam may end with each of the end tokens: as many more candidates leave enough that
        # go on. Over all beams of a sequence at once: several may go on from the same one.
        num_kept = min(max(2, 1 + len(self.ends)) * count, count * vocab_size)
        found, places = total.flatten(1).topk(num_kept)
        beam, token = places // vocab_size, places % vocab_size
        candidates = self.running_BWC.take_along_dim(beam[..., None], 1)
        candidates[:, :, self.length] = token
        self.length += 1
        ends_here = torch.isin(token, self._all_ends) | (self.length == self.room)
        self._keep_ended(found, candidates, ends_here)
        # The best candidates that have not ended go on.
        going = found + ends_here * WORST
        next_BW = going.topk(count).indices
        self.running_BWC = candidates.take_along_dim(next_BW[..., None], 1)
        self._scores_BW = going.gather(1, next_BW)
        self._may_improve_B1 &= self._hopes()
        is_full = self.beams.early_stopping is True and bool(self._has_ended_BW.all())
        self.is_done = bool(ends_here.all()) or not self._may_improve_B1.any() or is_full
        return (self._first_B1 + beam.gather(1, next_BW)).flatten()

    @property
    def tokens(self) -> Tensor:
        """Return the latest token of each beam, [B·W]."""
        return self.running_BWC[:, :, self.length - 1].flatten()

    def found(self) -> list[list[Found]]:
        """Return the W ended beams of each sequence, the best first."""
        lengths = self._lengths_BW.tolist()
        sums_BW = self._of_ended_BW * self._lengths_BW**self.beams.length_penalty
        return [
            [
                Found(_until(row[:length], self.ends), logprob)
                for row, length, logprob in zip(*each, strict=True)
            ]
            for each in zip(self._ended_BWC.tolist(), lengths, sums_BW.tolist(), strict=True)
        ]

    def _keep_ended(self, found: Tensor, candidates: Tensor, ends_here: Tensor) -> None:
        """Keep the best of those that have ended, here and before."""
        num_kept, count = found.shape[1], self.beams.width
        # Only the first ones count, and only where they could still be better.
        is_counted = ends_here & (torch.arange(num_kept, device=found.device) < count)
        is_closed_B1 = ~self._may_improve_B1
        if self.beams.early_stopping is True:
            is_closed_B1 = is_closed_B1 | self._has_ended_BW.all(1, keepdim=True)
        scores = found / self.length**self.beams.length_penalty
        scores = scores + is_closed_B1 * WORST + ~is_counted * WORST
        best = torch.cat((self._of_ended_BW, scores), 1).topk(count)
        self._of_ended_BW = best.values
        here = torch.full_like(self._lengths_BW[:, :1], self.length).expand(-1, num_kept)
        lengths = torch.cat((self._lengths_BW, here), 1)
        self._lengths_BW = lengths.gather(1, best.indices)
        ended = torch.cat((self._ended_BWC, candidates), 1)
        self._ended_BWC = ended.take_along_dim(best.indices[..., None], 1)
        self._has_ended_BW = torch.cat((self._has_ended_BW, is_counted), 1).gather(1, best.indices)

    def _hopes(self) -> Tensor:
        """Return whether the best running beam of each sequence could still be better than the worst
        that has ended, [B,1]."""
        penalty = self.beams.length_penalty
        # What is lost by each further token counts less, the longer the beam may become.
        may_grow = self.beams.early_stopping == "never" and penalty > 0
        length = self.room if may_grow else self.length
        worst_B1 = self._of_ended_BW.amin(1, keepdim=True)
        to_beat_BW = torch.where(self._has_ended_BW, worst_B1, WORST)
        return (self._scores_BW[:, :1] / length**penalty > to_beat_BW).any(1, keepdim=True)

    def _rules_of(
        self, sampling: Sampling, prompts: Sequence[Sequence[int]]
    ) -> tuple[list[Sampling], list[list[int]], list[int], list[frozenset[int]]]:
        """Return what `follow_rules` asks of each beam."""
        so_far = self.running_BWC[:, :, : self.length].tolist()
        ids = [
            [*prompt, *beam]
            for prompt, beams in zip(prompts, so_far, strict=True)
            for beam in beams
        ]
        num = len(ids)
        return [sampling] * num, ids, [self.length] * num, [self.ends] * num


def check_beams(beams: Beams, num_answers: int) -> None:
    """Raise ConfigError for more answers than beams, which are all that is found."""
    if num_answers > beams.width:
        raise ConfigError(
            f"{num_answers} answers are asked for, but {beams.width} beams find no more than so many"
        )


def _until(ids: list[int], ends: frozenset[int]) -> list[int]:
    """Return the ids before the first that is an end."""
    return ids[: next((place for place, token in enumerate(ids) if token in ends), len(ids))]
