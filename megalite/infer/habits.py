"""Default generation settings of a model: what its folder's generation_config.json says.

Every key of that file is followed, changes no answer, or is named in a warning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from megalite.data.tokenizer import Tokenizer
from megalite.errors import ConfigError
from megalite.infer.rules import Rules
from megalite.infer.sampling import Sampling
from megalite.models import peft, read_hf_config
from megalite.utils.outside import read_object, shown

FILE = "generation_config.json"
LIKELY = Sampling(temperature=0.8, top_p=0.95)
"""Sampling settings if neither the user nor the model's folder says."""
SAMPLED = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
RULES = tuple(field.name for field in fields(Rules))
LENGTHS = ("max_new_tokens", "max_length")
FOLLOWED = (*SAMPLED, *RULES, *LENGTHS, "do_sample", "eos_token_id", "stop_strings")

NEUTRAL = {
    **dict.fromkeys(("bos_token_id", "pad_token_id"), "the tokenizer begins texts, and nothing is padded"),
    **dict.fromkeys(("decoder_start_token_id",), "models with an encoder alone have it"),
    **dict.fromkeys(
        ("use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory", "prefill_chunk_size",
         "compile_config", "disable_compile", "continuous_batching_config"),
        "how it is computed, not what",
    ),
    **dict.fromkeys(
        ("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
         "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
         "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp"),
        "speculation makes the same answers faster",
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        "what else transformers returns",
    ),
    **dict.fromkeys(
        ("early_stopping", "length_penalty", "diversity_penalty", "num_beam_groups"), "with num_beams alone"
    ),
    "renormalize_logits": "probabilities have the sum 1 anyway",
    **dict.fromkeys(("transformers_version", "_from_model_config", "_commit_hash"), "where the file comes from"),
}  # fmt: skip
"""Keys that change no answer, and why."""
USUAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_return_sequences": (1,), "max_time": (), "top_h": (), "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "remove_invalid_values": (False,), "exponential_decay_length_penalty": (), "sequence_bias": (),
    "token_healing": (False,), "guidance_scale": (1.0,), "watermarking_config": (), "penalty_alpha": (0.0,),
    "dola_layers": (), "constraints": (), "force_words_ids": (),
}  # fmt: skip
"""Keys that are not supported, with the values that ask for nothing; null asks for nothing, too."""


class Habits(NamedTuple):
    """Holds a model's default generation settings."""

    ends: frozenset[int]
    """Token ids that end an answer."""
    sampling: Sampling
    stop: tuple[str, ...] = ()
    """Stop strings."""
    max_new_tokens: int | None = None
    max_length: int | None = None
    """Most tokens of prompt and answer together."""
    warning: str = ""
    """One line that names what is not supported; empty if there is nothing."""

    def most_tokens(self, num_prompt: int, usual: int) -> int:
        """Return the default `max_tokens` behind a prompt of `num_prompt` tokens: the model's own
        setting, else `usual`."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return (
            usual if self.max_length is None else min(usual, max(1, self.max_length - num_prompt))
        )


def read_habits(folder: Path, tokenizer: Tokenizer) -> Habits:
    """Read generation_config.json of `folder`. What it does not say comes from config.json, the
    tokenizer and `LIKELY`. Raise ConfigError for a value that makes no sense."""
    file, values = folder / FILE, {}
    if not file.is_file() and peft.is_adapter(folder):
        file = peft.base_of(folder) / FILE
    if file.is_file():
        values = read_object(file, ConfigError)
    given = {name: value for name, value in values.items() if value is not None}
    # generation_config.json is the newer of the two, and the one that transformers' generate reads.
    ends = (
        given["eos_token_id"]
        if "eos_token_id" in given
        else read_hf_config(folder).get("eos_token_id")
    )
    # Names in the error below what was being read.
    reading = "eos_token_id"
    try:
        ids = set(listed(ends))
        read = {}
        for reading in (*RULES, *LENGTHS, *SAMPLED, "stop_strings"):
            if reading in given:
                read[reading] = _read(reading, given[reading])
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"{file}: {reading} = {shown(values.get(reading, ends))}: {error}"
        ) from None
    sampled, rules, lengths = (
        {name: read[name] for name in names if name in read} for names in (SAMPLED, RULES, LENGTHS)
    )
    # What the file leaves open is LIKELY's, for transformers' own defaults (temperature 1, top-k
    # 50) are nobody's choice.
    # transformers decodes greedily then, whatever temperature the file has.
    if given.get("do_sample") is False:
        sampled["temperature"] = 0.0
    try:
        sampling = replace(LIKELY, **sampled, rules=Rules(**rules))
    except (TypeError, ConfigError) as error:
        raise ConfigError(f"{file}: {error}") from None
    # A file may name the end of a turn alone; a document's end ends an answer, too.
    ids |= set() if tokenizer.eod_id is None else {tokenizer.eod_id}
    stop = read.get("stop_strings", ())
    return Habits(frozenset(ids), sampling, stop, **lengths, warning=_warning(file, given))


def listed(ids: Any) -> list[int]:
    """Return the ids of eos_token_id, which is one id, several or null. Raise TypeError or
    ValueError for anything else."""
    return [int(one) for one in (ids if isinstance(ids, list) else [ids]) if one is not None]


def _read(name: str, value: Any) -> Any:
    """Check and convert one value. Raise ValueError if it does not have the form that transformers
    expects."""
    if name == "stop_strings":
        return _all((value,) if isinstance(value, str) else value, str)
    if name == "bad_words_ids":
        if not all(_all(value, list)):
            raise ValueError("a list without tokens forbids nothing")
        return tuple(_all(word, int) for word in value)
    if name in ("suppress_tokens", "begin_suppress_tokens"):
        return _all(value, int)
    if name in SAMPLED and name != "top_k":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError("must be a number")
        return value
    least = 1 if name in LENGTHS else 0
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"must be a whole number of at least {least}")
    return value


def _all(values: Any, kind: type) -> tuple[Any, ...]:
    """Return `values` as a tuple. Raise ValueError unless it is a list whose items are all of
    `kind`."""
    if not isinstance(values, Sequence) or not all(isinstance(value, kind) for value in values):
        raise ValueError(
            {str: "must be texts", int: "must be a list of token ids", list: "must hold lists"}[
                kind
            ]
        )
    return tuple(values)


def _warning(file: Path, given: dict[str, Any]) -> str:
    """Return a line that names the settings of `file` that would change answers but are not
    supported; empty if none."""
    names = [
        name
        for name, value in given.items()
        if name not in FOLLOWED and name not in NEUTRAL and value not in USUAL.get(name, ())
    ]
    said = ", ".join(f"{name} = {given[name]!s:.60}" for name in names)
    return f"warning: {file}: what megalite does not follow: {said}" if said else ""
