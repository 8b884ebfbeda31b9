"""Write a model with the matrices of its layers in fewer bits: a Hugging Face folder in
compressed-tensors' formats, or bitsandbytes', which transformers and vLLM open, as do generate,
serve, eval and convert here."""

from __future__ import annotations

import argparse
from pathlib import Path

from megalite.commands.numbers import at_least
from megalite.commands.parser import VerbParser, add_calibration, add_model


def add_arguments(parser: VerbParser) -> None:
    """Add the arguments of the verb."""
    add_model(parser)
    parser.add_argument("output", type=Path, help="a new Hugging Face folder")
    parser.add_argument(
        "--scheme", choices=("w8a8", "w4a16", "fp8", "fp8_block", "nf4"), default="w8a8",
        help="int8 with inputs in int8; 4-bit integers in groups; fp8 by row, or in blocks; bitsandbytes' NF4 "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--method", choices=("rtn", "gptq", "awq", "smoothquant"), default="rtn",
        help="to the nearest number; or, by --data, made up for errors, or inputs scaled first (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--group",
        type=at_least(1),
        default=128,
        help="columns of a w4a16 scale, size of a block (default: 128)",
    )
    add_calibration(parser)
    parser.set_defaults(verb=_quantize)


def _quantize(arguments: argparse.Namespace) -> None:
    """Write a quantised model, and say what it costs."""
    from rich.console import Console

    from megalite.checkpoint.convert import check_new, write_model
    from megalite.comm.mesh import Launch, leave
    from megalite.errors import ConfigError
    from megalite.infer.generate import find_model
    from megalite.kernels.schemes import make_scheme
    from megalite.quantization.layers import LayerRuns
    from megalite.quantization.run import quantised

    folder, runs, launch = find_model(arguments.model), None, Launch.from_environment()
    check_new(arguments.output)
    if launch.world_size > 1 and not arguments.data:
        raise ConfigError("ranks share what --data calibrates: give --data, or run one process")
    if arguments.data:
        runs = LayerRuns.from_tokens(folder, arguments.data, arguments.rows, arguments.length)
        runs.rank, runs.ranks = launch.rank, launch.world_size
    model, report = quantised(
        folder, make_scheme(arguments.scheme, arguments.group), arguments.method, runs
    )
    launch.join()
    if launch.rank:
        assert model.encode is not None
        # All that rank 0 does but writing: its matrices are changed here.
        for weight in model.weights:
            model.encode(weight, weight.to_hf(model.read(weight)))
        return leave()
    write_model(model, arguments.output, console=Console(stderr=True))
    # Without data there are no outputs to compare.
    of = "outputs" if runs else "weights"
    print(
        f"{arguments.output}: {len(report.errors)} matrices, mean error of their {of} {report.mean_error:.2e}"
    )
    if runs and report.perplexities:
        before, after = report.perplexities
        print(f"perplexity of {len(runs.held_out)} rows held out: {before:.4f} → {after:.4f}")
    leave()
