"""Continue a prompt with a trained model.

The model's generation_config.json says what is left out here; else temperature 0.8, top-p 0.95."""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megalite.commands.numbers import at_least, number
from megalite.commands.parser import VerbParser, add_kv_cache, add_layout, add_model, layout_of

if TYPE_CHECKING:
    from megalite.infer.answer import Request
    from megalite.infer.beams import Beams
    from megalite.infer.sampling import Sampling


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
        "--beams", type=at_least(2), help="beam search with so many, which draws nothing"
    )
    parser.add_argument(
        "--length-penalty",
        type=number(-math.inf),
        help="with --beams: its power of the length (default: 1)",
    )
    parser.add_argument(
        "--early-stopping",
        choices=("true", "false", "never"),
        help="with --beams: end once so many have ended (true), once the best running one is no better than "
        "these (false, the default), or once none could become better (never)",
    )
    parser.add_argument(
        "--answers", type=at_least(1), default=1, help="several: the best beams, or drawn ones"
    )
    add_kv_cache(parser)
    add_layout(parser)
    parser.set_defaults(verb=_generate)


def _generate(arguments: argparse.Namespace) -> None:
    """Print the answer to one prompt as it is generated."""
    from dataclasses import replace

    from megalite.comm.mesh import Launch, leave
    from megalite.data.chat import ChatTemplate
    from megalite.data.tokenizer import load_tokenizer
    from megalite.infer.generate import Generator, check_keeps_bits, find_model_on_ranks
    from megalite.models import model_config

    launch = Launch.from_environment()
    folder = find_model_on_ranks(arguments.model, launch)
    if folder != arguments.model and launch.rank == 0:
        print(f"{arguments.model}: {folder}", file=sys.stderr)  # beside the answer, not in it
    beams = _beams_of(arguments)
    task = model_config({"hf": str(folder)}).task
    if arguments.kv_cache:
        check_keeps_bits(folder, task)
    if task == "seq2seq":
        return _generate_targets(arguments, folder, beams)
    if arguments.chat:
        # Fails before the weights are read, which takes long.
        ChatTemplate.of(folder, load_tokenizer(folder))
    num_slots = beams.width if beams else min(arguments.answers, 8)
    kept, layout = arguments.kv_cache, layout_of(arguments)
    generator = Generator.open(folder, num_slots=num_slots, launch=launch, kv_cache=kept, **layout)
    sampling = _sampling_of(arguments, generator.sampling)
    said = arguments.prompt
    prompt = (
        generator.chat_ids([{"role": "user", "content": said}])
        if arguments.chat
        else generator.prompt_ids(said)
    )
    most = arguments.max_tokens
    # As many as fit behind the prompt, where the model itself names no number.
    most = generator.habits.most_tokens(len(prompt), 128) if most is None else most
    request = replace(generator.request(prompt, most, sampling, arguments.stop), beams=beams)
    request = generator.as_chat(request) if arguments.chat else request
    before = "" if arguments.chat else said
    if arguments.answers > 1:
        requests = _several(request, arguments.answers)
        found = [before + answer.text for answer in generator.answer(requests)]
        pieces = iter([_numbered(found)])
    else:
        pieces = itertools.chain([before], generator.stream(request))
    for text in itertools.chain(pieces, "\n"):
        if launch.rank == 0:  # the other ranks compute the same
            # Flushed: an answer is read while it is made.
            print(text, end="", flush=True)
    leave()


def _beams_of(arguments: argparse.Namespace) -> Beams | None:
    """Return what is asked of beam search; None if nothing. Raise ConfigError for options that the
    other way of choosing tokens has."""
    from megalite.errors import ConfigError
    from megalite.infer.beams import Beams, check_beams

    if not arguments.beams:
        for name in ("length_penalty", "early_stopping"):
            if getattr(arguments, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is for beam search: give --beams, too"
                )
        return None
    for name in ("temperature", "top_k", "top_p", "min_p"):
        if getattr(arguments, name):
            raise ConfigError(
                f"--{name.replace('_', '-')} is for tokens that are drawn, and --beams draws none: leave one out"
            )
    penalty, stopping = arguments.length_penalty, arguments.early_stopping
    early = stopping if stopping == "never" else stopping == "true"
    beams = Beams(arguments.beams, 1.0 if penalty is None else penalty, early)
    check_beams(beams, arguments.answers)
    return beams


def _sampling_of(arguments: argparse.Namespace, usual: Sampling) -> Sampling:
    """Return how tokens are chosen: as asked for, else as the model's folder says."""
    from dataclasses import replace

    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    asked = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    return replace(usual, **asked)


def _several(request: Request, count: int) -> list[Request]:
    """Return requests for several answers: of one search, or with a seed each."""
    from dataclasses import replace

    if request.beams:
        return [replace(request, place=place) for place in range(count)]
    first = request.sampling
    samplings = [replace(first, seed=(first.seed + place) % 2**63) for place in range(count)]
    return [replace(request, sampling=each) for each in samplings]


def _numbered(texts: Sequence[str]) -> str:
    """Return several answers as a text, each with its number; one alone as it is."""
    if len(texts) == 1:
        return texts[0]
    return "\n".join(f"[{number}] {text}" for number, text in enumerate(texts, 1))


def _generate_targets(arguments: argparse.Namespace, folder: Path, beams: Beams | None) -> None:
    """Print an encoder-decoder's targets for the prompt, its source."""
    from megalite.comm.mesh import Launch
    from megalite.errors import ConfigError
    from megalite.infer.seq2seq import TargetGenerator

    # Refused, not ignored: a target that does not stop where it should looks like the model's fault.
    # Each of several ranks would print the same target.
    num_ranks = max(arguments.tensor * arguments.pipeline, Launch.from_environment().world_size)
    if arguments.chat or arguments.stop or num_ranks > 1:
        raise ConfigError(
            "an encoder-decoder has no --chat and no --stop, and answers on one device"
        )
    generator = TargetGenerator.open(folder)
    sampling = _sampling_of(arguments, generator.habits.sampling)
    most = arguments.max_tokens or generator.habits.most_tokens(0, 128)
    found = generator.answer([arguments.prompt], most, sampling, beams, arguments.answers)
    print(_numbered(found))
