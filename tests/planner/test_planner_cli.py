"""`megalite plan`, as it is typed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.cli import main
from megalite.config_file import load_config
from megalite.planner import timeline
from megalite.planner.simulate import Event

CONFIG = """
run: {name: test}
model: {preset: llama-1b}
data: {train: [{path: x}], seq_length: 2048}
parallel: {tensor: 2, pipeline: 4, virtual: 2, schedule: interleaved}
train: {steps: 1000, global_batch_size: 64, micro_batch_size: 1}
optimizer: {lr: 1.0e-3}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return str(file)


def test_report(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", config, "--gpus", "32", "--gpu", "h200", "--tokens", "300B"]) == 0
    text = capsys.readouterr().out
    for part in (
        "llama-1b, 1.236 B parameters, on 32 × H200 SXM (4 nodes of 8, ib-ndr)", "pipeline 4 × data 4 × tensor 2",
        "bubble", "MFU", "pipeline 3", "fits:", "tokens/s", "within the node", "ib-ndr", "300 B tokens take",
        "GPU-hours", "Predicted, not measured", "--interconnect says otherwise",
    ):  # fmt: skip
        assert part in text, text
    assert max(map(len, text.splitlines())) <= 100


def test_overrides_and_interconnect(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        config,
        "--gpus",
        "32",
        "--gpu",
        "h200",
        "--interconnect",
        "ethernet-10",
        "parallel.virtual=4",
    ]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "4 stages a rank" in text
    assert "ethernet-10" in text
    assert "says otherwise" not in text


def test_what_does_not_fit_is_said(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", config, "model.preset=llama-13b", "--gpus", "8", "--gpu", "rtx 4090"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "DOES NOT FIT" in text
    assert "taken as typical" in text


def test_search_writes_a_config(
    config: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", config, "--gpus", "8", "--gpu", "h100", "--search", "--picture", "p.png"]
    arguments += ["--tokens", "100B"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "layouts on 8 × H100 SXM" in text
    assert max(map(len, text.splitlines())) <= 100
    best = load_config(tmp_path / "best.yaml")
    assert best.model.num_layers == 16
    assert best.train.tokens == 10**11
    assert best.train.steps == -(-(10**11) // (best.train.global_batch_size * best.data.seq_length))
    written = (tmp_path / "best.yaml").read_text()
    assert "num_layers" not in written, "the preset says so"
    assert len(written.splitlines()) < 40
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert main(arguments) == 2
    assert "best.yaml exists already" in capsys.readouterr().err


def test_picture(config: str, tmp_path: Path) -> None:
    for name, overrides in {
        "a.png": [],
        "b.png": ["parallel.schedule=zero_bubble"],
        "c.png": ["parallel.pipeline=1"],
    }.items():
        more = ["parallel.virtual=1", "parallel.schedule=1f1b"] if name == "c.png" else []
        arguments = [
            "plan",
            config,
            *overrides,
            *more,
            "--gpus",
            "8",
            "--gpu",
            "h100",
            "--picture",
            name,
        ]
        assert main(arguments) == 0
        assert (tmp_path / name).stat().st_size > 10_000
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("count", [4, 400])
def test_a_picture_of_many_passes_shows_where_they_begin_and_end(count: int) -> None:
    """Where all were drawn, they would be a grey wall; of few none may be missing."""
    events = [Event(0, kind, 0, n, 3.0 * n + at, 3.0 * n + end) for n in range(count)
              for kind, at, end in (("F", 0.0, 1.0), ("B", 1.0, 3.0))]  # fmt: skip
    estimate: Any = SimpleNamespace(
        timeline=SimpleNamespace(events=events), step_time_s=3.0 * count
    )
    parts = timeline._parts(estimate)
    assert (parts[0][0], parts[-1][1]) == (0.0, 3.0 * count)
    assert len(parts) == (1 if count == 4 else 2)
    shown = sum(end - start for start, end in parts)
    assert timeline.WIDTH_IN * 0.9 / shown >= timeline.NARROWEST_PASS_IN * 0.6


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--gpus", "32", "--gpu", "h201"], "--gpu 'h201' is not known"),
        (["--gpus", "31", "--gpu", "h200"], "does not divide the 31"),
        (["--gpus", "32", "--gpu", "h200", "--nodes-of", "0"], "--nodes-of 0"),
        (["--gpus", "32", "--gpu", "h200", "--tokens", "lots"], "--tokens 'lots'"),
        (["--gpus", "32", "--gpu", "h200", "--interconnect", "string"], "--interconnect 'string'"),
        (["--gpus", "32", "--gpu", "h200", "--output", "x.yaml"], "--search"),
        (["--gpus", "32", "--gpu", "h200", "--picture", "none/x.png"], "none/x.png"),
        (["--gpus", "32", "--gpu", "h200", "train.precision=fp32"], "train.precision"),
    ],
)
def test_mistakes_are_explained(
    config: str, capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str
) -> None:
    assert main(["plan", config, *arguments]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output", "--picture"])
def test_the_config_is_not_written_over(
    config: str, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    before = Path(config).read_text()
    assert main(["plan", config, "--gpus", "32", "--gpu", "h200", "--search", option, config]) == 2
    assert f"{config} is an input, and {config} would be written over it" in capsys.readouterr().err
    assert Path(config).read_text() == before


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1e12", 1e12), ("15T", 15e12), ("300b", 3e11), ("2.5M", 2.5e6), ("7", 7.0)],
)
def test_tokens(text: str, tokens: float) -> None:
    from megalite.planner.report import parse_tokens

    assert parse_tokens(text) == tokens


def test_fp8_is_predicted_and_what_it_rests_on_is_said(
    config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def step(gpu: str, *overrides: str) -> tuple[float, str]:
        arguments = ["plan", config, "--gpus", "8", "--gpu", gpu, "parallel.pipeline=1"]
        arguments += ["model.preset=llama-8b", "parallel.virtual=1", "parallel.schedule=1f1b"]
        assert main([*arguments, *overrides]) == 0
        text = capsys.readouterr().out
        (line,) = [line for line in text.splitlines() if line.startswith("step ")]
        return float(line.split()[1]), text

    plain, _ = step("h200")
    quick, text = step("h200", "train.fp8.recipe=blockwise")
    # Published: 1.1 to 1.5 times as quick.
    assert 1.1 < plain / quick < 1.6
    assert "1979 TFLOP/s" in text
    assert "neither has been measured" in text
    # Not on all layers: those left out cost what they did.
    some, _ = step("h200", "train.fp8.recipe=blockwise", "train.fp8.first_last_bf16=[8,8]")
    assert quick < some < plain
    # A Hopper has no blocks of 32: rounding comes on top.
    slow, text = step("h200", "train.fp8.recipe=mxfp8")
    assert slow > plain
    assert "mxfp8 on H200 SXM is no quicker" in text
