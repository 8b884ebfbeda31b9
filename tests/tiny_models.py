"""Configs of two-layer Hugging Face models, a few for each family: what
`transformers.AutoConfig.for_model` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

from megalite.models.layers import SequenceInfo, Source

PROJECTIONS = {"mixtral": ("w1", "w3", "w2")}
"""What an expert's gate, up and down are called in files, by family; elsewhere they are these."""
GATE_UP_DOWN = ("gate_proj", "up_proj", "down_proj")
IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "model_type": "gpt2", "vocab_size": 99, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, **IDS
}  # fmt: skip
NEOX: dict[str, Any] = {
    "model_type": "gpt_neox", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
GROUPED = LLAMA | {"num_key_value_heads": 2}
QWEN2 = GROUPED | {"model_type": "qwen2"}
QWEN3 = GROUPED | {"model_type": "qwen3", "head_dim": 12}
# Without the balance loss, which transformers adds in another form and only where it is asked for.
MIXTRAL = GROUPED | {
    "model_type": "mixtral", "num_local_experts": 5, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0,
}  # fmt: skip
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3,
    "router_aux_loss_coef": 0.0,
}  # fmt: skip
QWEN2_MOE = GROUPED | {
    "model_type": "qwen2_moe", "moe_intermediate_size": 24, "shared_expert_intermediate_size": 20, "num_experts": 5,
    "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0,
}  # fmt: skip
OLMOE = LLAMA | {
    "model_type": "olmoe", "num_experts": 6, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.0,
}  # fmt: skip
GPT_OSS = GROUPED | {
    "model_type": "gpt_oss", "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 7,
    "router_aux_loss_coef": 0.0,
}  # fmt: skip
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3", "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": 20,
    "kv_lora_rank": 12, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 8, "num_nextn_predict_layers": 0,
}  # fmt: skip
GEMMA2 = GROUPED | {
    "model_type": "gemma2", "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 7,
    "attn_logit_softcapping": 3.0, "final_logit_softcapping": 6.0,
}  # fmt: skip
GEMMA3 = GROUPED | {
    "model_type": "gemma3_text", "head_dim": 12, "query_pre_attn_scalar": 20, "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
# Sequences of 32 and 40 go past the original 16 positions, and a head's six frequencies fall into
# all three bands.
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 2.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 500.0, "partial_rotary_factor": 0.75, "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [1.0, 3.0, 5.0],
}  # fmt: skip
YARN_ROPE = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 2.0,
    "beta_slow": 0.25, "truncate": True,
}  # fmt: skip
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
MODERN: dict[str, Any] = {
    "model_type": "modernbert", "vocab_size": 99, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "local_attention": 14, "cls_token_id": None,
    "sep_token_id": None, **IDS,
}  # fmt: skip
T5: dict[str, Any] = {
    "model_type": "t5", "vocab_size": 99, "d_model": 32, "d_kv": 12, "d_ff": 56, "num_layers": 2,
    "num_decoder_layers": 3, "num_heads": 4, "relative_attention_num_buckets": 16,
    "relative_attention_max_distance": 24, "dropout_rate": 0.0,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OLMO3 = GROUPED | {
    "model_type": "olmo3",
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
}
GRANITE = GROUPED | {
    "model_type": "granite", "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7,
    "logits_scaling": 1.5,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "model_type": "falcon", "vocab_size": 99, "hidden_size": 32, "ffn_hidden_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-biases": GROUPED | {"attention_bias": True, "mlp_bias": True},
    "ministral": GROUPED | {
        "model_type": "ministral", "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"],
        "head_dim": 12,
    },
    "olmo3": OLMO3,
    "olmo3-yarn": OLMO3 | {
        "rope_parameters": {
            "full_attention": YARN_ROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 100.0}
        },
    },
    "granite": GRANITE,
    "granite-biases": GRANITE | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "gemma": GROUPED | {"model_type": "gemma", "head_dim": 12},
    "starcoder2": GROUPED | {"model_type": "starcoder2", "sliding_window": 7},
    "starcoder2-untied": GROUPED | {
        "model_type": "starcoder2", "use_bias": False, "tie_word_embeddings": False, "hidden_act": "gelu",
        "norm_epsilon": 1e-3, "attention_dropout": 0.1, "residual_dropout": 0.2, "embedding_dropout": 0.3,
    },
    "phi": LLAMA | {
        "model_type": "phi", "attention_dropout": 0.1, "resid_pdrop": 0.2, "embd_pdrop": 0.3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "phi-grouped": GROUPED | {"model_type": "phi", "tie_word_embeddings": True, "hidden_act": "gelu"},
    "falcon": FALCON,
    "falcon-groups": FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "tie_word_embeddings": False},
    "falcon-heads": FALCON | {"multi_query": False, "bias": True, "layer_norm_epsilon": 1e-3},
    "llama-grouped-queries": GROUPED | {"rms_norm_eps": 1e-3},
    "llama-tied": LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "llama-3": LLAMA | {"head_dim": 12, "rope_parameters": LLAMA3_ROPE},
    "llama-yarn": LLAMA | {"head_dim": 12, "rope_parameters": YARN_ROPE},
    "llama-dynamic": LLAMA | {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16},
    "mistral-yarn": GROUPED | {"model_type": "mistral", "rope_parameters": YARN_ROPE | {"truncate": False}},
    "mistral-dynamic": GROUPED | {
        "model_type": "mistral", "rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16
    },
    "qwen2-yarn": QWEN2 | {"rope_parameters": YARN_ROPE | {"attention_factor": 1.5}},
    "qwen2-dynamic": QWEN2 | {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16},
    "qwen3-yarn": QWEN3 | {"rope_parameters": YARN_ROPE | {"mscale": 1.5, "mscale_all_dim": 0.5}},
    "qwen3-dynamic": QWEN3 | {"rope_parameters": DYNAMIC_ROPE, "max_position_embeddings": 16},
    "gpt2": GPT2,
    "gpt2-untied": GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "layer_norm_epsilon": 1e-3},
    "mistral": GROUPED | {"model_type": "mistral", "sliding_window": 7},
    "mistral-whole": GROUPED | {"model_type": "mistral", "sliding_window": None, "head_dim": 12},
    "qwen2": QWEN2,
    "qwen2-window": QWEN2 | {
        "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1, "tie_word_embeddings": True
    },
    "qwen3": QWEN3,
    "qwen3-window": QWEN3 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 0},
    "mixtral": MIXTRAL,
    "mixtral-window": MIXTRAL | {
        "router_aux_loss_coef": 0.02,
        "sliding_window": 7, "head_dim": 12, "num_local_experts": 3, "num_experts_per_tok": 3,
        "tie_word_embeddings": True,
    },
    "qwen3_moe": QWEN3_MOE,
    "qwen3_moe-dense-among": QWEN3_MOE | {
        "norm_topk_prob": True, "mlp_only_layers": [0], "num_experts_per_tok": 2, "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen2_moe": QWEN2_MOE,
    "qwen2_moe-dense-among": QWEN2_MOE | {"norm_topk_prob": True, "decoder_sparse_step": 2},
    "olmoe": OLMOE,
    "olmoe-renormalized": OLMOE | {"num_key_value_heads": 2, "norm_topk_prob": True, "rms_norm_eps": 1e-3},
    "gpt_oss": GPT_OSS | {"rope_parameters": YARN_ROPE | {"truncate": False}},
    "gpt_oss-unscaled": GPT_OSS | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "swiglu_limit": 0.4, "swiglu_alpha": 1.2,
        "layer_types": ["full_attention", "sliding_attention"], "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
    },
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3-ungrouped": DEEPSEEK | {
        "v_head_dim": 20,  # larger than a key
        "q_lora_rank": None, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "norm_topk_prob": False,
        "rope_interleave": False, "rms_norm_eps": 1e-3, "tie_word_embeddings": True,
        "rope_parameters": YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.7},
    },
    "smollm3": GROUPED | {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "phi3": GROUPED | {"model_type": "phi3", "sliding_window": 7},
    "phi3-short": LLAMA | {
        "model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": 50,
    },
    "phi3-long": LLAMA | {
        "model_type": "phi3", "rope_parameters": LONG, "original_max_position_embeddings": 16,
    },
    "olmo2": GROUPED | {"model_type": "olmo2"},
    "gpt_neox": NEOX | {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
    "gpt_neox-serial": NEOX | {"use_parallel_residual": False, "hidden_act": "gelu_new", "tie_word_embeddings": True},
    "gemma2": GEMMA2,
    "gemma2-uncapped": GEMMA2 | {
        "attn_logit_softcapping": None, "final_logit_softcapping": None, "query_pre_attn_scalar": 20
    },
    "gemma3_text": GEMMA3,
    "gemma3_text-linear": GEMMA3 | {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
    "bert": BERT,
    "bert-tanh": BERT | STILL | {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3, "type_vocab_size": 1},
    "modernbert": MODERN,
    "modernbert-types": MODERN | {
        "layer_types": ["sliding_attention", "full_attention"], "local_attention": 6, "norm_eps": 1e-3,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "roberta": BERT | STILL | {
        "model_type": "roberta", "layer_norm_eps": 1e-5, "type_vocab_size": 1, "max_position_embeddings": 66,
        "pad_token_id": 1,
    },
    "mt5": T5 | {"model_type": "mt5", "d_kv": 6, "num_layers": 3, "num_decoder_layers": 2},
    "t5": T5 | {"dropout_rate": 0.1},
    "t5-gated": T5 | {
        "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3,
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 20,
    },
}  # fmt: skip


MASKED = ("bert", "modernbert", "roberta")
"""Families of encoders, which tell masked tokens."""
SEQ2SEQ = ("mt5", "t5")
"""Families of encoder-decoders."""
OWN_HEAD = ("mt5", "t5-gated")
"""Cases of these whose head is not the embedding, as published; transformers 5 ties it where none
is loaded."""


def auto_class(family: str) -> Any:
    """transformers' class that builds a model of a family, with the head that predicts tokens."""
    import transformers

    if family in SEQ2SEQ:
        return transformers.AutoModelForSeq2SeqLM
    return (
        transformers.AutoModelForMaskedLM if family in MASKED else transformers.AutoModelForCausalLM
    )


def their_logits(model: Any, tokens: Tensor, **options: Any) -> Tensor:
    """What a model of transformers says of tokens; of an encoder-decoder's target, whose source
    they are, too."""
    if model.config.is_encoder_decoder:
        return model(input_ids=source_of(tokens), decoder_input_ids=tokens, **options).logits
    return model(tokens, **options).logits


def our_logits(model: Any, tokens: Tensor) -> Tensor:
    """The same of ours."""
    if model.config.task != "seq2seq":
        return model(tokens)
    source = Source.whole(source_of(tokens))
    return model(tokens, SequenceInfo.whole(tokens.shape[1], tokens.device, source))


def source_of(tokens: Tensor) -> Tensor:
    """Other tokens, and fewer of them."""
    return tokens.flip(1)[:, : tokens.shape[1] * 3 // 4]


def randomize(model: nn.Module, own_head: bool = False) -> None:
    """Draw all weights, norms and biases too: left at 1 and 0 they could be swapped unseen.
    `own_head`: that of an encoder-decoder, which transformers would tie."""
    if own_head:
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # A bias that all features share would drown what distinguishes tokens behind a
            # post-norm.
            parameter.normal_(
                mean=0.5 * (parameter.dim() == 1 and not name.endswith("bias")), std=0.25
            )
        # By which routers choose experts.
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.05)


def save_model(folder: Path, values: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> Path:
    """Have transformers save a random decoder of `values` in `folder`."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**values)
    )
    randomize(model)
    model.to(dtype).save_pretrained(folder)
    return folder


def size_of(name: str, grads: Mapping[str, Tensor]) -> Tensor:
    """The norm that an error in the gradient `name` is compared with: its own. That of a bias of
    keys is exactly 0 without RoPE, as a softmax does not see what all scores have in common; there
    it is that of the queries'."""
    return grads[name.replace(".key.bias", ".query.bias")].norm()


def as_stored(family: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names, and in the pieces, that lie in files, from those of transformers'
    modules: each expert's apart."""
    found = {}
    for name, tensor in tensors.items():
        if family == "gpt_neox" and name == "lm_head.weight":
            name = "embed_out.weight"
        if family == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        block, experts, which = name.partition(".experts.")
        if not experts or family == "gpt_oss":
            found[name] = tensor
            continue
        gate, up, down = PROJECTIONS.get(family, GATE_UP_DOWN)
        for number, matrix in enumerate(tensor):
            parts = (
                {gate: matrix.chunk(2)[0], up: matrix.chunk(2)[1]}
                if which == "gate_up_proj"
                else {down: matrix}
            )
            found |= {
                f"{block}.experts.{number}.{part}.weight": rows for part, rows in parts.items()
            }
    return found


def make_byte_model(folder: Path, settings: Mapping[str, Any], **more: Any) -> Path:
    """Save a random model of these settings that speaks in bytes, and never ends by itself."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM

    # Weights large enough that its answers vary.
    config = AutoConfig.for_model(
        **{**settings, "vocab_size": 256, "initializer_range": 0.3, **more}
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(letters)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
