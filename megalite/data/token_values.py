"""Values of tokens, given a text of which parts have values.

The character offsets that tokenizers report are not always exact: those that fall back to bytes
give all bytes of a run of unknown characters the offsets of the whole run. So the tokens before a
part are identified by their ids: if the ids of the text before it are a prefix of the whole's ids,
they are exactly those tokens."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from megalite.data.tokenizer import HuggingFaceTokenizer

_NOWHERE = np.empty((0, 2), np.int64)


class Part(NamedTuple):
    """Holds a range of characters [start, stop) and its value."""

    start: int
    stop: int
    value: int


class Text(NamedTuple):
    """Holds the text of a row, and the parts of it that have values."""

    text: str
    parts: Sequence[Part]
    add_end: bool = False
    """End the text with the tokenizer's end-of-document token, which is learned."""
    first_only: bool = False
    """Only the first token of each part has its value."""
    add_begin: bool = False
    """Begin the text with whatever the tokenizer begins every text with, as prompts do later. A
    chat template writes that itself."""
    may_split: bool = False
    """No token may reach across the beginning of a part, so that the text before it has the same
    ids as alone. A chat has the ids of the whole text instead, as in transformers."""
    pair: str = ""
    """A second text behind it, with the same value."""
    lead: str = ""
    """A text before it, of which nothing is learned."""
    literal: Sequence[range] | None = None
    """Ranges of control tokens, ascending, that were not written by the chat template and are text.
    None if no template wrote the text."""


def token_values(tokenizer: HuggingFaceTokenizer, text: Text) -> tuple[list[int], np.ndarray]:
    """Return the ids of `text` and the value of each, [T]. A token that lies only partly in a part
    has its value."""
    if text.first_only:
        return _first_tokens(tokenizer, text)
    borders = sorted(
        {border for part in text.parts for border in part[:2] if 0 < border < len(text.text)}
    )
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
        # A tokenizer that prefixes every text with a space would change the text when it is encoded
        # in pieces.
        if tokenizer.decode(apart := list(itertools.chain(*pieces))) == tokenizer.decode(ids):
            ends = itertools.accumulate(map(len, pieces))
            ids, counts = apart, dict(zip([*_cuts(text)[1:]], ends, strict=True)) | {0: 0}
    values = np.zeros(len(ids), np.int64)
    places = (
        _places(tokenizer, text.text)
        if any(border not in counts for border in borders)
        else _NOWHERE
    )
    for part in text.parts:
        # A token reaches across the border. Offsets tell which, but it is none of those that the
        # text before has alone.
        first, last = counts.get(part.start), counts.get(part.stop)
        if first is None:
            first = max(
                same[part.start], int(np.searchsorted(places[:, 1], part.start, side="right"))
            )
        if last is None:
            last = max(same[part.stop], int(np.searchsorted(places[:, 0], part.stop, side="left")))
        values[first:last] = part.value
    return ids, values


def _windows(
    tokenizer: HuggingFaceTokenizer, text: str, ids: Sequence[int], borders: Sequence[int]
) -> list[tuple[int, int]]:
    """Return for each border a (character, token) position before it from which the text can be
    tokenized alone: the nearest landmark, or the beginning. This avoids tokenizing the whole text
    again per border."""
    found, place = [(0, 0)], 0
    for index, token in enumerate(ids):
        if landmark := tokenizer.landmarks.get(token):
            place = text.find(landmark, place)
            found.append((place, index))
            place += len(landmark)
    names = {tokenizer.landmarks[ids[index]] for _, index in found[1:]}
    # A landmark's text that did not become its token would shift all later positions: then use
    # none.
    if sum(map(text.count, names)) != len(found) - 1:
        return [(0, 0)] * len(borders)
    starts = [place for place, _ in found]
    return [found[max(bisect_left(starts, border) - 1, 0)] for border in borders]


def _first_tokens(tokenizer: HuggingFaceTokenizer, text: Text) -> tuple[list[int], np.ndarray]:
    """Return ids and values if only the first token of each part has its value."""
    ids, places = tokenizer.encode(text.text), _places(tokenizer, text.text)
    values = np.zeros(len(ids), np.int64)
    overlaps = places[1:, 0] < places[:-1, 1]
    is_shared = np.append(False, overlaps) | np.append(overlaps, False)
    for part in text.parts:
        first = int(np.searchsorted(places[:, 1], part.start, side="right"))
        last = int(np.searchsorted(places[:, 0], part.stop, side="left"))
        # Several tokens share offsets that begin before the part: these do not tell which of them
        # is the part's first.
        if first < last and is_shared[first] and places[first, 0] < part.start:
            before = tokenizer.encode(text.text[: part.start])
            first = max(first, _same(ids, before))
        values[first : first + (last > first)] = part.value
    return ids, values


def _cuts(text: Text) -> list[int]:
    """Return the positions at which the parts begin, with both ends of the text."""
    return sorted({0, len(text.text), *(part.start for part in text.parts)})


def _split(tokenizer: HuggingFaceTokenizer, text: Text) -> list[list[int]]:
    """Encode the text in pieces, split where parts begin."""
    return tokenizer.encode_batch([text.text[a:b] for a, b in itertools.pairwise(_cuts(text))])


def _places(tokenizer: HuggingFaceTokenizer, text: str) -> np.ndarray:
    """Return the character range [start, stop) of each token, [T, 2]."""
    return np.array(tokenizer.encode_with_offsets([text])[0][1], np.int64).reshape(-1, 2)


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the length of the common prefix of two lists of ids."""
    return next(
        (n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
