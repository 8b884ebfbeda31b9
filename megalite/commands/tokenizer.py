"""Train a tokenizer on text files: a folder that transformers' AutoTokenizer opens."""

from __future__ import annotations

from megalite.commands.parser import VerbParser, add_late


def add_arguments(parser: VerbParser) -> None:
    """Add the verbs below `megalite tokenizer`."""
    verbs = parser.add_verbs()
    add_late(verbs, "train", "train a tokenizer on text files", "tokenizer_train")
