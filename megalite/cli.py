"""The verbs: `megalite VERB --help` says more about each. Heavy imports wait until a verb needs them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit status: 0, or 2 for a mistake of the user's, which is explained without a
    traceback."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes positional arguments in one go: overrides that stand behind an option are left over.
    if rest and not (hasattr(arguments, "overrides") and all("=" in word and word[0] != "-" for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    from megalite.checkpoint.tensors import CheckpointError
    from megalite.config import ConfigError
    from megalite.data.indexed import DataError

    try:
        arguments.verb(arguments)
    except (ConfigError, DataError, CheckpointError) as error:
        rank = os.environ.get("RANK")  # a mistake in the config is every rank's, a bad disk may be one rank's alone
        print(f"error{f' on rank {rank}' if rank else ''}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megalite", description="Train large language models, on a laptop or a cluster."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train as a config says; run it alone, under torchrun or under srun")
    _add_config(train)
    train.add_argument("--print-plan", action="store_true", help="show what follows from the config, and stop")
    train.set_defaults(verb=_train)

    ranks = verbs.add_parser("ranks", help="print how many ranks a config needs at least")
    _add_config(ranks)
    ranks.set_defaults(verb=_ranks)

    generate = verbs.add_parser("generate", help="continue a prompt with a trained model")
    generate.add_argument("model", type=Path, help="a run, a checkpoint of one, or a Hugging Face folder")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, help="0: no limit")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)
    generate.set_defaults(verb=_generate)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as train.steps=100")


def _train(arguments: argparse.Namespace) -> None:
    from megalite.config_file import load_config

    config = load_config(arguments.config, arguments.overrides)
    if arguments.print_plan:
        from megalite.mesh import Launch
        from megalite.models import weight_table
        from megalite.plan import make_plan, smallest_world

        launch = Launch.from_environment()
        world_size = launch.world_size if launch.world_size > 1 else smallest_world(config)
        if launch.rank == 0:
            print(make_plan(config, weight_table(config.model), world_size).describe())
        return
    from megalite.mesh import leave
    from megalite.train import train

    train(config)
    leave()


def _ranks(arguments: argparse.Namespace) -> None:
    from megalite.config_file import load_config
    from megalite.plan import smallest_world

    print(smallest_world(load_config(arguments.config, arguments.overrides)))


def _generate(arguments: argparse.Namespace) -> None:
    from megalite.infer.generate import Sampling, generate_text, open_model

    model, tokenizer = open_model(arguments.model)
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    print(arguments.prompt, end="", flush=True)
    for text in generate_text(model, tokenizer, arguments.prompt, arguments.max_tokens, sampling):
        print(text, end="", flush=True)
    print()
