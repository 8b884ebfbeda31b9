"""Have an encoder tell which tokens stand in the gaps of texts."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser, add_model, add_texts


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    add_texts(parser, "with [MASK] for each gap", "a text a line; .jsonl")
    parser.add_argument(
        "--top-k", type=int, default=5, help="guesses for each gap (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object for each text")
    parser.set_defaults(verb=_fill)


def _fill(arguments: argparse.Namespace) -> None:
    """Print the likeliest tokens for each gap."""
    import json

    from megalite.errors import ConfigError
    from megalite.infer.encode import Encoder, read_texts

    texts = [*arguments.texts, *read_texts(arguments.input)]
    if not texts or arguments.top_k < 1:
        raise ConfigError("give a TEXT with a [MASK], or --input FILE, and --top-k of at least 1")
    filled = Encoder.open(arguments.model, fills=True).fill(texts, arguments.top_k)
    for text, gaps in zip(texts, filled, strict=True):
        if arguments.json:
            print(
                json.dumps(
                    {"text": text, "gaps": [[guess._asdict() for guess in gap] for gap in gaps]}
                )
            )
            continue
        print(text)
        for gap in gaps:
            print("  " + "  ".join(f"{guess.text} {guess.probability:.3f}" for guess in gap))
