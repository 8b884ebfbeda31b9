"""Values of the tokens of a text of which parts have values.

The places that tokenizers give for their tokens are not exact everywhere: those that fall back to bytes give all bytes
of a run of unknown characters the place of the whole run. What comes before a part is therefore told by its ids: where
they begin the whole's, they are exactly the tokens before the part."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizer import HuggingFaceTokenizer

_NOWHERE = np.empty((0, 2), np.int64)


class Part(NamedTuple):
    start: int
    stop: int
    value: int


class Text(NamedTuple):
    """Of a row, with the parts that have values."""

    text: str
    parts: Sequence[Part]
    add_end: bool = False
    """It is to end with the tokenizer's end-of-document token, which is learned."""
    first_only: bool = False
    """Of each part, only the first token has the value."""
    add_begin: bool = False
    """It is to begin with what the tokenizer has begin every text, as whoever asks the model does; a chat template
    writes that itself."""
    may_split: bool = False
    """A token may not reach across the beginning of a part, so that what comes before it has the ids that it has
    alone. Of a chat, the ids are those of the whole text, as transformers has it."""
    literal: Sequence[range] | None = None
    """Where control tokens stand, ascending, that are not the chat template's, and are text. None where no template
    wrote the text."""


def token_values(tokenizer: HuggingFaceTokenizer, text: Text) -> tuple[list[int], np.ndarray]:
    """Return the ids of a text and the value of each, [T]. A token that lies in a part only partly has its value."""
    if text.first_only:
        return _first_tokens(tokenizer, text)
    borders = sorted({border for part in text.parts for border in part[:2] if 0 < border < len(text.text)})
    ids = tokenizer.encode(text.text)
    windows = list(zip(borders, _windows(tokenizer, text.text, ids, borders), strict=True))
    before = tokenizer.encode_batch([text.text[place:border] for border, (place, _) in windows])
    same = {
        border: index + _same(ids[index : index + len(some)], some)
        for (border, (_, index)), some in zip(windows, before, strict=True)
    }
    counts = {
        border: same[border]
        for (border, (_, index)), some in zip(windows, before, strict=True)
        if same[border] == index + len(some)
    }
    counts |= {0: 0, len(text.text): len(ids)}
    if text.may_split and any(part.start not in counts for part in text.parts):
        pieces = _split(tokenizer, text)
        # Where a tokenizer has a space begin every text, pieces of one would be another text.
        if tokenizer.decode(apart := list(itertools.chain(*pieces))) == tokenizer.decode(ids):
            ends = itertools.accumulate(map(len, pieces))
            ids, counts = apart, dict(zip([*_cuts(text)[1:]], ends, strict=True)) | {0: 0}
    values = np.zeros(len(ids), np.int64)
    places = _places(tokenizer, text.text) if any(border not in counts for border in borders) else _NOWHERE
    for part in text.parts:
        # Where a token reaches across, places tell which one, though none of those that are the same without it.
        first, last = counts.get(part.start), counts.get(part.stop)
        if first is None:
            first = max(same[part.start], int(np.searchsorted(places[:, 1], part.start, side="right")))
        if last is None:
            last = max(same[part.stop], int(np.searchsorted(places[:, 0], part.stop, side="left")))
        values[first:last] = part.value
    return ids, values


def _windows(
    tokenizer: HuggingFaceTokenizer, text: str, ids: Sequence[int], borders: Sequence[int]
) -> list[tuple[int, int]]:
    """Of each border, a place before it from which on the text may be tokenized alone, and the number of the token that
    begins there: the nearest landmark, or the beginning."""
    found, place = [(0, 0)], 0
    for index, token in enumerate(ids):
        if landmark := tokenizer.landmarks.get(token):
            place = text.find(landmark, place)
            found.append((place, index))
            place += len(landmark)
    names = {tokenizer.landmarks[ids[index]] for _, index in found[1:]}
    if sum(map(text.count, names)) != len(found) - 1:
        return [(0, 0)] * len(borders)
    starts = [place for place, _ in found]
    return [found[max(bisect_left(starts, border) - 1, 0)] for border in borders]


def _first_tokens(tokenizer: HuggingFaceTokenizer, text: Text) -> tuple[list[int], np.ndarray]:
    ids, places = tokenizer.encode(text.text), _places(tokenizer, text.text)
    values = np.zeros(len(ids), np.int64)
    overlaps = places[1:, 0] < places[:-1, 1]
    is_shared = np.append(False, overlaps) | np.append(overlaps, False)
    for part in text.parts:
        first = int(np.searchsorted(places[:, 1], part.start, side="right"))
        last = int(np.searchsorted(places[:, 0], part.stop, side="left"))
        # Several tokens have a place that begins before the part: it says of none whether it is the part's.
        if first < last and is_shared[first] and places[first, 0] < part.start:
            before = tokenizer.encode(text.text[: part.start])
            first = max(first, _same(ids, before))
        values[first : first + (last > first)] = part.value
    return ids, values


def _cuts(text: Text) -> list[int]:
    return sorted({0, len(text.text), *(part.start for part in text.parts)})


def _split(tokenizer: HuggingFaceTokenizer, text: Text) -> list[list[int]]:
    return tokenizer.encode_batch([text.text[a:b] for a, b in itertools.pairwise(_cuts(text))])


def _places(tokenizer: HuggingFaceTokenizer, text: str) -> np.ndarray:
    """[T, 2]: the characters [start, stop) of each token."""
    return np.array(tokenizer.encode_with_offsets([text])[0][1], np.int64).reshape(-1, 2)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids both begin with."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
