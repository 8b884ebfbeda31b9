"""Answers that the student writes itself, and learns from by what its teacher says of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import MicroBatch
from megalite.data.mixture import IGNORE, build_mixtures
from megalite.errors import ConfigError, DataError
from megalite.plan import plan as plan_of
from megalite.train import train
from megalite.training.parts import build, forward
from megalite.training.run import DISK, Run, make_loader
from ranks import run_ranks
from small_runs import curve_of, make_config, train_on_rank, write_corpus

END = 96
LAYOUTS = {
    "tensor": "parallel.tensor=2",
    "tensor alone": "parallel={bucket_mb: 0.01, tensor: 2, sequence: false}",
    "pipeline": "parallel.pipeline=2",
    "context": "parallel.context=2",
    "data": "parallel.zero_stage=1",
}


def write_rows(prefix: Path) -> None:
    """Rows of a question of two to four tokens, and an answer that ends with END."""
    rng = np.random.default_rng(0)
    with IndexedWriter(prefix, np.uint16, np.uint8) as writer:
        for _ in range(40):
            asked, said = rng.integers(2, 5), rng.integers(2, 6)
            row = [*rng.integers(0, END, asked + said), END]
            mask = [0] * asked + [1] * (said + 1)
            writer.add_documents(np.array(row, np.int64), [len(row)], np.array(mask))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = make_config(tmp_path_factory.mktemp("teacher"), "llama", "train.steps=8")
    train(config)
    return config.run.folder / "checkpoints" / "step-00000008"


def student_of(
    folder: Path, teacher: Path, *overrides: str, on_policy: str = "share: 0.6"
) -> Config:
    if not (folder / "rows.idx").exists():
        write_rows(folder / "rows")
    asked = f"{{name: distill, teacher: {teacher}, weight: 1, on_policy: {{{on_policy}}}}}"
    return make_config(
        folder, "llama", f"objective={asked}", f"data.train=[{{path: {folder / 'rows'}}}]", "data.valid=[]",
        "data.document_mask=true", "train.steps=4", "checkpoint.every=2", "train.micro_batch_size=1", *overrides,
    )  # fmt: skip


def batches_of(config: Config) -> tuple[list[MicroBatch], list[MicroBatch], Any, Mesh]:
    """What is read, what is made of it, and by which parts."""
    mesh, plan = Mesh.alone(), plan_of(config, 1)
    parts, data = build(config, plan, mesh), build_mixtures(config)["train"]
    assert data is not None
    run = Run(config, plan, mesh, None)
    parts.engine.load(DISK.initial_state(config, mesh, None))
    with make_loader(data, run) as loader:
        read = next(loader)
    with make_loader(data, run) as loader:
        made = next(config.objective.batches(loader, run, parts))
    return read, made, parts, mesh


@pytest.mark.parametrize("way", ["train.compile=false", "train.recompute=full"])
def test_what_the_student_is_likeliest_to_say_is_learned(
    way: str, tmp_path: Path, teacher: Path
) -> None:
    """At a temperature of nearly 0 each label is the model's own likeliest token, by a forward pass
    over the whole rows."""
    config = student_of(
        tmp_path, teacher, way, on_policy="share: 1, temperature: 0.00001, slots: 2"
    )
    read, made, parts, mesh = batches_of(config)
    assert [micro.tokens.shape for micro in made] == [micro.tokens.shape for micro in read]
    outs = list(forward(parts, made, mesh, "logits"))
    num_labels = 0
    for before, (out, _, micro) in zip(read, outs, strict=True):
        likeliest = out.whole().argmax(-1)
        is_label = micro.labels != IGNORE
        assert torch.equal(likeliest[is_label], micro.labels[is_label])
        # Nothing is learned where nothing was, and questions stay.
        was_label = before.labels != IGNORE
        assert not (is_label & ~was_label).any()
        is_asked = torch.nn.functional.pad(~was_label, (1, 0), value=True)[:, :-1]
        assert torch.equal(before.tokens[is_asked], micro.tokens[is_asked])
        # A token that is learned is what the next place sees.
        both = is_label[:, :-1] & is_label[:, 1:]
        assert torch.equal(micro.labels[:, :-1][both], micro.tokens[:, 1:][both])
        num_labels += int(is_label.sum())
    assert num_labels > 20


def test_samples_are_chosen_and_answered_by_their_numbers(tmp_path: Path, teacher: Path) -> None:
    one = batches_of(student_of(tmp_path, teacher))
    two = batches_of(student_of(tmp_path, teacher, "train.micro_batch_size=2"))
    other = batches_of(student_of(tmp_path, teacher, "train.seed=4"))
    rows, made = (torch.cat([micro.labels for micro in found]) for found in one[:2])
    assert torch.equal(made, torch.cat([micro.labels for micro in two[1]]))
    changed = (rows != made).any(1).tolist()
    assert set(changed) == {True, False}
    assert not torch.equal(made, torch.cat([micro.labels for micro in other[1]]))


def test_each_layout_learns_from_the_same_answers_and_a_resume_is_bitwise(
    tmp_path: Path, teacher: Path
) -> None:
    whole, broken = (student_of(tmp_path, teacher, f"run.name={n}") for n in ("whole", "broken"))
    train(whole)
    train(broken.model_copy(update={"train": broken.train.model_copy(update={"stop_at": 2})}))
    train(broken)
    assert curve_of(broken) == curve_of(whole)
    configs = [
        student_of(tmp_path, teacher, f"run.name={name}".replace(" ", "-"), override)
        for name, override in LAYOUTS.items()
    ]
    run_ranks(2, train_on_rank, configs)
    for config in configs:
        for one, found in zip(curve_of(whole), curve_of(config), strict=True):
            # The project's bound of a step, and of several at this rate.
            assert found == pytest.approx(one, rel=2e-5), config.run.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.weight=0.5", "objective.on_policy needs objective.weight: 1, not 0.5: the cross-entropy"),
        ("objective.teacher_logits=said", "needs objective.teacher_logits: null, not said"),
        ("data.document_mask=false", "needs data.document_mask: true, not false"),
        ("parallel={engine: deepspeed, zero_stage: 1}", "objective.on_policy needs parallel.engine: native"),
    ],
)  # fmt: skip
def test_what_cannot_go_with_it_is_refused(
    override: str, message: str, tmp_path: Path, teacher: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(student_of(tmp_path, teacher, override), 1)


def test_plain_text_has_no_answers(tmp_path: Path, teacher: Path) -> None:
    write_corpus(tmp_path / "text")
    config = student_of(tmp_path, teacher, f"data.train=[{{path: {tmp_path / 'text'}}}]")
    with pytest.raises(DataError, match="text is plain text, which has no answers"):
        train(config)
