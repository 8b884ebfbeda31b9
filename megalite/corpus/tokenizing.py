"""Splits text into words and sentences for datatrove's rules.

datatrove's own tokenizers need spaCy or NLTK, and NLTK needs a download. The rules ask for less
than those know: how long words are, which repeat, where sentences end. Words here are Unicode's,
the same for every language with spaces.
"""

from __future__ import annotations

import re

from datatrove.utils.text import TERMINAL_PUNCTUATION
from datatrove.utils.word_tokenizers import WordTokenizer

# Letters and digits, with "don't" and "3.14" as one word; or a run of signs.
WORD = re.compile(r"\w+(?:['’]\w+|(?<=\d)[.,]\d+)*|[^\w\s]+")
_SIGNS = re.escape("".join(sorted(TERMINAL_PUNCTUATION)))
_CLOSING = r"[\"'”’)\]]*"
# Up to signs that end a sentence, with closing quotes, or to the end of a line. Possessive: a run of
# signs that ends nothing is passed over once, not from each of its signs again.
SENTENCE = re.compile(
    rf"[^\n](?:[^\n{_SIGNS}]++|[{_SIGNS}]++(?!{_CLOSING}+(?:\s|$)))*+(?:[{_SIGNS}]+{_CLOSING}|\n|$)\s*"
)


class Words(WordTokenizer):
    """Splits by regular expressions. All instances are equal, since datatrove caches words by the
    tokenizer."""

    def word_tokenize(self, text: str) -> list[str]:
        return WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in SENTENCE.finditer(text)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Words)

    def __hash__(self) -> int:
        return hash(Words)
