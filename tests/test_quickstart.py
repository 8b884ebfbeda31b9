"""`megalite quickstart`: its steps, which of them are left out when it is called again, and what it says
where one fails. The training itself is run by `--whole`."""

from __future__ import annotations

import importlib.util
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megalite.cli import main, make_parser
from megalite.quickstart import corpus, report, run


@pytest.fixture
def verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The verbs that are called, which leave what the next step looks for."""
    called: list[tuple[str, ...]] = []

    def call(folder: Path, *words: str) -> None:
        called.append(words)
        made = {"tokenizer": "--output", "preprocess": "--output-prefix"}.get(words[0])
        if made:
            path = folder / words[words.index(made) + 1]
            if words[0] == "preprocess":
                path = Path(f"{path}_text_document.idx")
                path.touch()
            else:
                path.mkdir()
        if words[0] == "convert":
            (folder / words[2]).mkdir(parents=True)

    monkeypatch.setattr(run, "run_verb", call)
    monkeypatch.setattr(report, "report", lambda run, base: 0)
    find = importlib.util.find_spec
    absent = {"transformers", "wandb"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in absent else find(name, *a)
    )
    return called


@pytest.mark.parametrize(
    ("model", "kind", "sample"),
    [("decoder", "bpe", "generate"), ("bert", "wordpiece", "fill"), ("t5", "t5", "generate")],
)
def test_steps_are_verbs_that_can_be_typed_and_what_is_made_is_kept(
    tmp_path: Path,
    verbs: list[tuple[str, ...]],
    capsys: pytest.CaptureFixture[str],
    model: str,
    kind: str,
    sample: str,
) -> None:
    name = "quickstart" if model == "decoder" else f"quickstart-{model}"
    assert main(["quickstart", model, "--dir", str(tmp_path / "new")]) == 0
    assert [words[0] for words in verbs] == [
        *("tokenizer", "preprocess", "preprocess", "launch", "launch", sample, "convert")
    ]
    for words in verbs:
        make_parser().parse_args(words)
    assert verbs[0][-1] == kind
    # As from the wheel alone, without the extras observe and hf.
    assert all("observe.wandb.mode=disabled" in words for words in verbs[3:5])
    assert "pip install 'megalite[hf]'" in capsys.readouterr().out
    data = tmp_path / "new" / "data" / name
    assert {path.name for path in data.iterdir()} == {
        *("train.jsonl", "valid.jsonl", "tokenizer"),
        *("train_text_document.idx", "valid_text_document.idx"),
    }
    before = (data / "train.jsonl").stat().st_mtime_ns
    verbs.clear()
    assert main(["quickstart", model, "--dir", str(tmp_path / "new")]) == 0
    assert [words[0] for words in verbs] == ["launch", "launch", sample]
    assert (data / "train.jsonl").stat().st_mtime_ns == before


def test_a_step_that_fails_ends_it_with_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(corpus, "write_corpus", lambda folder: folder.mkdir(parents=True) or "")
    data = tmp_path / "data" / "quickstart"
    (data / "tokenizer").mkdir(parents=True)
    (data / "valid.jsonl").write_text("")
    assert main(["quickstart", "--dir", str(tmp_path)]) == 2
    captured = capfd.readouterr()
    assert "$ megalite preprocess --input data/quickstart/train.jsonl" in captured.out
    assert captured.err.count("error: ") == 1
    (tmp_path / "file").touch()
    assert main(["quickstart", "--dir", str(tmp_path / "file")]) == 2
    assert f"error: --dir {tmp_path / 'file'}: File exists" in capfd.readouterr().err


def test_a_signal_reaches_the_step(tmp_path: Path) -> None:
    """A training that is asked to stop saves, and the quickstart waits for it."""
    step = "trap 'sleep 0.2; touch saved; exit 75' TERM; touch ready; while :; do sleep 0.05; done"
    code = f"""
import sys
from pathlib import Path
from megalite.quickstart import run
sys.executable = "/bin/sh"
run.subprocess.Popen = lambda command, made=run.subprocess.Popen, **how: made(["sh", "-c", {step!r}], **how)
try:
    run.run_verb(Path({str(tmp_path)!r}), "train")
except run.Stopped as stopped:
    sys.exit(stopped.status)
"""
    with subprocess.Popen([sys.executable, "-c", code]) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    assert (tmp_path / "saved").exists()


def test_the_whole_quickstart(
    tmp_path: Path, request: pytest.FixtureRequest, capfd: pytest.CaptureFixture[str]
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("minutes: one of the cases of --whole")
    assert main(["quickstart", "--dir", str(tmp_path)]) == 0
    out = capfd.readouterr().out
    assert "largest logit difference" in out
    assert (tmp_path / "runs" / "quickstart" / "exported" / "model.safetensors").exists()
    shutil.rmtree(tmp_path / "data")
