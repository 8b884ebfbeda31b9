"""Command line: `megalite VERB --help` describes each verb. Heavy imports wait until a verb needs
them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from megalite import __version__
from megalite.commands.parser import VerbParser, add_late
from megalite.errors import CheckpointError, ConfigError, DataError
from megalite.runtime import error_file
from megalite.runtime.exit_codes import (
    Exit,
    end_process,
    in_a_line,
    is_explained,
    killed_by,
    status_of,
)
from megalite.runtime.streams import flush_output, is_unread, open_streams
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
    "teacher-logits": "write what a teacher says of a run's token files, for a distillation without it",
    "finetune": "finetune a model on rows of chats, completions, preferences or classes",
    "sweep": "search for a config's best settings; each trial is a run",
    "ladder": "train small models for several lengths, and predict the loss of a large one",
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
    status, one of `exit_codes.py`."""
    asked = argparse.Namespace()

    def verb() -> int | None:
        # Also Ctrl-C among the imports of a verb, which begin with its arguments, is one line.
        make_parser().parse_args(argv, asked)
        return asked.verb(asked)

    return explained(verb, lambda: getattr(asked, "interrupted", "interrupted"))


def explained(
    work: Callable[[], int | None], interrupted: Callable[[], str] = lambda: "interrupted"
) -> int:
    """Do the work of a command, and return its exit status: what it returns itself, or 0. A user's
    mistake is one line on stderr, without a traceback, and so is Ctrl-C, as `interrupted` tells
    it."""
    open_streams()
    try:
        return _explained(work)
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            _complain(f"{interrupted()}\n")
        return _failed(killed_by(signal.SIGINT))


def _explained(work: Callable[[], int | None]) -> int:
    try:
        status = work() or Exit.DONE
        # A table of which the end does not reach its file is no success.
        sys.stdout.flush()
        return status
    except (ConfigError, DataError, CheckpointError) as error:
        # A bad disk, unlike a mistake in the config, may be one rank's alone.
        rank = os.environ.get("RANK")
        _complain(f"error{f' on rank {rank}' if rank else ''}: {error}\n")
        error_file.leave(str(error))
        return _failed(status_of(error))
    except Exception as error:
        if isinstance(error, BrokenPipeError) and is_unread():
            return killed_by(signal.SIGPIPE)  # without a word, as other programs end
        # Printed here, not by Python, to hide passwords in messages of libraries. The rank comes
        # first, as in torch's.
        rank = os.environ.get("RANK")
        if isinstance(error, OSError) and is_explained(error) and rank is None:
            _complain(f"error: {in_a_line(error)}\n")
            return status_of(error)
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
