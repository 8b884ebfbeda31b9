"""MLflow, Prometheus and the webhook, each against a server of this process."""

from __future__ import annotations

import json
import math
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from listening import listening
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.errors import ConfigError
from megalite.observe import mlflow, prometheus, webhook
from megalite.observe.prometheus import metric_of
from megalite.observe.recorder import Recorder
from megalite.runtime.error_file import LAUNCHER
from megalite.utils import webhooks
from megalite.utils.resources import configs_dir

VALUES = {
    "run": {"name": "demo"},
    "model": {
        "family": "llama", "vocab_size": 256, "hidden_size": 64, "num_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 128, "max_positions": 128,
    },
    "data": {"train": [{"path": "corpus"}], "seq_length": 128},
    "train": {"steps": 20, "global_batch_size": 4},
    "optimizer": {"lr": 1e-3},
}  # fmt: skip


SPEED = {"lr": 1e-3, "tokens_per_s": 51_200.0, "step_time_s": 0.01}


def make_config(*overrides: str) -> Config:
    return parse_config(VALUES, overrides)


def record(step: int, **more: float) -> dict[str, float]:
    return {
        "step": step,
        "loss": 5.0 / step,
        "grad_norm": math.nan,
        "tokens": 512.0 * step,
        **SPEED,
        **more,
    }


def open_recorder(folder: Path, *overrides: str, start_step: int = 0) -> Recorder:
    return Recorder(make_config(*overrides), folder, num_params=123_456, start_step=start_step)


class Server:
    """As much of MLflow's REST API as a run needs."""

    def __init__(self) -> None:
        self.created = 0
        self.metrics: list[tuple[str, int, Any]] = []
        self.params: dict[str, str] = {}
        self.statuses: list[str] = []

    def __call__(self, path: str, body: Any) -> tuple[int, Any]:
        call = path.partition("?")[0].removeprefix("/api/2.0/mlflow/")
        if call == "experiments/get-by-name":
            return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "none"}
        if call == "experiments/create":
            return 200, {"experiment_id": "7"}
        if call == "runs/create":
            self.created += 1
            assert (body["experiment_id"], body["run_name"]) == ("7", "demo")
        if call == "runs/log-batch":
            self.metrics += [(m["key"], m["step"], m["value"]) for m in body.get("metrics", ())]
            self.params |= {p["key"]: p["value"] for p in body.get("params", ())}
        if call == "runs/update":
            self.statuses.append(body["status"])
        info = {"run_id": "abc", "run_uuid": "abc", "experiment_id": "7", "status": "RUNNING"}
        info |= {"lifecycle_stage": "active", "start_time": 1, "artifact_uri": ""}
        return 200, {"run": {"info": info, "data": {}}, "run_info": info}


def test_mlflow_has_every_metric_in_one_run_over_resumes(tmp_path: Path) -> None:
    server = Server()
    with listening(server) as heard:
        uri = f"observe.mlflow.tracking_uri={heard.url}"
        for first, last in ((1, 3), (3, 5)):
            recorder = open_recorder(tmp_path, uri, start_step=first - 1)
            for step in range(first, last):
                recorder.step(record(step))
            recorder.evaluation({"step": last - 1, "valid_loss": 2.0})
            recorder.close("finished" if last == 5 else "failed")
    assert server.created == 1, "a resumed run goes on under its id"
    assert [entry for entry in server.metrics if entry[0] == "train/loss"] == [
        ("train/loss", step, 5.0 / step) for step in range(1, 5)
    ]
    assert ("train/grad_norm", 1, "NaN") in server.metrics
    assert ("valid/loss", 2, 2.0) in server.metrics
    assert server.params["optimizer.lr"] == "0.001"
    assert server.statuses == ["FAILED", "RUNNING", "FINISHED"]


@pytest.mark.parametrize("trouble", ["no server", "wrong token", "busy"])
def test_mlflow_that_fails_is_one_warning_without_the_token(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    monkeypatch.setattr(mlflow, "PAUSES", (0.0, 0.0))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "hush-hush-token")
    status = 401 if trouble == "wrong token" else 503
    with listening(lambda path, body: (status, {"message": "of hush-hush-token"})) as heard:
        uri = "http://127.0.0.1:9" if trouble == "no server" else heard.url
        recorder = open_recorder(tmp_path, f"observe.mlflow.tracking_uri={uri}")
        recorder.step(record(1))
        recorder.close("finished")
    assert len(heard.said) == {"no server": 0, "wrong token": 1, "busy": 3}[trouble]
    out = capfd.readouterr().out
    assert out.count("warning: MLflow turned off, training goes on: experiments/get-by-name") == 1
    assert ("Connection refused" if trouble == "no server" else str(status)) in out
    assert "hush-hush" not in out


def test_a_login_page_in_place_of_mlflow_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with listening(lambda path, body: (200, "<html>who are you?</html>")) as heard:
        recorder = open_recorder(tmp_path, f"observe.mlflow.tracking_uri={heard.url}")
        recorder.close("finished")
    assert len(heard.said) == 1
    assert "a proxy in front of it asks for a login" in capfd.readouterr().out
    with listening() as heard:
        open_recorder(tmp_path, f"observe.mlflow.tracking_uri={heard.url}").close("finished")
    assert "the server's answer has no experiment_id" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("name", "metric", "labels"),
    [
        ("train/loss", "megalite_train_loss", {}),
        ("train/tokens/web text", "megalite_train_source_tokens", {"source": "web text"}),
        ("train/grad_norm/3", "megalite_train_layer_grad_norm", {"layer": "3"}),
        ("valid/loss/web", "megalite_valid_source_loss", {"source": "web"}),
        ("tasks/arc/easy/acc,none", "megalite_tasks_score", {"task": "arc/easy", "metric": "acc,none"}),
    ],
)  # fmt: skip
def test_metrics_are_named_as_trackers_name_them(
    name: str, metric: str, labels: dict[str, str]
) -> None:
    assert metric_of(name) == (metric, labels)


@pytest.mark.usefixtures("written_at_once")
def test_prometheus_reads_a_port_and_a_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with listening() as taken:  # a port that is free once this one is closed
        port = taken.url.rpartition(":")[2]
    file = tmp_path / "megalite.prom"
    asked = (f"observe.prometheus.port={port}", f"observe.prometheus.textfile={file}")
    recorder = open_recorder(tmp_path / "run", *asked)
    recorder.step(record(3, **{"tokens/web": 7.0}))
    recorder.evaluation({"step": 3, "valid_loss": 2.5, "valid_loss/web": 2.25})
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120) as answer:
        told = answer.read().decode()
    for line in (
        'megalite_train_step{run="demo"} 3.0',
        'megalite_train_steps{run="demo"} 20.0',
        'megalite_train_grad_norm{run="demo"} NaN',
        'megalite_train_source_tokens{run="demo",source="web"} 7.0',
        'megalite_valid_loss{run="demo"} 2.5',
        'megalite_valid_source_loss{run="demo",source="web"} 2.25',
        'megalite_train_running{run="demo"} 1.0',
    ):
        assert f"\n{line}\n" in told
        assert f"\n{line}\n" in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o644, "node-exporter runs as somebody else"
    second = open_recorder(tmp_path / "second", asked[0])
    assert "warning: Prometheus turned off, training goes on" in capfd.readouterr().out
    second.close("stopped")
    recorder.close("finished")
    assert 'megalite_train_running{run="demo"} 0.0' in file.read_text()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=120)


@pytest.fixture
def written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus, "FILE_SECONDS", 0.0)


def test_the_file_is_not_written_at_every_step(tmp_path: Path) -> None:
    file = tmp_path / "megalite.prom"
    recorder = open_recorder(tmp_path / "run", f"observe.prometheus.textfile={file}")
    first = file.read_text()
    recorder.step(record(1))
    assert file.read_text() == first
    recorder.close("finished")
    assert 'megalite_train_step{run="demo"} 1.0' in file.read_text(), "the last is there at the end"


@pytest.mark.usefixtures("written_at_once")
def test_a_flag_of_one_step_is_counted_and_a_straggler_leaves(tmp_path: Path) -> None:
    file = tmp_path / "megalite.prom"
    recorder = open_recorder(tmp_path / "run", f"observe.prometheus.textfile={file}")
    recorder.step(record(1, skipped=1.0, straggler=3.0))
    assert 'megalite_train_straggler{run="demo"} 3.0' in file.read_text()
    recorder.step(record(2))
    assert 'megalite_train_skipped_total{run="demo"} 1.0' in file.read_text()
    assert "megalite_train_straggler{" not in file.read_text()
    recorder.close("finished")


@pytest.mark.usefixtures("written_at_once")
def test_the_dashboard_asks_for_metrics_that_there_are(tmp_path: Path) -> None:
    """Those of a run that records all that can be recorded."""
    file = tmp_path / "megalite.prom"
    recorder = open_recorder(tmp_path / "run", f"observe.prometheus.textfile={file}")
    more = dict.fromkeys(
        ("mfu", "memory_gb", "tflops", "straggler", "straggler_slowness", "grad_norm/0", "tokens/web"), 1.0
    )  # fmt: skip
    recorder.step(record(1, **more))
    recorder.evaluation({"step": 1, "valid_loss": 2.5, "valid_loss/web": 2.25})
    recorder.tasks({"step": 1, "tasks/arc/acc": 0.5})
    there = set(re.findall(r"^(megalite_\w+)", file.read_text(), re.MULTILINE))
    recorder.close("finished")
    board = json.loads((configs_dir() / "grafana" / "training.json").read_text("utf-8"))
    exprs = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    for query in (*exprs, board["templating"]["list"][1]["query"]["query"]):
        asked = re.findall(r"megalite_\w+", query)
        assert asked, query
        assert set(asked) <= there, query
        assert query.count("(") == query.count(")")
    assert all('run=~"$run"' in expr for expr in exprs)
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_a_webhook_hears_how_a_run_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Slack takes it. Where a launcher is there to tell of failures, it alone does."""
    with listening() as heard:
        monkeypatch.setenv("TEAM_WEBHOOK", f"{heard.url}/services/T/B/secret")
        for status in ("finished", "stopped", "sent back", "failed"):
            recorder = open_recorder(tmp_path, "observe.webhook=$TEAM_WEBHOOK")
            recorder.step(record(4))
            recorder.evaluation({"step": 4, "valid_loss": 2.0})
            recorder.close(status)
        monkeypatch.setenv(LAUNCHER, "1")
        recorder = open_recorder(tmp_path, "observe.webhook=$TEAM_WEBHOOK")
        recorder.close("failed")
        webhook.tell(f"{heard.url}/other", "<!channel> & co")
    assert heard.said.pop()[1] == {"text": "&lt;!channel&gt; &amp; co"}, "nobody is called"
    texts = [body["text"] for path, body in heard.said if path == "/services/T/B/secret"]
    assert [set(body) for _, body in heard.said] == [{"text"}] * 3
    assert [re.sub(r"after \S+,", "after T,", text) for text in texts] == [
        "demo finished at step 4 of 20 after T, loss 1.2500, valid 2.0000",
        "demo stopped at step 4 of 20 after T, loss 1.2500, valid 2.0000; it goes on when started again",
        "demo failed at step 4 of 20 after T, loss 1.2500, valid 2.0000",
    ]


def test_a_webhook_s_time_limits_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the socket may be over a little before that of the thread."""

    def time_out(*_: object, **__: object) -> None:
        raise urllib.error.URLError(TimeoutError("timed out"))

    monkeypatch.setattr(urllib.request, "urlopen", time_out)
    with pytest.raises(webhooks.NotTold, match="no answer in 10 s"):
        webhooks.post("http://127.0.0.1:9", {"text": "a text"})


def test_one_launcher_of_several_tells_of_a_start(tmp_path: Path) -> None:
    assert [webhook.claim(tmp_path, start) for start in ("7.0", "7.0", "7.1", "7.0")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("trouble", ["refused", "silent", "forbidden", "unset"])
def test_a_webhook_that_fails_is_one_warning_without_its_address(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    monkeypatch.setattr(webhooks, "SECONDS", 0.3)

    def answer(path: str, body: Any) -> tuple[int, Any]:
        if trouble == "silent":
            silence.wait(30)
        return 403, {}

    silence = threading.Event()
    with listening(answer) as heard:
        url = heard.url if trouble != "refused" else "http://127.0.0.1:9"
        monkeypatch.setenv(
            "TEAM_WEBHOOK", "" if trouble == "unset" else f"{url}/services/hush-hush"
        )
        recorder = open_recorder(tmp_path, "observe.webhook=$TEAM_WEBHOOK")
        recorder.step(record(1))
        recorder.close("finished")
        silence.set()
    out = capfd.readouterr().out
    assert out.count("warning: webhook turned off, training goes on: ") == 1
    why = {
        "refused": "Connection refused", "silent": "no answer in 0.3 s", "forbidden": "it answered 403",
        "unset": "TEAM_WEBHOOK holds no",
    }  # fmt: skip
    assert why[trouble] in out
    assert "hush-hush" not in "".join(
        [out, *(file.read_text(errors="replace") for file in tmp_path.rglob("*") if file.is_file())]
    )


@pytest.mark.parametrize(
    ("address", "said"),
    [
        (
            "https://hooks.slack.com/services/T0/B0/hushhushhush",
            "holds a key, a token or a password",
        ),
        ("https://discord.com/api/webhooks/1/hushhushhush", "whoever knows this URL"),
        ("https://chat.example.org/hooks/hushhushhush", "whoever knows this URL"),
        ("https://me:hushhushhush@example.org/", "password"),
        ("ftp://example.org/hushhushhush", "must be an http:// or https:// URL"),
    ],
)
def test_an_address_that_is_a_secret_is_refused_and_not_shown(address: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as refused:
        make_config(f"observe.webhook={address}")
    assert "hushhushhush" not in str(refused.value)
    assert "observe.webhook" in str(refused.value)
