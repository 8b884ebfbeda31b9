"""Parts by name: megalite's own, those of plugins, and what is said of names and settings that do
not go together."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
import torch

from megalite import registry
from megalite.config import Config, HookConfig, OptimizerConfig, ScheduleConfig
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.parallel.rules import rule
from megalite.registry import Registry

BASE: dict[str, Any] = {
    "run": {"name": "a"},
    "model": {"preset": "llama-1m"},
    "data": {"train": [{"path": "corpus"}], "seq_length": 64},
    "train": {"steps": 10, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
}


@pytest.mark.parametrize("name", ["families", "optimizers", "schedules", "objectives"])
def test_every_own_part_is_where_the_registry_says(name: str) -> None:
    parts: Registry[Any] = getattr(registry, name)
    for own in parts.own:
        part = parts.get(own)
        config = getattr(part, "CONFIG", part)
        assert config.model_fields[parts.key.rpartition(".")[2]].default == own


MISTAKES = {
    "optimizer.name=adam": "optimizer.name = 'adam': is not known; did you mean 'adamw'?",
    "optimizer.beta=0.9": "unknown key optimizer.beta (value 0.9); did you mean 'betas'?",
    "optimizer.schedule.halves=3": "unknown key optimizer.schedule.halves (value 3); known keys: min_lr, name, warm",
    "optimizer.schedule={name: wsd, decay_step: 4}": "unknown key optimizer.schedule.decay_step (value 4); did you",
    "optimizer.schedule.decay_steps=3": "optimizer.schedule.decay_steps = 3: is a setting of name: wsd, not of cosine",
    "objective.beta=0.3": "objective.beta = 0.3: is a setting of name: dpo, not of next_token",
    "objective.name=7": "objective.name = 7: should be a valid string",
    "model={family: [llama], preset: null}": "model.family = ['llama'] is not known; did you mean 'llama'?",
    "model.rope_scaling={type: longrope, short_factor: [-1]}": "model: rope_scaling.short_factor.0 = -1: should be",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_name_or_setting_that_does_not_go_with_the_others_is_explained(override: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_config(BASE, [override])
    assert str(error.value).startswith(f"command line: {MISTAKES[override]}")


def test_configs_in_which_all_kinds_have_all_settings_still_open() -> None:
    config = parse_config(
        BASE,
        [
            "objective={name: next_token, beta: 0.1}",
            "optimizer.schedule={name: linear, decay_steps: null}",
        ],
    )
    assert set(config.objective.model_fields_set) <= {"name"}
    assert parse_config(config.model_dump(mode="json")) == config


class Halving(ScheduleConfig):
    name: Literal["halving"] = "halving"  # type: ignore[assignment]
    every: int = 1

    def after_warmup(self, step: int, num_steps: int, peak: float) -> float:
        return peak / 2 ** (step // self.every)


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """What installed packages name, to be filled; nothing that a test registers outlives it."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: entries)
    monkeypatch.setattr(registry.schedules, "_found", {})
    registry.import_plugins.cache_clear()
    yield entries
    registry.import_plugins.cache_clear()


def register_halving() -> None:
    registry.schedules.register("halving", Halving)


def test_a_plugin_is_imported_when_its_name_is_asked_for(
    plugins: list[EntryPoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins.append(EntryPoint("mine", "a_package", registry.PLUGINS))
    imported = []
    monkeypatch.setattr(
        EntryPoint, "load", lambda self: imported.append(self.name) or register_halving()
    )
    parse_config(BASE, ["optimizer.schedule.name=linear"])
    assert not imported
    config = parse_config(BASE, ["optimizer.schedule={name: halving, every: 2}"])
    assert isinstance(config.optimizer.schedule, Halving)
    assert imported == ["mine"]
    assert parse_config(config.model_dump(mode="json")) == config
    with pytest.raises(ConfigError, match="did you mean 'halving'"):
        parse_config(BASE, ["optimizer.schedule.name=halvin"])


def test_a_plugin_that_cannot_be_imported_is_named(plugins: list[EntryPoint]) -> None:
    plugins.append(EntryPoint("broken", "no_such_module_anywhere", registry.PLUGINS))
    parse_config(BASE)
    with pytest.raises(
        ConfigError, match=r"the plugin 'broken' of .* cannot be imported: ModuleNotFoundError"
    ):
        parse_config(BASE, ["optimizer.name=lamb"])


class Watch(HookConfig):
    name: Literal["watch"] = "watch"

    def check(self, config: Config) -> None:
        if not config.data.valid:
            raise ValueError("hooks: watch needs data.valid")


def test_a_hook_refuses_a_config_that_it_does_not_go_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.hooks._found, "watch", Watch)
    with pytest.raises(ConfigError, match=r"^command line: hooks: watch needs data\.valid$"):
        parse_config(BASE, ["hooks=[{name: watch}]"])
    parse_config(BASE, ["hooks=[{name: watch}]", "data.valid=[{path: held}]"])


def test_two_parts_of_one_name_are_refused(plugins: list[EntryPoint]) -> None:
    register_halving()
    register_halving()  # imported a second time
    for name in ("halving", "cosine"):
        with pytest.raises(ConfigError, match=f"two parts of the name '{name}'"):
            registry.schedules.register(name)(OptimizerConfig)


def test_a_part_of_another_kind_is_refused(plugins: list[EntryPoint]) -> None:
    registry.schedules.register("adam", OptimizerConfig)
    with pytest.raises(
        ConfigError, match="'adam': is registered by a class that is no ScheduleConfig"
    ):
        parse_config(BASE, ["optimizer.schedule.name=adam"])


def test_a_state_that_would_be_taken_for_a_weight_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Bad\.STATES: 'master' is the name of something else"):
        type("Bad", (OptimizerConfig,), {"STATES": ("momentum", "master"), "__annotations__": {}})


def test_a_second_rule_for_a_module_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has a rule for parallelism already"):
        rule(torch.nn.Linear)(lambda module, layout: None)
