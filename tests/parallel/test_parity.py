"""Every layout trains the same model: loss, gradient norm, every gradient and every weight after
two steps, in fp32, against one process that runs the clean model with plain torch. A new layout is
one line in LAYOUTS; over 4 ranks every pair of settings is in some case."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import two_stacks  # noqa: F401
from lazy_collectives import lazy_collectives
from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Launch, Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.engine.native import NativeEngine
from megalite.errors import ConfigError
from megalite.kernels import experts
from megalite.models import family, weight_table
from megalite.models.core_attention import CoreAttention
from megalite.models.experts import RoutedLayer
from megalite.models.layer_loss import LayerLoss
from megalite.models.layers import SequenceInfo, Source, last_of
from megalite.models.weights import Weight
from megalite.parallel import expert
from megalite.plan import Plan, make_plan
from megalite.training.parts import build, forward, forward_backward
from megalite.training.schedules import learning_rate
from megalite.utils.counter_random import random_bits
from megalite.utils.keys import key_of
from ranks import cases_asked_for, run_ranks

SEED, STEPS, BATCH, LENGTH = 7, 2, 4, 32

# vocab 193 leaves ragged and, at tensor 4, wholly padded shards; 4 or 5 layers make uneven pipeline
# stages.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "family": "llama", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 5,
        "num_attention_heads": 8, "num_kv_heads": 4, "head_dim": 16, "max_positions": LENGTH, "init_std": 0.1,
    },
    "llama-packed": {
        "family": "llama", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
        "num_attention_heads": 4, "max_positions": LENGTH, "tie_embeddings": True, "init_std": 0.1,
        "rope_scaling": {"factor": 4.0, "original_max_positions": 16},
    },
    "gpt2-packed": {
        "family": "gpt2", "vocab_size": 193, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1, "embedding_dropout": 0.1, "hidden_dropout": 0.1,
    },
    "gpt2": {
        "family": "gpt2", "vocab_size": 193, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1, "tie_embeddings": False,
        "embedding_dropout": 0.1, "attention_dropout": 0.2, "hidden_dropout": 0.1,
    },
    # A layer without experts among those with.
    "moe-packed": {
        "family": "qwen3_moe", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
        "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": LENGTH, "init_std": 0.1,
        "moe_intermediate_size": 32, "num_experts": 8, "experts_per_token": 2, "norm_topk_prob": True,
        "mlp_only_layers": [1], "router_aux_loss_coef": 0.1, "router_z_loss_coef": 0.1,
    },
    # A dense layer, then experts beside one of every token, chosen within groups, by a bias.
    "latent-packed": {
        "family": "deepseek_v3", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
        "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.1, "moe_intermediate_size": 32,
        "num_experts": 8, "experts_per_token": 2, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "router_aux_loss_coef": 0.1, "router_bias_rate": 0.05, "routed_scaling_factor": 1.5,
    },
    # No norms of queries and keys, so that QK-clip bounds their logits.
    "mixtral": {
        "family": "mixtral", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 40, "num_layers": 3,
        "num_attention_heads": 4, "num_kv_heads": 2, "max_positions": LENGTH, "init_std": 0.1, "num_experts": 4,
        "experts_per_token": 2, "router_aux_loss_coef": 0.1,
    },
    # Latent attention and experts, with two predictors behind the last layer.
    "ahead-packed": {
        "family": "deepseek_v3", "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4,
        "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.1, "moe_intermediate_size": 32,
        "num_experts": 4, "experts_per_token": 2, "first_k_dense_replace": 1, "kv_lora_rank": 12,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 16, "router_aux_loss_coef": 0.1,
        "router_bias_rate": 0.05, "num_nextn_predict_layers": 2, "mtp_loss_scaling_factor": 0.7,
    },
    "bert-packed": {
        "family": "bert", "vocab_size": 193, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1, "hidden_dropout": 0.1,
    },
    "bert": {
        "family": "bert", "vocab_size": 193, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1, "hidden_dropout": 0.1, "attention_dropout": 0.2, "tanh_gelu": True,
    },
    # Beside masked tokens it tells whether two texts follow each other.
    "bert-pairs": {
        "family": "bert", "vocab_size": 193, "hidden_size": 48, "num_layers": 4, "num_attention_heads": 4,
        "max_positions": LENGTH, "init_std": 0.1, "hidden_dropout": 0.1, "sentence_head": True,
    },
    "t5-packed": {
        "family": "t5", "encoder_layers": 2, "vocab_size": 193, "hidden_size": 48, "head_dim": 16,
        "intermediate_size": 80, "num_layers": 5, "num_attention_heads": 4, "max_positions": LENGTH,
        "relative_buckets": 16, "relative_distance": 20, "feed_forward": "relu", "tie_embeddings": True,
        "scale_head": True,
    },
    "t5": {
        "family": "t5", "encoder_layers": 2, "vocab_size": 193, "hidden_size": 48, "head_dim": 16,
        "intermediate_size": 80, "num_layers": 5, "num_attention_heads": 4, "max_positions": LENGTH, "dropout": 0.1,
    },
    # An encoder of two layers and a decoder of three, whose stages hand over the hidden states of
    # both.
    "two-stacks-packed": {
        "family": "two_stacks", "encoder_layers": 2, "vocab_size": 193, "hidden_size": 48, "intermediate_size": 80,
        "num_layers": 5, "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.1,
    },
}  # fmt: skip
PACKED = (
    "llama-packed",
    "gpt2-packed",
    "moe-packed",
    "latent-packed",
    "ahead-packed",
    "bert-packed",
    "bert-pairs",
    "two-stacks-packed",
    "t5-packed",
)
SOURCE = 24
"""Tokens of what an encoder reads."""


@dataclass(frozen=True)
class Layout:
    ranks: int
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    schedule: str = "1f1b"
    virtual: int = 1
    context: int = 1
    context_method: str = "ring"
    context_balance: str | None = None
    expert: int = 1
    expert_tensor: int | None = None
    gathers: bool = False
    zero: int = 1
    micro: int = 1
    recompute: str = "none"
    engine: str = "native"
    loss_chunk: int | None = None
    compile: bool = False
    optimizer: str = "adamw"
    overlap: bool = False
    precision: str = "fp32"

    def __str__(self) -> str:
        data = self.ranks // (self.tensor * self.pipeline * self.context)
        name = f"{self.ranks}ranks-tp{self.tensor}{'-sp' * self.sequence}-dp{data}-zero{self.zero}-mbs{self.micro}"
        name += "-overlap" if self.overlap else ""
        if self.pipeline > 1:
            name += f"-pp{self.pipeline}-{self.schedule}{self.virtual}"
        if self.context > 1:
            name += f"-cp{self.context}{'-ulysses' * (self.context_method == 'ulysses')}"
            name += f"-by-{self.context_balance}" if self.context_balance else ""
        name += f"-ep{self.expert}" if self.expert > 1 else ""
        name += f"-etp{self.expert_tensor}" if self.expert_tensor else ""
        name += "-gathered" if self.gathers else ""
        name += f"-{self.recompute}" if self.recompute != "none" else ""
        name += f"-chunks{self.loss_chunk}" if self.loss_chunk else ""
        name += "-compiled" if self.compile else ""
        name += f"-{self.optimizer}" if self.optimizer != "adamw" else ""
        return name + (f"-{self.engine}" if self.engine != "native" else "")


def layouts(ranks: int) -> Iterator[Layout]:
    """Every layout of so many ranks that a model of 4 layers and a batch of 4 fits."""
    for tensor, pipeline, context in itertools.product((1, 2, 4), repeat=3):
        if ranks % (tensor * pipeline * context):
            continue
        shared = ranks > tensor * pipeline  # several replicas
        passes = (
            [("1f1b", 1), ("zero_bubble", 1), ("interleaved", 2), ("zero_bubble", 2)]
            if pipeline > 1
            else [("", 1)]
        )
        for (schedule, virtual), sequence, zero in itertools.product(
            passes, (False, True), (0, 1, 2)
        ):
            if pipeline * virtual <= 4 and (tensor > 1 or not sequence) and (shared or zero == 1):
                yield Layout(
                    ranks,
                    tensor,
                    sequence,
                    pipeline,
                    schedule or "1f1b",
                    virtual,
                    context,
                    zero=zero,
                )


def with_options(layout: Layout) -> Iterator[Layout]:
    """What else can be chosen beside where the ranks lie."""
    for micro, recompute, loss_chunk in itertools.product(
        (1, 2), ("none", "selective", "full"), (None, 5)
    ):
        yield replace(layout, micro=micro, recompute=recompute, loss_chunk=loss_chunk)


Case = tuple[str, Layout]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def choices_of(case: Case) -> list[tuple[str, Any]]:
    """Each setting of a case, as (name, value). A schedule is one choice with its stages a rank."""
    model, layout = case
    passes = (layout.schedule, layout.virtual) if layout.pipeline > 1 else None
    names = (
        "tensor",
        "sequence",
        "pipeline",
        "context",
        "zero",
        "micro",
        "recompute",
        "loss_chunk",
        "context_method",
        "optimizer",
        "overlap",
    )
    return [
        ("model", model),
        ("passes", passes),
        *((name, getattr(layout, name)) for name in names),
    ]


def every_pair(cases: Sequence[Case], beside: Sequence[Case] = ()) -> list[Case]:
    """As few of the cases as a greedy choice finds that, `beside` others, have every pair of
    settings that any of them has. A fault in a combination mostly needs two settings (Kuhn et al.
    2004, "Software fault interactions"); cases that the plan refuses are passed over."""
    pairs: dict[Case, set[Pair]] = {
        case: set(itertools.combinations(choices_of(case), 2)) for case in cases
    }
    missing, chosen = set().union(*pairs.values()), []
    missing -= set().union(*(itertools.combinations(choices_of(case), 2) for case in beside))
    while missing and pairs:
        best = max(pairs, key=lambda case: len(pairs[case] & missing))
        new = pairs.pop(best) & missing
        if not new:
            break
        if is_allowed(*best):
            chosen.append(best)
            missing -= new
    return chosen


def is_allowed(model: str, layout: Layout) -> bool:
    config = config_of(model, layout)
    try:
        make_plan(config, weight_table(config.model), layout.ranks)
    except ConfigError:
        return False
    return True


LAYOUTS = [
    *(layout for ranks in (1, 2) for layout in layouts(ranks)),
    Layout(1, micro=4),
    Layout(1, recompute="full"),
    Layout(1, recompute="selective"),
    Layout(2, micro=2),
    Layout(2, tensor=2, sequence=True, overlap=True, micro=2, zero=2),
    Layout(1, loss_chunk=5),
    Layout(2, loss_chunk=5),  # under ZeRO 2 a chunk that comes too late is still added
    Layout(1, compile=True),
    Layout(1, compile=True, recompute="full"),
    Layout(2, pipeline=2, micro=2, compile=True, recompute="selective"),
    Layout(2, tensor=2, sequence=True, loss_chunk=5, micro=2),
    Layout(2, tensor=2, zero=3, engine="deepspeed", loss_chunk=7),
    Layout(2, pipeline=2, schedule="zero_bubble", micro=2, loss_chunk=5),
    Layout(2, pipeline=2, micro=2, recompute="full"),
    Layout(2, pipeline=2, schedule="zero_bubble", micro=2, recompute="selective"),
    Layout(8, tensor=2, sequence=True, pipeline=2, schedule="1f1b", context=2, zero=1),
    Layout(
        8,
        tensor=2,
        sequence=True,
        overlap=True,
        pipeline=2,
        schedule="zero_bubble",
        virtual=2,
        zero=2,
    ),
    Layout(8, tensor=2, sequence=True, context=2, zero=2),
    Layout(8, pipeline=2, schedule="interleaved", virtual=2, context=2, zero=1),
    Layout(2, context=2, context_method="ulysses"),
    Layout(
        4,
        tensor=2,
        sequence=True,
        context=2,
        context_method="ulysses",
        zero=2,
        recompute="full",
        micro=2,
    ),
    Layout(4, pipeline=2, context=2, context_method="ulysses", optimizer="qk-clip"),
    *(Layout(2, zero=zero, engine="deepspeed") for zero in (1, 2, 3)),
    *(Layout(2, context=2, zero=zero, engine="deepspeed") for zero in (1, 3)),
    *(Layout(4, tensor=2, sequence=True, zero=zero, engine="deepspeed") for zero in (1, 2, 3)),
    Layout(1, zero=3, recompute="full", engine="deepspeed"),
    Layout(2, zero=3, recompute="selective", engine="deepspeed"),
    Layout(2, tensor=2, zero=2, micro=2, engine="deepspeed"),
    Layout(4, tensor=2, sequence=True, context=2, zero=3, recompute="full", engine="deepspeed"),
    *(
        Layout(ranks, zero=zero, optimizer="muon")
        for ranks, zero in ((1, 1), (2, 0), (2, 1), (4, 2))
    ),
    Layout(2, tensor=2, sequence=True, optimizer="muon"),
    Layout(2, pipeline=2, schedule="zero_bubble", optimizer="muon"),
    Layout(4, tensor=2, zero=2, optimizer="muon"),
    Layout(8, tensor=2, sequence=True, pipeline=2, zero=1, optimizer="muon"),
    *(Layout(ranks, zero=zero, optimizer="qk-clip") for ranks, zero in ((1, 1), (2, 0), (2, 1))),
    Layout(1, recompute="full", compile=True, optimizer="qk-clip"),
    Layout(2, tensor=2, sequence=True, micro=2, optimizer="qk-clip"),
    Layout(2, pipeline=2, schedule="zero_bubble", optimizer="qk-clip"),
    Layout(2, context=2, optimizer="qk-clip"),
    Layout(4, tensor=2, context=2, zero=2, recompute="full", optimizer="qk-clip"),
    *(
        Layout(ranks, zero=zero, optimizer="adafactor")
        for ranks, zero in ((1, 1), (2, 0), (2, 1), (4, 2))
    ),
    Layout(2, tensor=2, sequence=True, optimizer="adafactor"),
    Layout(2, pipeline=2, optimizer="adafactor"),
    Layout(4, tensor=2, zero=0, optimizer="adafactor"),
    Layout(8, tensor=2, sequence=True, pipeline=2, zero=1, optimizer="adafactor"),
]


# Each axis and what could be in its way; the rest of a layout is that of a decoder's dense layers.
ENCODERS = [
    *(("bert-packed", layout) for layout in (
        Layout(1, micro=2, recompute="selective"),
        Layout(2, tensor=2),
        Layout(2, context=2, zero=1, micro=2),
        Layout(2, tensor=2, sequence=True, optimizer="muon"),
        Layout(4, tensor=2, sequence=True, pipeline=2, recompute="selective"),
        Layout(8, tensor=2, sequence=True, pipeline=2, schedule="1f1b", context=2),
    )),
    # All that the others have, and pairs, of which some micro-batches have none.
    *(("bert-pairs", layout) for layout in (
        Layout(2, zero=2, recompute="full"),
        Layout(2, tensor=2, sequence=True, micro=2),
        Layout(2, pipeline=2, schedule="zero_bubble", virtual=2, micro=2),
        Layout(2, context=2, zero=2),
        Layout(2, tensor=2, sequence=True, zero=1, engine="deepspeed"),
    )),
    ("bert", Layout(1, recompute="selective")),
    ("bert", Layout(2, tensor=2, sequence=True)),
]  # fmt: skip
TWO_STACKS = [
    *(("two-stacks-packed", layout) for layout in (
        Layout(1, recompute="full"),
        Layout(2, zero=2, recompute="selective"),
        Layout(2, tensor=2),
        Layout(2, tensor=2, sequence=True, micro=2),
        Layout(2, pipeline=2),
        Layout(2, pipeline=2, recompute="full", micro=2),
        Layout(2, pipeline=2, schedule="interleaved", virtual=2),
        Layout(2, pipeline=2, schedule="zero_bubble", virtual=2),
        Layout(2, context=2, micro=2),
        Layout(4, tensor=2, sequence=True, pipeline=2),
    )),
]  # fmt: skip
ENCODER_DECODERS = [
    ("t5-packed", Layout(2, zero=2, recompute="full")),
    ("t5", Layout(1, recompute="selective", micro=2)),
    ("t5", Layout(2, tensor=2)),
    ("t5", Layout(2, tensor=2, sequence=True, micro=2, recompute="full")),
    ("t5-packed", Layout(2, pipeline=2)),
    ("t5", Layout(2, pipeline=2, schedule="zero_bubble", virtual=2, micro=2)),
    ("t5-packed", Layout(2, context=2)),
    ("t5", Layout(2, context=2, micro=2, recompute="selective")),
    ("t5-packed", Layout(2, zero=3, recompute="full", engine="deepspeed")),
    ("t5", Layout(2, tensor=2, sequence=True, zero=1, engine="deepspeed")),
    ("t5-packed", Layout(4, tensor=2, sequence=True, pipeline=2, recompute="selective")),
]
MORE_ENCODER_DECODERS = [
    (model, layout) for model in ("t5-packed", "t5") for layout in (
        Layout(1, micro=4),
        Layout(1, compile=True),
        Layout(1, loss_chunk=5),
        Layout(2, zero=0),
        Layout(2, tensor=2, sequence=True, zero=2, loss_chunk=5),
        Layout(2, pipeline=2, micro=2, recompute="full"),
        Layout(2, pipeline=2, schedule="interleaved", virtual=2),
        Layout(2, pipeline=2, schedule="zero_bubble", recompute="selective"),
        Layout(2, tensor=2, sequence=True, optimizer="muon"),
        Layout(2, pipeline=2, optimizer="adafactor"),
        Layout(4, pipeline=4, schedule="zero_bubble"),
        Layout(4, tensor=4),
        Layout(4, tensor=2, pipeline=2, schedule="interleaved", virtual=2),
        Layout(4, pipeline=2, zero=2, recompute="full"),
        Layout(2, context=2, zero=2, recompute="full", loss_chunk=5),
        Layout(4, context=4),
        Layout(4, context=2, pipeline=2, schedule="zero_bubble"),
        Layout(4, context=2, tensor=2, sequence=True, optimizer="muon"),
        *(Layout(2, zero=zero, micro=2, engine="deepspeed") for zero in (1, 2, 3)),
        Layout(2, context=2, zero=3, recompute="selective", engine="deepspeed"),
    )
]  # fmt: skip
"""Run with --whole."""
WITH_EXPERTS = [
    Layout(1, micro=2, recompute="selective"),
    Layout(2, zero=2, recompute="full"),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True, micro=2, recompute="full"),
    Layout(2, pipeline=2, schedule="zero_bubble", virtual=2, micro=2),
    Layout(2, context=2, zero=1, micro=2),
    Layout(2, zero=3, recompute="full", engine="deepspeed"),
    Layout(2, tensor=2, sequence=True, zero=1, engine="deepspeed"),
    Layout(2, tensor=2, sequence=True, optimizer="muon"),
    Layout(2, zero=2, optimizer="muon"),
    Layout(4, tensor=2, zero=2, optimizer="adafactor"),
    Layout(4, tensor=2, sequence=True, pipeline=2, recompute="selective"),
    Layout(8, tensor=2, sequence=True, pipeline=2, schedule="1f1b", context=2),
    Layout(2, expert=2),
    Layout(2, expert=2, gathers=True),
    Layout(4, tensor=2, sequence=True, expert=4, expert_tensor=1, gathers=True, recompute="full"),
    Layout(4, context=2, expert=2, expert_tensor=2, gathers=True, zero=2, micro=2),
    Layout(2, expert=2, zero=2, micro=2, recompute="full"),
    Layout(2, expert=2, optimizer="muon", recompute="selective"),
    Layout(2, context=2, expert=2, zero=0, micro=2),
    Layout(2, tensor=2, sequence=True, expert=2, expert_tensor=1),
    Layout(2, expert_tensor=2, zero=2),
    Layout(4, expert=4),
    Layout(4, tensor=2, sequence=True, expert=2, zero=2, optimizer="muon"),
    Layout(4, tensor=2, expert=2),
    Layout(4, tensor=2, sequence=True, expert=4, expert_tensor=1, recompute="full"),
    Layout(4, expert=2, zero=1, optimizer="muon"),
    Layout(4, pipeline=2, schedule="zero_bubble", expert=2, zero=1),
    Layout(
        4,
        pipeline=2,
        schedule="interleaved",
        virtual=2,
        tensor=2,
        sequence=True,
        expert=2,
        expert_tensor=1,
    ),
    Layout(4, context=2, expert=2, expert_tensor=2, zero=2),
    Layout(8, tensor=2, sequence=True, context=2, expert=2, expert_tensor=1, zero=2),
    Layout(
        8,
        tensor=2,
        sequence=True,
        pipeline=2,
        expert=4,
        expert_tensor=1,
        schedule="zero_bubble",
        virtual=2,
    ),
]


# Its attention cut over tensor and context ranks, its biases by every way of counting tokens.
WITH_LATENTS = [
    Layout(1, micro=2, recompute="selective"),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True, zero=2, recompute="full"),
    Layout(2, context=2, micro=2),
    Layout(2, expert=2, micro=2, optimizer="muon"),
    Layout(2, context=2, context_method="ulysses", expert=2, optimizer="adafactor"),
    Layout(4, tensor=2, sequence=True, expert=2, zero=0, optimizer="adafactor"),
    Layout(4, tensor=2, sequence=True, expert=4, expert_tensor=1, recompute="full"),
    Layout(4, pipeline=2, schedule="zero_bubble", expert=2),
    Layout(
        8,
        tensor=2,
        sequence=True,
        pipeline=2,
        schedule="interleaved",
        virtual=2,
        context=2,
        expert=2,
    ),
]


# The embedding at both ends, the head once for all predictions, documents and ranks' ends of them.
WITH_PREDICTORS = [
    Layout(1, micro=2, recompute="full", loss_chunk=5),
    Layout(2, tensor=2),
    Layout(2, tensor=2, sequence=True, zero=2, micro=2, recompute="selective"),
    Layout(2, context=2, zero=0),
    Layout(2, expert=2, optimizer="muon"),
    Layout(2, pipeline=2, micro=2, optimizer="adafactor"),
    Layout(2, pipeline=2, schedule="interleaved", virtual=2, recompute="full"),
    Layout(2, pipeline=2, schedule="zero_bubble", virtual=2),
    Layout(4, tensor=2, sequence=True, pipeline=2, expert=2, expert_tensor=1, loss_chunk=7),
    Layout(4, pipeline=2, context=2, schedule="zero_bubble", zero=2),
]


def fits(model: str, layout: Layout) -> bool:
    """Whether it is run. A ring of attention never has its probabilities in one place to drop from;
    and where ranks outnumber cores, or an engine is not ours, two models show what four would."""
    # WITH_EXPERTS, WITH_LATENTS, WITH_PREDICTORS, ENCODERS, TWO_STACKS, ENCODER_DECODERS
    if model in (
        "moe-packed",
        "latent-packed",
        "ahead-packed",
        "mixtral",
        "bert-packed",
        "bert-pairs",
        "bert",
        "two-stacks-packed",
        "t5-packed",
        "t5",
    ):
        return False
    if layout.optimizer in ("qk-clip", "adafactor") and model not in ("llama", "gpt2-packed"):
        return False
    if (layout.ranks >= 4 or layout.engine == "deepspeed") and model not in (
        "llama",
        "gpt2-packed",
    ):
        return False
    return layout.context == 1 or not MODELS[model].get("attention_dropout")


TURNS = [layout for layout in LAYOUTS if layout.ranks >= 4 or layout.engine == "deepspeed"]
COMPILED = [layout for layout in LAYOUTS if layout.compile]


def has_turn(model: str, layout: Layout) -> bool:
    """Where it would take long, layouts are given to one model after the other."""
    turns = COMPILED if layout.compile else TURNS
    return layout not in turns or model == ("llama", "gpt2-packed")[turns.index(layout) % 2]


OPTIMIZERS: dict[str, dict[str, Any]] = {
    # eps far above rounding: Adam's first steps would otherwise divide noise by noise, and no
    # tolerance would tell a wrong gradient from a right one.
    "adamw": {"eps": 1e-3},
    "muon": {"name": "muon", "adamw": {"lr": 5e-3, "eps": 1e-3}},
    # A threshold that about half of the heads are above.
    "qk-clip": {
        "name": "muon", "adamw": {"lr": 5e-3, "eps": 1e-3}, "qk_clip": {"threshold": 1.9, "alpha": 0.25}
    },
    "adafactor": {"name": "adafactor", "eps": 1e-3},
}  # fmt: skip


MORE_OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"name": "sgd"}, "adagrad": {"name": "adagrad", "eps": 1e-3}, "lion": {"name": "lion", "lr": 1e-3},
}  # fmt: skip
"""Of which one process is not stated again here: they update each element for itself, as AdamW."""
EVERY_OPTIMIZER = [*OPTIMIZERS, *MORE_OPTIMIZERS]


LEARNS: dict[str, dict[str, Any]] = {
    "bert": {"name": "masked_lm"}, "t5": {"name": "seq2seq", "target_length": LENGTH}
}  # fmt: skip


def config_of(model: str, layout: Layout) -> Config:
    kind = MODELS[model]["family"]
    objective = LEARNS.get(kind, {"name": "next_token"})
    if MODELS[model].get("sentence_head"):
        objective = objective | {"sentences": "nsp"}
    return parse_config(
        {
            "run": {"name": "parity"},
            "model": MODELS[model],
            "objective": objective,
            "data": {
                "train": [{"path": "unused"}], "seq_length": SOURCE if kind == "t5" else LENGTH,
                "document_mask": model in PACKED or kind == "t5",
                "tokenizer": "unused",
            },
            "parallel": {
                "tensor": layout.tensor, "sequence": layout.sequence, "zero_stage": layout.zero,
                "pipeline": layout.pipeline, "schedule": layout.schedule, "virtual": layout.virtual,
                "context": layout.context, "context_method": layout.context_method, "engine": layout.engine,
                "context_balance": layout.context_balance,
                "expert": layout.expert, "expert_tensor": layout.expert_tensor, "tensor_overlap": layout.overlap,
                "bucket_mb": 0.05,  # several buckets even in so small a model
            },
            "train": {
                "steps": STEPS, "global_batch_size": BATCH, "micro_batch_size": layout.micro,
                "precision": layout.precision, "seed": SEED, "recompute": layout.recompute,
                "loss_chunk": layout.loss_chunk, "compile": layout.compile,
            },
            # Clipping at 0.5 is active in both steps.
            "optimizer": {"lr": 1e-2, "weight_decay": 0.1, "clip": 0.5}
            | (OPTIMIZERS | MORE_OPTIMIZERS)[layout.optimizer],
        }
    )  # fmt: skip


def is_chosen_from(case: Case) -> bool:
    """Whether other models than the first have no need of a layout for its own sake."""
    model, layout = case
    return (
        model != "llama" and layout.ranks == 2 and layout.engine == "native" and not layout.compile
    )


EACH = [
    (model, layout) for layout in LAYOUTS for model in MODELS if fits(model, layout) and has_turn(model, layout)
]  # fmt: skip
WHOLE = [case for case in EACH if not is_chosen_from(case)]

CASES = [
    *WHOLE,
    *every_pair([case for case in EACH if is_chosen_from(case)], WHOLE),
    ("gpt2", Layout(2, tensor=2, sequence=True)),  # dropout and biases, whose products are not in parts
    *(("moe-packed", layout) for layout in WITH_EXPERTS),
    *(("latent-packed", layout) for layout in WITH_LATENTS),
    *(("ahead-packed", layout) for layout in WITH_PREDICTORS),
    # By documents where the others are packed.
    ("llama-packed", Layout(2, context=2, context_balance="sequence", micro=2)),
    *ENCODERS,
    *TWO_STACKS,
    *ENCODER_DECODERS,
    *every_pair([
        (model, full) for layout in layouts(4) for full in with_options(layout) for model in MODELS if fits(model, full)
    ]),
]  # fmt: skip


def batches() -> list[MicroBatch]:
    """The global batch of every step. A third of the labels carries no loss, unevenly; documents
    begin anywhere, and one is a single token."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for step in range(STEPS):
        tokens = torch.randint(0, 193, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        for row in range(BATCH):
            labels[row, : row * 7] = -100
        begins = torch.rand(BATCH, LENGTH, generator=generator) < 0.1
        begins[:, 11:13] = True
        samples = torch.arange(step * BATCH, (step + 1) * BATCH)
        found.append(MicroBatch(tokens[:, :-1], labels, samples, begins.long().cumsum(1)))
    return found


def micro_batches(
    model: str, step: int, layout: Layout, data_rank: int, data_size: int
) -> list[MicroBatch]:
    batch = batches()[step]
    rows = torch.arange(BATCH).view(-1, data_size, layout.micro)[:, data_rank]
    documents = batch.documents if model in PACKED else None
    return [
        MicroBatch(
            batch.tokens[row], batch.labels[row], batch.samples[row], None if documents is None else documents[row],
            **(sides_of(batch, model, row) if MODELS[model]["family"] == "t5" else {}),
            **({name: x[row] for name, x in pairs_of(batch).items()} if model == "bert-pairs" else {}),
        )
        for row in rows
    ]  # fmt: skip


def sides_of(batch: MicroBatch, model: str, row: Any = slice(None)) -> dict[str, Any]:
    """What an encoder reads of a batch, and its documents; some of the decoder's have no token
    there."""
    documents = batch.documents if model in PACKED else None
    return {
        "source": batch.tokens.flip(1)[row, :SOURCE],
        "source_documents": None if documents is None else documents[row, :SOURCE],
    }


def pairs_of(batch: MicroBatch) -> dict[str, Tensor]:
    """Which documents of a batch are pairs of texts, in order or not, and whose tokens are of the
    second one. The first row has none."""
    assert batch.documents is not None
    begins = torch.ones_like(batch.tokens, dtype=torch.bool)
    begins[:, 1:] = batch.documents[:, 1:] != batch.documents[:, :-1]
    is_pair = begins & (batch.tokens % 4 > 0)
    is_pair[0] = False
    return {
        # Mostly of one kind: gradients of two steps that nearly cancel would leave their rounding.
        "sentences": torch.where(is_pair, (batch.tokens % 7 == 0).long(), -100),
        "types": (batch.tokens % 3 == 0).long(),
    }


Result = dict[str, Any]


def train_layouts(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    return [train_layout(model, layout) for model, layout in cases]


def train_layout(model_name: str, layout: Layout) -> Result:
    """`two_steps` whose experts' rows travel as the layout says: by their size all would be
    gathered."""
    with patch.object(expert, "GATHERED_BYTES", 2**40 if layout.gathers else -1):
        return two_steps(model_name, layout)


def two_steps(model_name: str, layout: Layout) -> Result:
    """Two steps on this rank. What a rank returns in logical terms is its stage's part."""
    config = config_of(model_name, layout)
    weights = weight_table(config.model)
    plan = make_plan(config, weights, layout.ranks)
    mesh = mesh_of(plan)
    parts = build(config, plan, mesh)
    engine = parts.engine
    engine.load(from_seed(SEED, mesh))
    to_first = {w.name: plan.rank_at(place_of(w, plan), 0, 0) for w in weights}
    result: Result = {"loss": [], "norm": [], "grads": []}
    for step in range(STEPS):
        batch = micro_batches(model_name, step, layout, mesh.data.rank, mesh.data.size)
        result["loss"].append(forward_backward(parts, batch, mesh, SEED)["loss"].item())
        result["grads"].append(engine.gather("grad", to_first))
        result["norm"].append(engine.step(learning_rate(step + 1, STEPS, config.optimizer)).item())
    for kind in ("weight", *engine.states):
        result[kind] = engine.gather(kind, to_first)
    return result


MESHES: dict[tuple[int, ...], Mesh] = {}
"""Of this process, by shape: making process groups takes longer than two steps."""


def mesh_of(plan: Plan) -> Mesh:
    shape = (plan.pipeline, plan.data, plan.context, plan.tensor, *plan.experts)
    if shape not in MESHES:
        MESHES[shape] = make_mesh(plan, torch.device("cpu"))
    return MESHES[shape]


def place_of(weight: Weight, plan: Plan) -> int:
    """Pipeline rank of the first stage that holds a weight."""
    return next(stage.index for stage in plan.stages if stage.holds(weight.place)) % plan.pipeline


def join(parts: list[Result]) -> Result:
    """What the stages of a pipeline have returned, as one."""
    whole: Result = {"loss": parts[0]["loss"], "norm": parts[0]["norm"]}
    whole["grads"] = [
        {k: v for part in parts for k, v in part["grads"][step].items()} for step in range(STEPS)
    ]
    for kind in parts[0].keys() - whole.keys():
        whole[kind] = {name: tensor for part in parts for name, tensor in part[kind].items()}
    for part in parts:
        assert (part["loss"], part["norm"]) == (whole["loss"], whole["norm"]), (
            "every rank knows the loss and the norm"
        )
    return whole


class PlainMuon(torch.optim.Optimizer):
    """Muon as its papers state it, in float64, on every one of a weight's `rows` apart."""

    def __init__(self, parameters: Sequence[dict[str, Any]]):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            (p,) = group["params"]
            buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffer.mul_(0.95).add_(p.grad, alpha=0.05)
            seen = (0.05 * p.grad + 0.95 * buffer).double()
            p.mul_(1 - group["lr"] * 0.1)
            # Of stacks, too.
            rows, seen_rows = (each.flatten(0, -2).split(group["rows"]) for each in (p, seen))
            for part, x in zip(rows, seen_rows, strict=True):
                x = x / x.norm()
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                part.sub_(x, alpha=group["lr"] * 0.2 * max(x.shape) ** 0.5)


def note_logits(model: torch.nn.Module) -> dict[str, Tensor]:
    """The largest attention logit of each head, by the layer's name, from now on: whole matrices of
    logits."""
    largest: dict[str, Tensor] = {}

    def noting(name: str) -> Any:
        def note(core: CoreAttention, arguments: tuple[Any, ...]) -> None:
            qkv, heads, groups, places = arguments
            q, k = (
                qkv[:, :, :heads],
                qkv[:, :, heads : heads + groups].repeat_interleave(heads // groups, 2),
            )
            logits = torch.einsum("bthk,bshk->bhts", q, k) / qkv.shape[-1] ** 0.5
            unseen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
            if places.document_BT is not None:
                unseen = (
                    unseen
                    | (places.document_BT[:, :, None] != places.document_BT[:, None])[:, None]
                )
            largest[name] = logits.masked_fill(unseen, -torch.inf).amax((0, 2, 3)).detach()

        return note

    for name, module in model.named_modules():
        if isinstance(module, CoreAttention):
            module.register_forward_pre_hook(noting(name.removesuffix(".core")))
    return largest


def plain_qk_clip(
    largest: dict[str, Tensor], parameters: dict[str, Tensor], groups: int, settings: Any
) -> None:
    """MuonClip, head by head; those that share their keys by the largest of them."""
    ratios = []
    for name, of_heads in largest.items():
        for kind in ("weight", "bias"):
            if f"{name}.qkv.{kind}" not in parameters:
                continue
            rows = parameters[f"{name}.qkv.{kind}"]
            size = len(rows) // (len(of_heads) + 2 * groups)
            for head in range(len(of_heads)):
                group = head // (len(of_heads) // groups)
                ratio = min(1.0, settings.threshold / of_heads.view(groups, -1)[group].max().item())
                ratios.append(ratio)
                rows[head * size : (head + 1) * size] *= ratio**settings.alpha
                if head % (len(of_heads) // groups) == 0:
                    first = (len(of_heads) + group) * size
                    rows[first : first + size] *= ratio ** (1 - settings.alpha)
    assert min(ratios) < 0.95 < 1.0 in ratios, "the threshold tells heads apart"


class PlainAdafactor(torch.optim.Optimizer):
    """torch's Adafactor on every one of a weight's `rows` apart, whose states it keeps beside each
    other."""

    def __init__(self, parameters: Sequence[dict[str, Any]]):
        super().__init__(parameters, {})
        self.apart = []
        for group in self.param_groups:
            (p,) = group["params"]
            rows = p.data.flatten(0, -2) if p.dim() > 1 else p.data
            parts = [torch.nn.Parameter(part) for part in rows.split(group["rows"])]
            decay = group["weight_decay"]
            self.apart.append(
                torch.optim.Adafactor(parts, lr=1.0, eps=(1e-3, 1e-3), weight_decay=decay)
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group, each in zip(self.param_groups, self.apart, strict=True):
            (p,) = group["params"]
            parts = each.param_groups[0]["params"]
            grads = (p.grad.flatten(0, -2) if p.dim() > 1 else p.grad).split(group["rows"])
            for part, grad in zip(parts, grads, strict=True):
                part.grad = grad
            each.param_groups[0]["lr"] = group["lr"]
            each.step()
            shape = p.shape[:-2] if p.dim() > 1 else ()
            for name in ("row_var", "col_var") if p.dim() > 1 else ("variance",):
                whole = torch.cat([each.state[part][name] for part in parts])
                self.state[p][name] = (
                    whole.view(*shape, -1, whole.shape[-1]) if p.dim() > 1 else whole
                )


def plain_loss_ahead(model: Any, x: Tensor, batch: MicroBatch, places: SequenceInfo) -> Tensor:
    """The weighted sum of what predictors lose, as DeepSeek-V3's report states it: h'ᵏ = Mₖ [norm(h
    of depth k - 1); norm(embedding of token i + k)], then a layer, the last norm and the head."""
    h, config, total = model.norm(x), model.config, torch.zeros(())
    count = len(config.architecture.predictors)
    for depth in range(1, count + 1):
        tokens, labels = batch.tokens.clone(), torch.full_like(batch.labels, -100)
        for row, documents in enumerate(batch.documents.tolist()):  # type: ignore[union-attr]
            for place in range(LENGTH):
                last = max(at for at in range(LENGTH) if documents[at] == documents[place])
                tokens[row, place] = batch.tokens[row, min(place + depth, last)]
                if place + depth <= last:
                    labels[row, place] = batch.labels[row, place + depth]
        layer = model.layers[str(config.num_layers + depth - 1)]
        parts = layer.enorm(model.embedding.weight[tokens]), layer.hnorm(h)
        joined = torch.cat(parts, -1) @ layer.eh_proj.weight.T
        h = layer.norm(RoutedLayer.forward(layer, joined, model.shared(places, x.dtype)))
        logits = h @ model.head.weight.T
        total = total + F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
        )
    return config.predictor_weight * total / max(count, 1)


def plain_loss_of_pairs(model: Any, x: Tensor, batch: MicroBatch) -> Tensor:
    """Mean over the pairs of what is lost at their first tokens, for each label of masked tokens."""
    told = model.sentences.head(model.sentences.pooler(x).tanh())
    labels = pairs_of(batch)["sentences"]
    mean = F.cross_entropy(told.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return mean * (batch.labels != -100).sum()


@cache
def reference(model_name: str, optimizer_name: str = "adamw") -> Result:
    """The clean model in one process, whole batch at once, optimizers and clipping of torch, or as
    plain statements: no megalite engine."""
    config = config_of(model_name, Layout(1, optimizer=optimizer_name))
    weights = weight_table(config.model)
    read = from_seed(SEED, Mesh.alone())
    model = family(config.model.family).MODEL(config.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weights:
            parameters[weight.name].copy_(
                read(weight, "weight", 0, weight.numel).view(weight.shape)
            )
    clip = config.optimizer.qk_clip
    largest = note_logits(model) if clip else {}
    matrices = [w for w in weights if config.optimizer.name == "muon" and w.is_matrix]
    adamw = torch.optim.AdamW(
        [
            {"params": [parameters[w.name]], "weight_decay": 0.1 if w.decay else 0.0}
            for w in weights if w not in matrices and not w.by_counts
        ],
        betas=(0.9, 0.95), eps=1e-3, fused=False, foreach=False,
    )  # fmt: skip
    optimizers: dict[torch.optim.Optimizer, float] = {adamw: 0.5 if matrices else 1.0}
    if config.optimizer.name == "adafactor":
        each = [
            (w, parameters[w.name], 0.1 if w.decay else 0.0) for w in weights if not w.by_counts
        ]
        optimizers = {
            PlainAdafactor(
                [{"params": [p], "rows": w.row_groups, "weight_decay": d} for w, p, d in each]
            ): 1
        }
    if matrices:
        optimizers[
            PlainMuon([{"params": [parameters[w.name]], "rows": w.row_groups} for w in matrices])
        ] = 1.0
    result: Result = {"loss": [], "norm": [], "grads": []}
    losses = [module for module in model.modules() if isinstance(module, LayerLoss)]
    for batch in batches():
        for layer_loss in losses:
            layer_loss.begin(BATCH * LENGTH, BATCH, torch.ones(()))
        places = reference_places(batch, packed=model_name in PACKED)
        if config.lengths.source:
            tokens, documents = sides_of(batch, model_name).values()
            index = torch.arange(SOURCE)[None]
            source = Source(tokens, SequenceInfo(index, index, documents, places.key_B))
            places = replace(places, source=source)
        if is_of_pairs := model_name == "bert-pairs":
            places = replace(places, type_BT=pairs_of(batch)["types"])
        x = last_of(model.run_layers(model.embed(batch.tokens, places), places))
        loss = model.loss(model.predict(x), batch.labels).sum()
        loss = loss + plain_loss_ahead(model, x, batch, places)
        loss = loss + plain_loss_of_pairs(model, x, batch) if is_of_pairs else loss
        loss = loss / (batch.labels != -100).sum()
        model.zero_grad()
        loss.backward()
        result["loss"].append(loss.item())
        result["grads"].append({name: p.grad.clone() for name, p in parameters.items()})
        trained = [parameters[w.name] for w in weights if not w.by_counts]
        result["norm"].append(torch.nn.utils.clip_grad_norm_(trained, 0.5).item())
        with torch.no_grad():
            for bias in (parameters[w.name] for w in weights if w.by_counts):
                bias -= config.model.bias_rate * bias.grad.sign()  # type: ignore[operator,union-attr]
        for optimizer, factor in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * learning_rate(len(result["norm"]), STEPS, config.optimizer)
            optimizer.step()
        if clip:
            groups = config.model.architecture.attentions[0].num_kv_heads
            plain_qk_clip(largest, {name: p.data for name, p in parameters.items()}, groups, clip)
    result["weight"] = {name: p.detach() for name, p in parameters.items()}
    for weight in weights:
        for optimizer in optimizers:
            for state, tensor in optimizer.state.get(parameters[weight.name], {}).items():
                result.setdefault(state, {})[weight.name] = tensor
    return result


def reference_places(batch: MicroBatch, packed: bool) -> SequenceInfo:
    keys = random_bits(key_of(SEED, "dropout"), batch.samples)
    index = torch.arange(LENGTH)[None]
    if not packed:
        return SequenceInfo(index, index, None, keys)
    assert batch.documents is not None
    position = torch.zeros_like(batch.documents)
    for row, documents in enumerate(batch.documents.tolist()):
        for place in range(LENGTH):
            position[row, place] = documents[:place].count(documents[place])
    return SequenceInfo(index, position, batch.documents, keys)


@pytest.fixture(scope="session")
def chosen(request: pytest.FixtureRequest) -> frozenset[Case]:
    """The cases that are trained."""
    asked = cases_asked_for(request, test_layout_equals_one_process)
    return frozenset((each["model"], each["layout"]) for each in asked)


@cache
def results_of(
    ranks: int, engine: str, compiled: bool, chosen: frozenset[Case]
) -> dict[Case, Result]:
    """All layouts of a number of ranks in one spawn: starting processes takes longer than the
    steps. DeepSpeed has its own, since it replaces functions of torch; and so has torch's compiler,
    which takes its time."""
    kind = (ranks, engine, compiled)
    cases = [
        case
        for case in (*CASES, *MORE_ENCODER_DECODERS)
        if case in chosen and (case[1].ranks, case[1].engine, case[1].compile) == kind
    ]
    of_ranks = run_ranks(ranks, train_layouts, cases, deepspeed=engine == "deepspeed")
    return {
        case: join([results[number] for results in of_ranks]) for number, case in enumerate(cases)
    }


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm().clamp(min=1e-12)).item()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_layout_equals_one_process:
        more = MORE_ENCODER_DECODERS if metafunc.config.getoption("--whole") else []
        metafunc.parametrize(("model", "layout"), [*CASES, *more], ids=str)


def test_layout_equals_one_process(model: str, layout: Layout, chosen: frozenset[Case]) -> None:
    if layout.engine == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    found = results_of(layout.ranks, layout.engine, layout.compile, chosen)[model, layout]
    check_against_one_process(found, reference(model, layout.optimizer))


def check_against_one_process(found: Result, wanted: Result) -> None:
    # fp32 sums in another order: about 1e-7 per operation; 1e-5 is the project's bound for every
    # layout.
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    for step in range(STEPS):
        assert found["grads"][step].keys() == wanted["grads"][step].keys()
        for name, grad in found["grads"][step].items():
            if name.endswith("router.bias"):  # whole numbers
                assert torch.equal(grad, wanted["grads"][step][name]), (
                    f"step {step + 1}: counts of {name}"
                )
            error = relative_error(grad, wanted["grads"][step][name])
            assert error <= 1e-5, f"step {step + 1}: gradient of {name} is off by {error:.1e}"
    for kind in found.keys() - {"loss", "norm", "grads"}:
        assert found[kind].keys() == wanted[kind].keys(), kind
        for name, tensor in found[kind].items():
            error = relative_error(tensor, wanted[kind][name])
            assert error <= 1e-5, f"{kind} of {name} is off by {error:.1e} after {STEPS} steps"


@pytest.mark.parametrize("model", ["moe-packed", "latent-packed", "ahead-packed"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_token_is_close_to_another_expert(
    model: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routing is not continuous: rounding could send such a token elsewhere on another layout, and
    no bound would hold. Noise of fp32 is up to 1e-6 here, relative."""
    gaps = []

    def top_k(scores: Tensor, k: int) -> Tensor:
        ordered = scores.sort(-1, descending=True).values
        is_close = (ordered[..., k - 1] - ordered[..., k]) / ordered[..., k - 1]
        gaps.append(is_close[ordered[..., k].isfinite()].min().item())
        return experts.top_k(scores, k)

    monkeypatch.setattr("megalite.models.experts.top_k", top_k)
    reference.__wrapped__(model, optimizer)
    # Layers with experts; twice where groups are chosen, too; with both predictors.
    choices = {"moe-packed": 3, "latent-packed": 6, "ahead-packed": 5}
    assert len(gaps) == STEPS * choices[model]
    assert min(gaps) > 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zero_stages_give_the_same_bits(optimizer: str) -> None:
    """With one micro-batch a replica, two replicas sum the same two terms, whoever owns what. In
    bf16, Muon's matrices travel rounded."""
    layout = Layout(2, micro=2, optimizer=optimizer)
    layouts = [replace(layout, zero=zero) for zero in (0, 1, 2)]
    if optimizer == "muon":
        layouts += [replace(each, precision="bf16") for each in layouts]
    found = run_ranks(2, train_layouts, [("llama", each) for each in layouts])[0]
    for number in range(0, len(found), 3):
        first, *others = found[number : number + 3]
        for other in others:
            assert other.keys() == first.keys()
            for kind in first.keys() - {"loss", "norm", "grads"}:
                assert all(
                    torch.equal(other[kind][name], first[kind][name]) for name in first[kind]
                )


def test_sums_of_experts_do_not_depend_on_where_they_are() -> None:
    """With two replicas of dense weights. Of an expert's own gradient, the sum over tokens of other
    ranks is another one: a product here, a reduction there."""
    cases = [
        (
            "moe-packed",
            Layout(4, tensor=2, sequence=True, expert=n, expert_tensor=1, gathers=gathers),
        )
        for n, gathers in ((1, False), (2, False), (4, False), (2, True), (4, True))
    ]
    first, *others = run_ranks(4, train_layouts, cases)[0]
    for other in others:
        assert other["loss"] == first["loss"]
        for name, grad in first["grads"][0].items():
            assert ".experts." in name or torch.equal(other["grads"][0][name], grad), name


@cache
def mixtral_results() -> tuple[dict[str, Result], dict[str, Result]]:
    """Of each optimizer: in one process, and with half of the experts on each of two ranks."""
    cases = [("mixtral", Layout(2, expert=2, optimizer=name)) for name in EVERY_OPTIMIZER]
    found = (
        join(list(results)) for results in zip(*run_ranks(2, train_layouts, cases), strict=True)
    )
    alone = (train_layout("mixtral", Layout(1, optimizer=name)) for name in EVERY_OPTIMIZER)
    return tuple(dict(zip(EVERY_OPTIMIZER, results, strict=True)) for results in (alone, found))  # type: ignore[return-value]


@pytest.mark.parametrize("optimizer", EVERY_OPTIMIZER)
def test_every_optimizer_trains_experts_of_other_ranks(optimizer: str) -> None:
    wanted, found = (results[optimizer] for results in mixtral_results())
    check_against_one_process(found, wanted)


def judge_layouts(
    rank: int, world_size: int, layouts: list[Layout], model: str
) -> list[list[Tensor]]:
    """Losses [B,T] of the first batch's micro-batches, as validation computes them; on the last
    stage's rank."""
    found = []
    for layout in layouts:
        config = config_of(model, layout)
        plan = make_plan(config, weight_table(config.model), layout.ranks)
        mesh = mesh_of(plan)
        parts = build(config, plan, mesh)
        parts.engine.load(from_seed(SEED, mesh))
        batch = micro_batches(model, 0, layout, 0, 1)
        found.append([losses_BT for losses_BT, *_ in forward(parts, batch, mesh)])
    return found


@pytest.mark.parametrize("model", ["two-stacks-packed", "t5-packed"])
def test_stages_hand_several_streams_over_in_validation(model: str) -> None:
    (wanted,) = judge_layouts(0, 1, [Layout(1)], model)
    layouts = [Layout(2, pipeline=2), Layout(2, pipeline=2, schedule="interleaved", virtual=2)]
    for found in run_ranks(2, judge_layouts, layouts, model)[1]:
        # fp32 sums in another order; 1e-5 is the project's bound for every layout.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


LAZILY = [
    ("llama", Layout(2, zero=0)),
    ("llama", Layout(2, zero=1)),
    ("llama", Layout(2, zero=2)),
    ("gpt2", Layout(2, tensor=2)),
    ("llama", Layout(2, tensor=2, sequence=True, loss_chunk=5)),
    ("llama-packed", Layout(2, tensor=2, sequence=True, zero=2, micro=2)),
    ("llama-packed", Layout(2, context=2, zero=1, recompute="full")),
    ("llama-packed", Layout(2, pipeline=2, schedule="zero_bubble", zero=1)),
    ("moe-packed", Layout(2, expert=2, zero=2)),
    ("moe-packed", Layout(2, expert=2, gathers=True)),
    ("ahead-packed", Layout(2, tensor=2, sequence=True, micro=2)),
]  # fmt: skip


def train_layouts_lazily(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    with lazy_collectives():
        return train_layouts(rank, world_size, cases)


@cache
def lazy_results(cases: tuple[Case, ...]) -> dict[Case, Result]:
    of_ranks = run_ranks(2, train_layouts_lazily, list(cases))
    return {
        case: join([results[number] for results in of_ranks]) for number, case in enumerate(cases)
    }


@pytest.mark.parametrize(("model", "layout"), LAZILY, ids=str)
def test_every_collective_is_waited_for(
    model: str, layout: Layout, request: pytest.FixtureRequest
) -> None:
    """A result that is read before its wait, or a buffer that changes while it travels, goes unseen
    over loopback."""
    asked = cases_asked_for(request, test_every_collective_is_waited_for)
    found = lazy_results(tuple((each["model"], each["layout"]) for each in asked))[model, layout]
    check_against_one_process(found, reference(model, layout.optimizer))


def test_reference_would_notice_a_wrong_gradient() -> None:
    """The tolerance tells apart what it should: one sample less changes every matrix by far
    more."""
    wanted = reference("llama")["grads"][0]
    layout = Layout(1)
    config = config_of("llama", layout)
    plan = make_plan(config, weight_table(config.model), 1)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(SEED, Mesh.alone()))
    forward_backward(parts, micro_batches("llama", 0, layout, 0, 1)[1:], mesh, SEED)
    grads = parts.engine.gather("grad", dict.fromkeys(wanted, 0))
    assert min(relative_error(grads[name], wanted[name]) for name in wanted) > 1e-2


def whole_gradients_alive(rank: int, world_size: int, zero: int) -> tuple[int, int]:
    """(most buckets whose whole gradient existed at once during a backward pass, number of
    buckets)."""
    layout = Layout(world_size, zero=zero)
    config = config_of("llama", layout)
    plan = make_plan(config, weight_table(config.model), world_size)
    mesh = make_mesh(plan, Launch.from_environment().device)
    parts = build(config, plan, mesh)
    engine = parts.engine
    engine.load(from_seed(SEED, mesh))
    assert isinstance(engine, NativeEngine)
    most = 0

    def count(_: Tensor) -> None:
        nonlocal most
        alive = sum(bucket.grads is not None for bucket in engine.buckets)
        most = max(most, alive + (len(engine.gradients._in_flight) if zero == 2 else 0))

    for parameter in parts.stages[0].parameters():
        parameter.register_post_accumulate_grad_hook(count)
    batch = micro_batches("llama", 0, layout, mesh.data.rank, mesh.data.size)
    forward_backward(parts, batch, mesh, SEED)
    return most, len(engine.buckets)


def test_zero_2_never_holds_all_gradients() -> None:
    """What stage 2 is for. Norm weights share a bucket that is only full at the end, and up to 3
    more are on their way."""
    most, buckets = run_ranks(2, whole_gradients_alive, 2)[0]
    assert buckets > 8
    assert most <= 5
    most, buckets = run_ranks(2, whole_gradients_alive, 1)[0]
    assert most == buckets
