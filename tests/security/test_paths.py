"""No config makes a run write outside of its folder, whatever lies in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.config import Source
from megalite.config_file import parse_config
from megalite.corpus.config import CorpusConfig
from megalite.data.inputs import Report, list_files
from megalite.errors import ConfigError
from megalite.train import train
from small_runs import make_config

ENTRIES = (
    "checkpoints", "config.yaml", "config.yaml.tmp", "health", "lock", "loss.png", "metrics.jsonl", "source",
    "tensorboard", "tokenizer", "trace", "wandb", "checkpoints/step-00000001", "checkpoints/step-00000001.tmp",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "/x", "a/b", "a\\b", "~", "$HOME", "a\n", "", "-x", ".x", "a\0b"]
)
def test_a_name_cannot_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    values = make_config(tmp_path).model_dump(mode="json")
    values["run"]["name"] = name
    with pytest.raises(ConfigError, match=r"run\.name"):
        parse_config(values)


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_link_in_the_folder_is_refused_before_anything_is_written(
    tmp_path: Path, entry: str
) -> None:
    config = make_config(
        tmp_path, "llama", "train.steps=1", "observe.tensorboard=true", "health.hang_timeout_s=0.2"
    )
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
    with pytest.raises(
        ConfigError, match=r"run\.dir: .* cannot be written: Not a directory; make room"
    ):
        train(config)


def test_every_path_of_a_config_knows_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run.dir=~/x` made a folder that was called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    keys = (
        "run.dir",
        "data.tokenizer",
        "checkpoint.resume",
        "parallel.offload.nvme_path",
        "observe.tasks.include_path",
    )
    found = make_config(tmp_path, "llama", *(f"{key}=~/x/y" for key in keys))
    for key in keys:
        value: Any = found
        for part in key.split("."):
            value = getattr(value, part)
        assert value == tmp_path / "x" / "y", key
    corpus = CorpusConfig.model_validate(
        {"output": "~/out", "sources": [{"name": "a", "path": "p"}], "words": {"file": "~/words"}}
    )
    assert corpus.output == tmp_path / "out"
    assert corpus.words is not None
    assert corpus.words.file == tmp_path / "words"
    assert Source(path="~/x").path == f"{tmp_path}/x"
    assert Source(path="s3://b/~x").path == "s3://b/~x"
    values = make_config(tmp_path).model_dump(mode="json")
    values["run"]["dir"] = "~nobody-of-that-name/x"
    with pytest.raises(ConfigError, match=r"run\.dir.*no user of that name"):
        parse_config(values)


@pytest.mark.parametrize(
    "pattern", ["**/*.jsonl", "{}/**/*.jsonl", "{}/**", "**", "{}", "{}/./**/*.jsonl", "~/**/*l"]
)
def test_a_file_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    """Whatever links lead to it, also such as lead back; twenty of which are more ways than can be
    gone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in ("a/b/c.jsonl", "a/d.jsonl", ".hidden/e.jsonl", "z.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    for number in range(20):
        (tmp_path / "a" / f"loop{number}").symlink_to("..")
    (tmp_path / "also.jsonl").symlink_to("z.jsonl")
    report = Report()
    found = list_files(
        [pattern.format(tmp_path), "z.jsonl", str(tmp_path / "a" / "d.jsonl")], report
    )
    names = {Path(path).resolve().relative_to(tmp_path.resolve()).as_posix() for path in found}
    assert (len(found), names) == (3, {"a/b/c.jsonl", "a/d.jsonl", "z.jsonl"})
    assert report.num_repeated >= 1
    assert "more names of files that are taken already" in str(report)


@pytest.mark.parametrize("name", ["..", "", ".", "../x.safetensors", "/x", "a/b", "x\0y"])
def test_an_index_names_files_of_its_folder(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"w": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is outside of the folder or no file"):
        TensorFolder(tmp_path)
