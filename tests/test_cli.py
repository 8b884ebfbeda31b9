"""What a person types and what comes back."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megalite.cli import explained, main, make_parser
from megalite.commands.examples import EXAMPLES
from megalite.data import store
from megalite.kernels import library
from megalite.utils import resources
from megalite.utils.resources import configs_dir

QUICKSTART = str(configs_dir() / "quickstart.yaml")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")
    }
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=60,
        check=False,
    )


def write(tmp_path: Path, **sections: dict[str, Any]) -> str:
    values: dict[str, Any] = {
        "run": {"name": "test", "dir": str(tmp_path / "runs")},
        "model": {"preset": "llama-1m"},
        "data": {"train": [{"path": str(tmp_path / "none")}], "seq_length": 32},
        "train": {"steps": 10, "global_batch_size": 8},
        "optimizer": {"lr": 1e-3},
    }
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(values | sections))
    return str(path)


def test_help_needs_nothing_heavy() -> None:
    """So that it answers at once: importing torch alone takes over a second."""
    program = """
import runpy, sys
sys.argv = ["megalite", *sys.argv[1:]]
try:
    runpy.run_module("megalite", run_name="__main__")
except SystemExit as exit:
    assert exit.code == 0, exit.code
heavy = {"torch", "numpy", "pydantic", "transformers", "tokenizers", "matplotlib", "wandb", "rich", "yaml"}
print("heavy:", sorted(heavy & sys.modules.keys()))
"""
    found = python("-c", program, "--help")
    assert found.returncode == 0, found.stderr
    assert "heavy: []" in found.stdout
    assert "train" in found.stdout
    assert "generate" in found.stdout


def test_training_imports_no_compiler() -> None:
    """It takes a second of every rank's start."""
    program = """
import sys
import torch
from megalite.config_file import parse_config
from megalite.comm.mesh import make_mesh
from megalite.models import weight_table
from megalite.training.parts import build
from megalite.plan import make_plan
import megalite.train

config = parse_config({
    "run": {"name": "test"}, "model": {"preset": "llama-1m"}, "data": {"train": [{"path": "unused"}], "seq_length": 32},
    "train": {"steps": 1, "global_batch_size": 1}, "optimizer": {"lr": 1e-3},
})
plan = make_plan(config, weight_table(config.model), 1)
build(config, plan, make_mesh(plan, torch.device("cpu")))
print("compiler:", "torch._dynamo" in sys.modules)
"""
    found = python("-c", program)
    assert found.stdout == "compiler: False\n", found.stderr


def test_preprocessing_imports_no_torch() -> None:
    """It takes a second of the tool's start, and of each worker's."""
    program = "import sys, megalite.data.preprocess; print('torch:', 'torch' in sys.modules)"
    found = python("-c", program)
    assert found.stdout == "torch: False\n", found.stderr


@pytest.mark.parametrize("example", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_in_a_help_is_a_command(example: str) -> None:
    """A flag that was renamed, or a verb, is found in the text that says how to call it."""
    words = shlex.split(example.partition("#")[0])
    if "megalite" not in words:
        assert Path(words[-2]).is_file(), "a script of slurm/, which takes a config"
        return
    words = words[words.index("megalite") + 1 :]
    arguments, rest = make_parser().parse_known_args(words[: (*words, ">").index(">")])
    assert rest == []
    assert callable(arguments.verb)


BELOW = {"config": ("keys", "presets", "new", "schema"), "tokenizer": ("train",)}


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """`megalite` alone lists the verbs, but for those of scripts; each shows examples."""
    with pytest.raises(SystemExit):
        main([])
    listed = re.findall(r"^    ([\w-]+)", capsys.readouterr().out, re.M)
    assert "job" not in listed
    assert {"train", "preprocess", "tokenizer", "corpus", "convert"} < set(listed)
    below = [f"{verb} {name}" for verb, names in BELOW.items() for name in names]
    assert {verb for verb in EXAMPLES if " " in verb} == {*below}
    for verb in [*listed, *below]:
        with pytest.raises(SystemExit) as caught:
            main([*verb.split(), "--help"])
        assert caught.value.code == 0
        found = capsys.readouterr().out
        assert f"usage: megalite {verb}" in found
        assert f"examples:\n  {EXAMPLES[verb][0]}" in found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "c.yaml"], "there is no verb 'trian'; did you mean 'train'?"),
        (["jobs"], "there is no verb 'jobs'; known: quickstart, config"),
        (["tokenizer", "trian"], "there is no verb 'trian'; did you mean 'train'?"),
        (["train", "c.yaml", "--set"], "argument --set: expected one argument"),
        (["plan", "c.yaml", "--gpus", "0"], "argument --gpus: 0 is not between 1"),
    ],
)
def test_a_wrong_verb_is_told_the_right_one(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


def test_settings_are_taken_in_their_order_however_they_are_given(tmp_path: Path) -> None:
    words = "train a=1 --set b=2 --config c.yaml --print-plan --set=a=3 b=4 --set b=5"
    arguments, rest = make_parser().parse_known_args(words.split())
    assert str(arguments.config) == "c.yaml"
    assert arguments.overrides + rest == ["a=1", "b=2", "a=3", "b=4", "b=5"]


def test_a_mistake_is_explained_without_a_traceback(tmp_path: Path) -> None:
    found = python("-m", "megalite", "train", write(tmp_path), "train.stpes=5")
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("error: ")
    assert "train.stpes" in found.stderr
    assert "did you mean 'steps'" in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "runs").exists(), "nothing is begun"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "CONFIG", "model.preset=llama-9m"], "llama-8m"),
        (["train", "CONFIG", "steps"], "section.key=value"),
        (["train", "nowhere.yaml"], "nowhere.yaml: No such file"),
        (["train", "CONFIG", "--print-plan"], "parallel.tensor"),
        (
            ["train", "CONFIG", "data.split=[98, 2]"],
            "data.split: value number 3 of its list is missing",
        ),
        (["job", "CONFIG", "train.steps=0"], "greater than 0"),
        (
            ["generate", "TMP", "--prompt", "x"],
            "neither a run with a checkpoint nor a Hugging Face folder",
        ),
    ],
)
def test_mistakes_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    config = write(tmp_path, parallel={"tensor": 5, "sequence": False})
    assert (
        main([{"CONFIG": config, "TMP": str(tmp_path)}.get(word, word) for word in arguments]) == 2
    )
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert words in found.err


def test_a_folder_of_another_architecture_is_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_act": "gelu"}')
    assert main(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "error: config.json has hidden_act = " in capsys.readouterr().err


def test_a_rank_says_which_one_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["job", write(tmp_path), "train.steps=0"]) == 2
    assert capsys.readouterr().err.startswith("error on rank 1: ")


def test_what_a_launcher_must_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", QUICKSTART]) == 0
    assert main(["job", QUICKSTART, "parallel.tensor=1", "run.name=x"]) == 0
    assert (
        main(
            [
                "job",
                QUICKSTART,
                "--nodes=2",
                "--ranks-per-node=4",
                "train.micro_batch_size=1",
                "run.name=y",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out == "2 1 runs/quickstart\n1 1 runs/x\n4 2 runs/y\n"
    assert main(["job", QUICKSTART, "--nodes=3", "--ranks-per-node=1"]) == 2
    assert "start a multiple of 2 ranks" in capsys.readouterr().err


def test_print_plan_shows_the_numbers_and_stops(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(tmp_path, parallel={"tensor": 2})
    assert main(["train", config, "train.micro_batch_size=4", "--print-plan"]) == 0
    found = capsys.readouterr().out
    assert "2 = data 1 × tensor 2" in found
    assert [line.split() for line in found.splitlines() if line.startswith("micro")] == [
        ["micro-batches", "per", "step", "2", "of", "4"]
    ]
    assert not (tmp_path / "runs").exists()


def test_print_plan_for_the_ranks_of_a_job(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(tmp_path, parallel={"tensor": 2})
    monkeypatch.setenv("WORLD_SIZE", "8")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert main(["train", config, "--print-plan"]) == 0
    found = capsys.readouterr().out
    assert found.count("8 = data 4 × tensor 2") == 1, "one rank speaks"


def test_overrides_may_follow_an_option(tmp_path: Path) -> None:
    assert main(["train", write(tmp_path), "--print-plan", "train.steps=5"]) == 0


def test_ops_names_what_computes_each_operation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert main(["ops"]) == 0
    _, cpu, gpu = re.split("CPU:|NVIDIA H100:", capsys.readouterr().out)
    for found, device in ((cpu, "cpu"), (gpu, "cuda")):
        rows = [line.split(maxsplit=2) for line in found.strip().splitlines()]
        assert rows == [
            [operation, *library.explain(operation, device)] for operation in library.OPERATIONS
        ]


def test_ops_says_that_kernels_are_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "megalite._ops", None)
    library.own.cache_clear()
    try:
        assert main(["ops"]) == 0
    finally:
        library.own.cache_clear()
    rows = capsys.readouterr().out.splitlines()[1:]
    assert all(row.split()[1] == "torch" for row in rows)
    assert all("install a C++ compiler" in row for row in rows)


FAULTS = [(errno.ENOENT, 2), (errno.EACCES, 2), (errno.EIO, 1), (errno.ESTALE, 1)]


@pytest.mark.parametrize(("number", "status"), FAULTS)
def test_a_disk_that_is_gone_for_a_while_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    """A launcher starts again after 1, and not after 2."""

    config = write(tmp_path)

    def fail(path: Any, *arguments: Any, **options: Any) -> Any:
        if str(path) == config:
            raise OSError(number, os.strerror(number), str(path))
        return open(path, *arguments, **options)

    monkeypatch.setattr(resources, "open", fail, raising=False)
    assert main(["train", config, "--print-plan"]) == status


def test_a_store_that_does_not_answer_is_no_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ATTEMPTS", 1)
    for error, status in ((ConnectionError("gone"), 1), (PermissionError("no"), 2)):

        def fail(*_: Any, error: Exception = error, **__: Any) -> Any:
            raise error

        monkeypatch.setattr(store.Store, "_info", fail)
        config = write(tmp_path, data={"train": [{"path": "memory://bucket/a"}], "seq_length": 32})
        assert main(["train", config]) == status


@pytest.mark.parametrize("module", ["difflib", "torch"])
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path: Path, module: str) -> None:
    """Among the command line's own imports, and among those of a verb."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "megalite", "preflight", "configs/quickstart.yaml"],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


PRINTS = (
    "import sys; from megalite.cli import explained; sys.exit(explained(lambda: print('×' * {})))"
)


@pytest.mark.parametrize(
    ("letters", "into", "encoding", "status", "told"),
    [
        (10**5, "| head -c 2", "utf-8", 141, "×"),
        (3, "| cat", "ascii", 0, r"\xd7\xd7\xd7"),
        (3, "| cat", "ascii:surrogateescape", 0, r"\xd7\xd7\xd7"),
        (3, ">&-", "utf-8", 0, ""),
        (3, "> /dev/full", "utf-8", 1, "error: No space left on device"),
    ],
)
def test_output_that_nobody_takes_is_no_bug(
    letters: int, into: str, encoding: str, status: int, told: str
) -> None:
    """A pipe that is read no further, a terminal that lacks a letter, no stdout at all, a full
    disk."""
    command = f'"$0" -c "$1" {into}; exit "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PRINTS.format(letters)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUNBUFFERED": ""},
        timeout=60,
        check=False,
    )
    assert (done.returncode, (done.stdout + done.stderr).strip()) == (status, told)


def test_a_file_that_is_opened_does_not_take_the_number_of_a_closed_stdout(tmp_path: Path) -> None:
    program = (
        "import os, sys; from megalite.runtime.streams import open_streams; open_streams();"
        "file = open(sys.argv[1], 'w'); os.write(1, b'a library prints')"
    )
    path = tmp_path / "file"
    command = '"$0" -c "$1" "$2" <&- >&-'
    done = subprocess.run(["bash", "-c", command, sys.executable, program, path], check=False)
    assert (done.returncode, path.read_text()) == (0, "")


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), 2, "error: a/b: No such file\n"),
        (
            OSError(errno.EROFS, "Read-only file system", "a"),
            2,
            "error: a: Read-only file system\n",
        ),
        (OSError(errno.ENOSPC, "No space left"), 1, "error: No space left\n"),
        (OSError(errno.EIO, "Input/output error", "a"), 1, "error: a: Input/output error\n"),
    ],
)
def test_a_file_that_a_verb_cannot_use_is_one_line(
    error: OSError, status: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever verb it is; a rank shows where it stood, too."""

    def work() -> None:
        raise error

    assert explained(work) == status
    assert capsys.readouterr().err == told


WORKERS = """
import os, pathlib, signal, sys, time
from megalite.runtime.processes import start_worker, worker_pool

starting = pathlib.Path(sys.argv[1])
if __name__ == "__main__":
    try:
        with worker_pool(2, start_worker) as pool:
            task = pool.submit(int)
            while not starting.exists():
                time.sleep(0.01)
            os.killpg(0, signal.SIGINT)
            task.result()
    except KeyboardInterrupt:
        print("interrupted")
else:  # a worker, among its imports
    starting.touch()
    time.sleep(0.5)
"""


def test_ctrl_c_while_workers_start_is_answered_by_their_parent_alone(tmp_path: Path) -> None:
    """It reaches the whole group, also those of which the interpreter only starts."""
    path = tmp_path / "program.py"
    path.write_text(WORKERS)
    done = subprocess.run(
        [sys.executable, path, tmp_path / "starting"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "interrupted\n", "")
