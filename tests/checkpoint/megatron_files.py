"""Checkpoints as Megatron-LM writes them, from a Hugging Face model like Llama: its parts, names
and pickles."""

from __future__ import annotations

import io
import os
import pickle
from argparse import Namespace
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

PADDED = 128
STYLES = {
    "engine": {
        "first_norm": "self_attention.linear_qkv.layer_norm_weight", "qkv": "self_attention.linear_qkv",
        "out": "self_attention.linear_proj", "second_norm": "mlp.linear_fc1.layer_norm_weight",
        "up": "mlp.linear_fc1", "down": "mlp.linear_fc2", "last_norm": "decoder.final_layernorm",
    },
    "local": {
        "first_norm": "input_layernorm.weight", "qkv": "self_attention.linear_qkv",
        "out": "self_attention.linear_proj", "second_norm": "pre_mlp_layernorm.weight",
        "up": "mlp.linear_fc1", "down": "mlp.linear_fc2", "last_norm": "decoder.final_layernorm",
    },
    "old": {
        "first_norm": "input_norm.weight", "qkv": "self_attention.query_key_value", "out": "self_attention.dense",
        "second_norm": "post_attention_norm.weight", "up": "mlp.dense_h_to_4h", "down": "mlp.dense_4h_to_h",
        "last_norm": "decoder.final_norm",
    },
}  # fmt: skip


class Backend(Enum):
    """Stands for those enumerations of Megatron's that lie in its arguments."""

    AUTO = 5


class Trap:
    """Leaves a file behind where its pickle is run."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def arguments(config: Any, tensor: int, pipeline: int) -> Namespace:
    return Namespace(
        num_layers=config.num_hidden_layers, hidden_size=config.hidden_size, ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads, group_query_attention=True,
        num_query_groups=config.num_key_value_heads, kv_channels=getattr(config, "head_dim", None),
        max_position_embeddings=config.max_position_embeddings, norm_epsilon=config.rms_norm_eps,
        rotary_base=int(config.rope_parameters["rope_theta"]), rotary_percent=1.0, init_method_std=0.02,
        position_embedding_type="rope", normalization="RMSNorm", swiglu=True, add_bias_linear=False, vocab_size=None,
        padded_vocab_size=PADDED, untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        add_qkv_bias=config.model_type == "qwen2", qk_layernorm=config.model_type == "qwen3",
        tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline, params_dtype=torch.bfloat16,
        attention_backend=Backend.AUTO, bf16=True, num_experts=None,
    )  # fmt: skip


def weights_of(model: Any, tensor: int, style: str) -> dict[str, list[Tensor]]:
    """Each weight's part on every tensor rank, layers numbered through the model."""
    state, config, names = model.state_dict(), model.config, STYLES[style]
    groups = config.num_key_value_heads

    def by_group(kind: str, layer: int) -> list[Tensor]:
        q, k, v = (state[f"model.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv")
        rows = [torch.cat([x.chunk(groups)[group] for x in (q, k, v)]) for group in range(groups)]
        return list(torch.cat(rows).chunk(tensor))

    def padded(x: Tensor) -> list[Tensor]:
        return list(torch.cat([x, torch.full((PADDED - len(x), x.shape[1]), 7.0)]).chunk(tensor))

    found = {"embedding.word_embeddings.weight": padded(state["model.embed_tokens.weight"])}
    for i in range(config.num_hidden_layers):
        ours, theirs = f"decoder.layers.{i}", f"model.layers.{i}"
        gate, up = (
            state[f"{theirs}.mlp.{part}_proj.weight"].chunk(tensor) for part in ("gate", "up")
        )
        found[f"{ours}.{names['first_norm']}"] = [
            state[f"{theirs}.input_layernorm.weight"]
        ] * tensor
        found[f"{ours}.{names['qkv']}.weight"] = by_group("weight", i)
        if config.model_type == "qwen2":
            found[f"{ours}.{names['qkv']}.bias"] = by_group("bias", i)
        for part in "qk" if config.model_type == "qwen3" else "":
            found[f"{ours}.self_attention.{part}_layernorm.weight"] = [
                state[f"{theirs}.self_attn.{part}_norm.weight"]
            ] * tensor
        found[f"{ours}.{names['out']}.weight"] = list(
            state[f"{theirs}.self_attn.o_proj.weight"].chunk(tensor, 1)
        )
        found[f"{ours}.{names['second_norm']}"] = [
            state[f"{theirs}.post_attention_layernorm.weight"]
        ] * tensor
        found[f"{ours}.{names['up']}.weight"] = [
            torch.cat(pair) for pair in zip(gate, up, strict=True)
        ]
        found[f"{ours}.{names['down']}.weight"] = list(
            state[f"{theirs}.mlp.down_proj.weight"].chunk(tensor, 1)
        )
    found[f"{names['last_norm']}.weight"] = [state["model.norm.weight"]] * tensor
    if not config.tie_word_embeddings:
        found["output_layer.weight"] = padded(state["lm_head.weight"])
    return found


def write_rank_files(
    model: Any, folder: Path, tensor: int, pipeline: int, virtual: int, style: str
) -> None:
    """iter_0000012/mp_rank_TT[_PPP]/model_optim_rng.pt, and what else lies in them."""
    weights, layers = weights_of(model, tensor, style), model.config.num_hidden_layers
    each = layers // (pipeline * virtual)
    (folder / "iter_0000012").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")
    for p in range(pipeline):
        for t in range(tensor):
            name = f"mp_rank_{t:02d}" + (f"_{p:03d}" if pipeline > 1 else "")
            chunks = {}
            for v in range(virtual):
                stage = v * pipeline + p
                found = OrderedDict()
                for key, parts in weights.items():
                    words = key.split(".")
                    if words[:2] == ["decoder", "layers"]:
                        number = int(words[2])
                        if not stage * each <= number < (stage + 1) * each:
                            continue
                        words[2] = str(number - stage * each)
                    elif not (
                        stage == 0
                        if key.startswith("embedding")
                        else stage == pipeline * virtual - 1
                    ):
                        continue
                    found[".".join(words)] = parts[t].clone()
                found["decoder.layers.0.self_attention.linear_qkv._extra_state"] = io.BytesIO(
                    b"scales"
                )
                chunks["model" if virtual == 1 else f"model{v}"] = (
                    _nested(found) if style == "old" else found
                )
            (folder / "iter_0000012" / name).mkdir()
            other = {
                "args": arguments(model.config, tensor, pipeline), "checkpoint_version": 3.0, "iteration": 12,
                "rng_state": [np.random.RandomState(0).get_state()], "trap": Trap(folder / "trapped"),
            }  # fmt: skip
            torch.save(other | chunks, folder / "iter_0000012" / name / "model_optim_rng.pt")


def _nested(found: dict[str, Any]) -> dict[str, Any]:
    """As models before Megatron-core have it."""
    model: dict[str, Any] = {"encoder": {}}
    for key, value in found.items():
        if key.startswith("decoder."):
            model["encoder"][key.removeprefix("decoder.")] = value
        elif key == "output_layer.weight":
            model["output_layer"] = {"weight": value}
        else:
            model["embedding"] = {"word_embeddings": {"weight": value}}
    return {"language_model": model}


def write_pieces(model: Any, folder: Path, tensor: int, stacked: bool) -> None:
    """A torch_dist checkpoint, in which pieces are those of tensor ranks and layers."""
    whole: dict[str, Tensor] = {}
    cuts: dict[str, list[tuple[int, ...]]] = {}
    for key, parts in weights_of(model, tensor, "engine").items():
        dim = 1 if key.endswith(("linear_proj.weight", "linear_fc2.weight")) else 0
        if key.endswith("linear_fc1.weight"):  # all of gate, then all of up
            parts = [half.chunk(2)[number] for number in range(2) for half in parts]
        replicated = len(parts) > 1 and all(part is parts[0] for part in parts)
        parts = parts[:1] if replicated else parts
        whole[key] = torch.cat(parts, dim)
        size = parts[0].shape[dim]
        cuts[key] = [
            tuple(size * n if d == dim else 0 for d in range(whole[key].dim()))
            for n in range(len(parts))
        ]
        cuts[key].append(parts[0].shape)
    if stacked:
        whole, cuts = _stacked(whole, cuts, model.config.num_hidden_layers)
    folder.mkdir(parents=True)
    args = arguments(model.config, tensor, 1)
    torch.save(
        {"args": args, "trap": Trap(folder / "trapped"), "iteration": 3}, folder / "common.pt"
    )
    tensors, storage = {}, {}
    with open(folder / "__0_0.distcp", "wb") as file:
        for key, (*offsets, size) in cuts.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(offset), torch.Size(size)) for offset in offsets
            ]
            tensors[key] = TensorStorageMetadata(TensorProperties(), whole[key].shape, chunks)
            for number, offset in enumerate(offsets):
                begin = file.tell()
                piece = whole[key][
                    tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
                ].clone()
                torch.save(piece, file)
                index = MetadataIndex(key, torch.Size(offset), number)
                storage[index] = _StorageInfo("__0_0.distcp", begin, file.tell() - begin)
    metadata = Metadata(
        tensors, planner_data={"trap": Trap(folder / "trapped")}, storage_data=storage
    )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _stacked(
    whole: dict[str, Tensor], cuts: dict[str, Any], layers: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All layers of a weight as one tensor, a piece for each layer and tensor rank."""
    all_whole = {key: x for key, x in whole.items() if not key.startswith("decoder.layers.")}
    all_cuts = {key: x for key, x in cuts.items() if key in all_whole}
    for key in whole:
        if key.startswith("decoder.layers.0."):
            rest = key.removeprefix("decoder.layers.0.")
            of_layers = [f"decoder.layers.{i}.{rest}" for i in range(layers)]
            all_whole[f"decoder.layers.{rest}"] = torch.stack([whole[name] for name in of_layers])
            *offsets, size = cuts[key]
            all_cuts[f"decoder.layers.{rest}"] = [
                (i, *o) for i in range(layers) for o in offsets
            ] + [(1, *size)]
    return all_whole, all_cuts
