from __future__ import annotations

import json
import math
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.observe import plot, queued
from megalite.observe.console import clock
from megalite.observe.jsonl import JsonlSink, read_metrics
from megalite.observe.plot import plot_loss
from megalite.observe.recorder import Recorder
from megalite.utils.counts import compact

MODEL = {
    **{
        "family": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "num_layers": 2,
        "num_attention_heads": 4,
    },
    **{"intermediate_size": 128, "max_positions": 128},
}
VALUES = {
    "run": {"name": "demo"},
    "model": MODEL,
    "data": {"train": [{"path": "corpus"}], "seq_length": 128},
    "train": {"steps": 20, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
}


def make_config(*overrides: str) -> Config:
    return parse_config(VALUES, overrides)


def record(step: int, loss: float | None = None) -> dict[str, float]:
    return {
        **{
            "step": step,
            "loss": 5.0 / step if loss is None else loss,
            "lr": 1e-3,
            "grad_norm": 0.5,
        },
        **{"tokens": 512 * step, "tokens_per_s": 51_200.0, "step_time_s": 0.01, "tflops": 0.5},
    }


def valid(step: int, loss: float = 2.0) -> dict[str, float]:
    return {"step": step, "valid_loss": loss, "valid_perplexity": math.exp(loss)}


def play(recorder: Recorder, first: int, last: int) -> None:
    """Steps first to last, with an evaluation every fifth."""
    for step in range(first, last + 1):
        recorder.step(record(step))
        if step % 5 == 0:
            recorder.evaluation(valid(step, 10.0 / step))


def open_recorder(folder: Path, *overrides: str, **resume: Any) -> Recorder:
    return Recorder(make_config(*overrides), folder, num_params=123_456, **resume)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that `plot` has drawn in a test, with their axes, as they come."""
    drawn: list[Any] = []
    made = plot.new_figure
    monkeypatch.setattr(plot, "new_figure", lambda *size: drawn.append(made(*size)) or drawn[-1])
    return drawn


def test_a_resumed_run_leaves_the_metrics_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole = open_recorder(tmp_path / "whole")
    play(whole, 1, 20)
    whole.close("finished")

    cut = tmp_path / "cut"
    play(open_recorder(cut), 1, 13)  # killed: never closed
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "lo')  # in the middle of a line
    resumed = open_recorder(cut, start_step=10)
    play(resumed, 11, 20)
    resumed.close("finished")
    assert (cut / "metrics.jsonl").read_text() == (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert len((cut / "metrics.jsonl").read_text().splitlines()) == 24
    assert not list(cut.glob("*.tmp"))


def test_a_line_is_on_disk_at_once_and_stays_json_when_the_loss_is_not_a_number(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    sink.step(record(1, loss=math.nan))
    line = path.read_text()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] is None
    assert [entry["step"] for entry in read_metrics(path)] == [1]


def test_a_log_file_gets_a_plain_line_every_log_every_steps(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = open_recorder(tmp_path, "observe.log_every=4", layout={"tensor": 2, "data": 1})
    play(recorder, 1, 20)
    recorder.message("saved checkpoints/step-00000020")
    recorder.close("finished")
    lines = capfd.readouterr().out.splitlines()
    assert lines[0] == "demo  llama, 123k parameters, bf16"
    assert lines[1] == "tensor 2  data 1"
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split("/")[0].split()[-1] for line in steps] == ["1", "4", "8", "12", "16", "20"]
    # The mean of the steps since the line before.
    losses = [float(line.split("loss")[1].split()[0]) for line in steps]
    assert losses[1] == pytest.approx(sum(5.0 / step for step in (2, 3, 4)) / 3, abs=1e-4)
    # Aligned.
    assert (
        len({line.index("  loss ") for line in steps} | {line.index("tokens/s") for line in steps})
        == 2
    )
    assert max(len(line) for line in steps) <= 120
    assert "valid 10/20  loss   1.0000  perplexity 2.72  down 1.0000, best so far  <<<" in lines
    assert "saved checkpoints/step-00000020" in lines
    assert lines[-1].startswith("finished at step 20 of 20 after 0:0")


def test_a_perplexity_is_no_row_of_digits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    recorder = open_recorder(tmp_path)
    record = {"step": 4, "valid_loss": 100.0, "valid_perplexity": math.exp(100.0)}
    recorder.evaluation(record | {"valid_perplexity_ema": 19.15131})
    recorder.close("stopped")
    assert "perplexity 2.69e+43  perplexity ema 19.15 " in capfd.readouterr().out


def test_a_resumed_run_knows_how_good_it_was(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = open_recorder(tmp_path)
    for step, loss in ((4, 1.0), (8, 3.0), (12, 0.5)):
        before.evaluation(valid(step, loss))
    before.close("stopped")
    capfd.readouterr()
    after = open_recorder(tmp_path, start_step=8)  # the evaluation of step 12 is done again
    after.evaluation(valid(12, 2.0))
    after.evaluation(valid(16, 0.75))
    after.evaluation(valid(18, math.nan))
    after.evaluation(valid(20, 0.5))
    after.close("stopped")
    better, best, bad, behind = (
        line for line in capfd.readouterr().out.splitlines() if line.startswith("valid")
    )
    assert "down 1.0000" in better
    assert "best" not in better
    assert "down 1.2500, best so far" in best
    assert "up" not in bad + behind, "nothing is above or below NaN"
    assert "best so far" in behind, "a loss that is NaN is not the best one"


def test_the_end_of_a_run_that_had_more_steps_before(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_recorder(tmp_path, start_step=30).close("finished")
    assert "finished at step 30 after 0:00" in capfd.readouterr().out


def test_a_warmup_that_does_not_end_is_a_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    open_recorder(tmp_path, "optimizer.schedule.warmup_steps=20").close("finished")
    assert (
        "warning: optimizer.schedule.warmup_steps = 20 is not over at train.steps = 20"
        in capfd.readouterr().out
    )
    open_recorder(tmp_path, "optimizer.schedule.warmup_steps=19").close("finished")
    assert "warning" not in capfd.readouterr().out


def test_a_terminal_gets_one_live_line(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from test_recorder import *\n"
        "r = open_recorder(Path(sys.argv[1])); play(r, 1, 20); r.close('stopped')"
    )
    master, slave = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "110"}
    command = [sys.executable, "-c", program, str(tmp_path), str(Path(__file__).parent)]
    child = subprocess.Popen(command, stdout=slave, stderr=subprocess.PIPE, env=env)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # how Linux says that the terminal's other side was closed
        pass
    os.close(master)
    assert child.wait() == 0, child.stderr and child.stderr.read().decode()
    text = shown.decode()
    assert "\x1b[2K" in text  # redrawn in place
    assert "tokens/s" in text
    assert "ETA 0:00" in text
    assert "valid 10/20" in text
    assert "step  10/20" not in text  # no plain lines besides
    assert "stopped at step 20 of 20" in text


def test_numbers_are_short() -> None:
    assert [compact(x) for x in (7, 999, 1_234, 56_789, 8.03e9, 1.5e13)] == [
        *("7", "999", "1.23k", "56.8k", "8.03B", "15.0T")
    ]
    assert [clock(x) for x in (4.6, 61, 3_600, 200_000)] == ["0:05", "1:01", "1:00:00", "2d 7h"]


@pytest.mark.usefixtures("drawn")
def test_the_plot_is_a_picture_with_every_part(tmp_path: Path) -> None:
    recorder = open_recorder(tmp_path)
    play(recorder, 1, 20)
    recorder.close("finished")
    drawn = (tmp_path / "loss.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == drawn  # the same numbers give the same picture
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "with.png", {"unigram": 4.0})
    assert (tmp_path / "with.png").read_bytes() != drawn
    assert not list(tmp_path.glob("*.tmp"))


def test_a_short_run_is_drawn_over_whole_steps(tmp_path: Path, figures: list[Any]) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 6):
        sink.step(record(step))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    ticks = figures[0].axes[1].get_xticks()
    assert all(tick == round(tick) for tick in ticks), "a step has no half"


def test_low_losses_and_what_is_predicted_are_in_sight_and_a_spike_is_not(
    tmp_path: Path, figures: list[Any]
) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 201):
        sink.step(record(step, loss=50.0 if step == 90 else 2.0 if step % 20 == 0 else 4.0))

    def band(steps: Any) -> plot.np.ndarray:
        return plot.np.repeat([[8.0], [8.1], [8.3]], len(steps), axis=1)

    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png", band=band)
    upper = figures[0].axes[0]
    low, high = upper.get_ylim()
    assert 1.0 < low < 2.0
    assert 8.3 < high < 40.0
    labels = [text.get_text() for text in upper.get_legend().get_texts()]
    assert labels[-1] == "predicted  8.100  (8.000 to 8.300)"


def test_the_plot_survives_a_run_that_diverged(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    for step in range(1, 5):
        sink.step(record(step, loss=math.nan))
    plot_loss(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


@pytest.mark.usefixtures("drawn")
def test_drawing_never_takes_much_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr(
        plot, "plot_loss", lambda metrics, out, **_: (drawn.append(out), time.sleep(0.02))
    )
    monkeypatch.setattr(plot, "SHARE_OF_TIME", 1e-4)  # 0.02 s of drawing at most every 200 s
    recorder = open_recorder(tmp_path)
    play(recorder, 1, 20)
    assert len(drawn) == 1
    recorder.close("finished")
    assert len(drawn) == 2  # the last picture always shows everything


def test_smoothing_keeps_both_ends_and_leaves_out_what_is_not_finite() -> None:
    values = plot.np.array([9.0, 5.0, math.nan, 3.0, 3.0, 3.0])
    smooth = plot.smooth(values, window=2)
    assert smooth[0] == 9.0  # not bent by its neighbours
    assert smooth[1] == 7.0  # 9 and 5; the third point is missing
    assert smooth[-1] == 3.0


class Broken:
    """A sink that fails at one of its calls."""

    name = "broken"

    def __init__(self, call: str):
        self.call, self.calls = call, 0

    def __getattr__(self, name: str) -> Any:
        def method(argument: Any) -> None:
            self.calls += 1
            if name == self.call:
                raise OSError("no space left on device")

        return method


@pytest.mark.parametrize("call", ["step", "evaluation", "close"])
def test_a_sink_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], call: str
) -> None:
    recorder = open_recorder(tmp_path)
    broken = Broken(call)
    recorder._sinks.insert(0, broken)
    play(recorder, 1, 20)
    recorder.close("finished")
    out = capfd.readouterr().out
    assert out.count("broken turned off, training goes on: no space left on device") == 1
    assert broken.calls == {"step": 1, "evaluation": 6, "close": 25}[call]
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 24  # the others heard everything


def test_a_console_that_is_gone_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = open_recorder(tmp_path)
    monkeypatch.setattr("builtins.print", lambda *a, **k: (_ for _ in ()).throw(BrokenPipeError()))
    play(recorder, 1, 20)
    recorder.close("finished")
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 24


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    ("module", "override", "what"),
    [
        ("matplotlib.figure", "observe.tensorboard=false", "loss.png turned off"),
        ("torch.utils.tensorboard", "observe.tensorboard=true", "TensorBoard turned off"),
        ("wandb", "observe.wandb.mode=offline", "W&B turned off"),
    ],
)
def test_a_missing_package_is_one_warning(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    override: str,
    what: str,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    recorder = open_recorder(tmp_path, override)
    play(recorder, 1, 20)
    recorder.close("finished")
    assert capfd.readouterr().out.count(what) == 1
    assert len(list(read_metrics(tmp_path / "metrics.jsonl"))) == 24


def test_tensorboard_holds_every_scalar(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = open_recorder(tmp_path, "observe.tensorboard=true")
    play(recorder, 1, 20)
    recorder.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    # Stored as fp32.
    assert events.Scalars("valid/perplexity")[-1].value == pytest.approx(math.exp(0.5), rel=1e-6)


def test_wandb_offline_writes_one_run_under_one_id_over_resumes(tmp_path: Path) -> None:
    first = open_recorder(tmp_path, "observe.wandb.mode=offline")
    play(first, 1, 10)
    first.close("stopped")
    time.sleep(1.0)  # wandb names an offline folder by the second
    second = open_recorder(
        tmp_path, "observe.wandb.mode=offline", start_step=10, wandb_id=first.wandb_id
    )
    play(second, 11, 20)
    second.close("finished")
    assert second.wandb_id == first.wandb_id
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*/run-{first.wandb_id}.wandb"))
    assert len(files) == 2
    for file, steps in zip(files, (range(1, 11), range(11, 21)), strict=True):
        # Protobuf, with the values as JSON text. A process of wandb's own writes it, on a busy
        # machine after `finish`.
        end = time.monotonic() + 30
        while b"valid/perplexity" not in (uploaded := file.read_bytes()) and time.monotonic() < end:
            time.sleep(0.1)
        assert b"train/grad_norm" in uploaded
        assert b"valid/perplexity" in uploaded
        for step in (6, 7, 9, 13, 14, 19):  # whose losses have digits enough to be found
            assert (json.dumps(5.0 / step).encode() in uploaded) == (step in steps)
        # Each start's own environment, with what environment.json hides hidden.
        assert f'"after_step":{steps[0] - 1}'.encode() in uploaded
        assert f'"torch":"{torch.__version__}"'.encode() in uploaded


class FakeWandb:
    """What WandbSink uses of wandb; `init` is what happens at a start."""

    class Settings:
        def __init__(self, **settings: Any): ...

    def __init__(self, init: Any):
        self.init = init

    def setup(self) -> Any:
        return type("", (), {"settings": type("", (), {"base_url": "https://api.wandb.ai"})})

    def teardown(self) -> None: ...


class FakeRun:
    """A run whose calls fail where `broken` says so."""

    dir, url = "offline-run/files", None

    def __init__(self, broken: str = "", answers: threading.Event | None = None):
        self.broken, self.answers = broken, answers

    def log(self, values: dict[str, float], step: int) -> None:
        self.answer("log")

    def finish(self, exit_code: int) -> None:
        self.answer("finish")

    def answer(self, call: str) -> None:
        if self.answers:
            self.answers.wait()
        if call == self.broken:
            raise RuntimeError(f"{call} failed with key {os.environ['WANDB_API_KEY']}")


def use_wandb(monkeypatch: pytest.MonkeyPatch, init: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(init))
    monkeypatch.setenv("WANDB_API_KEY", "s3cret")


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_wandb_that_fails_anywhere_is_one_warning_without_the_key(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def init(**settings: Any) -> FakeRun:
        run = FakeRun(broken)
        run.answer("init")
        return run

    use_wandb(monkeypatch, init)
    recorder = open_recorder(tmp_path, "observe.wandb.mode=offline")
    play(recorder, 1, 20)
    recorder.close("finished")
    out = capfd.readouterr().out
    assert out.count("W&B turned off, training goes on: ") == 1
    assert f"{broken} failed with key <WANDB_API_KEY>" in out
    assert "s3cret" not in out


@pytest.mark.parametrize("key", [True, False])
def test_wandb_online_without_a_key_or_a_server_records_offline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: bool
) -> None:
    asked: list[str] = []

    def init(mode: str, **settings: Any) -> FakeRun:
        asked.append(mode)
        if mode == "online":
            raise ConnectionError("no route to host")
        return FakeRun()

    use_wandb(monkeypatch, init)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    if not key:
        monkeypatch.delenv("WANDB_API_KEY")
    recorder = open_recorder(tmp_path, "observe.wandb.mode=online")
    recorder.step(record(1))
    recorder.close("finished")
    assert asked == (["online", "offline"] if key else ["offline"])
    out = capfd.readouterr().out
    assert ("no route to host" if key else "no API key") in out
    assert "wandb sync" in out


def test_wandb_that_hangs_costs_the_steps_nothing_and_the_end_little(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queued, "CLOSE_SECONDS", 0.2)
    answers = threading.Event()
    use_wandb(monkeypatch, lambda **settings: FakeRun(answers=answers))
    recorder = open_recorder(tmp_path, "observe.wandb.mode=offline")
    play(recorder, 1, 20)
    recorder.close("finished")  # or this would never be over
    answers.set()
    assert "W&B turned off, training goes on: no answer in 0.2 s" in capfd.readouterr().out
