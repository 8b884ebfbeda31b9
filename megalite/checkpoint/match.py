"""Checks whether a checkpoint belongs to the run that a config describes, before the run writes
anything.

What gives the checkpoint's state its meaning must not change: the model, the tokenizer, the frozen
model beside adapters, and which samples of the data it has seen. Everything else may change, and is
reported.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from megalite.checkpoint.load import states_that_begin, stored_config
from megalite.checkpoint.tensors import KEEPS, CheckpointError
from megalite.config import EMA, Config, LoraConfig, OptimizerConfig
from megalite.data.mixture import Mixture
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.data.tokenizer_files import files_in, tokenizer_file
from megalite.errors import ConfigError, DataError
from megalite.models import model_config, peft, to_hf_config, weight_table
from megalite.models.lora import adapters_of
from megalite.training.schedules import learning_rate
from megalite.utils.changes import Change, changes, spelled, with_defaults

NEUTRAL = {"preset", "hf", "init_std"}
"""Settings of `model` that say only where its fields and initial weights came from. (Dropout may
change as well.)"""
SAME_MODEL = {
    "lora",
    "lora.rank",
    "lora.alpha",
    "lora.rslora",
    "lora.targets",
    "lora.quantize_base",
    "objective.name",
}
"""Settings outside `model` that decide the meaning of weights and optimizer state."""
SHOWN = 6
"""Number of differing settings that a message names."""


def is_of_the_model(key: str) -> bool:
    """Return whether a setting decides what weights and optimizer state mean."""
    name = key.rpartition(".")[2]
    of_model = key.startswith("model.") and name not in NEUTRAL and not name.endswith("dropout")
    return of_model or key in SAME_MODEL


def check_match(
    checkpoint: Path,
    state: Mapping[str, Any],
    config: Config,
    tokenizer: Tokenizer | None,
    train: Mixture,
    base: Mapping[str, str],
) -> list[str]:
    """Return what has changed since `checkpoint` was saved, in lines for the console.

    `state` is its train_state.json; `config`, `tokenizer` and `train` are the run's now; `base` is
    what `base_files` finds now. Raises CheckpointError if its model, tokenizer or base is another
    one, DataError if its data is, and ConfigError if it is further than the run is to go."""
    if state["step"] > config.train.steps:
        raise ConfigError(
            f"train.steps = {config.train.steps}, but {checkpoint} has {state['step']} steps done already; give at "
            "least as many, or go back with checkpoint.resume: FOLDER of an earlier checkpoint"
        )
    before = stored_config(checkpoint)
    changed = []
    if before:
        # Settings that newer versions added have their defaults in the old config, or each would be
        # a change.
        changed = changes(with_defaults(before, config), config.model_dump(mode="json"))
        of_model = [change for change in changed if is_of_the_model(change.key)]
        _check_model(checkpoint, before, config, of_model)
    if tokenizer and config.data.tokenizer:
        _check_tokenizer(checkpoint, config.data.tokenizer, tokenizer)
    _check_base(checkpoint, config, state.get("base") or {}, base)
    of_data = [str(change) for change in changed if _decides_samples(change.key, config)]
    # Compares fingerprints of the data; `of_data` are the settings that may explain a difference.
    train.check_state(state["data"], of_data)
    told = []
    if changed:
        told = [f"changed since step {state['step']}: {'; '.join(map(str, changed))}"]
    return told + _new_states(checkpoint, config) + _jump(before or {}, config, state["step"])


def _new_states(checkpoint: Path, config: Config) -> list[str]:
    """Say which states a changed optimizer begins at zero, since the checkpoint has none for these
    weights."""
    trained = [weight for weight in weight_table(config.model, config.lora) if not weight.frozen]
    begin = states_that_begin(checkpoint, config, trained)
    new = Counter(
        state
        for weight in trained
        if weight.name in begin
        for state in config.optimizer.states_of(weight)
        if state != EMA  # begins as the weights
    )
    missing = ", ".join(f"{state} of {count} weights" for state, count in new.items())
    return (
        [
            f"warning: {checkpoint} has not all that the optimizer now keeps of some weights, whose states begin at "
            f"zero: {missing}"
        ]
        if missing
        else []
    )


def _check_model(
    checkpoint: Path,
    before: Mapping[str, Any],
    config: Config,
    changed: Sequence[Change],
) -> None:
    """Raise CheckpointError if one of the changed settings makes another model."""
    other = [change for change in changed if not _says_the_same(change, before, config)]
    if other:
        named = [
            f"{each.key} = {spelled(each.now)}, there {spelled(each.was)}" for each in other[:SHOWN]
        ]
        if len(other) > SHOWN:
            named.append(f"and {len(other) - SHOWN} more")
        raise CheckpointError(
            f"{checkpoint} is of another model than the config's: {'; '.join(named)}; {KEEPS}"
        )


def _says_the_same(change: Change, before: Mapping[str, Any], config: Config) -> bool:
    """Return whether two spellings stand for one model: a size left to the family, or all-linear
    and its modules."""
    # A stored config that is no longer valid proves nothing: then the change stands.
    with contextlib.suppress(ConfigError, ValidationError, ValueError, KeyError, TypeError):
        # A stored config has every field written out: where they came from is not read again.
        fields = {key: x for key, x in before["model"].items() if key not in ("preset", "hf")}
        model = model_config(fields)
        if change.key == "lora.targets" and config.lora:
            table = weight_table(model)
            lora = LoraConfig.model_validate(before["lora"] | {"adapter": None})
            was = {adapter.module for adapter in adapters_of(table, lora)}
            now = {adapter.module for adapter in adapters_of(table, config.lora)}
            return was == now
        # 0 or null: as the family has it.
        if change.key.startswith("model.") and not (change.was and change.now):
            now_model = config.model.model_copy(update={change.key.partition(".")[2]: change.was})
            return to_hf_config(now_model) == to_hf_config(config.model)
    return False


def _check_tokenizer(checkpoint: Path, path: Path, tokenizer: Tokenizer) -> None:
    """Raise CheckpointError if the checkpoint's tokenizer is another one than that of `path`."""
    if tokenizer_file(checkpoint) is None:
        return
    # Equal files need not be loaded; files that differ may still hold one tokenizer.
    if all(_same_file(checkpoint / name, path / name) for name in files_in(checkpoint)):
        return
    try:
        other = load_tokenizer(checkpoint)
    except DataError:  # a tokenizer that cannot be loaded proves nothing
        return
    if other.fingerprint() != tokenizer.fingerprint():
        raise CheckpointError(
            f"data.tokenizer {path} is another one than that of {checkpoint}: {_difference(tokenizer, other)}; {KEEPS}"
        )


def _same_file(one: Path, other: Path) -> bool:
    return other.is_file() and filecmp.cmp(one, other, shallow=False)


def _difference(mine: Tokenizer, other: Tokenizer) -> str:
    """Say in what two tokenizers differ."""
    if mine.vocab_size != other.vocab_size:
        return f"it has {mine.vocab_size} token ids, there are {other.vocab_size}"
    if mine.eod_id != other.eod_id:
        return f"its texts end with token {mine.eod_id}, there with {other.eod_id}"
    tokens = {number: token for token, number in mine.vocabulary().items()}
    there = {number: token for token, number in other.vocabulary().items()}
    for number in sorted(tokens.keys() | there.keys()):
        if tokens.get(number) != there.get(number):
            return f"its token {number} is {tokens.get(number)!r}, there {there.get(number)!r}"
    return "of the same vocabulary, it cuts texts into other tokens"


def base_files(config: Config) -> dict[str, str]:
    """Return a digest of each file of the frozen model beside a run's own weights: the base of
    adapters, or DPO's reference.

    A digest covers the size and 64 slices of a file. Empty for other runs, and where the model is
    gone."""
    if config.model.hf is None or not (config.lora or config.objective.HAS_REFERENCE):
        return {}
    found: dict[str, str] = {}
    with contextlib.suppress(OSError, ConfigError):
        folders = [config.model.hf]
        if peft.is_adapter(config.model.hf):
            folders.append(peft.base_of(config.model.hf))
        for folder in folders:
            found |= digests_of(folder)
    return found


def digests_of(folder: Path) -> dict[str, str]:
    """Return a digest of each file of weights in a model's folder, by its name."""
    return {path.name: _content(path) for path in sorted(folder.glob("*.safetensors"))}


def _content(path: Path) -> str:
    """Return a digest of a file's size and of 64 slices spread over it: reading all would take
    minutes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        # The first and the last 4 KiB are among them: a header and a tail tell most files apart.
        for start in np.linspace(0, max(size - 4096, 0), 64, dtype=np.int64).tolist():
            file.seek(start)
            digest.update(file.read(4096))
    return digest.hexdigest()[:16]


def _check_base(
    checkpoint: Path,
    config: Config,
    was: Mapping[str, str],
    now: Mapping[str, str],
) -> None:
    """Raise CheckpointError if the frozen model has other files or contents than when the
    checkpoint was saved."""
    if not was or not now:  # saved before this was kept, or the base is gone: loading says so
        return
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise CheckpointError(
                f"model.hf = {config.model.hf} holds other weights than those {checkpoint} was trained beside: {name} "
                f"has the content {now.get(name, 'of no file')}, then {was.get(name, 'of no file')}; {KEEPS}"
            )


def _decides_samples(key: str, config: Config) -> bool:
    """Return whether the order of samples depends on a setting."""
    names = (
        "train",
        "split",
        "seq_length",
        "order",
        "packing",
        "long_rows",
        "weights",
        "temperature",
        "phases",
        "fim",
        "augment",
    )
    for name in names:
        if key == f"data.{name}" or key.startswith((f"data.{name}.", f"data.{name}[")):
            return True
    # Megatron's order depends on how many samples a run has; phases begin at a step, and so at a
    # batch.
    is_megatron = config.data.order == "megatron"
    if key == "train.global_batch_size" or key.startswith("train.batch_ramp"):
        return bool(config.data.phases) or is_megatron
    if key == "train.steps":
        return is_megatron
    return key in ("train.seed", "model.task") or key.startswith("objective.")


def _jump(before: Mapping[str, Any], config: Config, step: int) -> list[str]:
    """Warn if the learning rate of the next step is not what the schedule before would have given
    it."""
    with contextlib.suppress(ValidationError, KeyError, TypeError):
        optimizer = OptimizerConfig.model_validate(before["optimizer"])
        steps = int(before["train"]["steps"])
        # A run that had come to its end is compared with its last step.
        wanted = learning_rate(min(step + 1, steps), steps, optimizer)
        found = learning_rate(step + 1, config.train.steps, config.optimizer)
        if step < config.train.steps and not math.isclose(found, wanted, rel_tol=0.01):
            return [
                f"warning: the learning rate jumps: {found:.4g} in step {step + 1}, where the schedule before had "
                f"{wanted:.4g} (optimizer.lr, optimizer.schedule and train.steps say what it is)"
            ]
    return []
