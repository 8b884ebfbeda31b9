"""Command line: `megalite VERB --help` describes each verb. Heavy imports wait until a verb needs
them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence

from megalite import __version__
from megalite.commands.parser import VerbParser, add_late
from megalite.runtime import error_file
from megalite.runtime.exit_codes import Exit, end_process, flush_output, killed_by, passes
from megalite.utils.secrecy import hide_secrets

VERBS = {
    "quickstart": "text, tokenizer, tokens, pretraining, sample, export, in minutes",
    "config": "show every key of a config, presets of models, a config to start from",
    "corpus": "clean, deduplicate and split raw text",
    "tokenizer": "train a tokenizer",
    "synthesize": "make training rows by a model behind an endpoint, and check them",
    "preprocess": "tokenize text, or rows of labelled data, into token files",
    "train": "train as a config says; run it alone, under torchrun or under srun",
    "launch": "train on this machine, or on plain hosts over ssh",
    "finetune": "finetune a model on rows of chats, completions, preferences or classes",
    "sweep": "search for a config's best settings; each trial is a run",
    "ladder": "train small models for several lengths, and foretell the loss of a large one",
    "job": None,  # for scripts: it is not listed
    "preflight": "look whether all nodes are fit for a run; start it as the run is",
    "plan": "predict memory, step time and MFU of a config on a cluster; find its best layout",
    "dryrun": "run the training program as ranks of a cluster that is not there: memory, messages, waits",
    "generate": "continue a prompt with a trained model",
    "fill": "have an encoder tell what stands in the gaps of texts",
    "embed": "make a vector of each text with an encoder",
    "classify": "tell classes of texts, a number for them, or labels of their words",
    "annotate": "write the rows of which a model is least certain for an annotation tool",
    "answer": "find the answers to questions in texts",
    "eval": "measure a trained model: held-out loss, tasks of lm-evaluation-harness, answers",
    "serve": "answer over HTTP as OpenAI's API does, with a page to talk to the model",
    "monitor": "watch a model in service by the log of its requests: drift, latencies, ratings, alarms",
    "retrain": "finetune the served model on new ratings, and serve the result if it is better",
    "chat": "talk to a model in the terminal",
    "average": "average the weights of checkpoints or models, or merge them by another method",
    "quantize": "write a model with the matrices of its layers in fewer bits",
    "prune": "write a model of which single weights, or whole parts, are left out",
    "convert": "write a model as a Hugging Face folder",
    "push": "upload a model to the Hugging Face hub",
    "inspect": "show what is in token files, or what a config makes of them",
    "trace": "say which text a step was trained on, or at which steps a text was",
    "forget": "take documents out of a run's data, and go back to before it was trained on them",
    "contamination": "look for evaluation texts in training data, and say when they are trained on",
    "runs": "list the runs in a folder: model, layout, steps, losses, state",
    "compare": "compare runs: curves, what they came to, settings that differ",
    "parity": "say whether two runs differ by more than rounding, and where first",
    "ops": "list what computes each fused operation on this machine, and why",
}
"""The verbs in the order of the help, with what each is for. The rest of a verb is in
`megalite/commands/`, in the file of its name."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb with the arguments `argv` (default: those of the process). Return the exit
    status, one of `exit_codes.py`. A user's mistake is explained without a traceback, and Ctrl-C is
    one line, also while libraries are imported."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _complain("interrupted\n")
        return _failed(killed_by(signal.SIGINT))


def _run(argv: Sequence[str] | None) -> int:
    parser = make_parser()
    arguments = parser.parse_args(argv)
    from megalite.checkpoint.tensors import CheckpointError, NotSaved
    from megalite.errors import ConfigError, DataError, NotFinite

    try:
        return arguments.verb(arguments) or Exit.DONE
    except (ConfigError, DataError, CheckpointError) as error:
        # A bad disk, unlike a mistake in the config, may be one rank's alone.
        rank = os.environ.get("RANK")
        _complain(f"error{f' on rank {rank}' if rank else ''}: {error}\n")
        error_file.leave(str(error))
        mistake = Exit.FAILED if passes(error) else Exit.MISTAKE
        mistake = Exit.BAD_NUMBERS if isinstance(error, NotFinite) else mistake
        return _failed(Exit.NOT_SAVED if isinstance(error, NotSaved) else mistake)
    except Exception as error:
        # Printed here, not by Python, to hide passwords in messages of libraries. The rank comes
        # first, as in torch's.
        rank = os.environ.get("RANK")
        _complain(textwrap.indent(traceback.format_exc(), f"[rank{rank}]: " if rank else ""))
        error_file.leave(f"{type(error).__name__}: {error}", traceback.format_exc())
        return _failed(Exit.FAILED)
    finally:
        flush_output()


def _failed(status: int) -> int:
    """Return `status`. In a distributed run, end the process with it at once: Python's normal exit
    may be aborted by threads of the process groups, and the launcher must learn this status."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized() and distributed.get_world_size() > 1:
        flush_output()
        end_process(status)
    return status


def _complain(text: str) -> None:
    """Write to stderr, with secrets hidden."""
    with contextlib.suppress(OSError):  # the full disk may be the log's own
        sys.stderr.write(hide_secrets(text))


def make_parser() -> VerbParser:
    """Return the parser of all verbs."""
    parser = VerbParser(
        prog="megalite",
        description="Train large language models, on a laptop or a cluster. `megalite VERB --help` describes a verb.",
    )
    parser.add_argument("--version", action="version", version=f"megalite {__version__}")
    verbs = parser.add_verbs()
    for name, help in VERBS.items():
        add_late(verbs, name, help)
    return parser
