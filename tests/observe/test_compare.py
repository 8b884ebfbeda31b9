"""What `megalite runs` and `megalite compare` tell of the folders of runs."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megalite.cli import main
from megalite.observe import compare as comparing
from megalite.observe.compare import draw, table_of_settings
from megalite.observe.runs import RunRecord, run_folders, table_of_runs


def make_run(
    folder: Path, steps: int, ended: str | None = None, lr: float = 1e-3, **parallel: Any
) -> Path:
    """A run of 10 steps that has made `steps` of them, two tokens each, a minute each."""
    folder.mkdir(parents=True)
    values = {
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "model": {"preset": None, "family": "llama"},
        "parallel": {"tensor": 1, "zero_stage": 1} | parallel,
        "train": {"steps": 10},
        "optimizer": {"lr": lr, "betas": [0.9, 0.95]},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    lines = []
    for step in range(1, steps + 1):
        record = {
            "step": step,
            "loss": 4.0 / step,
            "tokens": 2 * step,
            "step_time_s": 60.0,
            "tokens_per_s": 0.03,
        }
        lines.append(json.dumps(record | {"lr": lr}))
        if step % 2 == 0:
            lines.append(json.dumps({"step": step, "valid_loss": 5.0 / step}))
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 3, "lo']))
    (folder / "lock").touch()
    if ended is not None:
        end = {"ended": {"status": ended, "step": steps}} if ended else {}
        (folder / "environment.json").write_text(
            json.dumps({"starts": [{"layout": {"data": 4}} | end]})
        )
    return folder


def test_a_table_says_what_became_of_each_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "a" / "done", 10, "finished")
    make_run(tmp_path / "a" / "failed", 4, "failed")
    make_run(tmp_path / "killed", 4, "")
    make_run(tmp_path / "old", 10, tensor=2)
    make_run(tmp_path / "new", 0)
    (tmp_path / "done" / "config.yaml").parent.mkdir()
    (tmp_path / "done" / "config.yaml").write_text("of no run")
    rows = {row[0]: row[1:] for row in table_of_runs(tmp_path)[1:]}
    assert {name: row[-2] for name, row in rows.items()} == {
        "a/done": "finished", "a/failed": "failed", "killed": "killed", "old": "finished", "new": "new",
    }  # fmt: skip
    assert rows["a/failed"][:5] == ["llama", "data 4", "4/10", "1.0000", "1.2500"]
    assert rows["old"][1] == "tensor 2, ZeRO-1"
    assert main(["runs", str(tmp_path / "a")]) == 0
    assert "done" in capsys.readouterr().out
    assert main(["runs", str(tmp_path / "done")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_model_that_a_run_goes_on_from_has_a_name_of_its_own(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "chat", 1, "finished")
    for hf, name in {
        "models/base": "base",
        "runs/first/checkpoints/step-00000057": "first",  # as many as there are runs have that step
        "owner/name": "name",
    }.items():
        (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"hf": hf}}))
        assert RunRecord(folder).model == name


def test_a_run_whose_folder_is_held_is_running(tmp_path: Path) -> None:
    """In another process, as it always is."""
    folder = make_run(tmp_path / "now", 4, "")
    program = "from megalite.runtime.run_folder import is_held; from pathlib import Path; "
    with (folder / "lock").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        command = [sys.executable, "-c", f"{program}print(is_held(Path({str(folder)!r})))"]
        assert (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"
        )
    assert RunRecord(folder).state == "killed"


def test_compared_runs_are_drawn_and_their_differences_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = make_run(tmp_path / "a", 10, lr=1e-3), make_run(tmp_path / "b", 6, lr=2e-3)
    assert main(["compare", str(a), str(b), "--output", str(tmp_path / "out")]) == 0
    found = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["a", "finished", "10", "20", "10:00", "0.4000", "0.5000", "0", "-"] in found
    assert ["optimizer.lr", "0.001", "0.002"] in found
    assert not any("run.name" in line for line in found)
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "<td>optimizer.lr</td><td>0.001</td><td>0.002</td>" in page
    assert "data:image/png;base64," in page
    assert (tmp_path / "out" / "compare.png").read_bytes()[1:4] == b"PNG"

    def without_matplotlib(*_: object) -> None:
        raise ImportError

    monkeypatch.setattr("megalite.observe.compare.draw", without_matplotlib)
    assert main(["compare", str(a), str(b), "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "compare.html").read_text()
    assert "data:image" not in page, "the picture of another comparison"


def test_curves_lie_where_their_steps_tokens_and_time_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, Any, Any]] = []
    runs = {name: RunRecord(make_run(tmp_path / name, 10)).records() for name in ("a", "b")}

    class Axes:
        def plot(self, x: Any, y: Any, *_: Any, **named: Any) -> None:
            drawn.append((named.get("label", "dots"), np.asarray(x), np.asarray(y)))

    for key in comparing.AXES:
        comparing._draw_run(Axes(), runs["a"], key, 60.0, "a", "red")  # type: ignore[arg-type]
    ends = [(label, x[-1]) for label, x, _ in drawn]
    # The last validation is that of step 10: 20 tokens, 10 minutes.
    assert ends == [("a", 10), ("dots", 10), ("a", 20), ("dots", 20), ("a", 10), ("dots", 10)]
    assert [list(x) for label, x, _ in drawn if label == "dots"][1] == [4, 8, 12, 16, 20]
    draw(runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_what_cannot_be_compared_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, new = make_run(tmp_path / "a", 10), make_run(tmp_path / "new", 0)
    for words, told in (
        ([a], "give 2 to 10 runs"),
        ([a, new], "new is no run with a step"),
        ([a, a], "a run is given twice"),
        ([a, tmp_path / "nowhere"], "nowhere is no run"),
        ([a, make_run(tmp_path / "b", 3), "--output", a / "lock"], "lock: "),
    ):
        assert main(["compare", *map(str, words)]) == 2
        assert told in capsys.readouterr().err
    assert table_of_settings({"a": RunRecord(a)}) == [["setting", "a"]]
    assert [folder.name for folder in run_folders(tmp_path)] == ["a", "b", "new"]
