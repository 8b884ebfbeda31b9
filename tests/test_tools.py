"""A mistake that a tool is called with is one line and exit status 2, as of `megalite`."""

from __future__ import annotations

import errno
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megalite.cli import explained
from megalite.errors import DataError, Unreachable
from megalite.runtime.exit_codes import Exit

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
        (FileNotFoundError(errno.ENOENT, "x", "file"), Exit.MISTAKE), (KeyboardInterrupt(), 130),
    ],
)  # fmt: skip
def test_what_may_pass_is_no_mistake(error: BaseException, status: int) -> None:
    def tool() -> int:
        raise error

    assert explained(tool) == status


FAKE_PYTHON = """#!/bin/bash
echo "$@" >>"$LOG"
if [[ "$1 $2" == "-m venv" ]]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; fi
if [[ $1 == --version ]]; then echo "Python 3.11.7"; fi
"""


@pytest.mark.parametrize("cpu", [False, True])
def test_the_setup_names_its_stages_and_offers_a_torch_without_cuda(
    tmp_path: Path, cpu: bool
) -> None:
    """With a python that only writes down what it is asked."""
    for folder in ("tools", "csrc", "megalite"):
        (tmp_path / folder).mkdir()
    for name in ("setup.sh", "constraints.txt"):
        shutil.copy(TOOLS / name, tmp_path / "tools")
    shutil.copy(TOOLS.parent / "pyproject.toml", tmp_path)
    (tmp_path / "csrc" / "a.cpp").touch()
    script = tmp_path / "tools" / "some.sh"
    script.write_text(
        'set -euo pipefail\nsource "$(dirname "$0")/setup.sh"\necho "arguments: $*"\n'
    )
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    command = ["bash", str(script), *["--cpu"] * cpu, "bert"]
    environment = os.environ | {"PYTHON": str(python), "LOG": str(log)}
    first, second = (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    )
    assert [line[:11] for line in first.splitlines() if " of 3: " in line] == [
        "  1 of 3: t", "  2 of 3: w", "  3 of 3: m",
    ]  # fmt: skip
    [torch] = [line for line in log.read_text().splitlines() if " torch==" in line]
    assert (
        ("+cpu " in torch)
        == ("--extra-index-url https://download.pytorch.org/whl/cpu" in torch)
        == cpu
    )
    if not Path("/proc/driver/nvidia").exists():
        assert (f"bash {script} --cpu 'bert' takes a torch without them" in first) == (not cpu)
    assert first.endswith("arguments: bert\n")
    assert second == "arguments: bert\n", "once"
