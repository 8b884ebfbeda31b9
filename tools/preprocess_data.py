"""Tokenize text into Megatron's .bin/.idx files. See megalite/data/preprocess.py.

Inputs are JSON lines (plain, .gz, .zst), parquet, plain text (a document each), folders and globs of these. Lines that
cannot be used are counted, reported and left out; the exit status is then still 0."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from rich.console import Console

from megalite.data.indexed import DataError
from megalite.data.preprocess import preprocess


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", nargs="+", required=True, help="files, folders or quoted globs")
    parser.add_argument("--output-prefix", required=True, help="P of P_KEY_document.bin, .idx and .json")
    parser.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, or a tokenizer file")
    parser.add_argument("--json-key", default="text", help="key or column of the text (default: %(default)s)")
    parser.add_argument("--append-eod", action="store_true", help="end each document with the end-of-document token")
    # A job may have fewer cores than its machine; only Linux can say so.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument("--workers", type=int, default=cores, help="processes (default: one a core)")
    args = parser.parse_args()
    # A job that is cancelled ends as one that is interrupted: with nothing left behind.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
    console = Console(stderr=True)
    try:
        result = preprocess(
            args.input,
            args.output_prefix,
            args.tokenizer,
            json_key=args.json_key,
            append_eod=args.append_eod,
            workers=args.workers,
            console=console,
        )
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
