"""What `megalite eval` has for tests of bias."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import layout_of
from megalite.errors import ConfigError


def add_bias_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments for tests of bias."""
    parser.add_argument(
        "--bias",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="tests of bias: CrowS-Pairs .csv, WinoBias .txt or .dev, BBQ .jsonl, templates .yaml; for classifiers "
        "templates, and rows with a label and a group, .jsonl",
    )
    parser.add_argument(
        "--corpus-report",
        type=Path,
        metavar="REPORT.json",
        help="of `megalite corpus`: its mentions of groups are set beside what --bias finds",
    )
    parser.add_argument(
        "--groups",
        type=Path,
        help="words of these groups (default: configs/corpus/groups.yaml)",
    )


def asks_for_bias(arguments: argparse.Namespace) -> bool:
    """Return whether bias is to be measured. Raise ConfigError for options that do not go
    together."""
    if not arguments.bias:
        if arguments.corpus_report or arguments.groups:
            raise ConfigError("--corpus-report and --groups go with --bias FILE")
        return False
    if arguments.tasks or arguments.data or arguments.tokens or arguments.chat:
        raise ConfigError("--bias goes with none of --tasks, --data, --tokens and --chat")
    # Words of groups are counted in the corpus; the tests themselves have their own.
    if arguments.groups and not arguments.corpus_report:
        raise ConfigError("--groups goes with --corpus-report REPORT.json")
    return True


def measure_bias(arguments: argparse.Namespace) -> None:
    """Print what a model says to tests of bias."""
    from megalite.bias.run import Asked, evaluate_bias
    from megalite.comm.mesh import leave

    asked = Asked(**{name: getattr(arguments, name) for name in Asked._fields})
    evaluate_bias(arguments.model, asked, arguments.output, arguments.slots, **layout_of(arguments))
    leave()
