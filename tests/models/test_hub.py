"""Models are named as on the hub where its cache has them; nothing is downloaded."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from megalite.cli import main
from megalite.config_file import parse_config
from megalite.data import remote
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.infer.generate import find_model
from megalite.train import train
from megalite.utils.hub import cache_folder, local
from small_runs import make_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_in_cache(folder: Path, name: str, cache: Path) -> Path:
    """As huggingface_hub lays it out: files are links to blobs."""
    stored = cache / f"models--{name.replace('/', '--')}"
    snapshot = stored / "snapshots" / COMMIT
    for part in (snapshot, stored / "blobs", stored / "refs"):
        part.mkdir(parents=True)
    (stored / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(path for path in folder.iterdir() if path.is_file()):
        blob = stored / "blobs" / str(number)
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs", str(number)))
    return snapshot


def test_a_model_of_the_hub_is_trained_and_opened_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("some words to learn tokens from")
    train_tokenizer([str(tmp_path / "text.txt")], tmp_path / "tokenizer", 257)
    size = ["model.vocab_size=300", f"data.tokenizer={tmp_path / 'tokenizer'}"]
    first = make_config(tmp_path, "llama", "train.steps=1", "checkpoint.every=0", *size)
    train(first)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    snapshot = put_in_cache(find_model(first.run.folder), "Owner/some-model.v2", tmp_path / "cache")
    config = make_config(
        tmp_path, {"hf": "Owner/some-model.v2"}, "run.name=next", "train.steps=1", "data.tokenizer=Owner/some-model.v2"
    )  # fmt: skip
    assert config.model.hf == snapshot, "also in the config that the run writes"
    assert config.data.tokenizer == snapshot
    train(config)
    capsys.readouterr()
    assert find_model(Path("Owner/some-model.v2")) == snapshot
    assert main(["generate", "Owner/some-model.v2", "--prompt", "some", "--max-tokens", "2"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("some")
    assert f"Owner/some-model.v2: {snapshot}" in told.err, "which files answer"


def test_what_the_cache_does_not_have_is_told_how_to_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=f"`hf download Owner/none` puts it into {tmp_path}"):
        make_config(tmp_path, {"hf": "Owner/none"})
    with pytest.raises(ConfigError, match="`hf download Owner/none`"):
        find_model(Path("Owner/none"))
    with pytest.raises(ConfigError) as caught:
        parse_config({"model": {"hf": "/Owner/none"}})
    assert "hf download" not in str(caught.value), "an absolute path is no name of the hub"


def test_a_folder_comes_before_the_cache_and_odd_references_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "files").mkdir()
    snapshot = put_in_cache(tmp_path / "files", "a/b", tmp_path / "cache")
    assert local(Path("a/b")) == snapshot
    (tmp_path / "cache/models--a--b/refs/main").write_text("../../..")
    assert local(Path("a/b")) == Path("a/b")
    (tmp_path / "cache/models--a--b/refs/main").write_text(COMMIT)
    (tmp_path / "a/b").mkdir(parents=True)
    assert local(Path("a/b")) == Path("a/b")
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / "hub"


def test_a_user_without_a_home_has_no_cache_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where a user is a number that no file of users has."""
    for name in ("HOME", "HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME", "MEGALITE_CACHE"):
        monkeypatch.delenv(name, raising=False)

    def unknown(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert local(Path("owner/name")) == Path("owner/name")
    with pytest.raises(DataError, match="set MEGALITE_CACHE to a folder"):
        remote.cache_folder()
