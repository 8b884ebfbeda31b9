"""Write a model as a Hugging Face folder, which transformers and vLLM open and from which `model:
{hf: FOLDER}` starts.

SOURCE is a run or a checkpoint of one, of which the optimizer state is left behind; a PEFT adapter,
which is merged into its model; a Hugging Face folder, to be written in another precision or other
files; or a checkpoint of Megatron-LM's (torch or torch_dist) of a model like Llama, from which
nothing pickled is run. With --experts, each MLP becomes a mixture of experts that begins as the
model is."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from megalite.checkpoint.convert import DTYPES, Model, open_source, write_model
from megalite.checkpoint.gguf_model import KINDS as GGUF_KINDS
from megalite.checkpoint.gguf_model import write_gguf
from megalite.checkpoint.megatron import find_megatron
from megalite.checkpoint.upcycle import Upcycling
from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser
from megalite.errors import ConfigError
from megalite.infer.generate import find_model


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path, help="a new folder")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the weights, rounded once (default: as stored)"
    )
    parser.add_argument(
        "--shard-gb", type=float, default=5.0, help="largest file (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab-size", type=at_least(1), help="of Megatron's: rows that are not padding"
    )
    parser.add_argument(
        "--ema",
        action="store_true",
        help="the average of the weights (optimizer.ema), not the last",
    )
    parser.add_argument(
        "--experts", type=at_least(2), help="make it a mixture of so many experts (upcycling)"
    )
    parser.add_argument(
        "--experts-per-token", type=at_least(1), default=2, help="of these (default: %(default)s)"
    )
    parser.add_argument(
        "--granularity", type=at_least(1), default=1, help="slices of an MLP (default: %(default)s)"
    )
    parser.add_argument(
        "--gguf",
        choices=GGUF_KINDS,
        metavar="TYPE",
        help="write the new file TARGET for llama.cpp instead, with matrices in one of "
        f"{', '.join(GGUF_KINDS)} (docs/quantization.md)",
    )
    parser.set_defaults(verb=_convert)


def _convert(args: argparse.Namespace) -> int:
    """Convert one model as the command line says; return the exit status."""
    if not args.shard_gb >= 1e-9:
        raise ConfigError(f"--shard-gb {args.shard_gb}: give a positive number")
    is_megatron = find_megatron(args.source)
    if args.vocab_size and not is_megatron:
        raise ConfigError(
            f"--vocab-size is for Megatron-LM's checkpoints, whose embeddings are padded; {args.source} is none"
        )
    source = args.source if is_megatron else find_model(args.source)
    model = open_source(source, args.vocab_size, args.ema)
    if args.experts:
        model = Upcycling(args.experts, args.experts_per_token, args.granularity).apply(model)
    if args.gguf:
        return _write_gguf(model, args)
    write_model(
        model, args.target, args.dtype, int(min(args.shard_gb, 10**6) * 10**9), Console(stderr=True)
    )
    print(f"{args.target}: {sum(weight.numel for weight in model.weights):,} parameters")
    return 0


def _write_gguf(model: Model, args: argparse.Namespace) -> int:
    """Write the file of `--gguf`, and print what is in it."""
    if args.dtype:
        raise ConfigError(f"--dtype {args.dtype} does not go with --gguf, whose TYPE says it")
    written = write_gguf(model, args.target, args.gguf)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in written.kinds.items())
    megabytes = args.target.stat().st_size / 1e6
    print(
        f"{args.target}: {megabytes:,.1f} MB; matrices: {kinds}; rounding changed {written.error:.2%} of their size"
    )
    return 0
