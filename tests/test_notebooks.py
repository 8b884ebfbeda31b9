"""The program on docs/api.md runs cell by cell in a real kernel: progress and the loss curve change in
place, a mistake is one line, and a cell that is stopped has its run saved."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from user_folder import make

PAGE = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
ANSWERS = "[each.finish for each in generator.answer([generator.request('The', 8)] * 3)]"
MISTAKE = 'load_config("my.yaml", ["train.step=4"])'
STOPPED = """
import os, signal, threading, time
from pathlib import Path

def stop():
    while not Path("runs/long/metrics.jsonl").exists():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)  # what a notebook's stop button does
    time.sleep(2.1)
    os.kill(os.getpid(), signal.SIGINT)  # pressed again: no reason for the kernel to die

threading.Thread(target=stop).start()
long = load_config("my.yaml", ["run.name=long", "train.steps=1000000"])
train(long).name
"""


def test_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    make(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    cells = [*program.split("\n\n"), ANSWERS, MISTAKE, STOPPED, "long.run.name"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        allow_errors=True,
        resources={"metadata": {"path": str(tmp_path)}},
    ).execute()
    nbformat.write(notebook, tmp_path / "shown.ipynb")
    outputs = {cell.source: cell.outputs for cell in notebook.cells}
    errors = [each for shown in outputs.values() for each in shown if each.output_type == "error"]
    assert [error.ename for error in errors] == ["ConfigError"]
    assert errors == outputs[MISTAKE]
    assert re.fullmatch(r"ConfigError: .*train\.step\b.*", "\n".join(errors[0].traceback))

    (trained,) = (shown for cell, shown in outputs.items() if "train(config)" in cell)
    # A bar and a picture, each an output of its own, whatever it went through.
    bar, picture = html_of(trained)
    assert 'value="4" max="4"' in bar
    assert "step 4/4" in bar
    assert "data:image/png;base64,iVBOR" in picture
    printed = "".join(each.text for each in trained if each.output_type == "stream")
    assert "finished at step 4 of 4" in printed
    assert "step 1/4" not in printed  # which is for logs
    (finetuned,) = (shown for cell, shown in outputs.items() if "train(chat)" in cell)
    rows, bar, picture = html_of(finetuned)
    assert "tokens/s</code>" in rows
    assert not [each for each in finetuned if each.get("name") == "stderr"]
    (answers,) = html_of(outputs[ANSWERS])
    assert "3 of 3 answers, 24 tokens" in answers
    assert outputs[STOPPED][-1].data["text/plain"] == "'STOPPED'"
    assert [*(tmp_path / "runs/long/checkpoints").glob("step-*")]
    # The kernel is still there.
    assert outputs["long.run.name"][-1].data["text/plain"] == "'long'"


def html_of(outputs: list[Any]) -> list[str]:
    return [each.data["text/html"] for each in outputs if "text/html" in each.get("data", {})]
