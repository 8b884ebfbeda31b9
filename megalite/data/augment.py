"""Augmentation of labelled texts (EDA, Wei and Zou 2019): words change places, are left out, are
replaced by synonyms, or misspelt; or words of a group of people become those of another. What is
done to a row is a function of the seed, the row and the epoch: the same on every layout and after
every resume, and other in every epoch.

Legend: n = samples, W = tokens of a window."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.config import AugmentConfig
from megalite.data.counterfactual import counterfactual, drawn_for, read_word_pairs
from megalite.data.dataset import Windows
from megalite.data.order import Int64s
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.utils.keys import key_of
from megalite.utils.outside import read_text

Random = npt.NDArray[np.float64]
Synonyms = Mapping[str, tuple[str, ...]]
_WORD = re.compile(r"\s*\S+")
_LETTER = re.compile(r"[^\W_]")
_CORE = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)
"""A word, with the signs around it."""
LEAST_LETTERS = 3
"""Letters below which a word is not misspelt: it would become another."""


class Room(NamedTuple):
    """Holds how many tokens a sample has room for."""

    all: int
    source: int | None = None
    """Those of an encoder, of which nothing is learned: only these are changed then. None: all may
    be."""


class Augmentation:
    """Changes the texts of rows in samples. Raises DataError for a list of synonyms or pairs
    that cannot be read."""

    def __init__(self, config: AugmentConfig, tokenizer: Tokenizer, room: Room, seed: int) -> None:
        self._config, self._tokenizer, self._room, self._seed = config, tokenizer, room, seed
        self._synonyms = read_synonyms(config.synonym_file) if config.synonym_file else {}
        self._counterparts = read_word_pairs(config.pair_file) if config.pair_file else {}
        named = (tokenizer.eod_id, tokenizer.begin_id, tokenizer.mask_id)
        ids = {*tokenizer.special_ids, *(each for each in named if each is not None)}
        self._special = np.array(sorted(ids), np.int64)

    def apply(
        self, windows: Windows, rows: Sequence[Int64s], epochs: Int64s
    ) -> tuple[Windows, Int64s]:
        """Return other windows [n, W], and the column of `windows` that each of their tokens was in,
        [n, W]; of a text that was changed its first tokens in their order, and -1 for the rest.

        `rows` are the numbers of each sample's documents in their token file, `epochs` [n] those of
        the samples. A text that becomes longer than the sample has room for loses its end."""
        assert windows.documents is not None
        assert windows.mask is not None
        made = Windows(
            windows.tokens.copy(),
            windows.filled.copy(),
            windows.documents.copy(),
            windows.mask.copy(),
            None if windows.removed is None else windows.removed.copy(),
        )
        origin = np.full(windows.tokens.shape, -1)
        for number, (of_sample, epoch) in enumerate(zip(rows, epochs.tolist(), strict=True)):
            columns = self._sample(windows, number, of_sample, epoch)
            tokens, origin_of, kept = (np.concatenate(x) for x in zip(*columns, strict=True))
            count = len(tokens)
            made.tokens[number], made.tokens[number, :count] = 0, tokens
            made.filled[number], origin[number, :count] = count, origin_of
            # What belongs to a token goes with it; a new one has that of its text.
            for x, now in zip(windows[2:], made[2:], strict=True):
                if x is not None and now is not None:
                    now[number], now[number, :count] = 0, x[number, kept]
            assert made.documents is not None
            made.documents[number, count:] = len(of_sample)
        return made, origin

    def _sample(
        self, windows: Windows, number: int, rows: Int64s, epoch: int
    ) -> list[tuple[Int64s, Int64s, Int64s]]:
        """Return the pieces of a sample: tokens, the columns that they were in or -1, and columns
        whose document and label they have."""
        assert windows.documents is not None
        assert windows.mask is not None
        count = int(windows.filled[number])
        tokens, documents, mask = (
            x[number, :count] for x in (windows.tokens, windows.documents, windows.mask)
        )
        is_special = np.isin(tokens, self._special)
        # A text goes on while document, label and kind of token are the same.
        changes = [np.diff(x) != 0 for x in (documents, mask, is_special.astype(np.int64))]
        borders = [0, *(np.flatnonzero(np.logical_or.reduce(changes)) + 1).tolist(), count]
        parts = list(itertools.pairwise(borders))
        may = [
            not is_special[start] and (self._room.source is None or mask[start] == 0)
            for start, _ in parts
        ]
        # Of what is left each text has its share: none depends on what becomes of the others.
        room = self._room.all - count
        if self._room.source is not None:
            room = min(room, self._room.source - int((mask == 0).sum()))
        room //= max(sum(may), 1)
        randoms: dict[int, np.random.Generator] = {}
        config, pieces = self._config, []
        # One stream of random numbers for a row, however many texts it has and whatever is packed
        # beside it: hence by row and epoch, never by sample.
        for (start, stop), may_change in zip(parts, may, strict=True):
            was = columns = np.arange(start, stop)
            new = tokens[start:stop]
            if may_change:
                row = int(rows[documents[start]])
                if row not in randoms:
                    key = key_of(self._seed, "augment", row, epoch)
                    randoms[row] = np.random.Generator(np.random.Philox(key))
                swap = drawn_for(config.counterfactual, self._seed, row, epoch)
                changed = self._changed(new, randoms[row], swap)
                if changed is not None:
                    new = changed[: len(columns) + room]
                    was = np.full(len(new), -1)
                    same = min(len(new), len(columns))
                    was[:same] = columns[:same]
                    columns = np.full(len(new), start)
            pieces.append((new, was, columns))
        return pieces

    def _changed(
        self, tokens: Int64s, random: np.random.Generator, swap: int | None
    ) -> Int64s | None:
        """Return the tokens of a text after changes, None if there are none. `swap` is the seed of
        the row's counterfactual, None where it is not to be one."""
        text = self._tokenizer.decode(tokens.tolist())
        changed = text if swap is None else counterfactual(text, self._counterparts, swap)
        if random.random() < self._config.share:
            changed = self.change(changed, random)
        if changed == text:
            return None
        return np.array(self._tokenizer.encode(changed), np.int64) if changed.strip() else None

    def change(self, text: str, random: np.random.Generator) -> str:
        """Return a text after changes. At least one word stays."""
        config, parts = self._config, _WORD.findall(text)
        words = [part.lstrip() for part in parts]
        gaps = [part[: len(part) - len(word)] for part, word in zip(parts, words, strict=True)]
        # Some tokenizers put spaces around signs, which are no words for that.
        places = [n for n, word in enumerate(words) if _LETTER.search(word)]
        if not places:
            return text
        # All numbers at once, so that one kind of change does not alter what another draws.
        drawn = random.random((9, len(places)))
        for n, place in enumerate(places):
            if drawn[0, n] < config.synonyms:
                words[place] = self._synonym(words[place], drawn[1, n])
            if drawn[2, n] < config.noise:
                words[place] = misspelt(words[place], drawn[3:6, n])
        for n in np.flatnonzero(drawn[6] < config.swap).tolist():
            one, other = places[n], places[int(drawn[7, n] * len(places))]
            words[one], words[other] = words[other], words[one]
        leaves = drawn[8] < config.delete
        leaves[int(np.argmax(drawn[8]))] = False
        left_out = {places[n] for n in np.flatnonzero(leaves).tolist()}
        kept = [n for n in range(len(words)) if n not in left_out]
        # The first word begins as the text did, whichever it is.
        begin = [gaps[0] + words[kept[0]], *(gaps[n] + words[n] for n in kept[1:])]
        return "".join(begin) + text[sum(map(len, parts)) :]

    def _synonym(self, word: str, drawn: float) -> str:
        """Return another word for this one, written as it is; itself if the list has none."""
        before, core, after = _split(word)
        others = self._synonyms.get(core.lower())
        if not others:
            return word
        other = others[int(drawn * len(others))]
        if core.isupper() and len(core) > 1:
            other = other.upper()
        elif core[:1].isupper():
            other = other[:1].upper() + other[1:]
        return before + other + after

    def identity(self) -> list[Any]:
        """Return what decides what it does, for a fingerprint."""
        settings = self._config.model_dump(mode="json", exclude={"synonym_file", "pair_file"})
        lists = (self._synonyms, self._counterparts)
        listed = json.dumps([sorted(each.items()) for each in lists])
        digest = hashlib.blake2b(listed.encode(), digest_size=16).hexdigest()
        return ["augment", settings, digest, *self._room, self._seed]


def _split(word: str) -> tuple[str, str, str]:
    """Return the signs before a word, the word, and those behind it."""
    found = _CORE.fullmatch(word)
    assert found is not None  # it takes any text
    return found[1], found[2], found[3]


def misspelt(word: str, drawn: Random) -> str:
    """Return a word with two letters exchanged, one left out, doubled, or replaced by another of
    its letters. `drawn` [3] decides which of these, where, and by which letter."""
    before, core, after = _split(word)
    if len(core) < LEAST_LETTERS:
        return word
    kind, place = int(drawn[0] * 4), int(drawn[1] * (len(core) - 1))
    one, other = core[place], core[place + 1]
    # Letters of the word itself: whatever the script, they are of it.
    letter = core[int(drawn[2] * len(core))]
    new = (other + one, other, one + one + other, letter + other)[kind]
    return before + core[:place] + new + core[place + 2 :] + after


def read_synonyms(path: Path) -> Synonyms:
    """Read a list of synonyms: words of a line, parted by commas, stand for one another. Lines that
    begin with # are comments. Raises DataError."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
        words = [word.strip() for word in line.split(",") if word.strip()]
        if not words or line.startswith("#"):
            continue
        if len(words) < 2:
            raise DataError(
                f"data.augment.synonym_file = {str(path)!r}: line {number} has {words[0]!r} alone; a line holds words "
                "that stand for one another, parted by commas"
            )
        for word in words:
            others = (other for other in words if other.lower() != word.lower())
            found.setdefault(word.lower(), []).extend(others)
    if not found:
        raise DataError(f"data.augment.synonym_file = {str(path)!r} has no words")
    return {word: tuple(dict.fromkeys(others)) for word, others in found.items()}
