"""megalite average: merged weights are what each method's paper says of exact weights, and models of
different shapes are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.folder import step_folder
from megalite.checkpoint.merging import slerp
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


def merge(config: Config, tmp_path: Path, *given: str) -> dict[str, torch.Tensor]:
    """The fp32 weights of steps 4 and 12 merged, as if they had begun as step 8: far apart."""
    base, *models = map(str, checkpoints(config, 8, 4, 12))
    given = tuple(base if word == "BASE" else word for word in given)
    out = tmp_path / "out"
    assert main(["average", *models, "-o", str(out), "--dtype", "fp32", *given]) == 0
    return load_file(out / "model.safetensors")


def check_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        # Sums of fp64 in another order, rounded once to fp32: off by one digit at most.
        torch.testing.assert_close(tensor, wanted[name].float(), rtol=1.2e-7, atol=1e-12)


def test_task_arithmetic_adds_what_was_learned(trained: Config, tmp_path: Path) -> None:
    """Ilharco et al. 2023: θ₀ + λ Σ τ, of which a negated one makes forget."""
    base, first, second = map(masters, checkpoints(trained, 8, 4, 12))
    given = "--method", "task_arithmetic", "--base", "BASE", "--scale", "0.4", "--shares", "1", "-2"
    wanted = {
        name: x + 0.4 * (1 * (first[name] - x) - 2 * (second[name] - x)) for name, x in base.items()
    }
    check_equal(merge(trained, tmp_path, *given), wanted)


@pytest.mark.parametrize("density", [("0.6",), ("0.3", "0.75")])
def test_ties_trims_elects_and_averages(
    trained: Config, tmp_path: Path, density: tuple[str, ...]
) -> None:
    """Yadav et al. 2023, algorithm 1, on the vector of all elements together: keep the top-k% of
    each task vector by size, take the sign of their sum, and the mean of those that have it."""
    base, *models = map(masters, checkpoints(trained, 8, 4, 12))
    flat = torch.cat([x.flatten() for x in base.values()])
    trimmed = []
    for model, share in zip(models, density * (2 // len(density)), strict=True):
        vector = torch.cat([model[name].flatten() for name in base]) - flat
        smallest = vector.abs().sort(descending=True).values[int(float(share) * len(vector)) - 1]
        trimmed.append(torch.where(vector.abs() < smallest, 0.0, vector))
    merged = flat.clone()
    stacked = torch.stack(trimmed)
    signs = stacked.sum(0).sign()
    agree = (stacked.sign() == signs) & (stacked != 0)
    mean = torch.where(agree, stacked, 0.0).sum(0) / agree.sum(0).clamp(min=1)
    merged += 0.7 * mean
    pieces = merged.split([x.numel() for x in base.values()])
    wanted = {name: x.view_as(base[name]) for name, x in zip(base, pieces, strict=True)}
    given = "--method", "ties", "--base", "BASE", "--scale", "0.7", "--density", *density
    found = merge(trained, tmp_path, *given)
    check_equal(found, wanted)
    kept = [(x != 0).double().mean().item() for x in trimmed]
    assert kept == pytest.approx([float(x) for x in density * (2 // len(density))], abs=1e-3)
    product = stacked.prod(0)
    assert (product < 0).any(), "the models differ somewhere"
    assert (product > 0).any(), "and agree elsewhere"


def test_slerp_goes_along_the_arc(trained: Config, tmp_path: Path) -> None:
    """Shoemake 1985: between unit vectors at the angle Ω, a unit vector in their plane, tΩ from the
    first. Each Hugging Face tensor is a vector."""
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    a, b = a / a.norm(), b / b.norm()
    middle, whole = slerp(a, b, 0.3), torch.acos((a * b).sum())
    assert middle.norm().item() == pytest.approx(1.0)
    assert torch.acos((a * middle).sum()).item() == pytest.approx(0.3 * whole.item())
    assert torch.acos((b * middle).sum()).item() == pytest.approx(0.7 * whole.item())
    # From there to a line, as the arc becomes one: equal, opposite, and nothing.
    for other in (a, 2 * a * (1 + 1e-9), -a, 0 * a):
        torch.testing.assert_close(slerp(a, other, 0.3), 0.7 * a + 0.3 * other)
    first, second = map(masters, checkpoints(trained, 4, 12))
    found = merge(trained, tmp_path, "--method", "slerp", "--shares", "1", "3")
    check_equal(found, {name: slerp(x, second[name], 0.75) for name, x in first.items()})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--shares", "1"], "1 shares for 2 models"),
        (["--shares", "1", "-1"], "their sum must be above 0"),
        (["--shares", "nan", "1"], "nan, 1.0: shares, scale and densities are finite"),
        (["--method", "ties"], "--method ties needs --base"),
        (["--density", "0.5"], "--density means nothing under --method linear"),
        (["--method", "slerp", "--scale", "2"], "--scale means nothing under --method slerp"),
        (["--method", "slerp", "--shares", "2", "-1"], "none may be below 0"),
        (["--method", "ties", "--base", "BASE", "--density", "0"], "at most 1"),
        (["--method", "ties", "--base", "BASE", "--density", *"111"], "3 densities for 2 models"),
        (["--method", "ties", "--base", "BASE", "--shares", "1", "0"], "each must be above 0"),
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
    given = [str(folders[0]) if word == "BASE" else word for word in given]
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
