"""A package outside of megalite adds parts by its entry point: they train on every layout as on one
process, resume, and are read back. No file of megalite knows them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from small_runs import write_corpus

PACKAGE = Path(__file__).parent / "package"
MODEL = {
    "family": "blend", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": 32, "init_std": 0.1, "num_experts": 3,
}  # fmt: skip
CONFIG: dict[str, Any] = {
    "run": {"name": "one"},
    "model": MODEL,
    "train": {"steps": 6, "global_batch_size": 4, "precision": "fp32"},
    "optimizer": {"name": "signum", "lr": 1e-3, "schedule": {"name": "rsqrt", "warmup_steps": 2}},
    "objective": {"name": "focal", "gamma": 2},
    "kernels": {"norm": "demo"},
    "hooks": [{"name": "norms", "every": 4}],
    "parallel": {"bucket_mb": 0.01},
    "checkpoint": {"every": 3},
}
LAYOUTS = {
    "one": (1, []),
    "tensor 2": (2, ["parallel.tensor=2"]),
    "tensor 2, whole sequences": (2, ["parallel.tensor=2", "parallel.sequence=false"]),
    "pipeline 2": (2, ["parallel.pipeline=2"]),
    "data 2, ZeRO 1": (2, ["parallel.zero_stage=1"]),
}


def megalite(folder: Path, ranks: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a verb where the package is installed."""
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    environment = os.environ | {"PYTHONPATH": str(PACKAGE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launch, "megalite", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def metrics_of(checkpoint: Path) -> list[tuple[float, float]]:
    lines = [
        json.loads(line)
        for line in (checkpoint.parents[1] / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [line for line in lines if "grad_norm" in line]
    assert steps[-1]["largest_grad_norm"] == max(line["grad_norm"] for line in steps)
    return [(line["loss"], line["grad_norm"]) for line in steps]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The checkpoint of every layout after the last step."""
    folder = tmp_path_factory.mktemp("plugin")
    write_corpus(folder / "corpus")
    data = {"train": [{"path": str(folder / "corpus")}], "seq_length": 32}
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"data": data}))
    done = megalite(folder, 1, "train", "config.yaml", "run.name=broken", "train.stop_at=3")
    assert done.returncode == 0, done.stderr
    assert "largest gradient norm of 3 steps: " in done.stdout
    found = {}
    for number, (name, (ranks, overrides)) in enumerate(LAYOUTS.items()):
        done = megalite(folder, ranks, "train", "config.yaml", f"run.name=run{number}", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        found[name] = folder / "runs" / f"run{number}" / "checkpoints" / "step-00000006"
    return found


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    files = [
        *checkpoint.glob("model*.safetensors"),
        *(checkpoint / "optimizer").glob("momentum*.safetensors"),
    ]
    return {
        f"{path.parent.name}/{name}": value
        for path in files
        for name, value in load_file(path).items()
    }


@pytest.mark.parametrize("layout", list(LAYOUTS)[1:])
def test_every_layout_trains_the_same_model(runs: dict[str, Path], layout: str) -> None:
    wanted, found = tensors_of(runs["one"]), tensors_of(runs[layout])
    for one, other in zip(metrics_of(runs["one"]), metrics_of(runs[layout]), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    # Each expert has a tensor of its own; of the sign of a mean near 0 layouts may differ, in few
    # elements.
    assert (
        sum("experts." in name for name in wanted) == 2 * MODEL["num_layers"] * MODEL["num_experts"]
    )
    for name in wanted:
        one, other = (
            tensors[name.replace(runs["one"].name, runs[layout].name)]
            for tensors in (wanted, found)
        )
        assert ((one - other).abs() > 1e-5 * one.abs().max()).float().mean() < 2e-3, name


def test_the_planner_counts_the_experts(runs: dict[str, Path]) -> None:
    done = megalite(
        runs["one"].parents[3],
        1,
        "plan",
        "config.yaml",
        "--gpus=1",
        "--gpu=h100",
        "train.precision=bf16",
    )
    assert done.returncode == 0, done.stderr
    hidden, inner, experts = (
        MODEL[name] for name in ("hidden_size", "intermediate_size", "num_experts")
    )
    layer = 4 * hidden**2 + 2 * hidden + experts * (hidden + 2 * hidden * inner) + inner
    size = MODEL["num_layers"] * layer + hidden * (2 * MODEL["vocab_size"] + 1)
    assert f"blend, {size:,} parameters" in done.stdout, done.stdout


def test_a_kernel_stands_for_the_function_of_its_name(tmp_path: Path) -> None:
    code = (
        "from megalite.config import KernelsConfig; from megalite.kernels import library;"
        "library.use(KernelsConfig(norm='demo')); print(library.added['rms_norm'].__module__)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "demo_parts\n", done.stderr


def test_a_broken_run_goes_on_bitwise(runs: dict[str, Path]) -> None:
    folder = runs["one"].parents[3]
    done = megalite(folder, 1, "train", "config.yaml", "run.name=broken")
    assert done.returncode == 0, done.stderr
    assert "largest gradient norm of 6 steps: " in done.stdout
    assert metrics_of(folder / "runs" / "broken" / "checkpoints" / runs["one"].name) == metrics_of(
        runs["one"]
    )
    resumed = tensors_of(folder / "runs" / "broken" / "checkpoints" / runs["one"].name)
    unbroken = tensors_of(runs["one"])
    assert resumed.keys() == unbroken.keys()
    assert all(torch.equal(resumed[name], value) for name, value in unbroken.items())
