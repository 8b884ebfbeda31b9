"""Counterfactual texts: words of one group of people become those of another, "she" "he" and "aunt"
"uncle", in all of a text at once (Zhao et al. 2018; Lu et al. 2020). Trained on as often as the texts
themselves, they teach a model nothing about which group does what."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megalite.errors import DataError
from megalite.utils.keys import key_of
from megalite.utils.outside import read_text, shown

Counterparts = Mapping[str, tuple[str, ...]]
"""What stands for a word, in lower case, in the text's counterfactual."""
_WORD = re.compile(r"[^\W\d_]+")


def read_word_pairs(path: Path) -> Counterparts:
    """Read pairs of words, one a line, parted by a comma; each stands for the other. A word may be in
    several: "her" has "him" and "his". Lines that begin with # are comments. Raise DataError that
    names the line."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path, DataError).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        words = [word.strip().lower() for word in line.split(",")]
        if len(words) != 2 or words[0] == words[1] or not all(map(_WORD.fullmatch, words)):
            raise DataError(
                f"{path}, line {number}: {shown(line)} is no pair of words such as she, he"
            )
        for word, other in (words, reversed(words)):
            found.setdefault(word, []).append(other)
    if not found:
        raise DataError(f"{path} has no pairs of words")
    return {word: tuple(dict.fromkeys(others)) for word, others in found.items()}


def drawn_for(share: float, seed: int, row: int, epoch: int) -> int | None:
    """Return the seed of a row's counterfactual in an epoch, in all of the row's texts; None for the
    rows that stay as they are, all but a `share` of them."""
    key = key_of(seed, "counterfactual", row, epoch)
    # 53 bits are what a float holds.
    return key if (key >> 11) * 2.0**-53 < share else None


def counterfactual(text: str, counterparts: Counterparts, seed: int) -> str:
    """Return a text with every word that has a counterpart replaced by it, written as the word is.
    Which one of several it is, is a function of `seed` and the word's number among those replaced."""
    number = 0

    def other(found: re.Match[str]) -> str:
        nonlocal number
        word = found[0]
        others = counterparts.get(word.lower())
        if not others:
            return word
        # By its number, not by the word: one "her" may become "him" and the next "his".
        chosen = others[key_of(seed, number) % len(others)]
        number += 1
        if word.isupper() and len(word) > 1:
            return chosen.upper()
        return chosen[:1].upper() + chosen[1:] if word[:1].isupper() else chosen

    return _WORD.sub(other, text)
