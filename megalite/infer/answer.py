"""The state of one generated answer: its tokens, the text that is already certain, and why
generation ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megalite.infer.beams import Beams
from megalite.infer.sampling import Sampling

Finish = Literal["stop", "length", "cancelled", "time", "failed", "not_finite"]
"""Why an answer ended. `stop`: an end token or a stop string. `length`: its `max_tokens`, or the
model's capacity. `cancelled`: the caller gave it up, or the server stopped. `time`: the server's
time limit. `failed`: the model raised an error. `not_finite`: logits are NaN or infinite, so that
there is no next token."""


@dataclass(frozen=True)
class Request:
    """Holds what one answer is asked for: prompt ids, length limit, sampling settings and stop
    conditions."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Stop strings: the answer ends before the first that appears."""
    num_logprobs: int | None = None
    """Also return each token's logprob, and those of this many likeliest tokens. None: no
    logprobs."""
    ends: frozenset[int] = frozenset()
    """Token ids that end this answer, in addition to those that end every answer."""
    scored: bool = False
    """Add up the log probabilities of the answer's tokens."""
    beams: Beams | None = None
    """Search for the answer with so many beams; None: choose one token after another."""
    place: int = 0
    """Of the answers that the beams find, the best at 0. Those of one search follow each other."""
    plain: bool = False
    """The text is meant for people: decode it without control tokens."""


@dataclass(frozen=True)
class Choice:
    """Holds one chosen token with its logprob. Probabilities are the model's own, before
    temperature and other processing."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, the likeliest first."""


@dataclass(eq=False)
class Answer:
    """Holds an answer during generation: its request, text stream, tokens so far, and reason to
    finish."""

    request: Request
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    """One entry per token, if the request asks for logprobs."""
    finish: Finish | None = None
    logprob: float = 0.0
    """Sum of its tokens' log probabilities, if the request is scored."""
    others: list[Answer] = field(default_factory=list)
    """Further answers of the same search by beams, which this one, the best, leads."""

    def take_all(self, tokens: Sequence[int], ends: frozenset[int], room: int) -> None:
        """Take all tokens of an answer that is found as a whole, and finish it. Arguments are as
        for `take`."""
        for count, token in enumerate(tokens):
            if self.finish is None:
                self.take(token, ends, room - count)
        self.end("stop")

    def take(self, token: int, ends: frozenset[int], room: int) -> None:
        """Append the next `token` and finish the answer if it ends there.

        `ends` are the ids that end it; an end token is not kept. `room` counts the tokens by which
        the sequence can still grow, this one included."""
        if token in ends:
            self.end("stop")
            return
        self.tokens.append(token)
        # A stop string in the last token that is allowed counts as a stop, not as too long.
        if self.stream.push(token):
            self.end("stop")
        elif len(self.tokens) >= self.request.max_tokens or room <= 1:
            self.end("length")

    def end(self, why: Finish) -> None:
        """Finish the answer for the reason `why`. The first reason stays, but a stop string found
        in the held-back text beats `length`."""
        if self.finish is None:
            came_to_stop = self.stream.close()
            self.finish = "stop" if came_to_stop and why == "length" else why

    @property
    def text(self) -> str:
        """Return the text as far as it is certain, without what a stop string may still remove."""
        return self.stream.said


def link(answers: Sequence[Answer]) -> None:
    """Put answers of one search by beams together; each leads those of further places behind it."""
    lead = None
    for answer in answers:
        if answer.request.place == 0:
            lead = answer
        elif lead is not None:
            lead.others.append(answer)


class TextStream:
    """Decodes a sequence's tokens to text piece by piece.

    A piece never ends inside a character, nor where a stop string may have begun."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int],
        stop: Sequence[str] = (),
    ):
        # Tokens are decoded together with the ones before them, because some tokenizers put a space
        # between two words. Not with all of them, or each token would cost more than the one
        # before.
        self._decode, self._stop = decode, [text for text in stop if text]
        # Tokens [_shown, _decoded) have been said; they are decoded again with each new one, and
        # what is longer than their own text is new.
        self._ids, self._shown, self._decoded = list(prompt[-CONTEXT:]), 0, len(prompt[-CONTEXT:])
        self._before = self._last = decode(self._ids)
        self._held, self.said, self._stopped = "", "", False
        self._taken = 0

    def push(self, token: int) -> bool:
        """Decode one more `token`. Return whether a stop string has appeared."""
        self._ids.append(token)
        self._last = self._decode(self._ids[self._shown :])
        # The replacement character means that bytes of a character are still missing: wait for the
        # next token.
        if self._last.endswith("\ufffd") and len(self._ids) - self._decoded < LONGEST_CHARACTER:
            return False
        self._add(self._last[len(self._before) :])
        # The window moves on: only the last piece is decoded again with the next token.
        self._shown, self._decoded = self._decoded, len(self._ids)
        self._before = self._last = self._decode(self._ids[self._shown :])
        return self._stopped

    def take(self) -> str:
        """Return the text that has become certain since the last call."""
        piece, self._taken = self.said[self._taken :], len(self.said)
        return piece

    def close(self) -> bool:
        """Release the held-back text, since nothing follows. Return whether a stop string has
        appeared."""
        if not self._stopped and len(self._last) > len(self._before):
            self._add(self._last[len(self._before) :])
        if not self._stopped:
            self.said, self._held = self.said + self._held, ""
        return self._stopped

    def _add(self, piece: str) -> None:
        """Append decoded text. Cut it at the first stop string, and hold back an end that may begin
        one."""
        text = self._held + piece
        # What has been said cannot be part of a match: its ends that might were held back.
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.said, self._held, self._stopped = self.said + text[: min(found)], "", True
            return
        # What may be the beginning of a stop string is held back until later text decides.
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self.said += text[: len(text) - keep]
        self._held = text[len(text) - keep :]


CONTEXT = 16
"""Number of prompt tokens that the first tokens of an answer are decoded together with."""
LONGEST_CHARACTER = 64
"""Stop waiting for a complete character after this many tokens, all decoded again for each one
added. A character has at most four bytes, so that bytes still incomplete by then are none."""


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of `text` may be the beginning of the stop string
    `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if stop.startswith(text[-count:])), 0)
