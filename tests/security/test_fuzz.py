"""Whatever is in a file from outside: it is read, or refused in one line, within 10 s and 1 GB.

`pytest tests/security/test_fuzz.py --whole` runs 30,000 cases in some minutes, the others a
sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fuzz import LLAMA, safe_bytes
from megalite.checkpoint.torch_file import load_pickle
from megalite.cli import main
from megalite.errors import CheckpointError, ConfigError
from megalite.infer.generate import load_model
from megalite.training.reference import read_references
from megalite.utils.outside import shown

SCRIPT = Path(__file__).with_name("fuzz.py")
CASES, SAMPLE = 2000, 15
"""Of each of 15 readers."""


def test_readers_of_outside_files(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """In a process of its own, which a reader may end."""
    count = CASES if pytestconfig.getoption("--whole") else SAMPLE
    case = tmp_path / "case"
    command = [sys.executable, str(SCRIPT), str(count), str(case)]
    ended = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=3600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])},
    )
    assert ended.returncode == 0, (
        f"case {case.read_text()}: {ended.stdout[-5000:]}{ended.stderr[-2000:]}"
    )


def hub(folder: Path) -> Path:
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "model.safetensors").write_bytes(safe_bytes())
    return folder


def said_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "Traceback" not in told
    assert len(told.splitlines()) == 1
    return told


CONFIGS = {
    b"[" * 10**6: "is nested too deeply", b"\xff{}": "is not UTF-8", b"{": "is not valid JSON",
    b"[]": "is not a JSON object",
    json.dumps(LLAMA | {"num_hidden_layers": 10**7}).encode(): "num_layers = 10000000: should be less than",
    json.dumps(LLAMA | {"num_attention_heads": 0}).encode(): "",
    json.dumps(LLAMA | {"vocab_size": 10**400}).encode(): "",
}  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_json_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: bytes
) -> None:
    (hub(tmp_path) / "config.json").write_bytes(config)
    assert CONFIGS[config] in said_of(capsys, "generate", str(tmp_path), "--prompt", "x")


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn, torch.uint8])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bytes of fp8 without their scales would become another model."""
    header: dict[str, Any] = json.loads(
        safe_bytes()[8 : 8 + int.from_bytes(safe_bytes()[:8], "little")]
    )
    tensors = {
        name: torch.zeros(value["shape"]).to(dtype)
        for name, value in header.items()
        if "shape" in value
    }
    save_file(tensors, hub(tmp_path) / "model.safetensors")
    with pytest.raises(CheckpointError, match="weights must be one of BF16, F16, F32, F64"):
        load_model(tmp_path)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", "pipe"]
)
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    hub(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    if name == "pipe":
        index = {"weight_map": {"model.norm.weight": "pipe"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises((CheckpointError, ConfigError), match=rf"{name} is not a regular file"):
        load_model(tmp_path)


def test_nine_bytes_take_no_gigabyte(tmp_path: Path) -> None:
    # "remember this under the number 50,331,647".
    (tmp_path / "a").write_bytes(b"\x80\x02Nr\xff\xff\xff\x02.")
    import tracemalloc

    tracemalloc.start()
    assert load_pickle(tmp_path / "a") is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10**6


def test_a_value_that_is_printed_has_an_end(tmp_path: Path) -> None:
    import pickle

    from megalite.checkpoint.megatron import _fields

    shared: list[Any] = []
    for _ in range(100):
        shared = [shared, shared]
    (tmp_path / "a").write_bytes(pickle.dumps(shared))
    with pytest.raises((CheckpointError, ValueError), match="a value of type list"):
        _fields({"swiglu": load_pickle(tmp_path / "a")}, None)


def test_a_value_is_shown_as_python_has_it_up_to_a_length() -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    whole: list[Any] = [
        {"rope_type": "yarn", "of": {"a": [1, None]}},
        (1,),
        (),
        {},
        [True, 0.5, "x"],
        "a" * 80,
    ]
    assert [shown(value) for value in whole] == [repr(value) for value in whole]
    long: list[Any] = [
        deep,
        list(range(10**6)),
        [[[[]] * 999] * 999] * 999,
        {"a" * 999: "b" * 999},
        10**5000,
    ]
    assert all(len(shown(value)) <= 201 for value in long)


@pytest.mark.parametrize("parts", ["[" * 100_000, "{", "[]", "{}", "7"])
def test_references_that_are_damaged_are_computed_again(tmp_path: Path, parts: str) -> None:
    save_file({"train.0": torch.zeros(1)}, tmp_path / "references", metadata={"parts": parts})
    found, _ = read_references(tmp_path / "references", {"weights": "x"}, {})
    assert found is None
