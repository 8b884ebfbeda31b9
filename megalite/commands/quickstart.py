"""Do the main job from one end to the other on two CPU ranks, in some minutes: text, tokenizer, tokens,
pretraining, plot, sample, Hugging Face folder.

It trains a decoder, with `bert` an encoder that fills gaps, with `t5` an encoder-decoder that tells
hidden spans; with `finetune` a base model learns to answer, to prefer short answers and to tell
classes, and is merged, measured and served.

The text is the Python standard library's own source. Run it again and it goes on where it was;
delete runs/quickstart (or runs/quickstart-bert, -t5, -sft, -dpo, -classes) to train anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser
from megalite.quickstart.run import MODELS, quickstart


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("model", nargs="?", choices=[*MODELS, "finetune"], default="decoder")
    parser.add_argument(
        "--dir", type=Path, default=Path(), help="where data/ and runs/ are made (default: here)"
    )
    parser.set_defaults(verb=_quickstart)


def _quickstart(arguments: argparse.Namespace) -> int:
    """Do the steps; return the exit status."""
    if arguments.model == "finetune":
        from megalite.quickstart.finetune import finetune

        return finetune(arguments.dir)
    return quickstart(MODELS[arguments.model], arguments.dir)
