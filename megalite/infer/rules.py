"""Tokens that must not come next, as generation_config.json has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Names and meanings are those of transformers' GenerationConfig."""

    no_repeat_ngram_size: int = 0
    """So many tokens in a row never come twice; 0: they may."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Tokens in a row that never come."""
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    """Not as an answer's first token."""
    min_new_tokens: int = 0
    """Of an answer, before which it does not end."""
    min_length: int = 0
    """The same with the prompt."""

    def forbidden(self, ids: Sequence[int], num_new: int, ends: frozenset[int]) -> set[int]:
        """Return the tokens that must not follow `ids`, of which the last `num_new` are the answer's. `ends`: those
        that end it."""
        found = {*self.suppress_tokens, *(self.begin_suppress_tokens if num_new == 0 else ())}
        if num_new < self.min_new_tokens or len(ids) < self.min_length:
            found |= ends
        for *before, last in self.bad_words_ids:
            # An end alone is no word.
            if list(ids[-len(before) :]) == before if before else last not in ends:
                found.add(last)
        return found | self._repeating(ids)

    def _repeating(self, ids: Sequence[int]) -> set[int]:
        before = self.no_repeat_ngram_size - 1
        if before < 0:
            return set()
        latest = list(ids[len(ids) - before :])
        return {ids[place] for place in range(before, len(ids)) if list(ids[place - before : place]) == latest}


NO_RULES = Rules()
