"""Clean, deduplicate and split raw text as a config says.

Interrupted, it goes on where it was when the same command is given again. Bad input is counted and
reported in the output's report.json and report.html; the exit status is then still 0, unless no
document is left."""

from __future__ import annotations

import argparse
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from megalite.commands.parser import VerbParser, add_config
from megalite.errors import ConfigError, DataError


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "language.min_score=0.5", help="YAML file, such as configs/corpus/web.yaml")
    interrupted = "interrupted; the same command goes on from here"
    parser.set_defaults(verb=_prepare, interrupted=interrupted)


def _prepare(args: argparse.Namespace) -> int:
    """Prepare the corpus as the command line says; return the exit status. Raises DataError where
    no document is left."""
    # A cancelled job ends like an interrupted one.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    start = time.monotonic()
    try:
        # Imported only once the arguments are known to be right: these import datatrove.
        from megalite.corpus.config import load_corpus_config
        from megalite.corpus.run import prepare_corpus

        config = load_corpus_config(args.config, args.overrides)
        report = prepare_corpus(config, Console(stderr=True))
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'megalite[corpus]'") from None
    if report is None:
        print(
            f"submitted; {config.output}/report.html comes at the end, and the same command resubmits what failed"
        )
        return 0
    # The first stage only reads: what it kept is all there was.
    read, seconds = report["stages"][0]["kept"], time.monotonic() - start
    kept = {side: f"{count['documents']:,} {side}" for side, count in report["splits"].items()}
    print(
        f"{config.output}: {', '.join(kept.values())} documents out of {read['documents']:,} "
        f"({read['num_bytes'] / 1e6:,.1f} MB) in {seconds:.1f} s; see {config.output}/report.html"
    )
    if not any(count["documents"] for count in report["splits"].values()):
        raise DataError(
            f"no document is left{_most_dropped(report['stages'])}; {config.output}/report.html says what was left "
            "out, and why"
        )
    return 0


def _most_dropped(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return which stage dropped most documents, and for which reason, in words; empty where none
    did."""
    counts = {
        (stage["name"], reason): dropped["documents"]
        for stage in stages
        for reason, dropped in stage["dropped"].items()
    }
    if not counts:
        return ""
    (stage, reason), count = max(counts.items(), key=lambda item: item[1])
    return f": {stage} dropped {count:,} ({reason})"
