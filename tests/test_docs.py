"""The pages for contributors name nothing that is not there."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from megalite.config import OptimizerConfig
from megalite.runtime.environment import (
    ALLOCATOR,
    ALWAYS,
    DETERMINISTIC,
    OLD_ALLOCATOR,
    set_defaults,
)

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
# Of the repository; what commands make, such as runs/, is not there yet.
FOLDERS = "megalite|csrc|tools|tests|configs|containers|slurm|docs"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "draw_architecture", ROOT / "tools" / "draw_architecture.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_names_in_the_pictures_are_in_the_code(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tool.missing_names() == []
    gone = tool.Step("", (), ("engine.native:NativeEngine.no_such_method", "no_such_module:f"))
    monkeypatch.setitem(tool.CHECKPOINT, "gone", gone)
    assert tool.missing_names() == list(gone.code)


def test_pictures_are_what_the_script_draws(tool: ModuleType) -> None:
    for name, picture in tool.PICTURES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == picture(), (
            "run tools/draw_architecture.py"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\((?!https?://)([^)\s]*)\)", text)]
    paths = re.findall(rf"`((?:{FOLDERS})/[\w./-]*)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
    headings = {
        re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
        for line in text.splitlines()
    }
    assert [
        anchor for anchor in re.findall(r"\]\(#([^)]*)\)", text) if anchor not in headings
    ] == []


def test_the_page_of_clusters_lists_the_variables_that_are_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (
        (ROOT / "docs/cluster.md").read_text(encoding="utf-8").partition("## What your network")[0]
    )
    listed = dict(re.findall(r"^\| `(\w+)` \| `(\S+)` \|", text, re.M))
    assert listed == ALWAYS | DETERMINISTIC
    for known, deterministic, wanted in (
        ({}, False, ALWAYS),
        ({}, True, listed),
        (
            {OLD_ALLOCATOR: "a", "TORCH_NCCL_HIGH_PRIORITY": "0"},
            False,
            {name: value for name, value in ALWAYS.items() if name != ALLOCATOR}
            | {"TORCH_NCCL_HIGH_PRIORITY": "0"},
        ),
    ):
        monkeypatch.setattr(os, "environ", dict(known))
        set_defaults(deterministic)
        assert {
            name: value for name, value in os.environ.items() if name != OLD_ALLOCATOR
        } == wanted


SETTINGS = re.findall(
    r"^```yaml\n(.*?)^```$", (ROOT / "docs/optimizers.md").read_text(encoding="utf-8"), re.M | re.S
)


@pytest.mark.parametrize("block", SETTINGS)
def test_settings_on_the_page_of_optimizers_are_settings(block: str) -> None:
    optimizer = yaml.safe_load(block)["optimizer"]
    name = "muon" if "groups" in optimizer else optimizer["name"]
    OptimizerConfig.model_validate({"lr": 1e-3, "name": name, **optimizer})
