"""Hidden states that are to be like a teacher's: projections in checkpoints, and what is refused.
tests/tune/test_objectives.py compares the losses and gradients on each layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint.convert import open_source, write_model
from megalite.config import Config, LoraConfig
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import weight_table
from megalite.plan import plan
from megalite.planner.estimate import memory_of
from megalite.train import train
from small_runs import MODELS, curve_of, make_config, metrics_of

WIDE = MODELS["llama"] | {"hidden_size": 48, "num_layers": 3}
PAIRS = "[{student: 0, teacher: 1}, {student: 1, teacher: 2, loss: cosine}]"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tmp_path_factory.mktemp("teacher"), WIDE, "train.steps=8")
    train(config)
    return config.run.folder / "checkpoints" / "step-00000008"


def student_of(folder: Path, teacher: Path, *overrides: str) -> Config:
    objective = f"objective={{name: distill, teacher: {teacher}, hidden: {PAIRS}}}"
    return make_config(
        folder, "llama", objective, "train.steps=6", "checkpoint.every=3", *overrides
    )


def test_a_resume_is_bitwise_and_projections_are_no_part_of_the_model(
    tmp_path: Path, teacher: Path
) -> None:
    whole = student_of(tmp_path, teacher, "train.recompute=full")
    train(whole)
    name = "run.name=broken"
    train(student_of(tmp_path, teacher, "train.recompute=full", name, "train.stop_at=3"))
    broken = student_of(tmp_path, teacher, "train.recompute=full", name)
    train(broken)
    assert curve_of(whole) == curve_of(broken)
    losses = [line["layer_loss/hidden"] for line in metrics_of(whole) if "loss" in line]
    assert losses[-1] < losses[0]
    last, other = (each.run.folder / "checkpoints" / "step-00000006" for each in (whole, broken))
    stored, again = (load_file(each / "model.safetensors") for each in (last, other))
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[key], again[key]) for key in stored)
    assert stored["distill.layers.0.weight"].shape == (48, 32)
    states = {path.name for path in (last / "optimizer").glob("*.safetensors")}
    moments = load_file(last / "optimizer" / sorted(states)[0])
    assert "distill.layers.1.weight" in moments
    assert load_model(last).config.projections == {}
    write_model(open_source(last), tmp_path / "out")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == {key for key in stored if not key.startswith("distill.")}


def test_layers_of_one_width_need_no_projection(tmp_path: Path, teacher: Path) -> None:
    wide = student_of(tmp_path, teacher, "model.hidden_size=48")
    assert wide.model.projections == {}
    names = {row.name for row in weight_table(student_of(tmp_path, teacher).model)}
    assert {row.name for row in weight_table(wide.model)} == {
        name for name in names if "projection" not in name
    }


def test_projections_are_planned(tmp_path: Path, teacher: Path) -> None:
    config = student_of(tmp_path, teacher)
    bare = config.model_copy(update={"model": config.model.model_copy(update={"projections": {}})})
    assert memory_of(config, plan(config, 1))[0].step > memory_of(bare, plan(bare, 1))[0].step
    assert plan(config, 1).num_params - plan(bare, 1).num_params == 2 * 32 * 48


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.pipeline=2",), r"objective.hidden needs parallel.pipeline: 1, not 2"),
        (("parallel.engine=deepspeed", "parallel.zero_stage=1"), "needs parallel.engine: native"),
        (("objective.hidden=[{student: 2, teacher: 0}]",), r"student = 2 is none of its layers, which are 0 to 1"),
        (("objective.hidden=[{student: 0, teacher: 3}]",), r"teacher = 3 is none of its layers, which are 0 to 2"),
        (("objective.hidden=[{student: 0, teacher: 0}, {student: 0, teacher: 1}]",), "a student's layer twice"),
        (("objective.teacher_logits=said",), "needs objective.teacher in memory, and no objective.teacher_logits"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused(
    overrides: tuple[str, ...], message: str, tmp_path: Path, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(student_of(tmp_path, teacher, *overrides), 2)


def test_adapters_have_no_projections(tmp_path: Path, teacher: Path) -> None:
    config = student_of(tmp_path, teacher).model_copy(update={"lora": LoraConfig(rank=2)})
    assert "needs lora: null where teacher and student differ in width" in config.objective.refuses(
        config
    )
