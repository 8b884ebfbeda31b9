"""config.json is a closed world: whatever a key says is computed as transformers computes it, or
refused; and whatever megalite can build, transformers opens."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.tensors import CheckpointError
from megalite.config import ModelConfig
from megalite.errors import ConfigError
from megalite.infer.generate import load_model
from megalite.models import (
    build_model,
    family,
    from_hf_config,
    model_config,
    set_parameters,
    to_hf_config,
    weight_table,
)
from megalite.models.hf import REQUIRED
from megalite.models.layers import Decoder
from megalite.models.sharding import read_local
from megalite.models.weights import Weight
from megalite.registry import families
from tiny_models import (
    CASES,
    LLAMA3_ROPE,
    LONG,
    MASKED,
    SEQ2SEQ,
    as_stored,
    auto_class,
    our_logits,
    randomize,
    their_logits,
)

transformers = pytest.importorskip("transformers")

LENGTH = 40
BASES = {name: CASES[name] | {"num_hidden_layers": 3} for name in families.own} | {
    "smollm3": CASES["smollm3"] | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "gemma3_text": CASES["gemma3_text"]
    | {"num_hidden_layers": 3, "layer_types": None, "sliding_window_pattern": 3},
    "qwen2": CASES["qwen2-window"] | {"num_hidden_layers": 3},
    "qwen3": CASES["qwen3-window"] | {"num_hidden_layers": 3, "max_window_layers": 1},
    **{name: CASES[name] | {"num_layers": 3} for name in SEQ2SEQ},
    # A third layer, whose output no norm bounds, would bring the rounding of fp32 above the bound
    # of logits.
    "gemma": CASES["gemma"],
    "gpt2": {key: value for key, value in CASES["gpt2"].items() if key != "n_layer"}
    | {"n_layer": 3},
    **{
        name: CASES[name]
        | {"num_hidden_layers": 3, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]}
        for name in ("ministral", "olmo3")
    },
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPES: list[Any] = [
    LLAMA3_ROPE,
    LINEAR,
    LINEAR | {"rope_theta": 77.0},
    {"type": "linear", "factor": 2.0},
    {"rope_type": "linear", "type": "default", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 77.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "proportional", "rope_theta": 77.0, "partial_rotary_factor": 0.5},
    LONG,
    LONG | {"original_max_position_embeddings": 16, "partial_rotary_factor": 1.0},
    LONG | {"original_max_position_embeddings": 16, "factor": 8.0},
    LONG | {"original_max_position_embeddings": 16, "attention_factor": 1.5},
    LLAMA3_ROPE | {"factor": 2.0},
    LLAMA3_ROPE | {"low_freq_factor": 1.0},
    LLAMA3_ROPE | {"high_freq_factor": 8.0},
    LLAMA3_ROPE | {"original_max_position_embeddings": 32},
    {key: LLAMA3_ROPE[key] for key in LLAMA3_ROPE if key != "original_max_position_embeddings"},
    {"full_attention": LINEAR | {"rope_theta": 77.0}},
    {"sliding_attention": LINEAR | {"rope_theta": 77.0}},
    {"sliding_attention": {"rope_type": "default", "rope_theta": 77.0}},
    {"full_attention": LLAMA3_ROPE, "sliding_attention": {"rope_theta": 77.0}},
    {"sliding_attention": {"rope_type": "llama3"} | LLAMA3_ROPE},
    {"sliding_attention": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"full_attention": None},
]
SLIDING, FULL = "sliding_attention", "full_attention"
VALUES: dict[str, list[Any]] = {
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "layer_types": [[FULL, SLIDING, FULL], [SLIDING] * 3, [FULL] * 3, [FULL], None],
    "sliding_window": [None, 1, 5, 64],
    "sliding_window_pattern": [1, 2, 6],
    "mlp_only_layers": [None, [0], [1, 2], [0, 1, 2], [3], ["x"]],
    "no_rope_layers": [None, [0, 1, 1], [1, 1, 1, 0], [0]],
    "id2label": [{"0": "a", "1": "b", "2": "c"}],
    "label2id": [{"a": 0}],
    "problem_type": ["regression"],
    "per_layer_config": [{"1": {"sliding_window": 3}}, {"1": {"intermediate_size": 24}}, {}],
    "architectures": [["GPT2Model"], None],
    "eos_token_id": [None, 1, [1, 2]],
    "pad_token_id": [None, 3, -1, 98, 99, 32000],
    "head_dim": [None, 4, 6, 8, 16],
    "num_key_value_heads": [None, 1, 2, 4],
    "num_attention_heads": [1, 2, 3, 8],
    "hidden_size": [24, 36, 64],
    "n_embd": [24, 64],
    "partial_rotary_factor": [0.5, 0.25, 1.0],
    "hidden_act": ["gelu", "relu", "silu", "gelu_new", "gelu_pytorch_tanh", "gelu_fast"],
    "dtype": ["float32", "bfloat16"],
    "feed_forward_proj": ["relu", "gelu", "gated-gelu", "gated-silu"],
}
EVERYWHERE: dict[str, list[Any]] = {
    "is_causal": [False, None],
    "attention_chunk_size": [4],
    "rope_theta": [77, 1e6],
    "rotary_emb_base": [77],
    "rotary_pct": [0.5],
    "rope_local_base_freq": [77.0],
    "original_max_position_embeddings": [16, 32, None],
    "max_window_layers": [0, 2, 28],
    "use_sliding_window": [True, False],
    "use_bidirectional_attention": [True],
    "tie_last_hidden_states": [True],
    "num_labels": [3],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}],
    "hidden_act": ["relu"],
    "max_position_embeddings": [32],
    "num_hidden_layers": [2],
    "n_ctx": [32],
    "no_rope_layer_interval": [2],
    "attn_logit_softcapping": [2.0],
    "final_logit_softcapping": [2.0],
    "query_pre_attn_scalar": [7],
    "qk_layernorm": [True],
    "num_experts": [2],
    "norm_topk_prob": [True, False],
    "scale_decoder_outputs": [True, False, None],
}
EVERYWHERE |= {
    key: VALUES[key]
    for key in ("rope_scaling", "layer_types", "head_dim", "sliding_window_pattern")
}
"""Keys that are no field of every family's class, and what may be said of them."""


def other_values(name: str, usual: Any) -> list[Any]:
    """Legal values of a field of transformers' config class."""
    if name in VALUES:
        return VALUES[name]
    if isinstance(usual, bool) or name.startswith(("use_", "is_")):
        return [True, False]
    if isinstance(usual, int):
        return [*{3, max(usual // 2, 1), 2 * usual}]
    if isinstance(usual, float):
        return [0.1, 0.5, 2.0 * usual, None]
    return {"str": ["relu", "x"], "list": [["x"]]}.get(type(usual).__name__, [None, 3, 2.0, "x"])


@functools.cache
def base_of(name: str) -> dict[str, Any]:
    """A config.json as transformers writes it."""
    return json.loads(
        transformers.AutoConfig.for_model(**BASES[name]).to_json_string(use_diff=False)
    )


def changes() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every family's config.json with one key changed: (family, what is other, config.json)"""
    for name in families.own:
        base, fields = base_of(name), dataclasses.fields(transformers.CONFIG_MAPPING[name])
        keys = {field.name: [*other_values(field.name, base.get(field.name))] for field in fields}
        for key, values in EVERYWHERE.items():
            known = keys.setdefault(key, [])
            known += [value for value in values if value not in known]
        older = {key: value for key, value in base.items() if key != "rope_parameters"}
        for key, value in ((key, value) for key, values in keys.items() for value in values):
            if key not in base or base[key] != value:
                yield name, f"{key} = {value}", base | {key: value}
                if (
                    key.startswith(("rope", "rotary", "partial", "original"))
                    and key != "rope_parameters"
                ):
                    yield name, f"{key} = {value}, without rope_parameters", older | {key: value}


def ours_with(weights: dict[str, Tensor], config: ModelConfig) -> Decoder:
    """Our model with the weights of transformers'."""
    found = as_stored(config.family, weights)

    def rows(weight: Weight, low: int, high: int, columns: tuple[int, int] | None) -> Tensor:
        return weight.rows_from_hf(lambda name, where: found[name][where], low, high, columns)

    model = build_model(config)
    parameters = {
        weight.name: nn.Parameter(
            read_local(weight, rows, 0, 1, 0, weight.numel).view(weight.shape)
        )
        for weight in weight_table(config)
    }
    set_parameters(model, parameters)
    return model.eval()


def tokens_for(config: ModelConfig) -> Tensor:
    tokens = torch.randint(
        0, config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(1)
    )
    # RoBERTa counts no positions of tokens with the id of padding.
    return tokens.masked_fill(tokens == 1, 0)[:, : config.max_positions]


def verdict(values: dict[str, Any]) -> str:
    """What becomes of a config.json: refused, not legal for transformers either, equal, or off by
    so much."""
    try:
        config = model_config(from_hf_config(copy.deepcopy(values)))
    except ConfigError as error:
        return f"refused: {error}"
    tokens = tokens_for(config)
    torch.manual_seed(0)
    try:
        their_config = transformers.CONFIG_MAPPING[config.family].from_dict(copy.deepcopy(values))
        theirs = (
            auto_class(config.family)
            .from_config(their_config, attn_implementation="eager", dtype=torch.float32)
            .eval()
        )
        randomize(theirs)
        with torch.no_grad():
            wanted = their_logits(theirs, tokens)
    except Exception as error:  # whatever its checks and its modules raise
        return f"not legal: {error!r}"
    with torch.no_grad():
        worst = (
            (our_logits(ours_with(theirs.state_dict(), config), tokens) - wanted).abs().max().item()
        )
    return "equal" if worst <= 1e-4 else f"off by {worst:.2g}"  # the project's bound


def sampled(cases: list[Any], config: pytest.Config, share: int) -> list[Any]:
    """All of them with --whole, else one in `share`."""
    return (
        cases
        if config.getoption("--whole")
        else random.Random(5).sample(cases, len(cases) // share)
    )


def test_every_key_is_computed_as_transformers_does_or_refused(pytestconfig: pytest.Config) -> None:
    """A key that is passed over; one fact in two places, of which megalite and transformers take
    different ones."""
    found = {
        (name, what): verdict(values)
        for name, what, values in sampled([*changes()], pytestconfig, 40)
    }
    wrong = {case: said for case, said in found.items() if said.startswith("off")}
    assert not wrong
    kinds = Counter(said.partition(":")[0] for said in found.values())
    # Of all, 4 in 100 are not legal; of the 75 that are drawn, chance can make it 7.
    assert kinds["not legal"] < 0.1 * len(found), "the sweep tries something"
    assert kinds["equal"] > 0.3 * len(found), "the sweep tries something"
    for (name, what), said in found.items():
        if what.partition(" = ")[0] in family(name).KEYS.neutral:
            assert not said.startswith("refused"), (name, what, said)


FIELDS: dict[str, list[Any]] = {
    "vocab_size": [2, 50, 99],
    "hidden_size": [8, 24, 24, 30, 32, 48],
    "intermediate_size": [16, 40],
    "num_layers": [1, 2, 3],
    "num_attention_heads": [1, 2, 2, 3, 4],
    "num_kv_heads": [0, 0, 1, 2, 3],
    "head_dim": [0, 0, 4, 5, 6, 12],
    "max_positions": [9, 20, 64],
    "norm_eps": [1e-6, 1e-3, 1],
    "init_std": [0.02, 0.5, 1, 3.5],
    "attention_bias": [False, True],
    "mlp_bias": [False, True],
    "use_bias": [False, True],
    "norms": [1, 2],
    "embedding_multiplier": [0.5, 3],
    "attention_multiplier": [0.2, 1],
    "residual_multiplier": [0.3, 1.5],
    "logits_scaling": [0.5, 4],
    "tie_embeddings": [False, True],
    "rope_theta": [1, 500, 1e6],
    "local_rope_theta": [1, 500.0],
    "rope_scaling": [
        None,
        {"type": "linear", "factor": 4},
        {"type": "linear", "factor": 0.5},
        {"type": "llama3", "factor": 4.5, "original_max_positions": 16},
        {"factor": 4, "low_freq_factor": 2, "high_freq_factor": 3, "original_max_positions": 16},
        {"factor": 4, "low_freq_factor": 4, "high_freq_factor": 4},
        {"type": "longrope", "original_max_positions": 16},
        {"type": "longrope", "original_max_positions": 16},
        {
            "type": "yarn",
            "factor": 4,
            "original_max_positions": 16,
            "beta_fast": 2,
            "beta_slow": 0.5,
        },
        {
            "type": "yarn",
            "factor": 1.5,
            "original_max_positions": 6,
            "attention_factor": 2,
            "truncate": False,
        },
        {"type": "dynamic", "factor": 4, "original_max_positions": 16},
        {"type": "dynamic", "factor": 2.5, "original_max_positions": 8},
    ],
    "sliding_window": [None, 1, 7, 7, 100],
    "layer_types": [None, [FULL], [SLIDING], [FULL, SLIDING]],
    "query_pre_attn_scalar": [0, 12, 20.0, 12.5],
    "logit_softcap": [None, 3, 30.0],
    "attention_softcap": [None, 3, 30.0],
    "rotary_pct": [0.25, 0.3, 0.5, 1],
    "partial_rotary_factor": [0.5, 0.75, 1],
    "parallel_residual": [False, True],
    "tanh_gelu": [False, True],
    "token_types": [1, 2],
    "nope_layers": [None, [], [0], [0, 1], [2]],
    "num_experts": [2, 3, 5],
    "experts_per_token": [1, 2, 2, 3],
    "router_aux_loss_coef": [0, 0.01],
    "moe_intermediate_size": [8, 12],
    "shared_expert_intermediate_size": [8, 20],
    "n_shared_experts": [1, 2],
    "n_group": [1, 1, 2],
    "topk_group": [1, 1, 1, 2],
    "routed_scaling_factor": [1, 2.5],
    "first_k_dense_replace": [0, 1],
    "kv_lora_rank": [6, 12],
    "q_lora_rank": [None, 8],
    "qk_nope_head_dim": [4, 10],
    "qk_rope_head_dim": [2, 2, 4, 6, 6, 5],
    "v_head_dim": [4, 8],
    "rope_interleave": [False, True],
    "norm_topk_prob": [False, True],
    "decoder_sparse_step": [1, 2],
    "mlp_only_layers": [[], [0], [1]],
    "embedding_dropout": [0, 0.5],
    "attention_dropout": [0, 0.5],
    "hidden_dropout": [0, 0.5],
    "task": ["causal", "causal", "causal", "classification", "labels"],
    "encoder_layers": [1, 1, 2],
    "feed_forward": ["relu", "gated-gelu"],
    "scale_head": [False, False, True],
    "relative_buckets": [8, 32],
    "relative_distance": [12, 17, 20, 128],
    "dropout": [0, 0.5],
}
NEEDED = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "max_positions",
    "intermediate_size",
    "sliding_window",
    "num_experts",
    "experts_per_token",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "encoder_layers",
)


NARROW: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_kv_heads": 0, "head_dim": 0, "rope_scaling": None},
    "modernbert": {"num_kv_heads": 0, "head_dim": 0, "rope_scaling": None, "tie_embeddings": True},
}
"""What most models of families have that would refuse nearly all others."""


def random_models(count: int) -> Iterator[dict[str, Any]]:
    """`model:` sections of all families in turn."""
    draw = random.Random(8)
    for number in range(count):
        name = families.own[number % len(families.own)]
        known = family(name).CONFIG.model_fields.keys() & FIELDS.keys()
        chosen = {
            key: copy.copy(draw.choice(FIELDS[key]))
            for key in sorted(known)
            if key in NEEDED or draw.random() < 0.4
        }
        if name in NARROW and draw.random() < 0.9:
            chosen |= NARROW[name]
        if chosen.get("layer_types"):
            chosen["layer_types"] = [
                draw.choice(chosen["layer_types"]) for _ in range(chosen["num_layers"])
            ]
        if (chosen.get("rope_scaling") or {}).get("type") == "longrope":
            share = (
                chosen.get("rotary_pct")
                or chosen.get("partial_rotary_factor")
                or {"gpt_neox": 0.25, "phi": 0.5}.get(name, 1)
            )
            size = chosen.get("head_dim") or chosen["hidden_size"] // chosen["num_attention_heads"]
            pairs = range(1, int(size * share) // 2 + 1)
            chosen["rope_scaling"] |= {
                "short_factor": [1.5] * len(pairs),
                "long_factor": [2.0 * n for n in pairs],
            }
        if chosen.get("task") == "causal" or name in SEQ2SEQ:
            chosen.pop("task", None)  # the family's own
        labels = ["a", "b", "c"] if "task" in chosen else []
        yield {"family": name, "labels": labels, **chosen}


AUTO = {
    "causal": "CausalLM",
    "masked": "MaskedLM",
    "seq2seq": "Seq2SeqLM",
    "classification": "SequenceClassification",
    "labels": "TokenClassification",
}


def export_of(config: ModelConfig, model: nn.Module, folder: Path) -> nn.Module:
    """transformers' model, opened from what megalite writes."""
    folder.mkdir()
    parameters, tensors = dict(model.named_parameters()), dict[str, Tensor]()
    for weight in weight_table(config):
        tensors |= weight.to_hf(parameters[weight.name].detach())
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    auto = getattr(transformers, f"AutoModelFor{AUTO[config.task]}")
    theirs, report = auto.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not any(report.values()), report
    return theirs.eval()


def test_whatever_megalite_builds_opens_in_transformers_and_is_the_same(
    tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """A shape or a setting that is found to be unknown to transformers only when the trained model
    is to be opened."""
    accepted = Counter[str]()
    for number, values in enumerate(
        random_models(3000 if pytestconfig.getoption("--whole") else 220)
    ):
        try:
            config = model_config(copy.deepcopy(values))
        except ConfigError:
            continue
        accepted[config.family] += 1
        torch.manual_seed(0)
        model = build_model(config).eval()
        set_parameters(
            model, {w.name: nn.Parameter(torch.empty(w.shape)) for w in weight_table(config)}
        )
        randomize(model)
        theirs, tokens = export_of(config, model, tmp_path / str(number)), tokens_for(config)
        with torch.no_grad():
            found = our_logits(model, tokens)
            wanted = their_logits(theirs, tokens[:1]), their_logits(theirs, tokens[1:])
        if config.task == "classification":  # which transformers tells at one token alone
            found = found[:, 0 if config.CLASS_AT == "first" else -1]
        assert (found - torch.cat(wanted)).abs().max().item() <= 1e-4, values  # the project's bound
        again = model_config(
            from_hf_config(json.loads((tmp_path / str(number) / "config.json").read_text()))
        )
        assert to_hf_config(again) == to_hf_config(config), values
    assert min(accepted[name] for name in families.own) >= 1, "each family is tried"


def opens(name: str, **keys: Any) -> ModelConfig:
    return model_config(from_hf_config(copy.deepcopy(base_of(name)) | keys))


@pytest.mark.parametrize("name", families.own)
def test_every_field_of_transformers_is_declared(name: str) -> None:
    """A field that a new version of transformers brings, and that nobody here has thought about."""
    keys = family(name).KEYS
    declared = keys.used.keys() | keys.only.keys() | keys.neutral.keys()
    assert {
        field.name for field in dataclasses.fields(transformers.CONFIG_MAPPING[name])
    } <= declared
    assert len(keys.used) + len(keys.only) + len(keys.neutral) == len(declared), (
        "each key in one way"
    )


@pytest.mark.parametrize("name", families.own)
def test_a_key_that_is_left_out_is_what_transformers_takes_for_it(name: str) -> None:
    theirs = transformers.CONFIG_MAPPING[name]()
    for field in dataclasses.fields(theirs):
        usual = family(name).KEYS.used.get(field.name)
        if usual is not None and usual is not REQUIRED:
            assert usual == field.default, field.name


PUBLISHED: dict[str, dict[str, Any]] = {
    "llama": {
        "_name_or_path": "x/y", "architectures": ["LlamaForCausalLM"], "is_llama_config": True, "pretraining_tp": 1,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": True, "unsloth_fixed": True,
        "unsloth_version": "2025.1", "max_sequence_length": 4096, "_attn_implementation_autoset": True,
        "quantization_config": None, "tokenizer_class": "LlamaTokenizer",
    },
    "granite": {
        "attention_bias": False, "attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 8.0,
        "mlp_bias": False, "residual_multiplier": 0.22, "rope_scaling": None,
    },
    "ministral": {"sliding_window": 7, "attention_dropout": 0.0, "rope_scaling": None},
    "olmo3": {"attention_bias": False, "rope_scaling": None, "rope_theta": 500000, "sliding_window": 7},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None, "rope_scaling": None, "attention_bias": False},
    "starcoder2": {
        "activation_function": "gelu", "attention_dropout": 0.1, "embedding_dropout": 0.1, "residual_dropout": 0.1,
        "attention_softmax_in_fp32": True, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
        "layer_norm_epsilon": 1e-5, "mlp_type": "default", "norm_type": "layer_norm", "use_bias": True,
    },
    "phi": {
        "attention_dropout": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "qk_layernorm": False, "rope_scaling": None,
        "partial_rotary_factor": 0.5,
    },
    "falcon": {
        "alibi": False, "apply_residual_connection_post_layernorm": False, "attention_dropout": 0.0, "bias": False,
        "hidden_dropout": 0.0, "multi_query": True, "new_decoder_architecture": False, "parallel_attn": True,
        "auto_map": {"AutoConfig": "configuration_falcon.FalconConfig"},
    },
    "mistral": {"sliding_window": None, "_flash_attn_2_enabled": True, "torch_dtype": "float16", "temperature": 0.7},
    "qwen2": {
        "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "use_mrope": False,
        "layer_types": None, "attention_bias": True,
    },
    "qwen3": {
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 36, "rope_scaling": None,
        "layer_types": None,
    },
    "mixtral": {"sliding_window": None, "router_jitter_noise": 0.0, "torch_dtype": "bfloat16", "num_local_experts": 5},
    "qwen3_moe": {
        "attention_bias": False, "max_window_layers": 48, "num_experts": 6, "output_router_logits": False,
        "rope_scaling": None, "sliding_window": None, "use_sliding_window": False, "head_dim": 12,
    },
    "qwen2_moe": {
        "max_window_layers": 21, "num_experts": 5, "output_router_logits": False, "sliding_window": 32768,
        "use_sliding_window": False, "decoder_sparse_step": 1,
    },
    "gpt_oss": {
        "experts_per_token": 2, "initial_context_length": 4096, "swiglu_limit": 7.0, "router_aux_loss_coef": 0.9,
        "output_router_logits": False,
    },
    "olmoe": {
        "attention_bias": False, "clip_qkv": None, "output_router_logits": False, "rope_scaling": None,
        "router_aux_loss_coef": 0.01, "eos_token_id": 97, "pad_token_id": 1,
    },
    "deepseek_v3": {
        "attention_bias": False, "aux_loss_alpha": 0.001, "ep_size": 1, "moe_layer_freq": 1, "pretraining_tp": 1,
        "num_nextn_predict_layers": 1, "scoring_func": "sigmoid", "seq_aux": True, "topk_method": "noaux_tc",
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    },
    "smollm3": {"max_window_layers": 28, "pretraining_tp": 2, "sliding_window": None, "use_sliding_window": False},
    "phi3": {
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "attention_bias": False, "full_attn_mod": 1,
        "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
    },
    "olmo2": {"rope_scaling": None, "attention_bias": False, "pad_token_id": 98, "eos_token_id": 97},
    "gemma2": {
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
        "sliding_window_size": 7,
    },
    "gemma3_text": {
        "cache_implementation": "hybrid", "rope_local_base_freq": 10000.0, "rope_theta": 1000000, "rope_scaling": None,
        "_sliding_window_pattern": 6, "attn_logit_softcapping": None, "use_bidirectional_attention": False,
    },
    "gpt2": {
        "n_ctx": 64, "summary_type": "cls_index", "summary_first_dropout": 0.1, "_num_labels": 1, "output_past": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "id2label": {"0": "LABEL_0"}, "gradient_checkpointing": False, "n_special": 0, "predict_special_tokens": True,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"], "gradient_checkpointing": False, "position_embedding_type": "absolute",
        "classifier_dropout": None, "use_cache": True, "directionality": "bidi", "pooler_fc_size": 768,
        "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
        "pooler_type": "first_token_transform",
    },
    "modernbert": {
        "architectures": ["ModernBertForMaskedLM"], "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
        "local_rope_theta": 10000.0, "layer_norm_eps": 1e-5, "position_embedding_type": "absolute",
        "classifier_pooling": "mean", "reference_compile": None, "repad_logits_with_grad": False,
        "gradient_checkpointing": False, "deterministic_flash_attn": False, "rope_scaling": None,
    },
    "roberta": {
        "architectures": ["RobertaForMaskedLM"], "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
        "layer_norm_eps": 1e-5, "type_vocab_size": 1,
    },
    "t5": {
        "architectures": ["T5WithLMHeadModel"], "n_positions": 512, "output_past": True, "decoder_start_token_id": 0,
        "task_specific_params": {"summarization": {"num_beams": 4, "prefix": "summarize: "}},
    },
    "mt5": {
        "tie_word_embeddings": False, "tokenizer_class": "T5Tokenizer", "output_past": True, "is_gated_act": True,
        "dense_act_fn": "gelu_new", "decoder_start_token_id": 0,
    },
    "gpt_neox": {
        "attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0, "classifier_dropout": 0.1,
        "rotary_emb_base": 500, "rotary_pct": 0.5, "rope_scaling": None,
        "custom_pipelines": {"text-generation": {"impl": "instruct.Pipeline"}},
    },
}  # fmt: skip
"""Keys beside transformers' own in files as their makers published them."""


def test_names_that_stand_for_none_say_nothing_of_classes() -> None:
    numbers = {"LABEL_0": 0, "LABEL_1": 1}
    keys = {"architectures": CLASSIFIER, "id2label": {"0": "ham", "1": "spam"}, "label2id": numbers}
    assert opens("llama", **keys).labels == ("ham", "spam")


@pytest.mark.parametrize("name", families.own)
def test_what_was_published_opens(name: str) -> None:
    assert opens(name, **PUBLISHED[name]).family == name


YARN = {"rope_type": "yarn", "factor": 4.0}
CLASSIFIER = ["LlamaForSequenceClassification"]


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("llama", {"rope_scaling": YARN, "rope_parameters": LLAMA3_ROPE}, "'yarn'.*'llama3'"),
        ("llama", {"rope_theta": 5e5}, r"rope_theta = 500000\.0, but rope_parameters\.rope_theta = 10000\.0"),
        ("llama", {"rope_parameters": LLAMA3_ROPE, "original_max_position_embeddings": 32}, "= 16, but .* = 32"),
        ("phi3", {"rope_parameters": LONG | {"original_max_position_embeddings": 3}}, "embeddings = 3, but .* = 4096"),
        ("gpt_neox", {"rotary_emb_base": 77}, r"rotary_emb_base = 77, but rope_parameters\.rope_theta = 500\.0"),
        ("gpt_neox", {"rope_parameters": None, "rotary_emb_base": 5, "rope_theta": 6}, "rope_theta = 6, but .* = 5"),
        ("gpt_neox", {"rope_parameters": None, "rope_theta": 600}, "rope_theta = 600, but rotary_emb_base left out"),
        ("gpt_neox", {"rotary_pct": 0.25}, "rotary_pct = 0.25, but .*partial_rotary_factor = 0.5"),
        ("gemma3_text", {"rope_local_base_freq": 77.0}, "rope_local_base_freq = 77.0, but .* = 10000.0"),
        ("gemma3_text", {"sliding_window_pattern": 2}, "layer_types = .*, but sliding_window_pattern = 2"),
        ("gemma2", {"sliding_window_size": 8}, "sliding_window_size = 8, but sliding_window = 7"),
        ("qwen2", {"max_window_layers": 2}, "layer_types = .*, but max_window_layers = 2"),
        ("qwen3", {"use_sliding_window": False}, "layer_types = .*, but use_sliding_window = False"),
        ("smollm3", {"no_rope_layer_interval": 3}, r"no_rope_layers = \[1, 0, 1\], but no_rope_layer_interval = 3"),
        ("qwen3_moe", {"num_experts": 5}, "num_local_experts = 6, but num_experts = 5"),
        ("gpt2", {"hidden_size": 64}, "hidden_size = 64, but n_embd = 32"),
        ("gpt2", {"n_ctx": 32}, "n_ctx = 32, but n_positions = 64"),
        (
            "llama",
            {"architectures": CLASSIFIER, "id2label": {"0": "a", "1": "b"}, "label2id": {"a": 1}},
            "id2label = .*'b'.*, but label2id = .*'a': 1",
        ),
        ("llama", {"architectures": CLASSIFIER, "num_labels": 3}, "but num_labels = 3"),
    ],
)  # fmt: skip
def test_one_fact_in_two_places_is_refused_with_both(
    name: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=rf"says two things of one: .*{words}"):
        opens(name, **keys)


@pytest.mark.parametrize(
    ("name", "keys", "words"),
    [
        ("mixtral", {"num_local_experts": 10**6}, "num_experts = 1000000"),
        ("llama", {"architectures": CLASSIFIER, "num_labels": 10**6}, "num_labels = 1000000, more than"),
    ],
)  # fmt: skip
def test_a_damaged_number_is_refused_before_so_many_things_are_named(
    name: str, keys: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        opens(name, **keys)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("mistral", "layer_types", [FULL, SLIDING, FULL]),
        *(
            (name, "is_causal", value)
            for name in families.own
            if name not in MASKED
            for value in (False, None)
        ),
        *((name, key, True) for name in MASKED for key in ("is_causal", "is_decoder")),
        *(
            ("llama", key, 2)
            for key in (
                "qk_norm",
                "embedding_multiplier",
                "clipQkv",
                "num_experts",
                "logits_scaling",
            )
        ),
        ("qwen2", "dual_chunk_attention_config", {"chunk_size": 8}),
        ("llama", "per_layer_config", {"1": {"intermediate_size": 24}}),
        ("gpt_neox", "alibi", True),
    ],
)
def test_a_key_that_says_what_to_compute_is_refused_by_name(
    name: str, key: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=rf"config\.json has {key} = "):
        opens(name, **{key: value})


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 77.0, "rope_type": "linear"}, {"partial_rotary_factor": 0.5}], ids=str
)
def test_gemma_3_reads_all_of_what_turns_windowed_layers(rope: dict[str, Any]) -> None:
    ropes = base_of("gemma3_text")["rope_parameters"]
    with pytest.raises(ConfigError, match=r"rope_parameters\.sliding_attention\."):
        opens("gemma3_text", rope_parameters=ropes | {SLIDING: ropes[SLIDING] | rope})


@pytest.mark.parametrize(
    ("kind", "close"),
    [
        ("ministral3", "ministral"),
        ("olmo_hybrid", None),
        ("deepseek_v2", "deepseek_v3"),
        ("gemma4", "gemma"),
        (4711, None),
    ],
)
def test_an_unknown_architecture_is_told_the_nearest_as_another_one(
    kind: Any, close: str | None
) -> None:
    with pytest.raises(
        ConfigError, match=rf"model_type = '{kind}', which megalite does not open.*; known: bert, "
    ) as found:
        from_hf_config({"model_type": kind})
    assert "did you mean" not in str(found.value)
    nearest = f"nearest in name is '{close}', another architecture"
    assert (nearest in str(found.value)) if close else ("nearest" not in str(found.value))


@pytest.mark.parametrize("kind", ["deberta", "deberta-v2", "bart", "mbart"])
def test_architectures_that_are_left_out_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=f"model_type = '{kind}', which megalite does not open: (its|of) "
    ):
        from_hf_config({"model_type": kind})


@pytest.mark.parametrize("name", families.own)
def test_what_is_written_says_each_fact_once(name: str) -> None:
    """YaRN that somebody adds to an export under its older name, while megalite goes on reading the
    newer one."""
    written = to_hf_config(opens(name))
    if "rope_scaling" in written:
        assert "rope_parameters" not in written
        added = written | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
        if name in ("phi3", "gemma3_text", "modernbert"):
            with pytest.raises(ConfigError, match=r"rope_.* 'yarn'"):
                from_hf_config(added)
        else:
            original = {"original_max_positions": written["max_position_embeddings"]}
            assert (
                from_hf_config(added)["rope_scaling"] == {"type": "yarn", "factor": 4.0} | original
            )
    else:
        assert name in ("gpt2", "bert", "roberta", *SEQ2SEQ)


@pytest.mark.parametrize("name", ["qwen2", "phi3", "gpt2", "gemma3_text"])
def test_a_converted_model_keeps_what_was_read(name: str, tmp_path: Path) -> None:
    stored = copy.deepcopy(base_of(name)) | PUBLISHED[name]
    their_config = transformers.CONFIG_MAPPING[name].from_dict(copy.deepcopy(stored))
    transformers.AutoModelForCausalLM.from_config(their_config).save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "config.json").write_text(json.dumps(stored))
    write_model(open_source(tmp_path / "source"), tmp_path / "copy")
    copied = transformers.AutoConfig.from_pretrained(tmp_path / "copy").to_dict()
    own = ("auto_map", "_name_or_path", "transformers_version", "dtype", "architectures")
    wanted = transformers.AutoConfig.from_pretrained(tmp_path / "source").to_dict()
    assert {key: copied.get(key) for key in wanted if key not in own} == {
        key: value for key, value in wanted.items() if key not in own
    }
    assert "auto_map" not in json.loads((tmp_path / "copy" / "config.json").read_text())


def test_a_model_beside_the_index_of_another_is_refused(tmp_path: Path) -> None:
    """transformers takes the one file, megalite took those of the index."""
    config = transformers.AutoConfig.for_model(**CASES["llama"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    load_model(tmp_path)
    model.save_pretrained(tmp_path / "one")
    (tmp_path / "one" / "model.safetensors").rename(tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError,
        match=r"two models: model\.safetensors, and the files that model.*index\.json lists",
    ):
        load_model(tmp_path)
