"""Continuous batching (Orca: Yu et al. 2022): sequences join and leave between the steps of one
batch.

A step first computes a limited number of tokens of new prompts (prefill), then one further token of
every sequence whose prompt is done (decode). So both who waits for a prompt and who waits for the
next token get a share of every step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from megalite.errors import ConfigError, NotFinite
from megalite.infer.answer import Answer, Choice, Request
from megalite.infer.beams import BeamSearch
from megalite.infer.cache import CachedSequenceInfo, Row, lay_out
from megalite.infer.sampling import choose
from megalite.models.layers import SequenceInfo

NOT_FINITE = (
    "the model's logits are not finite (NaN or infinite): its weights are damaged, or too large for their precision; "
    "take an earlier checkpoint"
)


class NoRoom(ConfigError):
    """Raised for a prompt so long that it leaves no room for an answer."""


class Predictor(Protocol):
    """Describes a model with a KV cache, as `Batch` and `Generator` call it."""

    num_slots: int
    vocab_size: int
    capacity: int
    """Most tokens of a sequence, prompt and answer together."""
    turning_points: range
    """Sequence lengths after which one token more has all positions encoded differently (LongRoPE,
    dynamic NTK), so that cached keys become useless."""
    device: torch.device

    def predict(self, tokens_BT: Tensor, places: CachedSequenceInfo, last_B: Tensor) -> Tensor:
        """Return the next-token logits of each row, fp32 [B,V], and write the tokens' keys and
        values to the cache.

        `tokens_BT` are the new tokens, `places` says where they stand in the cache, and `last_B` is
        the index in its row of the token that the logits follow."""
        ...

    def copy_slots(self, sources: Sequence[int], targets: Sequence[int], num_tokens: int) -> None:
        """Give each slot of `targets` the first `num_tokens` cached tokens of the slot of `sources`
        in its place."""
        ...

    def logits(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        """Return the next-token logits behind every token of `tokens_BT`: [B,T,V]. The cache is
        neither read nor written."""
        ...


class _Sequence:
    """Holds a running answer, its slot in the cache, all its token ids, and how many of them are
    cached."""

    def __init__(self, answer: Answer, slot: int, search: _Search | None = None):
        self.answer, self.slot, self.cached, self.search = answer, slot, 0, search
        # Prompt and answer so far; the last token may not have been an input yet.
        self.ids = list(answer.request.prompt)

    @property
    def fresh(self) -> int:
        """Return the number of tokens that are not in the cache yet."""
        return len(self.ids) - self.cached

    def row(self, limit: int) -> Row:
        """Return the next tokens to compute, at most `limit`, as a row of the batch."""
        tokens = self.ids[self.cached : self.cached + limit]
        return Row(self.slot, self.cached, tokens, len(self.ids))


class _Search:
    """Searches for an answer by beams, each with a slot of its own."""

    def __init__(
        self, model: Predictor, answer: Answer, slots: Sequence[int], ends: frozenset[int]
    ):
        """Begin with the prompt in the first slot: it is computed once, for all beams."""
        request = answer.request
        assert request.beams is not None
        self.model, self.answers, self.slots = model, [answer, *answer.others], list(slots)
        self.prompt, self.room = list(request.prompt), model.capacity - len(request.prompt)
        self.ends = ends | request.ends
        most = min(request.max_tokens, self.room)
        self.beams = BeamSearch(1, request.beams, most, self.ends, model.device)
        self.sequences = [_Sequence(answer, slot, self) for slot in slots]
        for waiting in self.sequences[1:]:
            waiting.ids = []
        self._logits: dict[int, Tensor] = {}
        """Logits [V] behind the beams, by slot, as far as they are computed."""

    def take(self, slot: int, logits_V: Tensor) -> list[Answer]:
        """Take the logits behind the beam in a slot, and go on once those of all are there. Return
        the answers when they are found, finished."""
        self._logits[slot] = logits_V
        is_first = self.beams.length == 0
        if len(self._logits) < len(self.slots) and not is_first:
            return []
        some = [logits_V] * len(self.slots) if is_first else [self._logits[x] for x in self.slots]
        logits = torch.stack(some)
        self._logits.clear()
        if not logits.amax(-1).isfinite().all():
            return self._end()
        going = self.beams.advance(logits, self.answers[0].request.sampling, [self.prompt])
        if not self.beams.is_done:
            self._go_on([0] * len(self.slots) if is_first else going.tolist())
            return []
        for answer, found in zip(self.answers, self.beams.found()[0], strict=False):
            answer.logprob = found.logprob
            answer.take_all(found.tokens, self.ends, self.room)
        return self.answers

    def _end(self) -> list[Answer]:
        for answer in self.answers:
            answer.end("not_finite")
        return self.answers

    def _go_on(self, beams: Sequence[int]) -> None:
        """Have each slot continue the beam of the slot that `beams` names."""
        cached = self.sequences[0].cached
        moved = [
            (self.slots[beam], slot)
            for beam, slot in zip(beams, self.slots, strict=True)
            if self.slots[beam] != slot
        ]
        if moved:
            self.model.copy_slots([x for x, _ in moved], [x for _, x in moved], cached)
        before = [self.sequences[beam].ids for beam in beams]
        for sequence, ids, token in zip(
            self.sequences, before, self.beams.tokens.tolist(), strict=True
        ):
            sequence.ids = [*ids, token]
            sequence.cached = 0 if len(ids) in self.model.turning_points else cached


class Batch:
    """Schedules the waiting and running answers of one model."""

    def __init__(self, model: Predictor, ends: frozenset[int], prompt_tokens: int = 512):
        """Create an empty batch. `ends` are token ids that end every answer; `prompt_tokens` limits
        the prompt tokens of one step."""
        self.model, self.ends, self.prompt_tokens = model, ends, prompt_tokens
        self.waiting: deque[Answer] = deque()
        self._running: dict[int, _Sequence] = {}
        """Running sequences by slot."""

    @property
    def num_running(self) -> int:
        """Return the number of sequences that hold a slot."""
        return len(self._running)

    @property
    def busy(self) -> bool:
        """Return whether any answer is waiting or running."""
        return bool(self._running or self.waiting)

    def check(self, request: Request) -> None:
        """Raise NoRoom for a prompt that is too long, and ConfigError for one that is empty or has
        token ids unknown to the model."""
        count, last = len(request.prompt), self.model.vocab_size - 1
        # Below the capacity, not up to it: at least one token of an answer must have a place.
        if not 0 < count < self.model.capacity:
            raise (NoRoom if count else ConfigError)(
                f"the prompt has {count} tokens; it must have at least one, and fewer than the "
                f"{self.model.capacity} that prompt and answer may have together"
            )
        unknown = next((token for token in request.prompt if not 0 <= token <= last), None)
        if unknown is not None:
            raise ConfigError(
                f"the prompt has the token {unknown}, but the model knows those from 0 to {last}"
            )
        if request.beams and request.beams.width > self.model.num_slots:
            raise ConfigError(
                f"{request.beams.width} beams are asked for, but this model computes {self.model.num_slots} "
                "sequences at a time"
            )

    def add(self, answer: Answer) -> None:
        """Queue an answer. Raise ConfigError as `check` does. An answer of no tokens ends at
        once."""
        self.check(answer.request)
        if answer.request.place > 0:  # whoever leads it is queued, and ends it
            return
        if answer.request.max_tokens <= 0:
            for each in (answer, *answer.others):
                each.end("length")
        else:
            self.waiting.append(answer)

    def drop(self, answer: Answer) -> None:
        """Give up an answer, whether it waits or runs. Its slot is free at once."""
        if answer in self.waiting:
            self.waiting.remove(answer)
        # Nothing is cleared: whoever gets the slot next writes over its cells before it reads them.
        for slot, sequence in list(self._running.items()):
            if sequence.answer is answer:
                del self._running[slot]

    def step(self) -> list[Answer]:
        """Advance by one step: some prompt tokens, then one token of every sequence that is ready.
        Return the answers that have a new token or an end."""
        self._admit()
        advanced = self._advance(self._prompts())
        # One uncached token: the prompt is done, and the token chosen last is the next input.
        ready = {slot: sequence for slot, sequence in self._running.items() if sequence.fresh == 1}
        if ready:
            # Take all slots between the lowest and the highest: the cache is then a slice, read
            # without a copy. Idle slots compute along, and nothing of it is used.
            rows = [
                ready[slot].row(1) if slot in ready else Row(slot, 0, (), 0)
                for slot in range(min(ready), max(ready) + 1)
            ]
            advanced += self._advance(rows)
        # Whose prompt ended above has decoded a second token by now, and is told once.
        return list(dict.fromkeys(advanced))

    def finish(self) -> Iterator[Answer]:
        """Advance until all answers have ended. Yield an answer whenever it has a new token or an
        end. Raise NotFinite for logits that are NaN or infinite."""
        while self.busy:
            for answer in self.step():
                if answer.finish == "not_finite":
                    raise NotFinite(NOT_FINITE)
                yield answer

    def _admit(self) -> None:
        """Give free slots to waiting answers, first come first served."""
        free = [slot for slot in range(self.model.num_slots) if slot not in self._running]
        while self.waiting:
            beams = self.waiting[0].request.beams
            count = beams.width if beams else 1
            if count > len(free):  # others do not overtake it, or it might wait for ever
                return
            # The lowest free ones first: a decode step computes all slots up to the highest taken.
            slots, free = free[:count], free[count:]
            answer = self.waiting.popleft()
            if beams:
                found = _Search(self.model, answer, slots, self.ends).sequences
                self._running.update(zip(slots, found, strict=True))
            else:
                self._running[slots[0]] = _Sequence(answer, slots[0])

    def _prompts(self) -> list[Row]:
        """Return the rows to prefill in this step, in order of arrival: as many as fit into
        `prompt_tokens`, padding included."""
        rows: list[Row] = []
        widest = 0
        for sequence in self._running.values():
            # Its prompt is done: it goes along with the decode step. A beam may not have begun.
            if sequence.fresh <= 1:
                continue
            # A longer prompt goes in pieces of `prompt_tokens`, step by step.
            width = min(max(widest, sequence.fresh), self.prompt_tokens)
            # Every row is padded to the widest, so that the cost is their number times that width.
            # One row always goes.
            if rows and (len(rows) + 1) * width > self.prompt_tokens:
                break
            rows.append(sequence.row(self.prompt_tokens))
            widest = width
        return rows

    def _advance(self, rows: Sequence[Row]) -> list[Answer]:
        """Run the model on `rows` and choose a token for each sequence whose prompt is complete.
        Return these answers."""
        if not rows:
            return []
        logits_BV = self.model.predict(*lay_out(rows, self.model.device))
        done = []
        for number, row in enumerate(rows):
            if not row.tokens:
                continue
            sequence = self._running[row.slot]
            # `predict` has written these to the cache.
            sequence.cached += len(row.tokens)
            # Of a prompt in several pieces, only the last piece's logits lead to a token.
            if not sequence.fresh:
                done.append((number, sequence))
        chosen = [(number, sequence) for number, sequence in done if not sequence.search]
        if chosen:
            self._choose(
                logits_BV[[number for number, _ in chosen]], [sequence for _, sequence in chosen]
            )
        advanced = [sequence.answer for _, sequence in chosen]
        for number, sequence in done:
            if sequence.search:
                advanced += self._search_on(sequence.search, sequence.slot, logits_BV[number])
        return advanced

    def _search_on(self, search: _Search, slot: int, logits_V: Tensor) -> list[Answer]:
        """Take the logits behind one beam of a search. Return its answers once they are found, and
        free its slots."""
        # Some may have been given up before.
        running = [answer for answer in search.answers if answer.finish is None]
        found = search.take(slot, logits_V)
        if found:
            for each in search.slots:
                del self._running[each]
        return [answer for answer in found if answer in running]

    def _choose(self, logits_BV: Tensor, sequences: Sequence[_Sequence]) -> None:
        """Choose the next token of each sequence from its logits [B,V], record it, and free the
        slots of answers that end."""
        requests = [sequence.answer.request for sequence in sequences]
        ends = [self.ends | request.ends for request in requests]
        num_new = [len(sequence.answer.tokens) for sequence in sequences]
        samplings, ids = (
            [request.sampling for request in requests],
            [sequence.ids for sequence in sequences],
        )
        tokens_B = choose(logits_BV, samplings, ids, num_new, ends)
        # The largest logit is NaN if any is. Tokens and this check share one transfer, since each
        # waits for the device.
        chosen = torch.stack([tokens_B, logits_BV.amax(-1).isfinite().long()], 1).tolist()
        logprobs = _logprobs_of(logits_BV, tokens_B, [request.scored for request in requests])
        for logits_V, (token, is_finite), logprob, sequence, own_ends in zip(
            logits_BV, chosen, logprobs, sequences, ends, strict=True
        ):
            answer = sequence.answer
            if not is_finite:
                answer.end("not_finite")
                del self._running[sequence.slot]
                continue
            answer.logprob += 0.0 if token in own_ends else logprob
            # An end token is not kept, and has no logprob.
            if answer.request.num_logprobs is not None and token not in own_ends:
                answer.choices.append(_choice(logits_V, token, answer.request.num_logprobs))
            answer.take(token, own_ends, self.model.capacity - len(sequence.ids))
            sequence.ids.append(token)
            if answer.finish is not None:
                del self._running[sequence.slot]
            elif len(sequence.ids) - 1 in self.model.turning_points:
                # Cached keys were rotated for another encoding of positions: compute the whole
                # sequence again.
                sequence.cached = 0


def _logprobs_of(logits_BV: Tensor, tokens_B: Tensor, scored: Sequence[bool]) -> list[float]:
    """Return the log probability of each row's token, from unprocessed logits; 0 for rows that are
    not scored."""
    if not any(scored):
        return [0.0] * len(scored)
    logprobs_B = logits_BV.gather(1, tokens_B[:, None])[:, 0] - logits_BV.logsumexp(-1)
    return [x if asked else 0.0 for x, asked in zip(logprobs_B.tolist(), scored, strict=True)]


def _choice(logits_V: Tensor, token: int, count: int) -> Choice:
    """Return the Choice of `token` with its logprob and the `count` likeliest tokens, from
    unprocessed logits [V]."""
    # Row by row, for few requests ask: of a whole batch it would be another [B,V].
    logprobs_V = logits_V.log_softmax(-1)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return Choice(token, logprobs_V[token].item(), tuple(likeliest))
