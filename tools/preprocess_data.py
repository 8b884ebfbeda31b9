"""Tokenize text into Megatron's .bin/.idx files. See megalite/data/preprocess.py.

Inputs are JSON lines (plain, .gz, .zst), parquet, Arrow, plain text (a document each), folders and globs of these.
Lines that cannot be used are counted, reported and left out; the exit status is then still 0.

Several jobs share the work by --shard 0/4, 1/4, …: each writes its part, keeps it if it is there already, and the one
that completes the last part joins them into the files that a single job would have written. slurm/preprocess.sh runs
them as a Slurm array."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from rich.console import Console

from megalite.data.blocks import Shard
from megalite.data.preprocess import preprocess
from megalite.errors import DataError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted globs")
    parser.add_argument("--output-prefix", required=True, help="P of P_KEY_document.bin, .idx and .json")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, or a tokenizer file")
    parser.add_argument(
        "--json-keys", "--json-key", nargs="+", default=["text"], metavar="KEY",
        help="keys or columns of texts, which become token files each (default: text)",
    )  # fmt: skip
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    # A job may have fewer cores than its machine; only Linux can say so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="threads or processes (default: one a core)")
    parser.add_argument(
        "--exact", action="store_true",
        help="take Hugging Face's tokenizers, not gigatoken, which is faster and compared with them on samples",
    )  # fmt: skip
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="only part I (from 0) of N of the input")
    args = parser.parse_args()
    # A job that is cancelled ends as one that is interrupted: with nothing left behind.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    console = Console(stderr=True)
    try:
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
            )
            print(result)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _shard(text: str) -> Shard:
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1, as in 0/4")
    return Shard(int(index), int(count))


if __name__ == "__main__":
    sys.exit(main())
