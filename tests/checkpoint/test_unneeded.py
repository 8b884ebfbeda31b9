"""No stored tensor is dropped unseen: what belongs to no weight says nothing new, or is refused by
name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint import unneeded
from megalite.checkpoint.convert import open_source
from megalite.checkpoint.tensors import CheckpointError, TensorFolder
from megalite.checkpoint.unneeded import ends_of
from megalite.comm.mesh import Axis
from megalite.infer.generate import load_model
from megalite.models import model_config
from megalite.registry import families
from megalite.train import train
from small_runs import make_config
from tiny_models import CASES, MASKED, auto_class

transformers = pytest.importorskip("transformers")
FAMILY = {CASES[case]["model_type"]: case for case in reversed(CASES)}
"""A case of each family."""


def save_model(folder: Path, case: str, **fields: object) -> dict[str, Tensor]:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(**CASES[case] | {"initializer_range": 0.2, **fields})
    auto_class(config.model_type).from_config(config).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def store(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# Of mT5 a head that is stored is its own in any case (tests/models/test_t5.py).
@pytest.mark.parametrize("family", [family for family in families.own if family != "mt5"])
def test_a_tied_head_that_is_stored_is_a_copy_or_is_refused(tmp_path: Path, family: str) -> None:
    """Of every family, whatever it calls its head."""
    tensors = save_model(tmp_path, FAMILY[family], tie_word_embeddings=True)
    embedding, head = ends_of(model_config({"hf": str(tmp_path)}))
    assert embedding in tensors
    assert head not in tensors
    store(tmp_path, tensors | {head: tensors[embedding].clone()})
    model = load_model(tmp_path)
    assert model.head.weight is model.embedding.weight
    other = tensors[embedding].clone()
    other[40:, 3] += 1e-6
    grown = torch.cat([tensors[embedding], torch.ones(1, other.shape[1])])
    rounded = tensors[embedding].bfloat16()
    for stored, why in (
        (other, "row 40 is"),
        (grown, r"shapes are \[100, 32\] and \[99, 32\]"),
        (rounded, "row 0"),
    ):
        store(tmp_path, tensors | {head: stored})
        with pytest.raises(
            CheckpointError,
            match=f"tie_word_embeddings = true .* {head} is {embedding}, but .*{why}",
        ):
            load_model(tmp_path)
    if family in MASKED:  # whose heads are tied in any case
        return
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    store(tmp_path, tensors | {head: other})
    assert torch.equal(load_model(tmp_path).head.weight, other), "as the message says"


def test_another_head_is_refused_wherever_a_model_is_opened(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tensors = save_model(folder, "llama-tied")
    store(folder, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    config = make_config(tmp_path, {}, f"model.hf={folder}", "train.steps=1")
    lora = make_config(
        tmp_path, {}, f"model.hf={folder}", "train.steps=1", "run.name=lora", "lora.rank=2"
    )
    ways: list[Callable[[], object]] = [
        lambda: load_model(folder), lambda: open_source(folder), lambda: train(config), lambda: train(lora),
    ]  # fmt: skip
    for way in ways:
        with pytest.raises(
            CheckpointError,
            match=r"lm_head\.weight is model\.embed_tokens\.weight, but both are stored",
        ):
            way()


def test_a_difference_is_found_in_any_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unneeded, "BLOCK_BYTES", 4 * 32 * 10)
    tensors = save_model(tmp_path, "llama-tied")
    for row in (0, 9, 10, 55, 98):
        other = tensors["model.embed_tokens.weight"].clone()
        other[row:, -1] += 1
        store(tmp_path, tensors | {"lm_head.weight": other})
        with pytest.raises(CheckpointError, match=f"row {row} is the first that differs"):
            load_model(tmp_path)
        # Of several ranks, one meets it.
        source, model = TensorFolder(tmp_path, "model"), model_config({"hf": str(tmp_path)})
        found = []
        for rank in range(3):
            try:
                unneeded.unneeded(source, model, False, Axis(3, rank))
            except CheckpointError:
                found.append(rank)
        assert (row // 10) % 3 in found


def test_a_model_stored_without_a_prefix_may_have_a_copy_too(tmp_path: Path) -> None:
    tensors = {
        name.removeprefix("transformer."): x for name, x in save_model(tmp_path, "gpt2").items()
    }
    store(tmp_path, tensors | {"lm_head.weight": tensors["wte.weight"].clone()})
    load_model(tmp_path)
    store(tmp_path, tensors | {"lm_head.weight": -tensors["wte.weight"]})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is transformer\.wte\.weight"):
        load_model(tmp_path)


def mask(size: int) -> Tensor:
    return torch.ones(1, 1, size, size, dtype=torch.bool).tril()


def frequencies(theta: float) -> Tensor:
    return theta ** -(torch.arange(0, 8, 2) / 8)


NEOX_LAYER, GPT2_LAYER = "gpt_neox.layers.1.attention", "transformer.h.1.attn"
BUFFERS: list[tuple[str, str, Tensor, bool]] = [
    ("gpt2", f"{GPT2_LAYER}.bias", mask(64), True),
    ("gpt2", f"{GPT2_LAYER}.bias", mask(64).float(), True),
    ("gpt2", f"{GPT2_LAYER}.bias", torch.ones(1, 1, 64, 64), False),
    ("gpt2", f"{GPT2_LAYER}.bias", torch.zeros(32), False),
    ("gpt2", f"{GPT2_LAYER}.masked_bias", torch.tensor(-1e4), True),
    ("gpt2", f"{GPT2_LAYER}.masked_bias", torch.tensor(-1e4).bfloat16(), True),
    ("gpt2", f"{GPT2_LAYER}.masked_bias", torch.zeros(32), False),
    ("gpt2", f"{GPT2_LAYER}.rotary_emb.inv_freq", frequencies(1e4), False),
    ("gpt_neox", f"{NEOX_LAYER}.bias", mask(64), True),
    ("gpt_neox", f"{NEOX_LAYER}.masked_bias", torch.tensor([-1e9]), True),
    ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(1e4), True),
    ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(1e4).half(), True),
    ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(2e4), False),
    ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq", frequencies(1e4)[:3], False),
    ("llama", "model.layers.1.attention.bias", torch.ones(32), False),
]  # fmt: skip


@pytest.mark.parametrize(("case", "name", "stored", "is_fine"), BUFFERS)
def test_buffers_of_older_versions_hold_what_the_model_computes(
    tmp_path: Path, case: str, name: str, stored: Tensor, is_fine: bool
) -> None:
    store(tmp_path, save_model(tmp_path, case) | {name: stored})
    if is_fine:
        load_model(tmp_path)
        return
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        load_model(tmp_path)


def write_parts(folder: Path, parts: list[dict[str, Tensor]], listed: dict[str, str]) -> None:
    for number, part in enumerate(parts):
        save_file(part, folder / f"part-{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))


def test_what_an_index_does_not_list_is_seen(tmp_path: Path) -> None:
    tensors = save_model(tmp_path, "llama-tied")
    (tmp_path / "model.safetensors").unlink()
    listed = dict.fromkeys(tensors, "part-0.safetensors")
    write_parts(
        tmp_path, [tensors | {"lm_head.weight": -tensors["model.embed_tokens.weight"]}], listed
    )
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is model\.embed_tokens\.weight"):
        load_model(tmp_path)
    write_parts(
        tmp_path, [tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}], listed
    )
    with pytest.raises(
        CheckpointError, match=r"of no weight: model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        load_model(tmp_path)


def test_a_tensor_and_a_model_are_stored_once(tmp_path: Path) -> None:
    x = {"a": torch.ones(2)}
    write_parts(
        tmp_path,
        [x, {"b": torch.ones(2), **x}],
        {"a": "part-0.safetensors", "b": "part-1.safetensors"},
    )
    with pytest.raises(
        CheckpointError, match=r"a is stored in both part-0\.safetensors and part-1\.safetensors"
    ):
        TensorFolder(tmp_path)
    write_parts(tmp_path, [x], {"a": "part-0.safetensors"})
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds two models: model\.safetensors, and the files that"
    ):
        TensorFolder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors"}})
    )
    assert TensorFolder(tmp_path).files == {"a": "model.safetensors"}
