"""Find where sentences of a text end. Imports no torch: those who split texts are many processes."""

from __future__ import annotations

import re

ENDS = re.compile(
    r"(?P<mark>[.!?…]+)[\"'”’)\]]*(?=\s+[\"'“‘(\[]*[A-Z0-9À-ÖØ-ÞΑ-ΩА-Я])|[。！？]+[」』”]*|\n\s*(?=\S)"
)
"""Ends of sentences: signs before white space and what may begin one, signs of Chinese and Japanese,
and ends of lines."""
SHORT = re.compile(r"\b([A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|z\.B|bzw|ca)$")
"""Ends of what stands before a full stop that ends no sentence: initials and abbreviations."""
BEFORE_NUMBER = re.compile(r"\b(No|Nr|Fig|Vol|pp?)$")
"""Likewise where a number follows."""


def split_sentences(text: str) -> list[str]:
    """Cut a text behind each of its sentences. White space between two belongs to the second, as
    byte-level BPE has it; put together they are the text."""
    cuts = [0]
    for found in ENDS.finditer(text):
        if found["mark"] == "." and _is_short(text, cuts[-1], found.start()):
            continue
        end = found.end() if found[0].strip() else found.start()
        if text[cuts[-1] : end].strip():
            cuts.append(end)
    pieces = [text[first:last] for first, last in zip(cuts, [*cuts[1:], len(text)], strict=True)]
    # What ends a text after its last sentence is none.
    if len(pieces) > 1 and not pieces[-1].strip():
        pieces[-2:] = [pieces[-2] + pieces[-1]]
    return pieces


def _is_short(text: str, start: int, stop: int) -> bool:
    """Return whether the full stop at `stop`, of a sentence that begins at `start`, belongs to an
    abbreviation."""
    # What is looked for at the end is short: not all of a long sentence is gone through for it.
    start = max(start, stop - 8)
    if SHORT.search(text, start, stop):
        return True
    is_number = text[stop + 1 : stop + 3].strip()[:1].isdecimal()
    return is_number and BEFORE_NUMBER.search(text, start, stop) is not None
