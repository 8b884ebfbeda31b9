"""Look at how a model does in service, by the folder of `megalite serve --request-log`: drift of lengths,
scores, languages and topics against a reference, latencies, errors and ratings, as a page and as alarms
(docs/monitoring.md).

The last --window of the log is compared with what is before it, or with --reference. Topics are there only
where the server logged texts. Exit status 80 says that an alarm stands."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megalite.commands.numbers import number
from megalite.commands.parser import VerbParser
from megalite.monitor.records import duration

WEBHOOK_VARIABLE = "MEGALITE_WEBHOOK"


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("log", type=Path, help="folder of a request log, or one of its files")
    parser.add_argument(
        "--window",
        type=duration,
        default="24h",
        help="time up to the newest request that is judged, such as 90m or 7d (default: 24h)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="LOG",
        help="log to compare with (default: what is before)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("monitor"),
        metavar="DIR",
        help="folder for the page and for which alarms stand (default: %(default)s)",
    )
    parser.add_argument(
        "--webhook",
        metavar="URL",
        help=f"address that is told of alarms that begin or end (default: {WEBHOOK_VARIABLE}, if set)",
    )
    parser.add_argument(
        "--psi",
        type=number(0),
        default=0.25,
        help="population stability index from which on drift is an alarm (default: %(default)s)",
    )
    parser.add_argument(
        "--max-errors",
        type=number(0, 1),
        default=0.01,
        help="share of requests that the server may fail (default: %(default)s)",
    )
    parser.add_argument(
        "--max-p95",
        type=number(0),
        metavar="S",
        help="seconds within which 95%% of requests shall end",
    )
    parser.add_argument(
        "--max-drop",
        type=number(0, 1),
        default=0.1,
        help="loss of good ratings, as a share of all, that is an alarm (default: %(default)s)",
    )
    parser.add_argument(
        "--compare",
        nargs="?",
        const="arm",
        choices=("arm", "version"),
        help="compare the two models of `megalite serve --challenger` instead, or two versions one after the other",
    )
    parser.set_defaults(verb=_monitor)


def _monitor(arguments: argparse.Namespace) -> int:
    from megalite.monitor.arms import compare
    from megalite.monitor.report import Limits
    from megalite.monitor.run import monitor, told
    from megalite.runtime.exit_codes import Exit
    from megalite.utils.pages import aligned

    if arguments.compare:
        table = compare(arguments.log, arguments.compare, arguments.window, arguments.output)
        print(*aligned(table), f"{arguments.output / 'compare.html'}: the same", sep="\n")
        return Exit.DONE
    limits = Limits(arguments.psi, arguments.max_errors, arguments.max_p95, arguments.max_drop)
    webhook = arguments.webhook or os.environ.get(WEBHOOK_VARIABLE)
    report, lines = monitor(
        arguments.log, arguments.reference, arguments.window, limits, arguments.output, webhook
    )
    print(*told(report, lines), sep="\n")
    # A status of its own: cron and Kubernetes tell an alarm from a failure by it.
    return Exit.ALARM if report.alarms else Exit.DONE
