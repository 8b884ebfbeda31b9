"""An answer under way: its tokens, its text as it becomes certain, and why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megalite.infer.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "time", "failed", "not_finite"]
"""It came to an end token or a stop string; to its most tokens, or those that the model can take; was given up; logits
are not finite, so that there is no next token."""


@dataclass(frozen=True)
class Request:
    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Texts at which the answer ends, before them."""
    num_logprobs: int | None = None
    """Also the logarithm of each token's probability, and of those of so many likeliest tokens."""
    ends: frozenset[int] = frozenset()
    """Tokens that end it, beside those that end every answer."""
    plain: bool = False
    """The text is for people: without control tokens."""


@dataclass(frozen=True)
class Choice:
    """One token as it was chosen. Probabilities are those of the model itself, before temperature and the like."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Answer:
    request: Request
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    """Of each token, where they were asked for."""
    finish: Finish | None = None

    def take(self, token: int, ends: frozenset[int], room: int) -> None:
        """One more token. `room`: how many tokens the sequence can still grow by, this one included."""
        if token in ends:
            self.end("stop")
            return
        self.tokens.append(token)
        if self.stream.push(token):
            self.end("stop")
        elif len(self.tokens) >= self.request.max_tokens or room <= 1:
            self.end("length")

    def end(self, why: Finish) -> None:
        if self.finish is None:
            came_to_stop = self.stream.close()
            self.finish = "stop" if came_to_stop and why == "length" else why

    @property
    def text(self) -> str:
        """As far as it is certain."""
        return self.stream.said


class TextStream:
    """The text of a sequence's tokens, piece by piece; a piece never ends inside a character, nor where a stop string
    may have begun."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop: Sequence[str] = ()):
        # Decoded together with the tokens before them, for the space that some tokenizers put between two words, but
        # not with all of them, or each token would cost more than the one before.
        self._decode, self._stop = decode, [text for text in stop if text]
        self._ids, self._shown, self._decoded = list(prompt[-CONTEXT:]), 0, len(prompt[-CONTEXT:])
        self._before = self._last = decode(self._ids)
        self._held, self.said, self._stopped = "", "", False
        self._taken = 0

    def push(self, token: int) -> bool:
        """Whether a stop string has come up."""
        self._ids.append(token)
        self._last = self._decode(self._ids[self._shown :])
        if self._last.endswith("\ufffd") and len(self._ids) - self._decoded < LONGEST_CHARACTER:
            return False
        self._add(self._last[len(self._before) :])
        self._shown, self._decoded = self._decoded, len(self._ids)
        self._before = self._last = self._decode(self._ids[self._shown :])
        return self._stopped

    def take(self) -> str:
        """What has become certain since the last time."""
        piece, self._taken = self.said[self._taken :], len(self.said)
        return piece

    def close(self) -> bool:
        """Nothing follows: what was held back is certain as well. Whether a stop string has come up."""
        if not self._stopped and len(self._last) > len(self._before):
            self._add(self._last[len(self._before) :])
        if not self._stopped:
            self.said, self._held = self.said + self._held, ""
        return self._stopped

    def _add(self, piece: str) -> None:
        text = self._held + piece
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.said, self._held, self._stopped = self.said + text[: min(found)], "", True
            return
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self.said += text[: len(text) - keep]
        self._held = text[len(text) - keep :]


CONTEXT = 16
"""Tokens of the prompt that the first ones of an answer are decoded with."""
LONGEST_CHARACTER = 64
"""Tokens that are decoded together, again for each that is added, in the hope of a whole character. It has four bytes,
so that what so many leave open is none."""


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if stop.startswith(text[-count:])), 0)
