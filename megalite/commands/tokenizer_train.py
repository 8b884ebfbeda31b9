"""Train a tokenizer on text files: JSON lines, parquet, Arrow, plain text, or folders and globs of
these."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from typing import get_args

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, not_empty
from megalite.data.tokenizer_training import Kind, train_tokenizer
from megalite.runtime.processes import handling

MOST_TOKENS = 2**22
"""Limit on the vocabulary. tokenizers takes memory for all of it at once, and aborts where there is
not enough."""


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted globs")
    parser.add_argument(
        "--output",
        type=not_empty,
        required=True,
        help="folder to write; AutoTokenizer.from_pretrained loads it",
    )
    parser.add_argument("--vocab-size", type=at_least(1, MOST_TOKENS), required=True)
    parser.add_argument("--type", choices=get_args(Kind), default="bpe")
    parser.add_argument(
        "--json-key", default="text", help="key or column of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--max-bytes",
        type=at_least(1),
        default=256_000_000,
        help="text to train on, from the start (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--special-tokens", nargs="+", default=[], metavar="TOKEN",
        help="more special tokens, such as '<|user|>'; fim, chatml and reserved:N are groups of them",
    )  # fmt: skip
    parser.set_defaults(verb=_train)


def _train(args: argparse.Namespace) -> int:
    """Train a tokenizer as the command line says; return the exit status."""
    start = time.monotonic()
    # The training libraries ignore Ctrl-C until they are done, and nothing is written before: end
    # at once.
    with handling([signal.SIGINT], signal.SIG_DFL):
        tokenizer, report = train_tokenizer(
            args.input,
            args.output,
            args.vocab_size,
            args.type,
            args.json_key,
            args.max_bytes,
            args.special_tokens,
        )
    if str(report):
        print(report, file=sys.stderr)
    # Not refused: a small text has no more pairs, and is often a try.
    if tokenizer.vocab_size < args.vocab_size:
        print(
            f"warning: the vocabulary came out at {tokenizer.vocab_size:,} tokens, not {args.vocab_size:,}: the text "
            f"has no more pairs that occur often; train on more text, or give model.vocab_size={tokenizer.vocab_size} "
            "(a larger one leaves rows that nothing trains)",
            file=sys.stderr,
        )
    print(
        f"{args.output}: {tokenizer.vocab_size:,} tokens of type {args.type} from {report.num_documents:,} "
        f"documents in {time.monotonic() - start:.1f} s"
    )
    return 0
