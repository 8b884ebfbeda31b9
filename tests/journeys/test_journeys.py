"""Tasks of a user, typed from the pages alone, end in what the page promises: tasks.yaml."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megalite.quickstart.ask import free_port
from user_folder import make, type_in

ROOT = Path(__file__).parents[2]
TASKS = yaml.safe_load(Path(__file__).with_name("tasks.yaml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("user"))


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"].replace(" ", "-"))
def test_a_task_ends_in_what_the_page_promises(
    task: dict[str, Any],
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    if not (task.get("fast") or request.config.getoption("--whole")):
        pytest.skip("with --whole")
    folder = shutil.copytree(made, tmp_path / "user")
    for name in ("configs", "slurm", "tools", "megalite"):
        (folder / name).symlink_to(ROOT / name)
    monkeypatch.chdir(folder)
    told = ""
    for command in task["types"]:
        status, printed = type_in(command, capfd, {"PORT": str(free_port())})
        told += printed
        assert status == 0, told
    for words in task.get("says", ()):
        assert re.search(words, told), told
    for name in task.get("makes", ()):
        assert (folder / name).is_file(), told


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task["task"].replace(" ", "-"))
def test_the_page_shows_what_is_typed(task: dict[str, Any]) -> None:
    pages = [task["page"]] if isinstance(task["page"], str) else task["page"]
    page = "".join((ROOT / name).read_text(encoding="utf-8") for name in pages)
    for command in task["types"]:
        for verb in re.findall(r"megalite (\w+)", command):
            assert re.search(rf"megalite {verb}|`{verb}|{verb}`", page), verb


def test_there_are_enough() -> None:
    assert len(TASKS) >= 40
    assert all(task.get("says") or task.get("makes") for task in TASKS)
