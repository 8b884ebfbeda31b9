"""Upload a model to the Hugging Face hub, or to a server that speaks its API (HF_ENDPOINT).

MODEL is a run, a checkpoint or a Hugging Face folder. Its weights, config, tokenizer, card
(README.md) and config.yaml are uploaded in one commit; what only a resumed training needs, as the
optimizer's state, stays. A repository that there is not yet is made, and is private unless --public
is given; that of an existing one stays as it is. The token is that of `hf auth login`, or
HF_TOKEN."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.parser import VerbParser


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument(
        "model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder"
    )
    parser.add_argument("name", metavar="OWNER/NAME", help="of the repository")
    parser.add_argument(
        "--public", action="store_true", help="a repository that is made is open to everybody"
    )
    parser.add_argument("--message", help="of the commit (default: what is uploaded)")
    parser.set_defaults(verb=_push)


def _push(arguments: argparse.Namespace) -> None:
    from megalite.checkpoint.push import push
    from megalite.infer.generate import find_model

    folder = find_model(arguments.model)
    print(push(folder, arguments.name, arguments.public, arguments.message))
