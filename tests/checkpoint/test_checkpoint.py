"""Checkpoints on disk: what is in them, what damage does, what pruning keeps."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megalite.checkpoint import folder as folder_module
from megalite.checkpoint import writing
from megalite.checkpoint.folder import (
    Damage,
    complete_steps,
    prune,
    read_manifest,
    step_folder,
    steps_in,
)
from megalite.checkpoint.load import from_checkpoint, from_hf, from_seed
from megalite.checkpoint.resume import find_checkpoint
from megalite.checkpoint.save import Saver
from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.comm.mesh import Mesh
from megalite.config import Config, LoraConfig
from megalite.engine.gather import HostBuffers
from megalite.engine.layout import choose_owners
from megalite.health.preflight import checkpoint_bytes
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from megalite.training.parts import build
from small_runs import VOCAB, make_config

LONE = Mesh.alone()


def checkpoints(config: Config) -> Path:
    return config.run.folder / "checkpoints"


def flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Config:
    """A copy that a test may damage."""
    shutil.copytree(trained.run.folder, tmp_path / trained.run.name)
    return trained.model_copy(update={"run": trained.run.model_copy(update={"dir": tmp_path})})


def test_transformers_opens_the_folder(trained: Config) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = step_folder(checkpoints(trained), 12)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.config.vocab_size == 320
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def f(x): return x + 1\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id


def test_optimizer_state_has_the_names_and_shapes_of_the_weights(trained: Config) -> None:
    folder = step_folder(checkpoints(trained), 12)
    weights = weight_table(trained.model)
    for state in ("master", "exp_avg", "exp_avg_sq"):
        TensorFolder(folder / "optimizer", state).check(weights)
    model = TensorFolder(folder)
    master = TensorFolder(folder / "optimizer", "master")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    everything = (slice(None),)
    assert index["metadata"]["total_size"] == sum(
        model.fetch(name, everything).nbytes for name in model.files
    )
    for name in model.files:
        assert master.fetch(name, everything).dtype == torch.float32
        assert torch.equal(master.fetch(name, everything).bfloat16(), model.fetch(name, everything))


def test_the_room_that_preflight_asks_for_is_what_a_checkpoint_takes(trained: Config) -> None:
    """Of a run that trains adapters alone: not that of the model they are for."""
    folder = step_folder(checkpoints(trained), 12)
    tensors = [x for path in folder.rglob("*.safetensors") for x in load_file(path).values()]
    assert checkpoint_bytes(trained) == sum(x.nbytes for x in tensors)
    lora = {"adapter": None, "rank": 1, "targets": ["q_proj"]}
    adapters = trained.model_copy(update={"lora": LoraConfig.model_validate(lora)})
    assert 0 < checkpoint_bytes(adapters) < 0.1 * checkpoint_bytes(trained)


def test_every_file_is_in_the_manifest_and_nothing_is_pickled(trained: Config) -> None:
    folder = step_folder(checkpoints(trained), 12)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    manifest = read_manifest(folder)
    assert not isinstance(manifest, Damage)
    assert files == set(manifest) | {"manifest.json", "README.md"}, "people may write in the card"
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".yaml", ".md"}
    assert not any(path.suffix == ".tmp" for path in checkpoints(trained).iterdir())


def test_both_ranks_write_about_half(trained: Config) -> None:
    sizes = [
        path.stat().st_size
        for path in step_folder(checkpoints(trained), 12).glob("model-*.safetensors")
    ]
    assert len(sizes) == 2
    assert min(sizes) > 0.3 * max(sizes)


def test_owners_are_balanced(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        {"preset": "llama-8b"},
        "parallel.tensor=4",
        "train.global_batch_size=16",
        "data.seq_length=32",
    )
    weights = weight_table(config.model)
    owners = choose_owners(make_plan(config, weights, 64), weights, config.optimizer, 10 << 20)
    load = Counter[int]()
    for weight in weights:
        load[owners[weight.name]] += weight.numel
    largest = max(weight.numel for weight in weights)
    assert len(load) == 64
    assert max(load.values()) <= max(largest, load.total() / 64 * 1.5)


def test_all_damaged_is_an_error_not_a_fresh_start(run: Config) -> None:
    for step in (4, 8, 12):
        flip_a_byte(step_folder(checkpoints(run), step) / "config.json")
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        find_checkpoint(checkpoints(run), "auto", LONE)


def test_pruning_counts_only_complete_checkpoints(run: Config) -> None:
    (step_folder(checkpoints(run), 12) / "manifest.json").unlink()
    (checkpoints(run) / "step-00000016.tmp").mkdir()
    prune(checkpoints(run), keep=1)
    assert complete_steps(checkpoints(run)) == [8]
    assert step_folder(checkpoints(run), 12).is_dir()  # incomplete: left to be looked at


def test_a_half_deleted_checkpoint_has_no_name_of_one(
    run: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be neither taken nor pruned, and stay for ever."""

    def killed(path: Path) -> None:
        (path / "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(folder_module.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(checkpoints(run), keep=2)
    assert steps_in(checkpoints(run)) == [8, 12]


def test_a_leftover_of_a_crash_is_replaced(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.steps=2")
    for step in (2, 7):  # one that is saved now, and another
        leftover = checkpoints(config) / f"step-{step:08d}.tmp"
        leftover.mkdir(parents=True)
        (leftover / "part-0.json").write_text("{")
    train(config)
    assert [path.name for path in checkpoints(config).iterdir()] == ["step-00000002"]
    assert complete_steps(checkpoints(config)) == [2]


@pytest.mark.parametrize("change", ["load", "step"])
def test_saving_takes_the_state_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Training goes on while the thread copies and writes: what it writes must not change any
    more."""
    config = make_config(tmp_path)
    weights = weight_table(config.model)
    parts = build(config, make_plan(config, weights, 1), LONE)
    engine = parts.engine
    alone = dict.fromkeys((weight.name for weight in weights), 0)
    engine.load(from_seed(1, Mesh.alone()), num_updates=5)
    may_write = threading.Event()
    saver = Saver(
        tmp_path / "saved",
        3,
        weights,
        LONE,
        engine,
        alone,
        lambda folder: may_write.wait() and None,
    )

    def write_late(*arguments: Any, **options: Any) -> None:
        may_write.wait()
        save_file(*arguments, **options)

    def copy_late(*arguments: Any) -> Any:
        time.sleep(0.01)
        return copy(*arguments)

    copy = HostBuffers.copy
    monkeypatch.setattr(writing, "PAUSES_S", ())
    monkeypatch.setattr(HostBuffers, "copy", copy_late)
    monkeypatch.setattr(writing, "save_file", write_late)
    engine.begin(1)
    for parameter in parts.stages[0].parameters():
        parameter.sum().backward()
    engine.finish()
    saver.save(5, {"step": 5})
    if change == "load":
        engine.load(from_seed(2, Mesh.alone()))
    else:
        engine.step(1.0)
    assert complete_steps(tmp_path / "saved") == []  # not before it is complete
    may_write.set()
    saver.wait()
    assert "saved" in saver.news()[0]
    folder = step_folder(tmp_path / "saved", 5)
    found = from_checkpoint(config, weights, folder, Mesh.alone())
    wanted = from_seed(1, Mesh.alone())
    for weight in weights:
        assert torch.equal(
            found(weight, "weight", 0, weight.numel), wanted(weight, "weight", 0, weight.numel)
        )


def test_plain_hugging_face_folder_starts_with_fresh_moments(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
        )
    ).save_pretrained(tmp_path / "hf")  # fmt: skip
    config = make_config(tmp_path, {}, f"model.hf={tmp_path / 'hf'}", "train.steps=1")
    weights = weight_table(config.model)
    read = from_hf(tmp_path / "hf", weights, config.model, Mesh.alone())
    assert all(read(weight, "exp_avg", 0, weight.numel).abs().sum() == 0 for weight in weights)
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert torch.equal(
        read(weights[0], "master", 0, VOCAB * 32), stored["model.embed_tokens.weight"].flatten()
    )
    train(config)
    state = json.loads((step_folder(checkpoints(config), 1) / "train_state.json").read_text())
    assert state["step"] == 1
    assert state["data"]["samples"] == 4
