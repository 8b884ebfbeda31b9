"""The program on docs/api.md runs as it stands, in a process of its own, with no guard around it; the
table on docs/recipes.md is what the planner says."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import megalite
from user_folder import make

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")


def test_the_program_on_the_page_runs(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("one of the cases of --whole; test_notebooks.py runs it cell by cell")
    make(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"],
        cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished at step 4 of 4" in done.stdout
    assert [*(tmp_path / "runs/chat/checkpoints").glob("step-*")]


def test_the_page_has_every_public_name() -> None:
    assert {*re.findall(r"^\| `(\w+)", PAGE, re.M)} == {*megalite.__all__}


def test_recipes_on_gpus_are_what_the_planner_says() -> None:
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "tools" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    recipes = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipes)
    text = recipes.PAGE.read_text(encoding="utf-8")
    assert text == recipes.page(text), "run tools/recipes.py"
