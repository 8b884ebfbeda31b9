"""Shows a run's metrics to Prometheus: at a port of the first rank, or in a file that node-exporter
reads.

The names are those of the trackers, `train/loss` as `megalite_train_loss`; what has a name or number
of its own, as sources, layers and tasks do, has it as a label. `docs/operations.md` lists them."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from megalite import __version__
from megalite.config import Config
from megalite.observe.queued import named_evaluation, named_step
from megalite.utils.files import replacing

FLAGS = ("not_finite", "loss_spike", "grad_norm_spike", "no_labels", "skipped")
"""Flags of a step. They are counted, since a flag of one step falls between two scrapes."""
PASSING = ("straggler", "straggler_slowness")
"""What is shown while it is reported, and gone afterwards."""

FILE_SECONDS = 5.0
"""Seconds between writes of the file, which collectors read every 15 s or less often: steps may be
much shorter."""


class PrometheusSink:
    """Sink that holds the last value of each metric. Raises ImportError without prometheus_client,
    OSError where the port is taken."""

    name = "Prometheus"

    def __init__(
        self,
        config: Config,
        num_params: int,
        start_step: int,
        layout: Mapping[str, object],
    ):
        """Open the port, if one is asked for. The parameters are those of `Recorder`."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        # A registry of its own: the global one has metrics of this Python process, and two runs in one
        # process would share it.
        self._registry, self._make = CollectorRegistry(), Gauge
        self._gauges: dict[str, Gauge] = {}
        self._run = config.run.name
        self._file: Path | None = config.observe.prometheus.textfile
        self._written = -FILE_SECONDS
        shown = " ".join(f"{name}={size}" for name, size in layout.items())
        about = {
            "version": __version__,
            "model": config.model.preset or config.model.family,
            "layout": shown,
        }
        info = Gauge(
            "megalite_train_info", "about a run: always 1", ("run", *about), registry=self._registry
        )
        info.labels(self._run, *about.values()).set(1)
        self._set("train_parameters", num_params, "parameters of the model")
        self._set("train_steps", config.train.steps, "steps that the run shall make")
        self._set("train_step", start_step, "steps made")
        self._set("train_running", 1, "1 while the run trains, 0 when it has ended")
        self._flags = {
            flag: Counter(
                f"megalite_train_{flag}",
                f"steps since this start with {flag}",
                ("run",),
                registry=self._registry,
            )
            for flag in FLAGS
        }
        for counter in self._flags.values():
            counter.labels(self._run)  # shown as 0 from the start
        port = config.observe.prometheus.port
        self._server = start_http_server(port, registry=self._registry)[0] if port else None
        self._write()

    def step(self, record: dict[str, float]) -> None:
        for flag, counter in self._flags.items():
            counter.labels(self._run).inc(record.get(flag, 0.0))
        # A gauge keeps its last value: that of a straggler which has caught up must go.
        for name in PASSING:
            if name not in record and (gauge := self._gauges.get(f"megalite_train_{name}")):
                gauge.clear()
        shown = {key: value for key, value in record.items() if key not in FLAGS}
        self._show(named_step(shown))

    def evaluation(self, record: dict[str, float]) -> None:
        named = named_evaluation(record)
        self._show({key.replace("test_", "test/"): value for key, value in named.items()})

    def tasks(self, record: dict[str, float]) -> None:
        self._show(record)

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Leave samples to the other sinks."""

    def close(self, status: str) -> None:
        """Close the port; in the file, the run has ended."""
        self._set("train_running", 0)
        self._write()
        if self._server:
            self._server.shutdown()
            self._server.server_close()

    def _show(self, named: Mapping[str, float]) -> None:
        for name, value in named.items():
            if name == "step":
                self._set("train_step", value)
            else:
                self._set(name, value)
        if time.monotonic() - self._written >= FILE_SECONDS:
            self._write()

    def _set(self, name: str, value: float, about: str = "") -> None:
        """Set a metric by a tracker's name, such as `valid/loss/web`."""
        metric, labels = metric_of(name)
        if metric not in self._gauges:
            self._gauges[metric] = self._make(
                metric, about or f"{name} of a run", ("run", *labels), registry=self._registry
            )
        self._gauges[metric].labels(self._run, *labels.values()).set(value)

    def _write(self) -> None:
        """Write the file, if one is asked for: whole or not at all, readable by node-exporter."""
        if self._file:
            from prometheus_client import generate_latest

            with replacing(self._file) as temporary:
                temporary.write_bytes(generate_latest(self._registry))
                temporary.chmod(0o644)  # node-exporter runs as another user
            self._written = time.monotonic()


def metric_of(name: str) -> tuple[str, dict[str, str]]:
    """Return the metric and its labels for a tracker's name: `train/loss` has none beside the run's,
    `tasks/arc/acc` those of the task and its metric."""
    group, _, rest = name.partition("/")
    key, _, which = rest.partition("/")
    labels: dict[str, str] = {}
    if group == "tasks":
        # A task's name may have a slash in it, its metric has none.
        task, _, metric = rest.rpartition("/")
        key, labels = "score", {"task": task, "metric": metric}
    elif which and key in ("tokens", "loss"):
        # A name may not have labels at one time and none at another.
        key, labels = f"source_{key}", {"source": which}
    elif which:
        key, labels = f"layer_{key}", {"layer": which}
    words = f"megalite_{group}_{key}" if key else f"megalite_{group}"
    return re.sub(r"\W", "_", words, flags=re.ASCII), labels
