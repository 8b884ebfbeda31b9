"""slurm/preprocess.sh: what it runs, in an array job and without Slurm."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megalite.data.tokenizer_training import train_tokenizer

SCRIPT = Path(__file__).parent.parent / "slurm" / "preprocess.sh"
OPTIONS = ["--input", "a b.jsonl", "--output-prefix", "x"]
ARRAY = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_COUNT": "8"}


def run(*arguments: str, script: Path = SCRIPT, **env: str) -> subprocess.CompletedProcess[str]:
    variables = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(
        ["bash", str(script), *arguments], env=variables, capture_output=True, text=True
    )


def words(process: subprocess.CompletedProcess[str]) -> list[str]:
    assert process.returncode == 0, process.stderr
    return shlex.split(process.stdout)[1:]  # after the interpreter


def test_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)


def test_alone_it_is_the_tool() -> None:
    assert words(run("--dry-run", *OPTIONS)) == ["tools/preprocess_data.py", *OPTIONS]


def test_a_task_of_an_array_takes_its_shard(tmp_path: Path) -> None:
    copy = shutil.copy(SCRIPT, tmp_path)  # as sbatch does
    root = str(SCRIPT.parent.parent)
    env = {
        **ARRAY,
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_CPUS_PER_TASK": "6",
        "SLURM_SUBMIT_DIR": root,
    }
    expected = ["tools/preprocess_data.py", "--workers", "6", "--shard", "2/8", *OPTIONS]
    assert words(run("--dry-run", *OPTIONS, script=Path(copy), **env)) == expected


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        ([], {}, "usage: preprocess.sh"),
        (
            OPTIONS,
            {**ARRAY, "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2"},
            "the array has gaps",
        ),
    ],
)
def test_refuses(arguments: list[str], env: dict[str, str], message: str) -> None:
    process = run(*arguments, **env)
    assert process.returncode == 2
    assert message in process.stderr


def test_a_shard_is_one_of_so_many_that_can_be_joined() -> None:
    tool = [sys.executable, str(SCRIPT.parent.parent / "tools" / "preprocess_data.py"), *OPTIONS]
    for shard in ("4/4", "0/0", "0/100000"):
        done = subprocess.run([*tool, "--shard", shard], capture_output=True, text=True)
        assert done.returncode == 2
        assert (
            f"'{shard}' is not I/N with I from 0 to N - 1, as in 0/4, and N up to 99,999"
            in done.stderr
        )


def test_an_array_writes_what_one_run_writes(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"line {i} of many é", "title": f"title {i}"}) for i in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / "t", 300)
    options = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(tmp_path / "t"),
        "--append-eod",
    ]
    options += ["--json-keys", "text", "title"]
    processes = [run("--output-prefix", str(tmp_path / "one"), *options)]
    for index in (1, 0):
        env = {
            "SLURM_ARRAY_TASK_MIN": "0",
            "SLURM_ARRAY_TASK_MAX": "1",
            "SLURM_ARRAY_TASK_COUNT": "2",
        }
        env |= {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_PER_TASK": "1"}
        processes.append(run("--output-prefix", str(tmp_path / "two"), *options, **env))
    assert [process.returncode for process in processes] == [0, 0, 0], processes
    for name in (
        "text_document.bin",
        "text_document.idx",
        "text_document.src",
        "title_document.json",
        "title_document.bin",
    ):
        assert (tmp_path / f"one_{name}").read_bytes() == (tmp_path / f"two_{name}").read_bytes()
    assert len(list(tmp_path.glob("two_*"))) == 8
