"""megalite average: the weights are the means of exact weights, and models of different shapes are
refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import step_folder
from megalite.cli import main
from megalite.config import Config
from megalite.train import train
from small_runs import make_config


def checkpoints(config: Config, *steps: int) -> list[Path]:
    return [step_folder(config.run.folder / "checkpoints", step) for step in steps]


def masters(folder: Path) -> dict[str, torch.Tensor]:
    return {
        k: v.double()
        for path in (folder / "optimizer").glob("master*.safetensors")
        for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("shares", [None, (1.0, 3.0, 0.0)])
def test_weights_are_the_mean(
    trained: Config, tmp_path: Path, shares: tuple[float, ...] | None
) -> None:
    folders = checkpoints(trained, 4, 8, 12)
    given = ["--shares", *map(str, shares)] if shares else []
    assert main(["average", *map(str, folders), "-o", str(tmp_path / "out"), *given]) == 0
    part = [share / sum(shares) for share in shares] if shares else [1 / 3] * 3
    kept = [masters(folder) for folder in folders]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == kept[0].keys()
    for name, tensor in found.items():
        wanted = sum(p * each[name] for p, each in zip(part, kept, strict=True))
        assert torch.equal(tensor, wanted.float().to(torch.bfloat16)), (
            "rounded once, from fp32 master weights"
        )
    transformers = pytest.importorskip("transformers")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--shares", "1"], "1 shares for 2 models"),
        (["--shares", "1", "-1"], "their sum must be above 0"),
        (["--shares", "nan", "1"], "their sum must be above 0"),
    ],
)
def test_shares_that_make_no_average(
    trained: Config,
    tmp_path: Path,
    given: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folders = checkpoints(trained, 4, 8)
    assert main(["average", *map(str, folders), "-o", str(tmp_path / "out"), *given]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_models_are_refused(
    trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = make_config(
        tmp_path, "llama", "train.steps=1", "model.rope_theta=20000", "model.vocab_size=320"
    )
    train(other)
    models = [*checkpoints(trained, 4), *checkpoints(other, 1)]
    assert main(["average", *map(str, models), "-o", str(tmp_path / "out")]) == 2
    assert "are not of one model: config.json has" in capsys.readouterr().err
