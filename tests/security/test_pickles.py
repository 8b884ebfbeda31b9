"""A pickle that would run a program is planted wherever a user may point to; it is never loaded,
and the error says what to do."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megalite.checkpoint.tensors import CheckpointError
from megalite.cli import main
from megalite.config import Config
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.infer.generate import load_model
from megalite.train import train
from small_runs import MODELS, make_config

LLAMA = {
    "model_type": "llama", "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
}  # fmt: skip


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "somebody-was-here"


@pytest.fixture
def bomb(canary: Path) -> bytes:
    data = pickle.dumps(Bomb(canary))
    pickle.loads(data)  # it works
    canary.rmdir()
    return data


@pytest.fixture
def hub(tmp_path: Path, bomb: bytes) -> Path:
    """A model as somebody may have published it: weights pickled, and code that asks to be run."""
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA))
    (folder / "evil.py").write_text(
        f"import os; os.mkdir({str(tmp_path / 'somebody-was-here')!r})\n"
    )
    for name in ("pytorch_model.bin", "optimizer.pt", "training_args.bin", "tokenizer.pkl"):
        (folder / name).write_bytes(bomb)
    return folder


def test_a_model_of_pickles_is_refused_with_the_way_out(
    tmp_path: Path, hub: Path, canary: Path
) -> None:
    config = make_config(tmp_path, {}, f"model.hf={hub}")
    for load in (lambda: train(config), lambda: load_model(hub)):
        with pytest.raises(
            CheckpointError, match=r"pytorch_model\.bin.* may be pickles.*save_pretrained\(NEW\)"
        ):
            load()
    assert main(["generate", str(hub), "--prompt", "x"]) == 2
    assert not canary.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_pickle_under_the_name_of_a_safe_file_is_not_loaded(
    hub: Path, bomb: bytes, canary: Path, name: str
) -> None:
    (hub / name).write_bytes(bomb)
    with pytest.raises(CheckpointError, match=r"no readable model\.safetensors"):
        load_model(hub)
    assert not canary.exists()


def test_an_index_that_names_a_pickle_does_not_load_it(hub: Path, canary: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (hub / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        load_model(hub)
    assert not canary.exists()


def test_pickles_in_a_checkpoint_are_passed_by(tmp_path: Path, bomb: bytes, canary: Path) -> None:
    first = make_config(tmp_path, "llama", "train.steps=2", "train.stop_at=1")
    train(first)
    folder = first.run.folder / "checkpoints" / "step-00000001"
    for name in (
        "optimizer.pt",
        "pytorch_model.bin",
        "optimizer/exp_avg.pt",
        "train_state.pt",
        "rng_state.pth",
    ):
        (folder / name).write_bytes(bomb)
    train(make_config(tmp_path, "llama", "train.steps=2"))
    assert not canary.exists()
    (folder / "optimizer" / "exp_avg.safetensors").write_bytes(bomb)
    begun = make_config(
        tmp_path, "llama", "train.steps=2", "run.name=other", f"checkpoint.resume={folder}"
    )
    with pytest.raises(CheckpointError, match="is not as long as it was"):
        train(begun)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer.pkl"])
def test_a_tokenizer_that_is_a_pickle_is_refused(
    tmp_path: Path, bomb: bytes, canary: Path, name: str
) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / name).write_bytes(bomb)
    for path in (tmp_path / "tokenizer", tmp_path / "tokenizer" / name):
        with pytest.raises(DataError, match=r"tokenizer|SentencePiece"):
            load_tokenizer(path)
    assert not canary.exists()


def test_data_that_is_a_pickle_is_refused(tmp_path: Path, bomb: bytes, canary: Path) -> None:
    for name in ("a.bin", "a.idx", "a.npy", "a.pkl"):
        (tmp_path / name).write_bytes(bomb)
    for prefix in ("a", "a.npy", "a.pkl"):
        with pytest.raises(DataError):
            IndexedDataset(tmp_path / prefix)
    assert not canary.exists()


def test_a_config_that_makes_objects_is_refused(tmp_path: Path, canary: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"run: !!python/object/apply:os.mkdir ['{canary}']\n")
    assert main(["train", str(path)]) == 2
    assert not canary.exists()


def test_code_beside_a_model_is_not_run(tmp_path: Path, hub: Path, canary: Path) -> None:
    """`auto_map` in config.json asks transformers to import evil.py."""
    from megalite.infer import check_hf

    config: Config = make_config(tmp_path, MODELS["llama"], "train.steps=1")
    train(config)
    checkpoint = config.run.folder / "checkpoints" / "step-00000001"
    shutil.copy(checkpoint / "model.safetensors", hub)
    load_model(hub, torch.float32)
    assert check_hf.largest_difference(hub) < check_hf.TOLERANCE
    train(make_config(tmp_path, {}, f"model.hf={hub}", "train.steps=1", "run.name=from-hub"))
    assert not canary.exists()
    values = json.loads((hub / "config.json").read_text()) | {"model_type": "evil"}
    (hub / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="which megalite does not open"):
        load_model(hub)
    assert not canary.exists()
