"""Convert PEFT's adapter_config.json to the `lora:` section and back."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import safe_open

from megalite.config import LoraConfig
from megalite.config.errors import describe_errors
from megalite.errors import ConfigError
from megalite.models.lora import ALL_LINEAR, PREFIX, adapters_of
from megalite.models.weights import Weight
from megalite.utils.hub import how_to_get, local
from megalite.utils.outside import check_regular, read_json, reading, shown

CONFIG, TENSORS = "adapter_config.json", "adapter_model"
OWN_NAME = r"\.lora_(?:[AB]\.weight|magnitude_vector)$"
"""Ends of the names of an adapter's tensors."""
WHOLE = ("model.safetensors", "model.safetensors.index.json")

# Keys that do not change what an adapter computes, beside those that are read.
MEANINGLESS = (
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern", "exclude_modules",
)  # fmt: skip
READ = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")
ONLY: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian"),
}


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model."""
    return (folder / CONFIG).is_file() and not any((folder / name).exists() for name in WHOLE)


def _read(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json. Raises ConfigError where it is not that of a LoRA adapter."""
    values = read_json(folder / CONFIG, ConfigError)
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ConfigError(f'{folder / CONFIG} is not that of a LoRA adapter (`peft_type`: "LORA")')
    return values


def base_of(folder: Path) -> Path:
    """Return the folder of the model that an adapter is for. Raises ConfigError where there is none
    on this machine."""
    name = _read(folder).get("base_model_name_or_path")
    base = local(Path(str(name)))
    if not name or not (base / "config.json").is_file():
        raise ConfigError(
            f"{folder / CONFIG}: base_model_name_or_path = {shown(name)} is no folder with a config.json; write there "
            f"where the model lies that the adapter was trained on{how_to_get(base) if name else ''}"
        )
    return base


def read_lora(folder: Path) -> dict[str, Any]:
    """Return the fields of `lora:` for an adapter. Raises ConfigError for what is not supported."""
    values = _read(folder)
    for key, value in values.items():
        # A key that is off (null, false, 0 or empty) changes nothing, whatever it is.
        plain = value in ONLY[key] if key in ONLY else not value
        if key not in (*MEANINGLESS, *READ) and not plain:
            raise ConfigError(
                f"{folder / CONFIG} has {key} = {shown(value)}, which is not supported"
            )
    targets = values.get("target_modules")
    # A string is a regular expression of PEFT's; the tensors say which modules it matched.
    if missing := [key for key in ("r", "lora_alpha") if key not in values]:
        raise ConfigError(f"{folder / CONFIG} does not say its {missing[0]}")
    return {
        "rank": values["r"],
        "alpha": values["lora_alpha"],
        "dropout": values.get("lora_dropout") or 0.0,
        "rslora": bool(values.get("use_rslora")),
        "dora": bool(values.get("use_dora")),
        "targets": sorted(map(str, targets)) if isinstance(targets, list) else _modules(folder),
    }


def lora_of(folder: Path) -> LoraConfig:
    """Return the `lora:` section of an adapter. Raises ConfigError."""
    try:
        return LoraConfig.model_validate(read_lora(folder))
    except ValidationError as error:
        # Its keys are ours by then: rank for r, alpha for lora_alpha.
        wrong = describe_errors(error, LoraConfig).partition("\n")[0]
        raise ConfigError(f"{folder / CONFIG}, as lora: {wrong}") from None


def with_adapter_fields(values: dict[str, Any]) -> dict[str, Any]:
    """Return a `lora:` section with what it leaves out taken from its `adapter`. A run's own config
    leaves nothing out, and does not need that folder any more. Raises ConfigError."""
    # Configs of earlier versions do not say `dora`.
    if not values.get("adapter") or LoraConfig.model_fields.keys() - {"dora"} <= values.keys():
        return values
    return read_lora(Path(str(values["adapter"]))) | values


def _modules(folder: Path) -> list[str]:
    """Return the names of the modules that the adapter's tensors belong to."""
    path = folder / f"{TENSORS}.safetensors"
    check_regular(path, ConfigError)
    with reading(path, ConfigError), safe_open(path, framework="pt") as file:
        names = file.keys()
        return sorted({re.sub(OWN_NAME, "", name).removeprefix(PREFIX) for name in names})


def to_peft(
    lora: LoraConfig, weights: Sequence[Weight], base: Path, task_type: str | None = "CAUSAL_LM"
) -> dict[str, Any]:
    """Return adapter_config.json. `weights` is the table of the base model; PEFT finds it at the
    path `base`. `task_type` is PEFT's name of what the model does; None, where it has none."""
    adapters = adapters_of(weights, lora)
    every = sorted({adapter.short for adapter in adapters})
    targets = every if ALL_LINEAR in lora.targets else list(lora.targets)
    # A head's own modules may be called as those of layers are, but have no adapter.
    # PEFT matches the ends of names in the whole model, we only linears inside layers.
    head = {
        name.removesuffix(".weight") for row in weights if row.place == "last" for name in row.hf
    }
    others = sorted(name for name in head if any(name.endswith(f".{target}") for target in targets))
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": str(base.absolute()),
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        **({"use_dora": True} if lora.dora else {}),
        "target_modules": targets,
        **({"exclude_modules": others} if others else {}),
        # GPT-2's matrices are stored [in, out], which PEFT must be told.
        "fan_in_fan_out": any(weight.transpose for weight in weights),
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }
