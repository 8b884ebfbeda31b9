"""Write what a teacher says of a run's token files, so that a distillation needs no teacher in memory
(docs/distillation.md).

CONFIG is that of the distillation: objective.teacher is asked about data.train, on the layout of the
config, and the likeliest tokens behind each label go to the folder objective.teacher_logits. Run it
alone, under torchrun or under srun; killed and called again, it goes on."""

from __future__ import annotations

import argparse

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_config


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_config(parser, "objective.teacher_logits=data/web_teacher")
    parser.add_argument(
        "--count", type=at_least(1), default=64, metavar="K",
        help="likeliest tokens that are kept of each distribution (default: 64)",
    )  # fmt: skip
    parser.add_argument(
        "--precision", choices=("fp16", "fp32"), default="fp16", help="of log-probabilities (default: fp16)"
    )  # fmt: skip
    parser.set_defaults(verb=_make)


def _make(arguments: argparse.Namespace) -> None:
    from megalite.comm.mesh import Launch, leave
    from megalite.config_file import load_config
    from megalite.training.teacher_logits import make_teacher_logits

    config = load_config(arguments.config, arguments.overrides)
    folder = make_teacher_logits(config, arguments.count, arguments.precision)
    if Launch.from_environment().rank == 0:
        size = sum(path.stat().st_size for path in folder.glob("*.top"))
        print(f"wrote {folder}: {size:,} bytes of likeliest tokens")
    leave()
