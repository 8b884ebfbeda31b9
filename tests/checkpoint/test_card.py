"""README.md of checkpoints and exports: what the hub reads of it, and that a card that somebody has
written stays."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from megalite.checkpoint.card import NAME, PIPELINES, write_card
from megalite.cli import main
from megalite.config import ModelConfig
from megalite.infer.generate import find_model
from megalite.train import train
from small_runs import make_config

hub = pytest.importorskip("huggingface_hub")


def test_a_checkpoint_and_its_export_have_a_card(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.steps=2", "checkpoint.every=0")
    train(config)
    folder = find_model(config.run.folder)
    text = (folder / NAME).read_text()
    card = hub.ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["megalite"],
    }  # fmt: skip
    assert "| data | corpus |" in text
    assert "| length of the run | 2 steps, 128 tokens |" in text
    (folder / NAME).write_text("mine")
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / NAME).read_text() == "mine"
    (folder / NAME).unlink()
    assert main(["convert", str(folder), str(tmp_path / "plain")]) == 0
    card = hub.ModelCard((tmp_path / "plain" / NAME).read_text())
    assert card.data.pipeline_tag == "text-generation"
    assert "21.7k parameters" in card.text


def test_a_card_names_the_model_that_a_run_started_from(tmp_path: Path) -> None:
    base = make_config(tmp_path, "llama", "train.steps=1", "checkpoint.every=0")
    train(base)
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "hub" / "models--Owner--base-1b" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(find_model(base.run.folder))
    config = make_config(tmp_path, {"hf": str(snapshot)}, "lora.rank=4")
    local = find_model(base.run.folder)
    write_card(tmp_path, make_config(tmp_path, {"hf": str(local)}, "run.name=other"))
    text = (tmp_path / NAME).read_text()
    assert f"| started from | {local.name} |" in text
    assert "base_model" not in hub.ModelCard(text).data.to_dict(), "the hub knows no such model"
    write_card(tmp_path, config)
    data = hub.ModelCard((tmp_path / NAME).read_text()).data.to_dict()
    assert (data["library_name"], data["base_model"]) == ("peft", "Owner/base-1b")
    assert "from_pretrained('Owner/base-1b')" in (tmp_path / NAME).read_text()


def test_every_task_has_a_name_on_the_hub() -> None:
    assert {*PIPELINES} == {*get_args(ModelConfig.model_fields["task"].annotation)}
    transformers = pytest.importorskip("transformers")
    assert all(hasattr(transformers, name) for _, name in PIPELINES.values())
