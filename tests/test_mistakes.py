"""A mistake is told in one line that holds the remedy, and loses nothing: tests/mistakes.yaml."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.cli import main
from megalite.utils.resources import configs_dir

MISTAKES = yaml.safe_load(Path(__file__).with_suffix("").with_name("mistakes.yaml").read_text())
CONFIG = """
run: {name: my}
model: {preset: llama-1m, vocab_size: 300, num_layers: 2}
data: {train: [{path: data_text_document}], split: [90, 10, 0], seq_length: 32, tokenizer: tokenizer}
train: {steps: 2, global_batch_size: 4, precision: fp32}
optimizer: {lr: 1.0e-3}
"""
ROWS = {
    "chats": lambda i: {
        "messages": [
            {"role": "user", "content": f"Number {i}?"},
            {"role": "assistant", "content": f"The first words {i}."},
        ]
    },
    "pairs": lambda i: {"prompt": f"Number {i}?", "chosen": f"words {i}", "rejected": "no"},
    "texts": lambda i: {"text": f"number {i}", "label": "odd" if i % 2 else "even"},
}
FORMATS = {"chats": "chat", "pairs": "preference", "texts": "classification"}
WRITTEN_BY_STARTS = {"environment.json", "lock", "health"}
"""What a start writes into the folder of its run before it can know that it is a mistake."""


def typed(words: str) -> int:
    """Run one command of megalite; return its exit status."""
    try:
        return main(shlex.split(words))
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user who has trained a model."""
    folder = tmp_path_factory.mktemp("user")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
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
        for name, row in ROWS.items():
            rows = (json.dumps(row(i)) + "\n" for i in range(40))
            Path(f"{name}.jsonl").write_text("".join(rows))
            preprocess = f"preprocess --format {FORMATS[name]} --input {name}.jsonl --workers 1"
            assert typed(f"{preprocess} --tokenizer chatty --output-prefix {name}") == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files below a folder, but those that a start writes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not WRITTEN_BY_STARTS & {*path.parts}
    }


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake["type"])
def test_a_mistake_is_one_line_with_its_remedy(
    mistake: dict[str, Any],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(made, tmp_path / "user")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    if "before" in mistake:
        subprocess.run(mistake["before"], shell=True, check=True)
    before, asked_to_end = contents(folder), signal.getsignal(signal.SIGTERM)
    try:
        status = typed(mistake["type"])
    finally:
        signal.signal(signal.SIGTERM, asked_to_end)
    found = capsys.readouterr()
    assert status == 2, found.err
    # Lines before it may say which checkpoint was taken, or warn.
    *_, line = found.err.partition("error: ")
    assert mistake["told"] in line
    assert mistake.get("more") or line.count("\n") == 1, line
    assert found.out == ""
    assert contents(folder) == before


def test_there_are_many_of_every_kind() -> None:
    verbs = {mistake["type"].split()[0] for mistake in MISTAKES}
    assert len(MISTAKES) >= 60
    assert {"train", "preprocess", "generate", "serve", "convert", "eval", "plan"} <= verbs
