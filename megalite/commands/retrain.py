"""Finetune the served model on new ratings and corrections, and serve the result if it is better by a
stated margin (docs/retraining.md).

CONFIG names the link that is served, the files of ratings, the run's config and what the model was
trained on before. A round that was killed goes on where it was. Exit status 75: it was asked to stop."""

from __future__ import annotations

import argparse

from megalite.commands.parser import VerbParser, add_config


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "min_rows=50", help="YAML file; see configs/retrain/chat.yaml")
    interrupted = "interrupted; the same command goes on from here"
    parser.set_defaults(verb=_retrain, interrupted=interrupted)


def _retrain(arguments: argparse.Namespace) -> int:
    from megalite.retrain.config import load_retrain_config
    from megalite.retrain.run import retrain

    config = load_retrain_config(arguments.config, arguments.overrides)
    # Flushed: a round takes long, and its log is read meanwhile.
    return retrain(config, lambda line: print(line, flush=True))
