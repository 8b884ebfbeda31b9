"""`megalite quickstart finetune`: its steps, and the rows it learns from. The training itself is run by
`--whole`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.cli import main, make_parser
from megalite.errors import DataError
from megalite.quickstart import ask, finetune
from megalite.quickstart.rows import COUNTS, write_rows


def test_steps_are_verbs_that_can_be_typed_and_what_is_made_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verbs: list[tuple[str, ...]] = []

    def call(folder: Path, *words: str) -> None:
        verbs.append(words)
        made = {"convert": words[-1], "launch": "runs/quickstart/checkpoints/step-00000200"}
        if words[0] in made:
            (folder / made[words[0]]).mkdir(parents=True)

    monkeypatch.setattr(finetune, "run_verb", call)
    monkeypatch.setattr(finetune, "make_tokens", lambda model, folder: None)
    monkeypatch.setattr(ask, "serve_and_ask", lambda model: 0)
    assert main(["quickstart", "finetune", "--dir", str(tmp_path)]) == 0
    learned = ["finetune", "finetune", "convert", "finetune", "classify"]
    asked = ["eval", "eval", "generate"]
    assert [words[0] for words in verbs] == ["launch", "convert", *learned, *asked]
    for words in verbs:
        make_parser().parse_args(words)
    assert (tmp_path / "models/quickstart-base/chat_template.jinja").is_file()
    verbs.clear()
    assert main(["quickstart", "finetune", "--dir", str(tmp_path)]) == 0
    assert "convert" not in [words[0] for words in verbs]
    assert "launch" not in [words[0] for words in verbs]


def test_questions_that_are_held_out_are_in_no_other_file(tmp_path: Path) -> None:
    assert "chats.jsonl (800)" in write_rows(tmp_path)
    lines: dict[str, list[str]] = {}
    for name, count in COUNTS.items():
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        texts = [
            row.get("text") or (row.get("messages") or row["prompt"])[0]["content"] for row in rows
        ]
        lines[name] = [text.rpartition("\n")[2] for text in texts]
        assert len({*lines[name]}) == count
    assert len({line for found in lines.values() for line in found}) == sum(COUNTS.values())


def test_it_learns_to_answer(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("takes minutes: --whole")
    command = [sys.executable, "-m", "megalite", "quickstart", "finetune", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "→ A definition." in done.stdout


def test_a_server_that_ends_is_waited_for_no_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(DataError, match=r"the server has ended with exit status 1 \(failed"):
        ask.serve_and_ask(tmp_path)
