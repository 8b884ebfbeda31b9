"""Ranks that share the matrices of a layer write the bits of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.cli import main
from megalite.models import model_config, weight_table
from megalite.quantization.layers import owners_of
from quantized_folders import SMALL
from tiny_models import LLAMA, save_model

LAUNCH = "-m megalite.launch --standalone --local-addr=127.0.0.1 --nproc-per-node=2 -m megalite"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_bits_are_those_of_one_process(
    method: str, tokens: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    given = ["quantize", str(source)]
    how = ["--scheme", "w4a16", "--group", "16", "--method", method, "--data", tokens]
    how += ["--rows", "12", "--length", "16"]
    assert main([*given, str(tmp_path / "one"), *how]) == 0
    said = capsys.readouterr().out.replace("/one:", "/two:")

    def told(text: str) -> list[str]:
        # The launcher has a line of its own.
        return [
            line for line in text.splitlines() if line.startswith((str(tmp_path), "perplexity"))
        ]

    done = subprocess.run(
        [sys.executable, *LAUNCH.split(), *given, str(tmp_path / "two"), *how],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == told(said), "errors and perplexities, once"
    assert len(told(said)) == 2
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def test_ranks_have_about_as_much_to_do(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    table = [w for w in weight_table(model_config({"hf": source})) if w.is_matrix and w.place == 0]
    owners = owners_of(table, 2)
    assert {*owners.values()} == {0, 1}
    assert owners == owners_of(reversed(table), 2) or len({w.numel for w in table}) < len(table)
    assert {*owners_of(table, 1).values()} == {0}


def test_without_data_there_is_nothing_to_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_model(tmp_path / "source", LLAMA | SMALL)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(["quantize", str(source), str(tmp_path / "out")]) == 2
    assert "give --data, or run one process" in capsys.readouterr().err
