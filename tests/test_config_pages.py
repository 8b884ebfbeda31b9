"""What is made of the schema of configs: the list of keys, the starter, and the schema for editors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from megalite.cli import main
from megalite.config.catalog import REQUIRED, catalog
from megalite.config.json_schema import json_schema
from megalite.config.starter import OFFERED
from megalite.config_file import load_config, parse_config
from megalite.utils.resources import configs_dir, presets

CONFIGS = [
    path for path in sorted(configs_dir().glob("*.yaml")) if "run:" in path.read_text("utf-8")
]


TOLD = """
import json
from megalite.commands.config import markdown
from megalite.config.catalog import catalog
from megalite.config.json_schema import json_schema
keys = [key for section in catalog().values() for key in section]
print(json.dumps([{key.name: key.description for key in keys}, markdown(), json_schema()]))
"""


@pytest.fixture(scope="module")
def told() -> tuple[dict[str, str], str, dict[str, Any]]:
    """Descriptions by key, the page and the schema, by a process that has no parts of other tests."""
    done = subprocess.run([sys.executable, "-c", TOLD], capture_output=True, text=True, check=True)
    descriptions, page, schema = json.loads(done.stdout)
    return descriptions, page, schema


def test_every_key_says_what_it_means(told: tuple[dict[str, str], str, dict[str, Any]]) -> None:
    assert [name for name, description in told[0].items() if not description] == []
    assert set(OFFERED) <= told[0].keys()


def test_the_page_and_the_stored_schema_are_current(
    told: tuple[dict[str, str], str, dict[str, Any]],
) -> None:
    """A key that was added, or whose default has changed."""
    page = configs_dir().parent / "docs" / "config.md"
    assert page.read_text("utf-8") == told[1], "megalite config keys --markdown > docs/config.md"
    stored = json.loads((configs_dir() / "config.schema.json").read_text("utf-8"))
    assert stored == told[2], "megalite config schema > configs/config.schema.json"


@pytest.fixture(scope="module")
def schema() -> jsonschema_rs.Validator:
    return jsonschema_rs.validator_for(json_schema())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_editors_take_a_config_as_megalite_does(
    path: Path, schema: jsonschema_rs.Validator
) -> None:
    """As it was written, and with every default written out as a run keeps it."""
    values = yaml.safe_load(path.read_text("utf-8"))
    assert [error.message for error in schema.iter_errors(values)] == []
    if "hf" not in values["model"]:
        written = yaml.safe_load(parse_config(values).to_yaml())
        assert [error.message for error in schema.iter_errors(written)] == []
    first = path.read_text("utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=config.schema.json"


@pytest.mark.parametrize(
    "setting",
    [
        "train: {stpes: 3}", "optimizer: {lr: big}", "train: {precision: fp16}", "model: {preset: none}",
        "data: {split: [1, 2]}", "optimizer: {lr: 0}", "data: {train: [{paht: a}]}", "trian: {}",
        "optimizer: {schedule: {name: cosin}}",
    ],
)  # fmt: skip
def test_editors_mark_mistakes(setting: str, schema: jsonschema_rs.Validator) -> None:
    values = yaml.safe_load((configs_dir() / "quickstart.yaml").read_text("utf-8"))
    for section, changes in yaml.safe_load(setting).items():
        values[section] = values.get(section, {}) | changes
    assert not schema.is_valid(values)


@pytest.mark.parametrize("preset", presets())
def test_a_starter_is_a_config(
    preset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is, and with each line uncommented that has a value."""
    path = tmp_path / "new.yaml"
    assert main(["config", "new", "--preset", preset, "--output", str(path)]) == 0
    config = load_config(path)
    assert config.model.preset == preset
    assert main(["config", "new", "--preset", preset, "--output", str(path)]) == 2, "is kept"
    assert "exists; name a new file" in capsys.readouterr().err
    keys = {key.name: key.default for section in catalog().values() for key in section}
    lines = path.read_text("utf-8").splitlines()
    offered = {key.rpartition(".")[2]: keys[key] for key in OFFERED}
    shown = [line.strip() for line in lines]
    assert [
        name
        for name, default in offered.items()
        if f"# {name}: {default}" not in shown and default != REQUIRED
    ] == []


def test_config_shows_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "keys", "data.fim"]) == 0
    assert "data.fim.rate = 0.5   [number, > 0, ≤ 1]" in capsys.readouterr().out
    assert main(["config", "keys", "data.fmi"]) == 2
    assert "did you mean 'data.fim'?" in capsys.readouterr().err
    assert main(["config", "presets"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0] for row in rows[1:]} == set(presets())
    assert ["llama-8m", "8.00M", "llama", "causal", "8", "256", "8", "8192", "2048"] in rows
