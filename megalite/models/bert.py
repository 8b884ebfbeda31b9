"""BERT (Devlin et al. 2019): an encoder of post-norm layers, with learned positions, GELU, biases,
dropout, and a head that tells what stands behind a [MASK]. RoBERTa shares its modules and rows."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from megalite.kernels.activation import gelu
from megalite.models.dropout import Dropout
from megalite.models.gpt2 import MLP, Attention, GPT2Like, linear_rows, norm_rows
from megalite.models.hf import SIZES, Keys, check_padding
from megalite.models.layers import (
    CrossEntropy,
    Decoder,
    LayerNorm,
    SequenceInfo,
    make_embedding,
    numbered,
)
from megalite.models.llama import residual_std
from megalite.models.ungated import TANH, is_tanh
from megalite.models.weights import Weight, embedding_row, head_rows, layer_rows
from megalite.utils.changes import spelled


class HeadNames(NamedTuple):
    """Hugging Face's names of what stands behind the layers."""

    transform: str
    norm: str
    bias: str
    decoder: str
    pooler: str
    sentences: str = ""
    """Head for pairs of sentences; empty where the family has none."""


class BertConfig(GPT2Like):
    family: Literal["bert"] = "bert"
    token_types: int = Field(
        2,
        gt=0,
        description="Rows of the embedding of a token's type: 1 in the second of two texts, else 0.",
    )
    norm_eps: float = Field(1e-12, gt=0)
    tie_embeddings: Literal[True] = True
    tanh_gelu: bool = Field(False, description="Use GELU's tanh approximation.")
    task: Literal["masked", "classification", "labels", "answers"] = "masked"
    sentence_head: bool | Literal["kept"] = Field(
        False,
        description="Have a pooler and a head beside the one for masked tokens, which tell whether two texts follow "
        "each other (objective.sentences). kept: those of model.hf go along untrained, which is how a folder with both "
        "is opened.",
    )

    PREDICTS: ClassVar[Literal["causal", "masked"]] = "masked"
    CLASS_AT: ClassVar[Literal["first", "last"]] = "first"
    PREFIX: ClassVar[str] = "bert"
    HEAD: ClassVar[HeadNames] = HeadNames(
        transform="cls.predictions.transform.dense",
        norm="cls.predictions.transform.LayerNorm",
        bias="cls.predictions.bias",
        decoder="cls.predictions.decoder",
        pooler="bert.pooler.dense",
        sentences="cls.seq_relationship",
    )
    # Published files keep the heads of pretraining on pairs of sentences beside the masked one.
    SPARE: ClassVar[tuple[str, ...]] = (
        *(f"bert.pooler.dense.{part}" for part in ("weight", "bias")),
        *(f"cls.seq_relationship.{part}" for part in ("weight", "bias")),
        "cls.predictions.decoder.bias",
    )
    # TensorFlow's names, which files of the first years have.
    OLD_ENDS: ClassVar[Mapping[str, str]] = {
        "LayerNorm.gamma": "LayerNorm.weight",
        "LayerNorm.beta": "LayerNorm.bias",
    }
    HEAD_ACTS_ALIKE: ClassVar[bool] = True
    """True if the head has the activation of the layers, and not GELU in any case."""
    OFFSET: ClassVar[int] = 0
    """Rows of the embedding of positions before that of the first position."""

    @model_validator(mode="before")
    @classmethod
    def _no_heads_beside_classes(cls, values: Any) -> Any:
        # What a folder has beside the masked head is left behind with it.
        is_kept = isinstance(values, dict) and values.get("sentence_head") == "kept"
        has_classes = is_kept and values.get("task", cls.PREDICTS) != cls.PREDICTS
        return values | {"sentence_head": False} if has_classes else values

    @model_validator(mode="after")
    def _head_of_pretraining(self) -> BertConfig:
        if self.sentence_head and not self.HEAD.sentences:
            raise ValueError(
                f"sentence_head: {spelled(self.sentence_head)} is not known for the {self.family} family"
            )
        if self.sentence_head and self.task != "masked":
            raise ValueError(f"sentence_head: true needs task: masked, not {self.task}")
        return self

    @classmethod
    def with_files(cls, fields: dict[str, Any], names: Container[str]) -> dict[str, Any]:
        """Return the fields with the heads that the files have: published models keep both of BERT's
        pretraining, whatever architecture config.json names."""
        modules = (cls.HEAD.pooler, cls.HEAD.sentences) if cls.HEAD.sentences else ()
        has_all = modules and all(f"{module}.weight" in names for module in modules)
        return fields | {"sentence_head": "kept"} if has_all else fields

    @property
    def has_token_types(self) -> bool:
        return self.token_types > 1

    @property
    def activation(self) -> Callable[[Tensor], Tensor]:
        return gelu if self.tanh_gelu else F.gelu


class Layer(nn.Module):
    """Post-norm layer: attention, then MLP; what each adds to its input is normalized together with
    it."""

    def __init__(self, config: BertConfig, index: int):
        super().__init__()
        site = f"layers.{index}"
        self.attention = Attention(config, f"{site}.attention")
        self.attention_dropout = Dropout(config.hidden_dropout, f"{site}.attention")
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config)
        self.mlp_dropout = Dropout(config.hidden_dropout, f"{site}.mlp")
        self.mlp_norm = LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, places: SequenceInfo) -> Tensor:
        # The fused operation also returns the sum, which goes no further here.
        x, _ = self.attention_norm(self.attention_dropout(self.attention(x, places), places), x)
        x, _ = self.mlp_norm(self.mlp_dropout(self.mlp(x), places), x)
        return x


class SentenceHead(nn.Module):
    """Tell of final states of texts' first tokens [1,N,D] whether two texts follow each other:
    logits [1,M,2], of all ranks where parallelism has cut the tokens. 0 says that they do."""

    def __init__(self, hidden: int):
        super().__init__()
        self.pooler, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
        self.gather: Callable[[Tensor], Tensor] = lambda x: x

    def forward(self, x_1ND: Tensor) -> Tensor:
        return self.gather(self.head(self.pooler(x_1ND).tanh()))


class Bert(Decoder):
    INPUT: tuple[str, ...] = ("embedding", "positions", "token_types", "embedding_norm", "dropout")
    OUTPUT: tuple[str, ...] = ("transform", "norm", "sentences", "head", "loss")
    config: BertConfig

    def __init__(self, config: BertConfig):
        super().__init__()
        self.config = config
        hidden = config.hidden_size
        self.embedding = make_embedding(config.vocab_size, hidden)
        self.positions = make_embedding(config.OFFSET + config.max_positions, hidden)
        self.token_types = make_embedding(config.token_types, hidden)
        self.embedding_norm = LayerNorm(hidden, config.norm_eps)
        self.dropout = Dropout(config.hidden_dropout, "embedding")
        self.layers = numbered(Layer(config, i) for i in range(config.num_layers))
        if config.task in ("masked", "classification"):
            # One module in two roles: before the masked head's norm, or the pooler of a whole text.
            self.transform = nn.Linear(hidden, hidden)
        if config.sentence_head:
            self.sentences = SentenceHead(hidden)
        if config.task == "masked":
            self.norm = LayerNorm(hidden, config.norm_eps)
            self.head = nn.Linear(hidden, config.vocab_size)
            # Tied: one parameter in two modules, which the table has as one row with place "both".
            self.head.weight = self.embedding.weight
        self.activation = config.activation if config.HEAD_ACTS_ALIKE else F.gelu
        self.loss = CrossEntropy()

    def embed(self, tokens_BT: Tensor, places: SequenceInfo) -> Tensor:
        # RoBERTa's first rows are of padding, which no token here is.
        position_BT = places.position_BT + self.config.OFFSET
        # position_BT has the shape and device that the types need: all of type 0.
        type_BT = position_BT * 0 if places.type_BT is None else places.type_BT
        x_BTD = self.embedding(tokens_BT) + self.positions(position_BT) + self.token_types(type_BT)
        return self.dropout(self.embedding_norm(x_BTD), places)

    def shared(self, places: SequenceInfo, dtype: torch.dtype) -> SequenceInfo:
        return places

    def final_states(self, x_BTD: Tensor) -> Tensor:
        # Post-norm: the last layer's output is normalized already.
        return x_BTD

    def finish(self, x_BTD: Tensor) -> Tensor:
        if self.config.task == "masked":
            return self.norm(self.activation(self.transform(x_BTD)))
        # The pooler, of which only a text's first token is asked.
        return self.transform(x_BTD).tanh() if self.config.task == "classification" else x_BTD


def weights(config: BertConfig) -> Iterator[Weight]:
    """Yield the table of weights."""
    hidden, inner = config.hidden_size, config.inner_size
    std, prefix = config.init_std, config.PREFIX
    # As in Megatron-LM, also where the stream is normalized between.
    out_std = residual_std(config)
    thirds, head = (hidden, hidden, hidden), config.head_size
    # Three Hugging Face tensors make up the one fused weight, in this order.
    qkv = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))
    layer = (
        *linear_rows("attention.qkv", qkv, (3 * hidden, hidden), "column", std, thirds, head),
        # `unit`: columns that stay together, as they are the outputs of one head.
        *linear_rows(
            "attention.out",
            ("attention.output.dense",),
            (hidden, hidden),
            "row",
            out_std,
            unit=head,
        ),
        *norm_rows("attention_norm", "attention.output.LayerNorm", hidden, 0),
        *linear_rows("mlp.up", ("intermediate.dense",), (inner, hidden), "column", std),
        *linear_rows("mlp.down", ("output.dense",), (hidden, inner), "row", out_std),
        *norm_rows("mlp_norm", "output.LayerNorm", hidden, 0),
    )
    yield embedding_row(config, f"{prefix}.embeddings.word_embeddings.weight")
    rows = {"positions": config.OFFSET + config.max_positions, "token_types": config.token_types}
    for name, hf in (("positions", "position"), ("token_types", "token_type")):
        yield Weight(
            f"{name}.weight", (rows[name], hidden), (f"{prefix}.embeddings.{hf}_embeddings.weight",),
            used=0.0, init=std, partial_grad="sequence",
        )  # fmt: skip
    yield from norm_rows("embedding_norm", f"{prefix}.embeddings.LayerNorm", hidden, "first")
    for i in range(config.num_layers):
        yield from layer_rows(i, f"{prefix}.encoder.layer", layer)
    names = config.HEAD
    if config.task in ("masked", "classification"):
        hf = names.transform if config.task == "masked" else names.pooler
        yield from linear_rows("transform", (hf,), (hidden, hidden), None, std, place="last")
    if config.sentence_head:
        for name, hf, size in (("pooler", names.pooler, hidden), ("head", names.sentences, 2)):
            shape = (size, hidden)
            for row in linear_rows(f"sentences.{name}", (hf,), shape, None, std, place="last"):
                held = config.sentence_head == "kept"
                yield replace(row, held=held, decay=row.decay and not held)
    if config.task == "masked":
        yield from norm_rows("norm", names.norm, hidden, "last")
        hf_head = None if config.tie_embeddings else f"{names.decoder}.weight"
        yield from head_rows(config.vocab_size, hidden, std, hf_head, names.bias)


_POOLER = "of a pooler in Google's own code, which transformers does not read"
KEYS = Keys().but(
    used={
        **SIZES,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": None,
    },
    only={
        "tie_word_embeddings": True,
        "is_decoder": False,
        "is_causal": False,
        "position_embedding_type": "absolute",
    },
    directionality="said to be of both directions, as all are",
    **dict.fromkeys(
        (
            "pooler_fc_size",
            "pooler_num_attention_heads",
            "pooler_num_fc_layers",
            "pooler_size_per_head",
            "pooler_type",
        ),
        _POOLER,
    ),
)


def to_hf(config: BertConfig) -> dict[str, Any]:
    return fields_to_hf(config, "BertForPreTraining" if config.sentence_head else "BertForMaskedLM")


def fields_to_hf(config: BertConfig, architecture: str) -> dict[str, Any]:
    """Return the keys of config.json that BERT and RoBERTa share; `architecture` is transformers'
    name."""
    return {
        "architectures": [architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.inner_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "max_position_embeddings": config.OFFSET + config.max_positions,
        "type_vocab_size": config.token_types,
        "hidden_act": TANH[0] if config.tanh_gelu else "gelu",
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "tie_word_embeddings": True,
        "is_decoder": False,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    return fields_from_hf(hf, BertConfig)


def fields_from_hf(hf: dict[str, Any], config: type[BertConfig]) -> dict[str, Any]:
    """Return the fields of the `model:` section that BERT and RoBERTa share."""
    check_padding(hf)
    family = config.model_fields["family"].default
    return {
        "family": family,
        "vocab_size": hf["vocab_size"],
        "hidden_size": hf["hidden_size"],
        "intermediate_size": hf["intermediate_size"],
        "num_layers": hf["num_hidden_layers"],
        "num_attention_heads": hf["num_attention_heads"],
        "max_positions": hf["max_position_embeddings"] - config.OFFSET,
        "token_types": hf["type_vocab_size"],
        "norm_eps": hf["layer_norm_eps"],
        "init_std": hf["initializer_range"],
        "tanh_gelu": is_tanh(hf, family),
        "hidden_dropout": hf["hidden_dropout_prob"],
        "attention_dropout": hf["attention_probs_dropout_prob"],
    }


MODEL, CONFIG = Bert, BertConfig
