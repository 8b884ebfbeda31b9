"""`megalite finetune`: from rows to a trained model in one command, by a config that is shown."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from megalite.config_file import load_config
from megalite.observe.jsonl import read_metrics
from megalite.utils.resources import configs_dir
from user_folder import make, typed


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("user"))


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = shutil.copytree(made, tmp_path / "user")
    monkeypatch.chdir(copied)
    return copied


@pytest.mark.parametrize(
    ("rows", "words", "config"),
    [
        ("chats", "", "finetune-chat"),
        ("chats", "--method lora", "finetune-lora"),
        ("pairs", "", "finetune-dpo"),
        ("texts", "", "finetune-classes"),
    ],
)
def test_rows_say_what_is_learned_and_the_config_can_be_trained_elsewhere(
    folder: Path, rows: str, words: str, config: str
) -> None:
    command = f"finetune chatty --data {rows}.jsonl {words} --output new.yaml run.name=first"
    assert typed(f"{command} train.epochs=1 optimizer.lr=1e-4") == 0
    found = load_config("new.yaml")
    begun = yaml.safe_load((configs_dir() / f"{config}.yaml").read_text())
    assert found.objective.name == begun.get("objective", {}).get("name", "next_token")
    assert bool(found.lora) == ("lora" in begun)
    assert found.model.hf == Path("chatty")
    assert (found.model.task == "classification") == (rows == "texts")
    assert (found.train.epochs, found.optimizer.lr) == (1.0, 1e-4)
    # Fitted: 40 short rows are one batch of the shipped config.
    assert found.data.seq_length == 256
    assert found.train.global_batch_size == 4
    assert not Path("runs/first/checkpoints").exists()
    assert typed("train new.yaml") == 0
    assert [*Path("runs/first/checkpoints").glob("step-*")]


def test_it_trains_goes_on_and_is_gone_on_from(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "finetune chatty --data chats.jsonl run.name=first"
    assert typed(command) == 0
    assert "seq_length: 256" in capsys.readouterr().out
    steps = len([*read_metrics(Path("runs/first/metrics.jsonl"))])
    assert typed(command) == 0, "nothing is left to do"
    assert len([*read_metrics(Path("runs/first/metrics.jsonl"))]) == steps
    # A run is its newest checkpoint.
    assert typed("finetune runs/first --data pairs.jsonl --output dpo.yaml") == 0
    assert "runs/first/checkpoints/step-" in str(load_config("dpo.yaml").model.hf)
    # Rows that have changed are not taken for those the run began with.
    with open("chats.jsonl", "a") as file:
        file.write(json.dumps({"messages": []}) + "\n")
    assert typed(command) == 2
    assert "have changed since: choose another run.name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("chatty --data chats.jsonl --method dpo", "format chat: sft or lora does"),
        ("chatty --data corpus.jsonl", "corpus.jsonl:1: the row is of no format that is known"),
        ("model --data chats.jsonl", "put one into model/chat_template.jinja"),
        ("chatty --data nothing.jsonl", "matches no file"),
        ("chatty --data chats.jsonl --output my.yaml", "--output my.yaml exists; name a new file"),
        ("chatty --data chats.jsonl train.epoch=3", "did you mean 'train.epochs'?"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    folder: Path, capsys: pytest.CaptureFixture[str], words: str, told: str
) -> None:
    assert typed(f"finetune {words}") == 2
    assert told in capsys.readouterr().err
    assert not [*Path("runs").glob("finetune-*")]


def test_it_is_for_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert typed("finetune chatty --data chats.jsonl") == 2
    assert "start `megalite train FILE` on the ranks" in capsys.readouterr().err
