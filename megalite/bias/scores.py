"""How likely a model finds texts, in nats: decoders by the sum of the tokens' log-probabilities,
encoders by the pseudo-log-likelihood (Salazar et al. 2020), for which each token is masked by
itself.

Letters in shapes: B rows of a batch, T tokens, D hidden size, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from megalite.comm.mesh import Launch
from megalite.errors import ConfigError, DataError
from megalite.infer.encode import Encoder, logits_of, state_batches
from megalite.infer.generate import Generator
from megalite.models import model_config
from megalite.utils.outside import shown

ROWS_AT_ONCE = 256


class Row(NamedTuple):
    """Tokens of a text, and those of them that are scored."""

    ids: list[int]
    places: list[int]
    """Numbers of tokens."""


class Scorer(Protocol):
    """Tells how likely texts are."""

    def row(self, text: str, given: str = "") -> Row:
        """Return the tokens of `given` and `text` behind it, of which those of `text` are scored.
        Raise DataError for more than the model takes."""

    def pair(self, one: str, other: str) -> tuple[Row, Row]:
        """Return the tokens of two texts that are to be compared."""

    def sums(self, rows: Sequence[Row]) -> list[float]:
        """Return the sum of the log-probabilities of each row's scored tokens, in nats."""


def open_scorer(folder: Path, launch: Launch, num_slots: int, **layout: Any) -> Scorer:
    """Load the model in `folder`, a checkpoint or a Hugging Face folder, over the ranks of
    `launch`. Raise ConfigError for one that tells no likelihood of texts."""
    if model_config({"hf": str(folder)}).task == "masked":
        if launch.world_size > 1:
            raise ConfigError(f"{folder} holds an encoder, whose bias one process measures")
        return MaskedScorer(Encoder.open(folder, fills=True))
    return CausalScorer(Generator.open(folder, num_slots=num_slots, launch=launch, **layout))


class CausalScorer:
    """A decoder. A text begins behind the token that begins texts, or else the one that ends
    them."""

    def __init__(self, generator: Generator):
        """Raise ConfigError for a tokenizer with neither token: the first token of a text would not
        be scored, which often is what a pair differs in."""
        self._generator, tokenizer = generator, generator.tokenizer
        begin = tokenizer.eod_id if tokenizer.begin_id is None else tokenizer.begin_id
        if begin is None:
            raise ConfigError(
                "the model's tokenizer has neither a token that begins a text nor one that ends it"
            )
        self._begin, self._longest = begin, generator.model.capacity + 1

    def row(self, text: str, given: str = "") -> Row:
        encode = self._generator.tokenizer.encode
        ids = encode(given + text)
        # Encoded together: a tokenizer may join the end of one to the beginning of the other.
        before = _num_given(encode(given), ids) if given else 0
        row = Row([self._begin, *ids], list(range(1 + before, 1 + len(ids))))
        return _checked(row, text, self._longest)

    def pair(self, one: str, other: str) -> tuple[Row, Row]:
        return self.row(one), self.row(other)

    def sums(self, rows: Sequence[Row]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            scores = self._generator.score([row.ids for row in some])
            # Score t is of token t + 1.
            found += [
                float(score.logprobs[torch.tensor(row.places) - 1].double().sum())
                for row, score in zip(some, scores, strict=True)
            ]
        return found


class MaskedScorer:
    """An encoder with a head for masked tokens."""

    def __init__(self, encoder: Encoder):
        """Raise DataError for a tokenizer without a mask token."""
        mask = encoder.tokenizer.mask_id
        if mask is None:
            raise DataError(f"{encoder.folder}: the tokenizer names no mask_token")
        self._encoder, self._mask = encoder, mask

    def row(self, text: str, given: str = "") -> Row:
        # Between the two tokens that are around an encoder's texts.
        ids, alone = self._encoder.rows([given + text, given])
        row = Row(ids, list(range(_num_given(alone[:-1], ids), len(ids) - 1)))
        return _checked(row, text, self._encoder.max_positions)

    def pair(self, one: str, other: str) -> tuple[Row, Row]:
        """Return the tokens of two texts, of which those are scored that both have: given the words
        in which they differ, how likely are the others (Nangia et al. 2020)? The words themselves
        differ in how frequent they are."""
        rows = self.row(one), self.row(other)
        # autojunk would leave out tokens that a long text has often, such as spaces.
        matcher = SequenceMatcher(None, rows[0].ids, rows[1].ids, autojunk=False)
        places: tuple[list[int], list[int]] = ([], [])
        for block in matcher.get_matching_blocks():
            for side, start in enumerate((block.a, block.b)):
                # Those around a text are the same in all.
                last = len(rows[side].ids) - 1
                places[side].extend(p for p in range(start, start + block.size) if 0 < p < last)
        return Row(rows[0].ids, places[0]), Row(rows[1].ids, places[1])

    def sums(self, rows: Sequence[Row]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            found += self._sums(rows[start : start + ROWS_AT_ONCE])
        return found

    def _sums(self, rows: Sequence[Row]) -> list[float]:
        model = self._encoder.model
        asked = [(number, place) for number, row in enumerate(rows) for place in row.places]
        masked = []
        for number, place in asked:
            ids = [*rows[number].ids]
            ids[place] = self._mask
            # A copy of the text for each token: all tokens but one are seen, whatever the order.
            masked.append(ids)
        sums = [0.0] * len(rows)
        for numbers, _, x_BTD in state_batches(model, masked):
            at_B = [asked[n][1] for n in numbers]
            x_B1D = x_BTD[torch.arange(len(numbers)), at_B][:, None]
            logprobs_BV = logits_of(model, x_B1D)[:, 0].log_softmax(-1).cpu()
            for each, logprobs_V in zip(numbers, logprobs_BV, strict=True):
                number, place = asked[each]
                sums[number] += logprobs_V[rows[number].ids[place]].item()
        return sums


def _num_given(alone: Sequence[int], ids: Sequence[int]) -> int:
    """Return how many of the tokens `ids` are only given, which are `alone` where nothing follows.
    One that reaches over the border belongs to what follows."""
    same = [a == b for a, b in zip(alone, ids, strict=False)]
    return same.index(False) if False in same else len(same)


def _checked(row: Row, text: str, longest: int) -> Row:
    if not row.places or len(row.ids) > longest:
        why = (
            f"{len(row.ids):,} tokens, and the model takes {longest:,}"
            if row.places
            else "no tokens"
        )
        raise DataError(f"{shown(text)} has {why}")
    return row
