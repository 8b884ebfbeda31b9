"""The folder of a user who has trained a model, and commands typed in it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megalite.cli import main
from megalite.utils.resources import configs_dir

CONFIG = """
run: {name: my}
model: {preset: llama-1m, vocab_size: 300, num_layers: 2}
data: {train: [{path: data_text_document}], split: [90, 10, 0], seq_length: 32, tokenizer: tokenizer}
train: {steps: 2, global_batch_size: 4, precision: fp32}
optimizer: {lr: 1.0e-3}
"""
NEEDS_A_SHELL = re.compile(r"[|&<>$*\n]|^(?!megalite )|^megalite (chat|sweep|launch|retrain)")
FORMATS = {"chats": "chat", "pairs": "preference", "texts": "classification"}


def row(kind: str, number: int) -> dict[str, Any]:
    """Return a row of labelled data."""
    if kind == "texts":
        return {"text": f"number {number}", "label": "odd" if number % 2 else "even"}
    question = f"Number {number}?"
    if kind == "pairs":
        return {"prompt": question, "chosen": f"words {number}", "rejected": "no"}
    answer = {"role": "assistant", "content": f"The first words {number}."}
    return {"messages": [{"role": "user", "content": question}, answer]}


def typed(words: str) -> int:
    """Run one command of megalite in this process; return its exit status."""
    try:
        return main(shlex.split(words))
    except SystemExit as ended:
        return int(ended.code or 0)


def in_shell(
    command: str, environment: Mapping[str, str] = {}, answers: str = ""
) -> tuple[int, str]:
    """Run a command as it is typed, with `answers` for what it asks; return its exit status and what it
    prints."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        input=answers,
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": path} | environment,
        timeout=900,
    )
    return done.returncode, done.stdout + done.stderr


def type_in(
    command: str, capfd: pytest.CaptureFixture[str], environment: Mapping[str, str] = {}
) -> tuple[int, str]:
    """Run a command, in this process where it needs no shell; return its exit status and what it
    prints."""
    plain = re.sub(r"\s#.*", "", command)
    if NEEDS_A_SHELL.search(plain):
        return in_shell(command, environment, "Number 3?\n")
    status = typed(plain.removeprefix("megalite "))
    printed = capfd.readouterr()
    return status, printed.out + printed.err


def make(folder: Path) -> Path:
    """Make text, tokenizer, token files, a run of two steps, its model as a Hugging Face folder, and
    rows of chats, pairs and texts with their token files."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        text = "The first words of a text are the first that a model learns: number"
        lines = (json.dumps({"text": f"{text} {i}."}) + "\n" for i in range(400))
        Path("corpus.jsonl").write_text("".join(lines))
        Path("my.yaml").write_text(CONFIG)
        for command in (
            "tokenizer train --input corpus.jsonl --output tokenizer --vocab-size 300",
            "preprocess --input corpus.jsonl --output-prefix data --tokenizer tokenizer",
            "train my.yaml",
            "convert runs/my model",
        ):
            assert typed(command) == 0
        shutil.copytree("model", "chatty")
        shutil.copy(configs_dir() / "chat_template.jinja", "chatty")
        for name, format in FORMATS.items():
            rows = (json.dumps(row(name, i)) + "\n" for i in range(40))
            Path(f"{name}.jsonl").write_text("".join(rows))
            preprocess = f"preprocess --format {format} --input {name}.jsonl --workers 1"
            assert typed(f"{preprocess} --tokenizer chatty --output-prefix {name}") == 0
    finally:
        os.chdir(before)
    return folder
