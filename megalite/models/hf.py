"""Check what a Hugging Face config.json says, and which tensors are stored beside it. A family
declares each key as used, as supported with one value only, or as neutral; any other key whose name
suggests a computation is refused, so that none that changes it is passed over."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megalite.errors import ConfigError
from megalite.utils.outside import check_regular, read_object, shown

REQUIRED: Any = object()
"""Stands for the usual value of a key that config.json cannot leave out."""
SIZES: Mapping[str, Any] = dict.fromkeys(
    (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "max_position_embeddings",
    ),
    REQUIRED,
)  # fmt: skip
"""Keys that most families use and config.json cannot leave out."""
LARGEST_HEADER = 100_000_000
"""Bytes of the longest header that safetensors reads."""


def _each(reasons: Mapping[str, str]) -> dict[str, str]:
    """Return the reason by key, from a mapping of reasons to their keys."""
    return {key: reason for reason, keys in reasons.items() for key in keys.split()}


NEUTRAL = _each({
    "names and versions": "model_type architectures _name_or_path name_or_path _commit_hash transformers_version "
    "unsloth_version is_llama_config finetuning_task task_specific_params prefix tokenizer_class "
    "transformers.js_config",
    "transformers runs such code only where it is told to trust it, and else computes what the family does": "auto_map",
    "the stored tensors say their precision, and train.precision that of a run": "dtype torch_dtype use_bfloat16",
    "which tokens the tokenizer and generation give a meaning": "bos_token_id eos_token_id pad_token_id sep_token_id "
    "decoder_start_token_id",
    "how to generate": "use_cache cache_implementation assistant_confidence_threshold assistant_lookbehind "
    "bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size "
    "encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty forced_bos_token_id "
    "forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values "
    "repetition_penalty return_dict_in_generate suppress_tokens target_lookbehind temperature top_k top_p typical_p",
    "what transformers returns beside the logits": "output_hidden_states output_attentions output_past "
    "use_return_dict tie_last_hidden_states",
    "how to compute the same": "attn_implementation _attn_implementation _attn_implementation_internal "
    "_attn_implementation_autoset _experts_implementation _experts_implementation_internal experts_implementation "
    "_flash_attn_2_enabled use_flash_attn use_flash_attention use_flash_attention_2 chunk_size_feed_forward "
    "gradient_checkpointing torchscript pretraining_tp is_decoder",
    "of a head for classes, which `heads` reads where the architecture has one": "id2label label2id num_labels "
    "_num_labels problem_type",
    "of training alone": "classifier_dropout neftune_noise_alpha",
})  # fmt: skip
"""Keys of any family that do not change what is computed, each with the reason."""

ONLY: dict[str, Any] = {
    "is_causal": True,
    "return_dict": True,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "per_layer_config": {},
    "attention_chunk_size": None,
    "partial_rotary_factor": 1.0,
    "rope_interleaved": False,
    "use_mrope": False,
    "use_sliding_window": False,
    "token_classification_bias": True,
    "quantization_config": None,
}
"""Keys that can be given for any family, each with the one value that megalite computes."""

_COMPUTES = re.compile(
    # Anywhere in a name,
    r"att(n|en)|heads?|layer|rope|rotary|yarn|alibi|position|window|sliding|norm(?!al_)|scal(e|ing|ar)|multipl|softcap|"
    r"capping|activ|gelu|silu|swi|relu|causal|bidirection|mask|resid|embed|expert|moe|router|drop|mlp|ffn|logit|"
    r"epsilon|hidden|quant|lora|mamba|ssm|recurren|chunk|spars|interleav|latent|bias|encoder|decoder|kernel|dim|"
    # at the beginning of a word,
    r"(?<![a-z])(skip|emb|rout|feed|eps|size|width|depth|cross|compress|adapter|gat(e|ing)|conv(?!er)|linear|factor|"
    r"block|local|global|mtp|nextn|predictor|parallel|freq|theta|base(?!_model)|clip|sink|rank|group|config|vision|"
    r"audio|shar|tie|untie|quer|key|value|qkv|mix|prun|stride|pattern|steps?|loop|mup|gamma|beta|alpha|memor)|"
    # and as a word.
    r"(?<![a-z])(act|acts|ln|rms|qk|kv|q|k|v|cap|glu|mu|mult|unit|temp|softmax|sigmoid|states?|period)(?![a-z])"
)


def computes(key: str) -> bool:
    """Return whether the name of a key suggests something that a model computes."""
    # camelCase to snake_case, so that words can be told apart.
    # Guessing errs to the side of refusal: an unknown key that sounds like a computation stops the
    # load, since a model that is computed otherwise would go on unnoticed.
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    return bool(_COMPUTES.search(words))


@dataclass(frozen=True)
class Keys:
    """How a family treats the keys of config.json, beside those that are common to all."""

    used: Mapping[str, Any] = field(default_factory=dict)
    """Keys that the family's `from_hf` reads, each with transformers' default for where it is left
    out."""
    only: Mapping[str, Any] = field(default_factory=lambda: ONLY)
    """Keys that are supported with one value only."""
    neutral: Mapping[str, str] = field(default_factory=lambda: NEUTRAL)
    """Keys that do not change what is computed, each with the reason."""

    def but(
        self,
        used: Mapping[str, Any] | None = None,
        only: Mapping[str, Any] | None = None,
        **neutral: str,
    ) -> Keys:
        """Return these keys with others added, or declared differently; `neutral` gives the reason
        by key."""
        # A key has one declaration: the new one takes it out of all three of the old.
        new = {**(used or {}), **(only or {}), **neutral}

        def merged(old: Mapping[str, Any], more: Mapping[str, Any] | None) -> dict[str, Any]:
            return {key: value for key, value in old.items() if key not in new} | dict(more or {})

        return Keys(merged(self.used, used), merged(self.only, only), merged(self.neutral, neutral))

    def read(self, hf: Mapping[str, Any], family: str) -> dict[str, Any]:
        """Return config.json with the defaults of used keys that it leaves out. Raises ConfigError
        for a key with a value that the `family` does not support, or that is not declared and may
        change what is computed."""
        for key, value in hf.items():
            if key == "quantization_config" and key in self.only:
                check_compressed(value, family)
            elif key in self.only:
                require(hf, family, {key: self.only[key]})
            elif (
                key not in self.used
                and key not in self.neutral
                and value is not None
                and computes(key)
            ):
                raise ConfigError(
                    f"config.json has {key} = {shown(value)}, which is unknown for the {family} family and may change "
                    "what the model computes; remove the key only if it changes nothing"
                )
        usual = {key: value for key, value in self.used.items() if value is not REQUIRED}
        # A key that is null stays so: `from_hf` knows what the family takes that for.
        return usual | dict(hf)


def require(hf: Mapping[str, Any], family: str, supported: Mapping[str, Any]) -> None:
    """Raise ConfigError where a key has another value than the one `supported` by the family. A key
    that is left out has that value, and so has null, except where it is true: to transformers null
    is off."""
    for key, only in supported.items():
        value = hf.get(key, only)
        if value != only and (value is not None or only is True):
            raise ConfigError(
                f"config.json has {key} = {shown(value)}; the {family} family supports {only!r}"
            )


def check_quantisation(hf: Mapping[str, Any], family: str, only: Mapping[str, Any]) -> None:
    """Raise ConfigError where the stored weights are quantised in another way than `only` says, as
    `checkpoint.quantised` reads them."""
    values = hf["quantization_config"]
    if values is None:
        return
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"config.json has quantization_config = {shown(values)}, which is no mapping"
        )
    # How inputs are rounded, and what was left as it was, which the stored tensors say themselves.
    place, computing = "quantization_config", ("activation_scheme", "modules_to_not_convert")
    refuse_others(values, (*only, *computing), place, f"weights of the {family} family")
    for key, value in only.items():
        if values.get(key, None if key == "quant_method" else value) != value:
            raise ConfigError(
                f"config.json has {place}.{key} = {shown(values.get(key))}; of the {family} family, {value!r} is read"
            )


COMPRESSED = ("int-quantized", "float-quantized", "pack-quantized", "naive-quantized")
"""Formats of compressed-tensors whose tensors `checkpoint.quantised` reads."""


def check_compressed(values: Any, family: str) -> None:
    """Raise ConfigError for quantised weights that are none of `COMPRESSED`. How inputs are rounded
    where others run the model is neutral: here products take them as they are."""
    if values is None:
        return
    if isinstance(values, Mapping) and values.get("quant_method") in ("gptq", "awq"):
        return check_packed(values)
    if isinstance(values, Mapping) and values.get("quant_method") == "bitsandbytes":
        return check_nf4(values)
    read = (
        f"GPTQ, AWQ, bitsandbytes' NF4 and compressed-tensors in {', '.join(COMPRESSED)} are read; save the model "
        "dequantised otherwise"
    )
    if not isinstance(values, Mapping) or values.get("quant_method") != "compressed-tensors":
        raise ConfigError(
            f"config.json has quantization_config = {shown(values)}; of the {family} family, {read}"
        )
    groups = values.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else [None]:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        # A group's own format wins over that of the whole model.
        kind = (group.get("format") if isinstance(group, Mapping) else None) or values.get("format")
        if kind not in COMPRESSED or not isinstance(weights, Mapping):
            raise ConfigError(
                f"config.json has quantization_config of format {shown(kind)}; {read}"
            )
        if not weights.get("symmetric", True) or weights.get("num_bits") not in (4, 8):
            raise ConfigError(
                f"config.json has quantization_config with weights = {shown(weights)}; symmetric ones of 4 or 8 bits "
                "are read"
            )


def check_nf4(values: Mapping[str, Any]) -> None:
    """Raise ConfigError for quantised weights that are not bitsandbytes' NF4. Where products are
    computed, and in what, is neutral."""
    if not values.get("load_in_4bit") or values.get("bnb_4bit_quant_type") != "nf4":
        raise ConfigError(
            f"config.json has quantization_config = {shown(values)}; of bitsandbytes' files those with load_in_4bit "
            "and bnb_4bit_quant_type nf4 are read"
        )


def check_packed(values: Any) -> None:
    """Raise ConfigError for quantised weights that are no integers of GPTQ's or AWQ's files."""
    said = values if isinstance(values, Mapping) else {}
    method = said.get("quant_method")
    # The second names are AWQ's own.
    bits = said.get("bits", said.get("w_bit"))
    if method == "gptq" and said.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2"):
        known: tuple[int, ...] = (4, 8)
    elif method == "awq" and str(said.get("version", "gemm")).lower() == "gemm":
        known = (4,)
    else:
        known = ()
    # -1: all inputs of an output are one group.
    group = said.get("group_size", said.get("q_group_size", -1))
    if bits not in known or not isinstance(group, int) or group == 0 or group < -1:
        raise ConfigError(
            f"config.json has quantization_config = {shown(values)}; GPTQ of 4 or 8 bits (checkpoint_format gptq or "
            "gptq_v2) and AWQ of 4 (version gemm) are read"
        )


def check_padding(hf: Mapping[str, Any]) -> None:
    """Raise ConfigError for a padding token outside of the vocabulary, with which transformers
    builds no embedding."""
    pad, vocabulary = hf["pad_token_id"], hf["vocab_size"]
    if pad is not None and not -vocabulary <= pad < vocabulary:
        raise ConfigError(
            f"config.json has pad_token_id = {pad!r}, which is none of the {vocabulary} tokens"
        )


def agreed(
    hf: Mapping[str, Any], *places: str, default: Any = REQUIRED, copies: Sequence[str] = ()
) -> Any:
    """Return the value of a fact that config.json may give in several `places`
    ("rope_parameters.rope_theta" is nested): that of the first place that has one, or `default`.

    Raises ConfigError where another place disagrees, or one of the `copies`, which transformers
    does not read. Raises KeyError where no place has a value and there is no default."""
    # null counts as left out, as transformers takes it.
    found = {place: value for place in (*places, *copies) if (value := at(hf, place)) is not None}
    first = next((place for place in places if place in found), None)
    if first is None and default is REQUIRED:
        raise KeyError(places[0])
    value = default if first is None else found[first]
    for place, other in found.items():
        if other != value:
            said = (
                f"{first} = {shown(value)}"
                if first
                else f"{places[-1]} left out, which means {shown(value)}"
            )
            disagree(f"{place} = {shown(other)}", said)
    return value


def disagree(one: str, other: str) -> None:
    """Raise the ConfigError for a fact that is given twice, differently."""
    raise ConfigError(
        f"config.json says two things of one: {one}, but {other}; leave only the right one"
    )


def at(hf: Mapping[str, Any], place: str) -> Any:
    """Return the value at a nested place ("rope_parameters.rope_theta"); None where there is
    none."""
    value: Any = hf
    for key in place.split("."):
        value = None if value is None else value.get(key)
    return value


def refuse_others(values: Mapping[str, Any], known: Iterable[str], place: str, whose: str) -> None:
    """Raise ConfigError for a key of `values`, at `place` in config.json, that has a value and is
    not `known`. `whose` names the owner in the message."""
    for key, value in values.items():
        if value is not None and key not in known:
            raise ConfigError(
                f"config.json has {place}.{key} = {shown(value)}, which is unknown for {whose}"
            )


def stored_names(folder: Path) -> frozenset[str]:
    """Return the names of the tensors in a Hugging Face folder, read from headers alone; none where
    there are no readable files, of which whoever loads them tells."""
    try:
        if (index := folder / "model.safetensors.index.json").is_file():
            return frozenset(read_object(index, ConfigError).get("weight_map") or ())
        check_regular(single := folder / "model.safetensors", ConfigError)
        with single.open("rb") as file:
            # safetensors: the length of the header, then the header, JSON of the tensors' names.
            size = int.from_bytes(file.read(8), "little")
            return frozenset(json.loads(file.read(min(size, LARGEST_HEADER))))
    except (OSError, ValueError, TypeError, ConfigError):
        return frozenset()
