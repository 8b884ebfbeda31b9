"""Continue a prompt with a trained model.

The model's generation_config.json says what is left out here; else temperature 0.8, top-p 0.95."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path

from megalite.commands.numbers import at_least, number
from megalite.commands.parser import VerbParser, add_layout, add_model, layout_of


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("--prompt", required=True)
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is a message, put as the chat template says"
    )
    parser.add_argument(
        "--max-tokens",
        type=at_least(1),
        help="of the answer (default: as the model says, else 128)",
    )
    parser.add_argument("--temperature", type=number(0), help="0 takes the likeliest token")
    parser.add_argument(
        "--top-k", type=at_least(0), help="only the k likeliest tokens; 0: no limit"
    )
    parser.add_argument(
        "--top-p",
        type=number(0, 1),
        help="only the likeliest tokens that together are as likely as this",
    )
    parser.add_argument(
        "--min-p",
        type=number(0, 1),
        help="only tokens at least this share as likely as the likeliest",
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before it; may be repeated"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--beams", type=at_least(1), help="beam search with so many (encoder-decoders)"
    )
    parser.add_argument(
        "--length-penalty",
        type=number(-math.inf),
        default=1.0,
        help="its power of the length (default: 1)",
    )
    add_layout(parser)
    parser.set_defaults(verb=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    """Print the answer to one prompt as it is generated."""
    from dataclasses import replace

    from megalite.comm.mesh import Launch, leave
    from megalite.data.chat import ChatTemplate
    from megalite.data.tokenizer import load_tokenizer
    from megalite.errors import ConfigError
    from megalite.infer.generate import Generator, find_model_on_ranks
    from megalite.models import model_config

    launch = Launch.from_environment()
    folder = find_model_on_ranks(arguments.model, launch)
    if folder != arguments.model and launch.rank == 0:
        print(f"{arguments.model}: {folder}", file=sys.stderr)  # beside the answer, not in it
    if model_config({"hf": str(folder)}).task == "seq2seq":
        return _generate_target(arguments, folder)
    if arguments.beams:
        raise ConfigError(f"--beams is for encoder-decoders; {folder} holds a decoder")
    if arguments.chat:
        # Fails before the weights are read, which takes long.
        ChatTemplate.of(folder, load_tokenizer(folder))
    generator = Generator.open(folder, num_slots=1, launch=launch, **layout_of(arguments))
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    said = arguments.prompt
    prompt = (
        generator.chat_ids([{"role": "user", "content": said}])
        if arguments.chat
        else generator.prompt_ids(said)
    )
    most = arguments.max_tokens
    # As many as fit behind the prompt, where the model itself names no number.
    most = generator.habits.most_tokens(len(prompt), 128) if most is None else most
    request = generator.request(prompt, most, replace(generator.sampling, **asked), arguments.stop)
    request = generator.as_chat(request) if arguments.chat else request
    for text in itertools.chain([] if arguments.chat else [said], generator.stream(request), "\n"):
        if launch.rank == 0:  # the other ranks compute the same
            # Flushed: an answer is read while it is made.
            print(text, end="", flush=True)
    leave()


def _generate_target(arguments: argparse.Namespace, folder: Path) -> None:
    """Print an encoder-decoder's target for the prompt, its source."""
    from dataclasses import replace

    from megalite.comm.mesh import Launch
    from megalite.errors import ConfigError
    from megalite.infer.seq2seq import Beams, TargetGenerator

    # Refused, not ignored: a target that does not stop where it should looks like the model's fault.
    # Each of several ranks would print the same target.
    num_ranks = max(arguments.tensor * arguments.pipeline, Launch.from_environment().world_size)
    if arguments.chat or arguments.stop or num_ranks > 1:
        raise ConfigError(
            "an encoder-decoder has no --chat and no --stop, and answers on one device"
        )
    generator = TargetGenerator.open(folder)
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sampling = replace(generator.habits.sampling, **asked)
    beams = Beams(arguments.beams, arguments.length_penalty) if arguments.beams else None
    most = arguments.max_tokens or generator.habits.most_tokens(0, 128)
    print(generator.answer([arguments.prompt], most, sampling, beams)[0])
