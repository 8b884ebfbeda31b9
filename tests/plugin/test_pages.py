"""The pages of docs/extend/ work as they stand: their modules, installed as one package, train by
their YAML."""

from __future__ import annotations

import json
import os
import re
import string
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from small_runs import MODELS, write_corpus

PAGES = Path(__file__).parents[2] / "docs" / "extend"
NAMES = sorted(page.stem for page in PAGES.glob("*.md") if page.stem != "README")
LENGTH, STEPS = 32, 8
BASE: dict[str, Any] = {
    "model": MODELS["llama"],
    # A step takes all 16 samples of the corpus, and so does a validation.
    "data": {"train": [{"path": "corpus"}], "valid": [{"path": "corpus"}], "seq_length": LENGTH},
    "train": {"steps": STEPS, "global_batch_size": 16, "micro_batch_size": 4, "precision": "fp32"},
    "parallel": {"bucket_mb": 0.01},
    "checkpoint": {"every": 1, "keep": 9},
    "observe": {"eval_every": 1, "eval_batches": 1},
    "optimizer": {"lr": 1e-2},
}


def block(page: str, language: str) -> str:
    """Return the one block of a page in a language."""
    (found,) = re.findall(
        rf"^```{language}\n(.*?)^```$", (PAGES / f"{page}.md").read_text("utf-8"), re.M | re.S
    )
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return a section with the settings of another; those inside of `optimizer` and `data` are of
    two pages."""
    same = {key for key in one.keys() & other.keys() if key in ("optimizer", "data")}
    return one | other | {key: one[key] | other[key] for key in same}


def settings(*pages: str) -> dict[str, Any]:
    config = BASE
    for page in pages:
        config = merged(config, yaml.safe_load(block(page, "yaml")))
    return config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and the package of the pages as pip would install it."""
    folder = tmp_path_factory.mktemp("pages")
    write_corpus(folder / "corpus")
    (folder / "letters").mkdir()
    (folder / "letters" / "tokenizer.chars").write_text(
        string.ascii_lowercase + string.digits + " ."
    )
    project = tomllib.loads(block("README", "toml"))["project"]
    (folder / "my_parts").mkdir()
    for page in NAMES:
        (folder / "my_parts" / f"{page}.py").write_text(block(page, "python"), encoding="utf-8")
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n",
        encoding="utf-8",
    )
    points = project["entry-points"]["megalite.plugins"]
    assert sorted(points.values()) == [f"my_parts.{page}" for page in NAMES]
    lines = [f"{name} = {module}" for name, module in points.items()]
    (info / "entry_points.txt").write_text(
        "\n".join(["[megalite.plugins]", *lines, ""]), encoding="utf-8"
    )
    return folder


def python(folder: Path, *arguments: str) -> str:
    """Run Python where the package is installed, and return what it prints."""
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(folder: Path, name: str, config: dict[str, Any], ranks: int = 1) -> tuple[Path, str]:
    """Train, and return the run's folder and what was printed."""
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"run": {"name": name}}))
    launch = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        if ranks > 1
        else []
    )
    said = python(folder, *launch, "-m", "megalite", "train", f"{name}.yaml")
    return folder / "runs" / name, said


def steps_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "grad_norm" in line]


def weights_of(run: Path, step: int) -> dict[str, torch.Tensor]:
    folder = run / "checkpoints" / f"step-{step:08}"
    files = [*folder.glob("model*.safetensors"), *(folder / "optimizer").glob("*.safetensors")]
    # Several ranks write several files of each kind, such as model-00001-of-00002.
    kinds = {path: path.stem.partition("-")[0] for path in files}
    return {
        f"{kind}/{name}": value
        for path, kind in kinds.items()
        for name, value in load_file(path).items()
    }


@pytest.fixture(scope="module")
def run(folder: Path) -> tuple[Path, str]:
    """All pages but that of the kernel, which the family has no use for, in one process."""
    return train(folder, "one", settings(*(name for name in NAMES if name != "kernel")))


def test_schedule(run: tuple[Path, str]) -> None:
    told = settings("schedule")["optimizer"]["schedule"]
    assert told == {
        "name": "multistep",
        "warmup_steps": 2,
        "milestones": [0.5, 0.6],
        "factor": 0.5,
        "min_lr": 1e-6,
    }
    peak = settings("optimizer")["optimizer"]["lr"]
    found = [line["lr"] for line in steps_of(run[0])]
    assert found == [peak / 2, peak, peak, peak, peak / 2, peak / 4]


def test_hook(run: tuple[Path, str]) -> None:
    (told,) = settings("hook")["hooks"]
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    losses = [line["valid_loss"] for line in lines if "valid_loss" in line]
    assert min(losses[:-1]) > told["valid_loss"] >= losses[-1]
    assert f"has reached {told['valid_loss']} at step {len(losses)}\n" in run[1]
    assert len(losses) < STEPS
    state = json.loads(
        (run[0] / "checkpoints" / f"step-{len(losses):08}" / "train_state.json").read_text()
    )
    assert state["data"]["samples"] == 16 * len(losses)
    assert state["valid_loss"] == losses[-1]
    for line in steps_of(run[0]):
        assert line["above_target"] == pytest.approx(line["loss"] - told["valid_loss"], abs=1e-6)


def test_optimizer(run: tuple[Path, str]) -> None:
    told, line = settings("optimizer")["optimizer"], steps_of(run[0])[4]
    before, after = weights_of(run[0], 4), weights_of(run[0], 5)
    clipped = 0.0
    for name in [name for name in after if name.startswith("model/")]:
        state = name.replace("model/", "square_avg/")
        square = (after[state] - told["alpha"] * before[state]).clamp(min=0) / (1 - told["alpha"])
        clipped += float(square.double().sum())
        decay = 0.0 if "norm" in name else told["weight_decay"]
        step = (before[name] * (1 - line["lr"] * decay) - after[name]) / line["lr"]
        # Squares of fp32 numbers and their differences: where a gradient is not tiny.
        is_large = square > 1e-3 * square.max()
        wanted = (square / after[state]).sqrt()
        torch.testing.assert_close(step.abs()[is_large], wanted[is_large], rtol=1e-2, atol=1e-3)
    # Differences of fp32 numbers.
    assert clipped**0.5 == pytest.approx(min(line["grad_norm"], 1.0), rel=1e-4)


INSIDE = """
import json, sys
from pathlib import Path

import torch
import torch.nn.functional as F

from megalite.cli import main
from megalite.data.indexed import IndexedDataset
from megalite.infer.generate import load_model
from my_parts import kernel

model = load_model(Path(sys.argv[1]))
data = IndexedDataset("corpus")
tokens = torch.cat([torch.from_numpy(data[number].astype("int64")) for number in range(len(data))])
windows = torch.stack([tokens[at : at + 33] for at in range(0, 16 * 32, 32)])
logits = model(windows[:, :-1])
losses = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")

x = torch.randn(3, 5, 14, dtype=torch.float64, requires_grad=True)
gate, up = x.chunk(2, -1)
torch.testing.assert_close(kernel.LeanActivation.swiglu(x), F.silu(gate) * up)
assert torch.autograd.gradcheck(kernel.SwiGLU.apply, x)
calls, swiglu = [], kernel.LeanActivation.swiglu
kernel.LeanActivation.swiglu = staticmethod(lambda gate_up: calls.append(gate_up.shape) or swiglu(gate_up))
assert main(["train", "kernel.yaml"]) == 0
assert main(["plan", "one.yaml", "--gpus", "2", "--gpu", "h100", "train.precision=bf16"]) == 0
print(json.dumps({"losses": losses.tolist(), "calls": calls}))
"""


@pytest.fixture(scope="module")
def inside(folder: Path, run: tuple[Path, str]) -> dict[str, Any]:
    """What one process finds: the cross-entropies by step 4, and the shapes that the kernel is
    given in a step."""
    config = settings("kernel") | {"run": {"name": "kernel"}}
    config |= {"train": config["train"] | {"steps": 1}, "observe": {"eval_every": 0}}
    (folder / "kernel.yaml").write_text(yaml.safe_dump(config))
    checkpoint = run[0] / "checkpoints" / "step-00000004"
    found: dict[str, Any] = json.loads(
        python(folder, "-c", INSIDE, str(checkpoint)).splitlines()[-1]
    )
    return found


def test_objective_and_config_json_of_the_family(
    run: tuple[Path, str], inside: dict[str, Any]
) -> None:
    """The checkpoint before a step opens as a model, whose logits give the loss of that step."""
    config = json.loads((run[0] / "checkpoints" / "step-00000004" / "config.json").read_text())
    assert (config["model_type"], config["hidden_act"]) == ("squared", "relu2")
    losses = torch.tensor(inside["losses"])
    right, line = torch.exp(-losses), steps_of(run[0])[4]
    wanted = (losses + settings("objective")["objective"]["epsilon"] * (1 - right)).mean()
    # fp32 sums in another order
    assert line["loss"] == pytest.approx(float(wanted), rel=1e-5)
    assert line["right_probability"] == pytest.approx(float(right.mean()), rel=1e-5)
    assert line["cross_entropy"] == pytest.approx(float(losses.mean()), rel=1e-5)
    lines = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    (valid,) = [line["valid_loss"] for line in lines if line["step"] == 4 and "valid_loss" in line]
    assert valid == pytest.approx(float(losses.mean()), rel=1e-5)


def test_kernel(inside: dict[str, Any]) -> None:
    model = BASE["model"]
    # Of 4 micro-batches in training, and as many in the validation at the end.
    assert (
        inside["calls"] == [[4, LENGTH, 2 * model["intermediate_size"]]] * 8 * model["num_layers"]
    )


def test_two_tensor_ranks_train_the_same(folder: Path, run: tuple[Path, str]) -> None:
    config = settings(*(name for name in NAMES if name != "kernel"))
    other, _ = train(
        folder, "two", merged(config, {"parallel": {"tensor": 2, "bucket_mb": 0.01}}), ranks=2
    )
    lines = steps_of(run[0]), steps_of(other)
    for one, two in zip(*lines, strict=True):
        for key in ("loss", "grad_norm", "lr", "right_probability", "above_target"):
            assert two[key] == pytest.approx(one[key], rel=1e-5), key  # fp32 sums in another order
    wanted, found = (weights_of(path, len(lines[0])) for path in (run[0], other))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_tokenizer(folder: Path, run: tuple[Path, str]) -> None:
    checkpoint = sorted((run[0] / "checkpoints").iterdir())[-1]
    wanted = (folder / "letters" / "tokenizer.chars").read_text()
    assert (checkpoint / "tokenizer.chars").read_text() == wanted
    answered = python(
        folder, "-m", "megalite", "generate", str(run[0]), "--prompt", "abc", "--max-tokens", "5"
    )
    assert answered.startswith("abc")
    assert set(answered.strip()) <= set(wanted)
