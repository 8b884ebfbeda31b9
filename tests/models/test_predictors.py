"""Predictors of further tokens against transformers' own, in files with DeepSeek's names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source, write_model
from megalite.checkpoint.load import from_seed
from megalite.checkpoint.tensors import CheckpointError
from megalite.comm.mesh import Mesh
from megalite.config import ModelConfig
from megalite.data.loader import MicroBatch
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import build_model, model_config, set_parameters, to_hf_config, weight_table
from megalite.models.layers import IGNORE, Decoder, SequenceInfo
from megalite.training.multi_token import look_ahead
from tiny_models import our_logits

LENGTH = 24
MODEL = {
    "family": "deepseek_v3", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_layers": 2,
    "num_attention_heads": 4, "max_positions": 64, "moe_intermediate_size": 24, "num_experts": 8,
    "experts_per_token": 3, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1, "q_lora_rank": 20,
    "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "init_std": 0.1,
    "num_nextn_predict_layers": 2,
}  # fmt: skip
BEHIND = {
    "embed_tokens.weight", "shared_head.head.weight", "shared_head.norm.weight", "enorm.weight", "hnorm.weight",
    "eh_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight",
    *(f"self_attn.{name}.weight" for name in (
        "q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj",
    )),
    "mlp.gate.weight", "mlp.gate.e_score_correction_bias",
    *(f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"mlp.experts.{e}.{name}_proj.weight" for e in range(8) for name in ("gate", "up", "down")),
}  # fmt: skip
"""Tensors of a layer behind the last one, as the hub's DeepSeek-V3 has them of layer 61."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with two predictors."""
    config, place = model_config(MODEL), tmp_path_factory.mktemp("predictors") / "model"
    read = from_seed(5, Mesh.alone())

    def drawn(weight: Any) -> Tensor:
        # Norms apart from one another, and from 1.
        spread = 1 + 0.3 * torch.randn(weight.shape) if weight.init == "ones" else 1
        return read(weight, "weight", 0, weight.numel).view(weight.shape) * spread

    torch.manual_seed(0)
    write_model(Model(to_hf_config(config), weight_table(config), drawn), place)
    return place


def whole_model(folder: Path) -> Decoder:
    """The model of a folder with its predictors, which generation leaves out."""
    config = model_config({"hf": str(folder)})
    source = open_source(folder)
    model = build_model(config)
    read = {weight.name: torch.nn.Parameter(source.read(weight)) for weight in source.weights}
    set_parameters(model, read)
    return model


def test_files_have_deepseeks_names_and_are_written_back_to_the_bit(
    folder: Path, tmp_path: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    for number in (2, 3):
        start = f"model.layers.{number}."
        assert {name.removeprefix(start) for name in tensors if name.startswith(start)} == BEHIND
        copies = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
        for copy, of in copies.items():
            assert torch.equal(tensors[f"{start}{copy}.weight"], tensors[f"{of}.weight"])
    assert json.loads((folder / "config.json").read_text())["num_nextn_predict_layers"] == 2
    write_model(open_source(folder), tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_predictors_are_those_of_transformers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transformers = pytest.importorskip("transformers")
    layers = pytest.importorskip("transformers.modeling_layers")
    kind = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(kind, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.[23]\..*"])
    theirs = kind.from_pretrained(folder, attn_implementation="eager")
    behind = layers.MtpModel.from_pretrained(theirs)
    ours = whole_model(folder)
    tokens = torch.randint(0, 99, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(-1, 1)
    ahead, _ = look_ahead(MicroBatch(tokens, labels, torch.arange(3)), 2)
    with torch.no_grad():
        places = SequenceInfo.whole(LENGTH, tokens.device)
        x = ours.run_layers(ours.embed(tokens, places), places)
        found = [
            ours.project(states) for states in ours.predict_ahead(ours.finish(x), ahead, places)
        ]
        h = theirs.model(tokens).last_hidden_state
        wanted = [theirs.lm_head(h)]
        for depth, further in enumerate(ahead):
            h = behind.forward_layer(depth, h, places.index_BT, None, input_ids=further)
            wanted.append(theirs.lm_head(h))
    for mine, other in zip(found, wanted, strict=True):
        assert other.std() > 0.3, "logits large enough that the bound means something"
        assert (mine - other).abs().max().item() <= 1e-4  # the project's bound
    # Transformers opens the folder and gives the same of the next token as without predictors.
    assert torch.allclose(our_logits(load_model(folder), tokens), wanted[0], atol=1e-4)


def config_of(folder: Path, **more: Any) -> ModelConfig:
    return model_config({"hf": str(folder), **more})


def test_predictors_are_those_that_are_stored_unless_they_are_left_out(
    folder: Path, tmp_path: Path
) -> None:
    assert len(config_of(folder).architecture.predictors) == 2
    # Left out by the config: what is stored of them is not read.
    alone = config_of(folder, num_nextn_predict_layers=0)
    assert not any("eh_proj" in weight.name for weight in weight_table(alone))
    generating = load_model(folder)
    assert generating.layers.keys() == {"0", "1"}, "generation has none"
    # transformers saves their number, but not them.
    tensors = load_file(folder / "model.safetensors")
    kept = {
        name: x for name, x in tensors.items() if not name.startswith(("model.layers.2.", "model.layers.3."))
    }  # fmt: skip
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert config_of(tmp_path).architecture.predictors == ()
    load_model(tmp_path)
    # Layers beyond the config's number are no predictors, and never left out.
    save_file(
        kept | {"model.layers.2.input_layernorm.weight": torch.ones(32)},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(CheckpointError, match=r"tensors of no weight: model\.layers\.2\.input"):
        load_model(tmp_path)


def test_another_embedding_of_a_predictor_is_no_copy(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.shared_head.head.weight"][7, 3] += 1
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    message = r"model.layers.3.shared_head.head.weight must be a copy of lm_head.weight, but row 7"
    with pytest.raises(CheckpointError, match=message):
        open_source(tmp_path)


def test_no_prediction_reaches_over_the_end_of_a_document() -> None:
    tokens = torch.tensor([[10, 11, 12, 20, 30, 31, 32]])
    labels = torch.tensor([[11, IGNORE, 20, 30, 31, 32, 33]])
    documents = torch.tensor([[0, 0, 0, 1, 2, 2, 2]])
    ahead, of = look_ahead(MicroBatch(tokens, labels, torch.arange(1), documents), 2)
    assert ahead.tolist() == [[[11, 12, 12, 20, 31, 32, 32]], [[12, 12, 12, 20, 32, 32, 32]]]
    none = IGNORE
    assert of.tolist() == [
        [[none, 20, none, none, 32, 33, none]],
        [[20, none, none, none, 33, none, none]],
    ]


def test_predictors_need_a_head_of_tokens() -> None:
    with pytest.raises(ConfigError, match="num_nextn_predict_layers 2 needs task: causal"):
        model_config(MODEL | {"task": "classification", "labels": ["a", "b"]})
