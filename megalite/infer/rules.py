"""Logits processors that forbid tokens, as generation_config.json defines them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """Holds which tokens must not come next. Names and meanings are those of transformers'
    GenerationConfig."""

    no_repeat_ngram_size: int = 0
    """No n-gram of this size comes twice. 0 disables."""
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that never come."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that never come."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that do not come first in an answer."""
    min_new_tokens: int = 0
    """An answer does not end before it has this many tokens."""
    min_length: int = 0
    """The same for prompt and answer together."""

    def forbidden(self, ids: Sequence[int], num_new: int, ends: frozenset[int]) -> set[int]:
        """Return the tokens that must not follow `ids`, of which the last `num_new` belong to the
        answer. `ends` are the ids that end it."""
        found = {*self.suppress_tokens, *(self.begin_suppress_tokens if num_new == 0 else ())}
        if num_new < self.min_new_tokens or len(ids) < self.min_length:
            found |= ends
        for *before, last in self.bad_words_ids:
            if before:
                is_next = list(ids[-len(before) :]) == before
            else:
                # transformers ignores a bad word that consists of an end token alone.
                is_next = last not in ends
            if is_next:
                found.add(last)
        return found | self._repeating(ids)

    def _repeating(self, ids: Sequence[int]) -> set[int]:
        """Return the tokens that would complete an n-gram that `ids` already has."""
        before = self.no_repeat_ngram_size - 1
        if before < 0:
            return set()
        # Wherever the latest n - 1 tokens stood before, what followed them must not follow again. Of
        # single tokens (n = 1) these are none, and all of `ids` have followed them.
        latest = list(ids[len(ids) - before :])
        return {
            ids[place]
            for place in range(before, len(ids))
            if list(ids[place - before : place]) == latest
        }


NO_RULES = Rules()
