"""No config makes a run write outside of its folder, whatever lies in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.train import train
from small_runs import make_config

ENTRIES = (
    "checkpoints", "config.yaml", "config.yaml.tmp", "health", "lock", "loss.png", "metrics.jsonl", "source",
    "tensorboard", "tokenizer", "trace", "wandb", "checkpoints/step-00000001", "checkpoints/step-00000001.tmp",
)  # fmt: skip


@pytest.mark.parametrize("name", ["../x", "..", ".", "/x", "a/b", "a\\b", "~", "$HOME", "a\n", "", "-x", ".x", "a\0b"])
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    values = make_config(tmp_path).model_dump(mode="json")
    values["run"]["name"] = name
    with pytest.raises(ConfigError, match=r"run\.name"):
        parse_config(values)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_link_in_the_folder_is_refused_before_anything_is_written(tmp_path: Path, entry: str) -> None:
    config = make_config(tmp_path, "llama", "train.steps=1", "observe.tensorboard=true", "health.hang_timeout_s=0.2")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    target = outside if "." not in entry or "step" in entry else outside / "precious"
    link = config.run.folder / entry
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(ConfigError, match=r"is a link to .*run\.dir"):
        train(config)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_the_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    """To another disk, say; and links in it may lead to each other."""
    config = make_config(tmp_path, "llama", "train.steps=1")
    disk = tmp_path / "disk"
    disk.mkdir()
    config.run.folder.parent.mkdir()
    config.run.folder.symlink_to(disk)
    (disk / "latest.json").symlink_to("metrics.jsonl")
    train(config)
    assert (disk / "checkpoints" / "step-00000001").is_dir()


def test_a_folder_that_cannot_be_made_is_a_mistake_in_words(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path, "llama", "train.steps=1", f"run.dir={tmp_path / 'file'}")
    with pytest.raises(ConfigError, match=r"run\.dir: .* cannot be written: Not a directory; make room"):
        train(config)
