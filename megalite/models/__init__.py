"""Model families. A family is one file: its config, its modules for one device, its table of
weights and its mapping to and from a Hugging Face config.json. To add one, write the file and name
it in registry.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn as nn
from pydantic import ValidationError

from megalite.config import Fp8Config, LoraConfig, ModelConfig
from megalite.config.errors import describe_errors
from megalite.errors import ConfigError
from megalite.models import heads, peft, rope
from megalite.models.fp8 import with_codes
from megalite.models.hf import Keys, stored_names
from megalite.models.layers import Decoder
from megalite.models.lora import adapt, with_adapters
from megalite.models.mup import by_width
from megalite.models.projections import add_projections, with_projections
from megalite.models.weights import Weight
from megalite.registry import families, hint
from megalite.utils.hub import how_to_get
from megalite.utils.outside import read_json
from megalite.utils.resources import configs_dir, presets, read_yaml
from megalite.utils.spelling import instead_of, nearest

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Keys of config.json that are left to the tokenizer."""


class Family(Protocol):
    """The names that a family's file defines."""

    @property
    def MODEL(self) -> type[Decoder]: ...
    @property
    def CONFIG(self) -> type[ModelConfig]: ...
    @property
    def KEYS(self) -> Keys:
        """Declare how the family treats each key of config.json."""

    # Yields the rows of the table of weights, in the order in which a forward pass uses them.
    def weights(self, config: Any) -> Any: ...
    # Returns the keys of config.json that describe the model.
    def to_hf(self, config: Any) -> dict[str, Any]: ...
    # Returns the fields of `CONFIG`; raises ConfigError for what the family does not compute.
    def from_hf(self, hf: dict[str, Any]) -> dict[str, Any]: ...


def family(name: str) -> Family:
    """Return the module of a family. Raises ConfigError for an unknown one."""
    return families.get(name)


def model_config(values: dict[str, Any]) -> ModelConfig:
    """Return the `model:` section from its `values`: a preset or the config of a Hugging Face
    folder, with any field overridden beside it.

    Raises ConfigError."""
    base: dict[str, Any] = {}
    if values.get("preset") and values.get("hf"):
        raise ConfigError(
            "give either a `preset` or an `hf` folder, not both; model.preset=null leaves a file's preset out"
        )
    if values.get("preset"):
        base = _read_preset(str(values["preset"]))
    elif values.get("hf") and "family" not in values:
        # A run's own config.yaml has every field written out.
        # Only the architecture: weights are read later, by checkpoint/load.py.
        folder = Path(values["hf"])
        base = from_hf_config(read_hf_config(folder))
        if peft.is_adapter(folder):  # beside the adapter's tensors there are none of the model
            folder = peft.base_of(folder)
        base = family(base["family"]).CONFIG.with_files(base, stored_names(folder))
    if base and values.get("family") not in (None, base["family"]):
        raise ConfigError(
            f"model.family = {values['family']!r}, but preset {values['preset']} is {base['family']!r}"
        )
    if base and values.get("hf"):
        values = rope.lengthened(values, base)
    # What stands beside `preset` or `hf` in the config wins over it.
    merged = base | values
    if "family" not in merged:
        raise ConfigError("model needs a `preset`, an `hf` folder, or a `family` with its fields")
    config_class = family(merged["family"]).CONFIG
    try:
        config = config_class.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(describe_errors(error, config_class, merged)) from None
    # Behind validation: it compares fields that must each be right by themselves first.
    heads.check_head(config)
    return config


def _read_preset(name: str) -> dict[str, Any]:
    """Return the fields of a preset. Raises ConfigError for an unknown one."""
    if name not in presets():
        raise ConfigError(f"model.preset = {name!r} is not known; {hint(name, presets())}")
    return read_yaml(configs_dir() / "model" / f"{name}.yaml")


def _what_else(folder: Path) -> str:
    """Return, as the end of a message about a folder that holds no model, what may be meant."""
    if checkpoints := sorted((folder / "checkpoints").glob("step-*")):
        return f"; it is a run, of which {checkpoints[-1]} is the newest checkpoint"
    return (not folder.exists() and instead_of(folder)) or how_to_get(folder)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a model's folder, or of the model that an adapter's folder is for.
    Raises ConfigError."""
    if peft.is_adapter(folder):
        folder = peft.base_of(folder)
    if not (folder / "config.json").exists():
        raise ConfigError(
            f"{folder} holds no Hugging Face model: {folder / 'config.json'}: No such file or directory"
            f"{_what_else(folder)}"
        )
    values = read_json(folder / "config.json", ConfigError)
    if not isinstance(values, dict):
        raise ConfigError(f"{folder / 'config.json'} is not a JSON object")
    return _known_part(values)


PARTS = {"gemma3": "gemma3_text"}
"""Families that are a part of larger models, by the `model_type` of these."""
REFUSED = {
    "deberta": "its disentangled attention needs a kernel of its own",
    "deberta-v2": "its disentangled attention needs a kernel of its own",
    "bart": "of encoder-decoders, T5 is the one to train",
    "mbart": "of encoder-decoders, T5 is the one to train",
}
"""Why some architectures that are asked for are left out."""


def _known_part(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a config.json that describes a family's model: nearly always all of it."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in PARTS:
        return hf
    return family(PARTS[kind]).text_part(hf)  # type: ignore[attr-defined]


def from_hf_config(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the `model:` section from a Hugging Face config.json. Raises ConfigError
    for an unknown architecture or value."""
    hf = _known_part(hf)
    kind = str(hf.get("model_type"))
    if kind in REFUSED:
        raise ConfigError(
            f"config.json has model_type = {kind!r}, which megalite does not open: {REFUSED[kind]}"
        )
    if kind not in families:
        known = (*families.names(), *PARTS)
        close = nearest(kind, known)
        # Not offered as a spelling: a name close to that of a family belongs to another
        # architecture.
        also = f"; nearest in name is {close!r}, another architecture" if close else ""
        raise ConfigError(
            f"config.json has model_type = {kind!r}, which megalite does not open{also}; known: {', '.join(known)}"
        )
    module = family(kind)
    try:
        hf = module.KEYS.read(hf, kind)
        return module.from_hf(hf) | heads.from_hf(hf)
    except KeyError as error:
        raise ConfigError(f"config.json of a {kind} model lacks {error.args[0]!r}") from None
    except ConfigError:
        raise
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:
        # A list for a number, 0 heads.
        raise ConfigError(
            f"config.json of a {kind} model holds a value of another kind: {error}"
        ) from None


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model's config.json. That it has no special tokens, beside those that its family
    counts on, is written out, too: transformers' defaults for them may lie outside of the
    vocabulary."""
    # In this order: a family may set special tokens, a head the architecture's name.
    return dict.fromkeys(SPECIAL) | family(config.family).to_hf(config) | heads.to_hf(config)


TWICE = (
    "rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq", "rotary_emb_base", "rotary_pct",
    "partial_rotary_factor", "dtype", "torch_dtype",
)  # fmt: skip
"""Keys of config.json whose fact may stand elsewhere in it, too."""


def copied_hf_config(hf: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a copy of a model: `hf` as it was read, but with each fact in one
    place, and without names of code that is not copied, nor how weights were quantised, which are
    read as what they stand for."""
    ours = to_hf_config(config)
    # Where both agree, ours are written: they have the numeric types that transformers asks for.
    unsaid = {key for key, value in hf.items() if value is None or value == ours.get(key)}
    return ours | {
        key: value
        for key, value in hf.items()
        if key not in {*TWICE, "auto_map", "quantization_config", *unsaid}
    }


def weight_table(
    config: ModelConfig, lora: LoraConfig | None = None, fp8: Fp8Config | None = None
) -> tuple[Weight, ...]:
    """Return every weight of the model, in the order in which a forward pass uses them. With
    `lora`, those of its adapters are among them, and the others frozen; with `fp8`, rows say which
    are gathered as its codes. Raises ConfigError where the model does not have what these ask
    for."""
    weights = tuple(heads.with_head(config, family(config.family).weights(config)))
    # Before adapters, whose initial values go by their rank and not by the model's width.
    if config.mup:
        weights = tuple(by_width(config, weights))
    weights = with_projections(config, weights)
    if lora:
        weights = with_adapters(weights, lora)
    return with_codes(weights, fp8, config.num_layers) if fp8 else weights


def set_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Replace every parameter of the model by the one of its name. Tied weights stay tied."""
    # named_parameters gives a tied weight once, under its first name; the walk below meets it in
    # both modules and gives both the one new parameter.
    names = {old: name for name, old in model.named_parameters()}
    for module in model.modules():
        for attribute, old in module.named_parameters(recurse=False, remove_duplicate=False):
            setattr(module, attribute, parameters[names[old]])


def build_model(config: ModelConfig, lora: LoraConfig | None = None) -> Decoder:
    """Build the clean model on the meta device: shapes without memory. An engine gives it
    weights."""
    with torch.device("meta"):
        model = heads.put_on(family(config.family).MODEL(config), config)
        add_projections(model, config)
    if lora:
        adapt(model, weight_table(config), lora)
    return model
