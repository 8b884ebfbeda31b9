"""A mistake is told in one line that holds the remedy, and loses nothing: tests/mistakes.yaml."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.commands.finetune import _tokenize
from megalite.errors import ConfigError
from user_folder import make, typed

MISTAKES = yaml.safe_load(Path(__file__).with_suffix("").with_name("mistakes.yaml").read_text())
WRITTEN_BY_STARTS = {"environment.json", "lock", "health"}
"""What a start writes into the folder of its run before it can know that it is a mistake."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("user"))


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


@pytest.mark.parametrize("named", ["chat*.jsonl", "rows"])
def test_finetune_tells_rows_that_have_changed_however_they_are_named(
    named: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on with the token files that it made, unless a file of rows is newer:
    by a glob, which is no file, or in a folder, whose own time stays."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    for folder in (tmp_path, tmp_path / "rows"):
        shutil.copy(made / "chats.jsonl", folder)
    prefix = tmp_path / "run" / "rows"
    for _ in range(2):
        _tokenize([named], prefix, "chat", str(made / "chatty"))
    later = prefix.with_suffix(".json").stat().st_mtime + 10
    for folder in (tmp_path, tmp_path / "rows"):
        os.utime(folder / "chats.jsonl", (later, later))
    with pytest.raises(ConfigError, match="they have changed since"):
        _tokenize([named], prefix, "chat", str(made / "chatty"))


def test_there_are_many_of_every_kind() -> None:
    verbs = {mistake["type"].split()[0] for mistake in MISTAKES}
    assert len(MISTAKES) >= 60
    assert {"train", "preprocess", "generate", "serve", "convert", "eval", "plan"} <= verbs
