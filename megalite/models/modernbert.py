"""ModernBERT (Warner et al. 2024): an encoder of Llama's modules, with LayerNorm and GeGLU, without
biases. A layer attends to all of a document, or to a window around each token, with a RoPE theta of
its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from megalite.kernels.attention_kinds import AttentionKind
from megalite.models import llama, rope
from megalite.models.architecture import Architecture
from megalite.models.hf import (
    SIZES,
    Keys,
    agreed,
    check_padding,
    disagree,
    refuse_others,
    require,
)
from megalite.models.layers import LayerNorm, RMSNorm, SequenceInfo, UnshiftedLayerNorm
from megalite.models.llama import Attention, Layer, Llama, layer_table, norm_row
from megalite.models.weights import Weight, embedding_row, head_rows, layer_rows
from megalite.models.windows import LAYER_TYPES, LayerType, TwoRopes


class ModernBertConfig(TwoRopes):
    family: Literal["modernbert"] = "modernbert"
    tie_embeddings: Literal[True] = True
    rope_theta: float = Field(160_000.0, gt=0, description="RoPE base of full-attention layers.")
    sliding_window: int | None = Field(
        None, gt=0, description="Tokens that each token attends to on each side, itself included."
    )
    task: Literal["masked", "classification", "labels", "answers"] = "masked"

    PREDICTS: ClassVar[Literal["causal", "masked"]] = "masked"
    CLASS_AT: ClassVar[Literal["first", "last"]] = "first"
    GATE: ClassVar[Literal["silu", "gelu"]] = "gelu"
    NORM: ClassVar[type[RMSNorm] | type[LayerNorm]] = UnshiftedLayerNorm
    ROPE: ClassVar[rope.Names] = rope.Names(
        kinds=(),
        theta_key="global_rope_theta",
        theta=160_000.0,
        new="rope_parameters.full_attention",
    )

    @model_validator(mode="after")
    def _plain_heads(self) -> ModernBertConfig:
        if (
            self.kv_heads != self.num_attention_heads
            or self.head_size * self.num_attention_heads != self.hidden_size
        ):
            raise ValueError(
                "modernbert has no num_kv_heads or head_dim of its own: its heads fill a token together"
            )
        return self

    def describe(self) -> Architecture:
        found = super().describe()
        first, *others = found.layers
        # What comes from the embedding is normalized already.
        return replace(found, layers=(replace(first, num_norms=self.NUM_NORMS - 1), *others))

    def usual_type(self, layer: int) -> LayerType:
        return "sliding_attention" if layer % 3 else "full_attention"

    def attention(self, layer: int) -> AttentionKind:
        return AttentionKind(self.window(layer), causal=False)


class MLP(llama.MLP):
    """GeGLU with the exact GELU."""

    def __init__(self, config: llama.LlamaLike):
        super().__init__(config)
        self.gate = _geglu


def _geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate) * up


class ModernBert(Llama):
    INPUT = ("embedding", "embedding_norm")
    OUTPUT = ("norm", "transform", "head_norm", "head", "loss")
    config: ModernBertConfig

    def __init__(self, config: ModernBertConfig):
        super().__init__(config)
        hidden = config.hidden_size
        self.embedding_norm = config.NORM(hidden, config.norm_eps)
        self.transform = nn.Linear(hidden, hidden, bias=False)
        self.head_norm = config.NORM(hidden, config.norm_eps)
        self.head = nn.Linear(hidden, config.vocab_size)
        self.head.weight = self.embedding.weight

    def layer(self, number: int) -> nn.Module:
        layer = Layer(self.config, Attention(self.config, number))
        layer.mlp = MLP(self.config)
        if number == 0:
            # The embedding's norm has done it; the table leaves the row out (`layer[1:]` below).
            layer.attention_norm = nn.Identity()
        return layer

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        return self.embedding_norm(self.embedding(tokens_BT))

    def finish(self, x_BTD: Tensor) -> Tensor:
        return self.head_norm(F.gelu(self.transform(self.norm(x_BTD))))


HF_NAMES = {
    "attention_norm.weight": "attn_norm.weight",
    "attention.qkv.weight": "attn.Wqkv.weight",
    "attention.out.weight": "attn.Wo.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_up.weight": "mlp.Wi.weight",
    "mlp.down.weight": "mlp.Wo.weight",
}


def weights(config: ModernBertConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    hidden, std = config.hidden_size, config.init_std
    yield embedding_row(config, "model.embeddings.tok_embeddings.weight")
    yield norm_row(config, "embedding_norm", "model.embeddings.norm", "first")
    layer = [replace(row, hf=(HF_NAMES[row.name],)) for row in layer_table(config)]
    for i in range(config.num_layers):
        # Without the norm that the first layer does not have; see `ModernBert.layer`.
        yield from layer_rows(i, "model.layers", layer if i else layer[1:])
    yield norm_row(config, "norm", "model.final_norm", "last")
    yield Weight(
        "transform.weight",
        (hidden, hidden),
        ("head.dense.weight",),
        init=std,
        partial_grad="sequence",
        place="last",
    )
    yield norm_row(config, "head_norm", "head.norm", "last")
    if config.task == "masked":
        head = None if config.tie_embeddings else "decoder.weight"
        yield from head_rows(config.vocab_size, hidden, std, head, "decoder.bias")


_SPARSE = "which logits transformers returns beside the loss"
KEYS = Keys().but(
    used={
        **SIZES,
        "original_max_position_embeddings": None,
        "norm_eps": 1e-5,
        "initializer_range": 0.02,
        "local_attention": 128,
        "layer_types": None,
        "global_attn_every_n_layers": None,
        "rope_parameters": None,
        "global_rope_theta": None,
        "local_rope_theta": None,
        "classifier_pooling": "cls",
        "pad_token_id": None,
    },
    only={
        "tie_word_embeddings": True,
        "is_decoder": False,
        "is_causal": False,
        "hidden_activation": "gelu",
        "norm_bias": False,
        "attention_bias": False,
        "mlp_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "classifier_activation": "gelu",
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "mlp_dropout": 0.0,
        "rope_scaling": None,
    },
    initializer_cutoff_factor="of initial values",
    cls_token_id="which token begins a text",
    layer_norm_eps="which transformers does not read; it is norm_eps",
    position_embedding_type="which transformers does not read",
    reference_compile="how to compute the same",
    deterministic_flash_attn="how to compute the same",
    repad_logits_with_grad="how to compute the same",
    sparse_prediction=_SPARSE,
    sparse_pred_ignore_index=_SPARSE,
)


def to_hf(config: ModernBertConfig) -> dict[str, Any]:
    types = [config.type_of(layer) for layer in range(config.num_layers)]
    values = {
        "architectures": ["ModernBertForMaskedLM"],
        "model_type": "modernbert",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.max_positions,
        "norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": True,
        # Half of it lies to each side of a token, which is not counted.
        "local_attention": 2 * ((config.sliding_window or 1) - 1),
        "layer_types": types,
        "local_rope_theta": config.local_rope_theta,
        "classifier_pooling": "cls",
        "cls_token_id": None,
        "sep_token_id": None,
        **rope.to_hf(config.ROPE, config.rope_theta, None),
    }
    # transformers 4 knows the types by this alone.
    every = next(
        (n for n in range(1, config.num_layers + 1) if types == _types(config.num_layers, n)), None
    )
    return values if every is None else values | {"global_attn_every_n_layers": every}


def _types(num_layers: int, every: int) -> list[str]:
    """Return the types of layers of which one in `every` has full attention."""
    return [
        "sliding_attention" if layer % every else "full_attention" for layer in range(num_layers)
    ]


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    check_padding(hf)
    if str((hf.get("architectures") or [""])[0]).endswith("ForSequenceClassification"):
        # Only the head of whole texts pools; the others have an output for each token.
        require(hf, "modernbert", {"classifier_pooling": "cls"})
    ropes = hf["rope_parameters"] or {}
    refuse_others(
        ropes, LAYER_TYPES, "rope_parameters", "ModernBERT, which has them by the type of the layer"
    )
    for kind in LAYER_TYPES:
        place = f"rope_parameters.{kind}"
        refuse_others(ropes.get(kind) or {}, ("rope_type", "rope_theta"), place, "ModernBERT")
        require(
            {"rope_type": rope.kind_of(ropes.get(kind) or {}, place)},
            "modernbert",
            {"rope_type": "default"},
        )
    types, every = hf["layer_types"], hf["global_attn_every_n_layers"]
    layers = hf["num_hidden_layers"]
    if types and every and types != _types(layers, every):
        disagree(f"layer_types = {types}", f"global_attn_every_n_layers = {every}")
    thetas = [
        agreed(hf, f"rope_parameters.{kind}.rope_theta", f"{name}_rope_theta", default=default)
        for kind, name, default in (
            ("full_attention", "global", 160_000.0),
            ("sliding_attention", "local", 10_000.0),
        )
    ]
    return {
        "family": "modernbert",
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": layers,
        "num_attention_heads": hf["num_attention_heads"],
        "max_positions": hf["max_position_embeddings"],
        "norm_eps": hf["norm_eps"],
        "init_std": hf["initializer_range"],
        "sliding_window": hf["local_attention"] // 2 + 1,
        "layer_types": types or _types(layers, every or 3),
        "rope_theta": thetas[0],
        "local_rope_theta": thetas[1],
    }


MODEL, CONFIG = ModernBert, ModernBertConfig
