"""Continuous batching (Orca: Yu et al. 2022): sequences join and leave between the steps of one batch.

A step computes at most so many tokens of prompts that are new, and then one further token of every sequence whose
prompt is done: who waits for a prompt, and who for the next token, gets a share of every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalite.errors import ConfigError, NotFinite
from megalite.infer.answer import Answer, Choice, Request
from megalite.infer.cache import CachedPlaces, Row, lay_out
from megalite.infer.sampling import choose
from megalite.models.layers import Places

NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): its weights are damaged, or too large for their precision; "
    "take an earlier checkpoint"
)


class NoRoom(ConfigError):
    """A prompt that leaves no room for an answer."""


class Predictor(Protocol):
    """A model with a cache."""

    num_slots: int
    vocab_size: int
    capacity: int
    """Tokens of the longest sequence."""
    turning_point: int | None
    """Tokens beyond which positions are encoded in another way, so that what is in the cache is of no more use."""
    device: torch.device

    def predict(self, tokens_BT: Tensor, places: CachedPlaces, last_B: Tensor) -> Tensor:
        """Logits of what follows the `last` token of each row: fp32 [B,V]."""
        ...

    def logits(self, tokens_BT: Tensor, places: Places) -> Tensor:
        """Of what follows every token: [B,T,V]. The cache is left alone."""
        ...


class _Sequence:
    def __init__(self, answer: Answer, slot: int):
        self.answer, self.slot, self.cached = answer, slot, 0
        self.ids = list(answer.request.prompt)

    @property
    def fresh(self) -> int:
        """Tokens that are not in the cache."""
        return len(self.ids) - self.cached

    def row(self, limit: int) -> Row:
        tokens = self.ids[self.cached : self.cached + limit]
        return Row(self.slot, self.cached, tokens, len(self.ids))


class Batch:
    def __init__(self, model: Predictor, ends: frozenset[int], prompt_tokens: int = 512):
        """`ends`: tokens that end an answer. `prompt_tokens`: of prompts, that a step computes at most."""
        self.model, self.ends, self.prompt_tokens = model, ends, prompt_tokens
        self.waiting: deque[Answer] = deque()
        self._running: dict[int, _Sequence] = {}
        """By slot."""

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def busy(self) -> bool:
        return bool(self._running or self.waiting)

    def check(self, request: Request) -> None:
        """Raises NoRoom, and ConfigError for a prompt of tokens that the model has not."""
        count, last = len(request.prompt), self.model.vocab_size - 1
        if not 0 < count < self.model.capacity:
            raise (NoRoom if count else ConfigError)(
                f"the prompt has {count} tokens; it must have at least one, and fewer than the "
                f"{self.model.capacity} that prompt and answer may have together"
            )
        unknown = next((token for token in request.prompt if not 0 <= token <= last), None)
        if unknown is not None:
            raise ConfigError(f"the prompt has the token {unknown}, but the model knows those from 0 to {last}")

    def add(self, answer: Answer) -> None:
        """Raises ConfigError as `check` does."""
        self.check(answer.request)
        if answer.request.max_tokens <= 0:
            answer.end("length")
        else:
            self.waiting.append(answer)

    def drop(self, answer: Answer) -> None:
        """Give an answer up, whether it waits or runs. Its slot is free at once."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        for slot, sequence in list(self._running.items()):
            if sequence.answer is answer:
                del self._running[slot]

    def step(self) -> list[Answer]:
        """Advance; the answers that have a new token or an end."""
        self._admit()
        advanced = self._advance(self._prompts())
        ready = {slot: sequence for slot, sequence in self._running.items() if sequence.fresh == 1}
        if ready:
            # All slots up to the highest, so that keys are read where they lie; idle ones compute along for nothing.
            rows = [
                ready[slot].row(1) if slot in ready else Row(slot, 0, (), 0)
                for slot in range(min(ready), max(ready) + 1)
            ]
            advanced += self._advance(rows)
        return list(dict.fromkeys(advanced))

    def finish(self) -> Iterator[Answer]:
        """Advance until all have ended; each answer whenever it has a new token or an end. Raises NotFinite."""
        while self.busy:
            for answer in self.step():
                if answer.finish == "not_finite":
                    raise NotFinite(NOT_FINITE)
                yield answer

    def _admit(self) -> None:
        for slot in range(self.model.num_slots):
            if self.waiting and slot not in self._running:
                self._running[slot] = _Sequence(self.waiting.popleft(), slot)

    def _prompts(self) -> list[Row]:
        """In the order in which they came, as many as make up no more tokens than a step may have, filling included."""
        rows: list[Row] = []
        widest = 0
        for sequence in self._running.values():
            if sequence.fresh == 1:
                continue
            width = min(max(widest, sequence.fresh), self.prompt_tokens)
            if rows and (len(rows) + 1) * width > self.prompt_tokens:
                break
            rows.append(sequence.row(self.prompt_tokens))
            widest = width
        return rows

    def _advance(self, rows: Sequence[Row]) -> list[Answer]:
        if not rows:
            return []
        logits_BV = self.model.predict(*lay_out(rows, self.model.device))
        done = []
        for number, row in enumerate(rows):
            if not row.tokens:
                continue
            sequence = self._running[row.slot]
            sequence.cached += len(row.tokens)
            if not sequence.fresh:
                done.append((number, sequence))
        if done:
            self._choose(logits_BV[[number for number, _ in done]], [sequence for _, sequence in done])
        return [sequence.answer for _, sequence in done]

    def _choose(self, logits_BV: Tensor, sequences: Sequence[_Sequence]) -> None:
        requests = [sequence.answer.request for sequence in sequences]
        ends = [self.ends | request.ends for request in requests]
        num_new = [len(sequence.answer.tokens) for sequence in sequences]
        samplings, ids = [request.sampling for request in requests], [sequence.ids for sequence in sequences]
        tokens_B = choose(logits_BV, samplings, ids, num_new, ends)
        # The largest is NaN where any is. One message from the device tells both.
        chosen = torch.stack([tokens_B, logits_BV.amax(-1).isfinite().long()], 1).tolist()
        for logits_V, (token, is_finite), sequence, own_ends in zip(logits_BV, chosen, sequences, ends, strict=True):
            answer = sequence.answer
            if not is_finite:
                answer.end("not_finite")
                del self._running[sequence.slot]
                continue
            if answer.request.num_logprobs is not None and token not in own_ends:
                answer.choices.append(_choice(logits_V, token, answer.request.num_logprobs))
            answer.take(token, own_ends, self.model.capacity - len(sequence.ids))
            sequence.ids.append(token)
            if answer.finish is not None:
                del self._running[sequence.slot]
            elif len(sequence.ids) - 1 == self.model.turning_point:
                sequence.cached = 0


def _choice(logits_V: Tensor, token: int, count: int) -> Choice:
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token, logprobs_V[token].item(), tuple(likeliest))
