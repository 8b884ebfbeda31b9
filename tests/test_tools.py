"""A mistake that a tool is called with is one line and exit status 2, as of `megalite`."""

from __future__ import annotations

import errno
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.errors import DataError, Unreachable
from megalite.runtime.exit_codes import Exit, explained

TOOLS = Path(__file__).parents[1] / "tools"
MISTAKES = {
    "preprocess_data.py --input a.jsonl --output-prefix x --tokenizer broken": "broken/tokenizer.json cannot be read",
    "preprocess_data.py --input a.jsonl --output-prefix x --tokenizer pipe": "pipe holds no tokenizer",
    "preprocess_data.py --input a.jsonl --output-prefix x --tokenizer x --workers 0": "0 is not between 1 and",
    "train_tokenizer.py --input no.jsonl --output out --vocab-size 300": "no.jsonl",
    "train_tokenizer.py --input a.jsonl --output a.jsonl/out --vocab-size 300": "a.jsonl/out",
    "train_tokenizer.py --input a.jsonl --output out --vocab-size 1000000000000000000000": "is not between 1 and",
    "convert_checkpoint.py nowhere out": "nowhere is neither a run with a checkpoint nor",
    "convert_checkpoint.py broken out": "broken/config.json is not a JSON object",
    "convert_checkpoint.py broken out --shard-gb nan": "--shard-gb nan: give a positive number",
    "check_hf.py nowhere": "nowhere is neither a run with a checkpoint nor",
    "check_hf.py empty": "empty: Error no file named",
    "prepare_corpus.py nowhere.yaml": "nowhere.yaml: No such file or directory",
    "synthesize.py nowhere.yaml": "nowhere.yaml: No such file or directory",
}


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(json.dumps({"text": "a b c"}))
    for folder in ("broken", "empty", "pipe"):
        Path(folder).mkdir()
    Path("broken/tokenizer.json").write_text("{}")
    Path("broken/config.json").write_text("[]")
    Path("empty/config.json").write_text(json.dumps({"model_type": "llama"}))
    os.mkfifo("pipe/tokenizer.json")
    tool, *arguments = command.split()
    monkeypatch.setattr(sys, "argv", [tool, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / tool), run_name="__main__")
    assert ended.value.code == Exit.MISTAKE
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    assert MISTAKES[command] in lines[0]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (DataError("x"), Exit.MISTAKE), (Unreachable("x"), Exit.FAILED), (OSError(errno.ENOSPC, "full"), Exit.FAILED),
        (FileNotFoundError(errno.ENOENT, "x"), Exit.MISTAKE), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_what_may_pass_is_no_mistake(error: BaseException, status: int) -> None:
    def tool() -> int:
        raise error

    assert explained(tool) == status
