"""The steps of the quickstart: text, tokenizer, tokens, pretraining on 2 ranks, report, sample,
export. Each is a verb of the command line, shown as one would type it."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megalite.errors import ConfigError
from megalite.runtime.exit_codes import Exit
from megalite.runtime.processes import handling
from megalite.utils.resources import configs_dir


@dataclass(frozen=True)
class Model:
    """One of the models the quickstart trains."""

    name: str
    """Of its config, its run and its folder of data."""
    tokenizer: str
    sample: tuple[str, ...]
    """The verb that shows what it has learned, with RUN for the run."""


MODELS = {
    "decoder": Model(
        "quickstart",
        "bpe",
        (
            "generate",
            "RUN",
            "--prompt",
            "def read(self, size):",
            "--max-tokens",
            "96",
            "--temperature",
            "0.6",
        ),
    ),
    "bert": Model(
        "quickstart-bert",
        "wordpiece",
        ("fill", "RUN", "def read([MASK], size):", "for line [MASK] lines:", "[MASK] os"),
    ),
    "t5": Model(
        "quickstart-t5",
        "t5",
        (
            "generate",
            "RUN",
            "--prompt",
            "    def read(<extra_id_0>, size):\n        <extra_id_1> None",
            "--max-tokens",
            "12",
        ),
    ),
}


class Stopped(Exception):
    """A step ended with another exit status than 0."""

    def __init__(self, status: int):
        super().__init__(f"exit status {status}")
        self.status = status


def quickstart(model: Model, folder: Path) -> int:
    """Do all steps in a folder, and return the exit status of the first that fails.

    A step that is done already is left out, and a run that was stopped goes on. Raises
    ConfigError where the folder cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--dir {folder}: {error.strerror}") from None
    try:
        make_tokens(model, folder)
        return _train_and_show(model, folder)
    except Stopped as stopped:
        return stopped.status


def make_tokens(model: Model, folder: Path) -> None:
    """Write text, tokenizer and token files. What is made gets its name when it is whole: a start
    that was interrupted must not leave a part for the next."""
    from megalite.quickstart.corpus import write_corpus

    data = Path("data", model.name)
    say("1. text: the Python standard library's own source files")
    if not (folder / data / "valid.jsonl").exists():
        part = folder / data / "text.part"
        print(write_corpus(part))
        for split in ("train", "valid"):
            (part / f"{split}.jsonl").replace(folder / data / f"{split}.jsonl")
        part.rmdir()
    say("2. tokenizer")
    if not (folder / data / "tokenizer").exists():
        part = data / "tokenizer.part"
        # Of a start that was interrupted: a tokenizer is not written over another.
        shutil.rmtree(folder / part, ignore_errors=True)
        options = ("--vocab-size", "4096", "--type", model.tokenizer)
        text = str(data / "train.jsonl")
        run_verb(folder, "tokenizer", "train", "--input", text, "--output", str(part), *options)
        (folder / part).replace(folder / data / "tokenizer")
    say("3. tokens")
    for split in ("train", "valid"):
        # .idx is written last, so that the other files are whole where it is.
        if not (folder / data / f"{split}_text_document.idx").exists():
            run_verb(
                *(folder, "preprocess", "--input", str(data / f"{split}.jsonl")),
                *("--output-prefix", str(data / split), "--tokenizer", str(data / "tokenizer")),
            )


def _train_and_show(model: Model, folder: Path) -> int:
    """Train, report, sample and export; return 1 where the model has learned too little."""
    # Two CPU ranks, whatever else this machine has.
    config = shortest_of(configs_dir() / f"{model.name}.yaml", folder)
    launch = ["launch", "--ranks", "2", str(config)]
    # The config asks for it offline, which needs the package.
    if importlib.util.find_spec("wandb") is None:
        launch.append("observe.wandb.mode=disabled")
    say("4. pretraining: 2 ranks share every matrix (tensor 2) ...")
    run_verb(folder, *launch, "parallel.tensor=2", "train.stop_at=200")
    say("   ... and go on from the checkpoint as 2 data-parallel ranks (data 2)")
    # Another layout on purpose: that a run goes on with it is what megalite is about.
    run_verb(folder, *launch, "parallel.tensor=1", "train.micro_batch_size=4")
    from megalite.quickstart.report import report

    run = Path("runs", model.name)
    if status := report(folder / run, folder):
        return status
    say("5. a sample")
    run_verb(folder, *(str(run) if word == "RUN" else word for word in model.sample))
    say("6. the model as a Hugging Face folder")
    exported = run / "exported"
    if not (folder / exported).exists():
        run_verb(folder, "convert", str(run), str(exported))
    if importlib.util.find_spec("transformers") is None:
        print("not opened with transformers: pip install 'megalite[hf]' brings it")
        return Exit.DONE
    from megalite.infer.check_hf import compare

    return compare(folder / exported)


def say(text: str) -> None:
    """Print the heading of a step."""
    print(f"\n== {text}", flush=True)


def shortest_of(path: Path, folder: Path) -> Path:
    """Return `path` relative to `folder` where it lies below it."""
    folder = folder.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def run_verb(folder: Path, *words: str) -> None:
    """Run a verb in a folder, with signals passed on to it. Raises Stopped where it fails."""
    print(f"$ megalite {shlex.join(words)}", flush=True)
    # The same everywhere, and within minutes: two CPU ranks, though there are GPUs.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    # Before the process is there, a signal ends this one as always.
    process = subprocess.Popen(
        [sys.executable, "-m", "megalite", *words], cwd=folder, env=environment
    )

    def pass_on(number: int, frame: FrameType | None) -> None:
        # Once it has ended, its number may be that of another process.
        if process.poll() is None:
            process.send_signal(number)

    with handling((signal.SIGINT, signal.SIGTERM), pass_on):
        status = process.wait()
    if status:
        # Negative: ended by a signal, which shells count from 128 on.
        raise Stopped(status if status > 0 else 128 - status)
