"""The small kin of a model: of the same family, with heads of the same size and layers in the same
proportions, narrower and less deep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.models import model_config, weight_table
from megalite.plan import plan as plan_of
from megalite.utils.counts import compact, divisors
from megalite.utils.resources import with_overrides

UNIT = 128
"""What widths are multiples of, as blocks of fp8 ask for."""
FEWEST_LAYERS = 8
"""Fewer would say little of a deep model, in which errors of rounding add up."""
STEP_TOKENS = 16_384
"""Most tokens of a step."""
EVALUATIONS = 30


def kin_values(
    config: Config, parameters: float, steps: int, overrides: Sequence[str]
) -> dict[str, Any]:
    """Return the config, as YAML has it, of a short run of the model's kin on the same data, on one
    rank in bf16. `parameters` are those that its layers should have; `overrides` come last.

    Raises ConfigError where no kin is found, or the data has nothing to validate on."""
    if not (config.data.valid or (config.data.split and config.data.split[1])):
        raise ConfigError("--precision compares valid_loss: give data.valid or data.split")
    values = config.model_dump(mode="json")
    batch = max(1, min(config.train.global_batch_size, STEP_TOKENS // config.sample_tokens))
    micro = max(size for size in divisors(batch) if size <= config.train.micro_batch_size)
    values["model"] = narrowed(values["model"], parameters)
    # None of what is about the cluster, or about the length of the run.
    for section in ("parallel", "checkpoint", "observe", "health", "profile", "hooks", "lora"):
        values.pop(section)
    values["train"] |= {
        "steps": steps, "tokens": None, "epochs": None, "patience": None, "stop_at": None, "batch_ramp": None,
        "global_batch_size": batch, "micro_batch_size": micro, "precision": "bf16", "fp8": None, "compile": False,
        "recompute": "none", "recompute_layers": None,
    }  # fmt: skip
    values["checkpoint"] = {"every": 0, "keep": 1}
    every = max(1, steps // EVALUATIONS)
    values["observe"] = {"log_every": every, "eval_every": every, "eval_batches": 20}
    schedule = values["optimizer"]["schedule"]
    # As a share: thousands of steps are the warmup of the model itself.
    if schedule["warmup_steps"] > steps / 10:
        schedule["warmup_steps"] = 0.1
    values = with_overrides(values, overrides)
    plan_of(parse_config(values, origin="the kin's config (--kin-set changes it)"), 1)
    return values


def narrowed(model: dict[str, Any], parameters: float) -> dict[str, Any]:
    """Return the fields of a model like `model`, whose layers have about so many parameters; the
    model itself where it has no more. Raises ConfigError where its family takes none."""
    model = model | {"preset": None, "hf": None}
    if layer_parameters(model) <= parameters:
        return model
    best, least, problem = None, float("inf"), None
    for width in range(UNIT, model["hidden_size"] + 1, UNIT):
        try:
            fields = _of_width(model, width)
            found = layer_parameters(fields)
        except ConfigError as error:
            problem = error
            continue
        off = max(found / parameters, parameters / found)
        if off < least:
            best, least = fields, off
        if found > parameters:
            break
    if best is None:
        raise ConfigError(
            f"--kin {compact(parameters)}: model.family {model['family']} takes no narrower model: {problem}"
        )
    return best


def layer_parameters(model: dict[str, Any]) -> int:
    """Return the parameters of a model's layers. Raises ConfigError for fields that do not fit."""
    table = weight_table(model_config(model))
    return sum(weight.numel for weight in table if isinstance(weight.place, int))


def _of_width(model: dict[str, Any], width: int) -> dict[str, Any]:
    """Return the fields of a model with another hidden size, and the rest in proportion."""
    share, layers = width / model["hidden_size"], model["num_layers"]
    fields = dict(model)
    for name, value in model.items():
        # Of MLPs, experts and latents.
        if isinstance(value, int) and name.endswith(("intermediate_size", "lora_rank")):
            fields[name] = max(UNIT, round(value * share / UNIT) * UNIT) if value else value
    heads, kv_heads = model["num_attention_heads"], model.get("num_kv_heads") or 0
    fields["hidden_size"], fields["num_attention_heads"] = width, max(1, round(heads * share))
    if kv_heads:
        head_size = model.get("head_dim") or model["hidden_size"] // heads
        # As many queries for each, and as many keys as a block of fp8 has.
        wanted = max(kv_heads * share, UNIT / head_size)
        fields["num_kv_heads"] = min(
            divisors(fields["num_attention_heads"]), key=lambda count: abs(count - wanted)
        )
    fields["num_layers"] = count = min(layers, max(FEWEST_LAYERS, round(layers * share)))
    for name, value in model.items():
        # What each layer is, in a list.
        if isinstance(value, list) and len(value) == layers:
            fields[name] = value[:count]
    if model.get("first_k_dense_replace"):
        fields["first_k_dense_replace"] = 1
    return fields
