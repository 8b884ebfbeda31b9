"""Tokenize text into Megatron's .bin/.idx files.

Inputs are JSON lines (plain, .gz, .zst), parquet, Arrow, plain text (a document each), folders and
globs of these. Lines that cannot be used are counted, reported and left out; the exit status is
then still 0.

Several jobs share the work by --shard 0/4, 1/4, …: each writes its part, keeps it if it is there
already, and the one that completes the last part joins them into the files that a single job would
have written. slurm/preprocess.sh runs them as a Slurm array.

With --format, inputs are rows of labelled data: JSON lines, JSON arrays, parquet, or folders of the
datasets library.

    chat             {"messages": [{"role": …, "content": …}, …]}, or ShareGPT's conversations; the answers are learned,
                     but for those of "weight": 0. Beside them may be "tools" and "system"
    completion       {"prompt": …, "completion": …}; the completion is learned
    preference       {"prompt": …, "chosen": …, "rejected": …}, texts or messages, for DPO; sides may be the answers
                     alone or begin with the prompt, which is then taken once
    seq2seq          {"source": …, "target": …}, for encoder-decoders; the target is learned
    classification   {"text": …, "label": …}
    labels           {"tokens": [words], "labels": [one for each]}, or ner_tags
    answers          {"question": …, "context": …, "answers": {"text": […], "answer_start": […]}}, as SQuAD has them

Or they are what an annotation tool exports: Label Studio (JSON, JSON-MIN), Argilla (records as
JSON) or doccano (JSONL, a file for each annotator). Several annotators' agreement is told, and what
they disagree on is decided by --disagreement (docs/annotation.md).

They become P.bin, .idx and .json, and P.mask, which says what is learned from each token. A row
that cannot be used is an error that shows it, and nothing is written, unless --bad-rows allows for
it."""

from __future__ import annotations

import argparse
import os
import signal

from rich.console import Console

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, not_empty
from megalite.data.annotations import RULES
from megalite.data.blocks import Shard
from megalite.data.formats import FORMATS, PROBLEMS, Settings
from megalite.data.preprocess import preprocess
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError

MOST_SHARDS = 99_999


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted globs")
    parser.add_argument(
        "--output-prefix",
        type=not_empty,
        required=True,
        help="P of P_KEY_document.bin, .idx and .json; with --format, of P.bin",
    )
    parser.add_argument(
        "--tokenizer",
        type=not_empty,
        required=True,
        help="folder with tokenizer.json, or a tokenizer file",
    )
    parser.add_argument(
        "--json-keys", "--json-key", nargs="+", default=["text"], metavar="KEY",
        help="keys or columns of texts, which become token files each (default: text)",
    )  # fmt: skip
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=None,
        help="end each document with the end-of-document token (default: where the tokenizer names one)",
    )  # fmt: skip
    parser.add_argument(
        "--prepend-bos", action=argparse.BooleanOptionalAction, default=None,
        help="begin each document with the BOS token (default: where the tokenizer has every text begin with it)",
    )  # fmt: skip
    # A job may have fewer cores than its machine; only Linux can say so.
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    parser.add_argument(
        "--workers",
        type=at_least(1),
        default=cores,
        help="threads or processes (default: one a core)",
    )
    parser.add_argument(
        "--exact", action="store_true",
        help="take Hugging Face's tokenizers, not gigatoken, which is faster and compared with them on samples",
    )  # fmt: skip
    parser.add_argument(
        "--split-sentences", action="store_true",
        help="keep the borders of sentences, which objective.sentences needs; documents have the same tokens",
    )  # fmt: skip
    parser.add_argument(
        "--shard", type=_shard, metavar="I/N", help="only part I (from 0) of N of the input"
    )
    _add_rows(parser)
    parser.set_defaults(verb=_preprocess)


def _add_rows(parser: VerbParser) -> None:
    """Add the arguments for rows of labelled data."""
    parser.add_argument(
        "--format", choices=FORMATS, help="the inputs are rows of labelled data, such as these"
    )
    parser.add_argument(
        "--last-only", action="store_true", help="of a chat, learn the last answer only"
    )
    parser.add_argument(
        "--labels",
        nargs="+",
        default=[],
        help="names of the classes, in order (default: those there)",
    )
    parser.add_argument(
        "--problem",
        choices=PROBLEMS,
        default="single_label",
        help="of --format classification (default: %(default)s)",
    )
    parser.add_argument(
        "--bad-rows", type=at_least(0), default=0, metavar="N", help="rows that may be left out"
    )
    parser.add_argument(
        "--disagreement", choices=RULES, default="vote",
        help="of an export: what most annotators say, without ties, or only what all say (default: %(default)s)",
    )  # fmt: skip


def _preprocess(args: argparse.Namespace) -> int:
    """Tokenize the inputs as the command line says; return the exit status."""
    # Whatever differs from its default: of options that do nothing here the user would not hear.
    for_text = (
        args.exact
        or args.shard
        or args.split_sentences
        or args.json_keys != ["text"]
        or args.append_eod is not None
        or args.prepend_bos is not None
    )
    if args.format and for_text:
        raise ConfigError(
            "--append-eod, --prepend-bos, --exact, --shard, --split-sentences and --json-keys are for plain text, "
            "not for --format"
        )
    # A cancelled job ends like an interrupted one: with nothing left behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console(stderr=True)
    if args.format:
        settings = Settings(
            args.format, args.tokenizer, args.last_only, tuple(args.labels), args.problem
        )
        result = preprocess_rows(
            args.input,
            args.output_prefix,
            settings,
            args.workers,
            args.bad_rows,
            console,
            args.disagreement,
        )
        print(result)
        return 0
    for key in args.json_keys:
        result = preprocess(
            args.input,
            args.output_prefix,
            args.tokenizer,
            json_key=key,
            append_eod=args.append_eod,
            workers=args.workers,
            console=console,
            exact=args.exact,
            shard=args.shard,
            prepend_bos=args.prepend_bos,
            by_sentence=args.split_sentences,
        )
        print(result)
    return 0


def _shard(text: str) -> Shard:
    """Parse I/N. Raises ArgumentTypeError unless 0 <= I < N <= MOST_SHARDS."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count) <= MOST_SHARDS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not I/N with I from 0 to N - 1, as in 0/4, and N up to {MOST_SHARDS:,}"
        )
    return Shard(int(index), int(count))
