"""Nothing is not perfect: data without labels is refused before the first step, a step and a
validation without any have no loss, and say so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.cli import main
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import build_mixtures
from megalite.errors import DataError
from megalite.train import train
from megalite.training.objectives import DPOConfig
from small_runs import MODELS, make_config, metrics_of

LENGTH = 8
CLASSES = {"labels": ["a", "b"]}
UNLEARNED: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    # The mask of each document, or where there is none its tokens' number; and what the config
    # says.
    "a mask of zeros": ([[0] * 5, [0] * 7], {}),
    "only first tokens, which nothing predicts": (
        [[1, 0, 0], [1, 0, 0, 0]],
        {"data.border_loss": False},
    ),
    "answers that are cut away": ([[0] * 12 + [1, 1], [0] * 10 + [1]], {"data.long_rows": "cut"}),
    "answers in rows that are left out": ([[0] * 9 + [1, 1], [0] * 4], {"data.long_rows": "drop"}),
    "documents of a token": ([[], [], [], []] * 9, {"data.border_loss": False}),
    "documents of a token, packed": (
        [[], [], [], []] * 9,
        {"data.border_loss": False, "data.packing": "best_fit"},
    ),
    "no class of a text": ([[0] * 5, [1, 1, 0]], {"model.task": "classification", **CLASSES}),
    "no class of a token": ([[0] * 5, [0] * 3], {"model.task": "labels", **CLASSES}),
    "pairs of which one side is learned": (
        [[0, 1], [0, 0], [0, 0], [0, 1]],
        {"objective.name": "dpo"},
    ),
}


def write(prefix: Path, documents: list[list[int]]) -> Path:
    has_mask = any(documents)
    with IndexedWriter(prefix, np.uint16, np.uint8 if has_mask else None) as writer:
        for mask in documents:
            writer.add_documents(
                np.arange(max(len(mask), 1)), [max(len(mask), 1)], mask if has_mask else None
            )
    return prefix


def config_of(folder: Path, more: dict[str, Any], **data: list[dict[str, str]]) -> Config:
    model = MODELS["llama"] | {
        "labels": more.get("labels", []),
        "task": more.get("model.task", "causal"),
    }
    sections = {
        "run": {"name": "test", "dir": str(folder / "runs")},
        "data": {"seq_length": LENGTH, **data},
    }
    objective = more.get("objective.name", "next_token")
    if objective == "dpo":
        model |= {"hf": str(folder / "hf")}
    values = {
        **sections, "model": model, "train": {"steps": 2, "global_batch_size": 1, "precision": "fp32"},
        "optimizer": {"lr": 1e-2}, "objective": {"name": objective}, "checkpoint": {"every": 0},
    }  # fmt: skip
    values["data"]["document_mask"] = True
    for key, value in more.items():
        if key.startswith("data."):
            values["data"][key.removeprefix("data.")] = value
    if objective != "dpo":
        return parse_config(values)
    config = parse_config(values | {"objective": {}, "model": model | {"hf": None}})
    return config.model_copy(update={"objective": DPOConfig()})


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("what", UNLEARNED)
def test_a_source_without_a_label_is_refused(tmp_path: Path, what: str, split: str) -> None:
    documents, more = UNLEARNED[what]
    bad, good = write(tmp_path / "bad", documents), write(tmp_path / "good", [[1] * 4] * 16)
    sources = [{"path": str(good)}, {"path": str(bad)}]
    # Rows that are too long are said to be that.
    why = (
        r"\[1\] .*bad: .* none is left with something to learn"
        if "cut" in what
        else ": bad: no token of it has a label"
    )
    with pytest.raises(DataError, match=rf"data\.{split}{why}"):
        build_mixtures(
            config_of(tmp_path, more, **{"train": [{"path": str(good)}], split: sources})
        )
    assert (
        build_mixtures(config_of(tmp_path, more, train=[{"path": str(good)}]))["train"] is not None
    )


def test_an_evaluation_that_comes_to_no_label_is_refused(tmp_path: Path) -> None:
    late = write(tmp_path / "late", [[0] * 8] * 40 + [[1] * 8])
    good = write(tmp_path / "good", [[1] * 6] * 16)
    sources = {"train": [{"path": str(good)}], "valid": [{"path": str(late)}]}
    with pytest.raises(
        DataError,
        match=r"data\.valid: none of the first 20 samples, .* raise observe\.eval_batches",
    ):
        build_mixtures(config_of(tmp_path, {}, **sources))
    build_mixtures(config_of(tmp_path, {}, train=sources["valid"]))


def test_training_on_nothing_ends_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "corpus", [[0] * 20] * 30)
    config = make_config(
        tmp_path, "llama", "data.document_mask=true", "data.valid=[]", "data.seq_length=32"
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["train", str(tmp_path / "config.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: data.train: corpus: no token of it has a label, so that there is nothing to learn"
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("first", [True, False])
def test_a_step_without_labels_has_no_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], first: bool
) -> None:
    """Its loss was 0.0000, the best there is, and the window of spikes took it for one."""
    rows = [[1] * 17 if (number // 4 % 2 == 0) is not first else [0] * 17 for number in range(32)]
    write(tmp_path / "corpus", rows)
    config = make_config(
        tmp_path,
        "llama",
        "data.document_mask=true",
        "data.order=sequential",
        "train.steps=8",
        "checkpoint.every=0",
    )
    train(config)
    found = [line for line in metrics_of(config) if "lr" in line]
    unlabelled = [step for step in range(1, 9) if (step % 2 == 1) is first]
    assert [line["step"] for line in found if line["loss"] is None] == unlabelled
    assert [line["step"] for line in found if line.get("no_labels")] == unlabelled
    assert all(line["loss"] > 1 for line in found if line["step"] not in unlabelled)
    assert not any(line.get("skipped") or line.get("not_finite") for line in found)
    state = json.loads(
        (config.run.folder / "checkpoints" / "step-00000008" / "train_state.json").read_text()
    )
    assert (len(state["hooks"]["guard"]["losses"]), state["hooks"]["guard"]["in_a_row"]) == (4, 0)
    said = capsys.readouterr().out
    assert said.count("has a label: nothing was learned") == 1
    assert f"warning: step {unlabelled[0]}: no token of its batch has a label" in said
