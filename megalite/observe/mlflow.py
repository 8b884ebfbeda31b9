"""Sends records to an MLflow tracking server by its REST API (2.0), of which five calls are enough:
the client library brings a dozen packages for what is JSON over HTTP."""

from __future__ import annotations

import base64
import http.client
import json
import math
import os
import queue
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.config import Config
from megalite.errors import DataError
from megalite.observe.queued import QueuedSink
from megalite.utils.changes import flat
from megalite.utils.files import replacing
from megalite.utils.outside import read_object

NAME = "mlflow.json"
"""File of the run folder with the id of the MLflow run, under which a resumed run goes on."""
MOST_METRICS, MOST_PARAMS, LONGEST_PARAM = 1000, 100, 500
"""Limits of one request, and of a parameter's text."""
SECONDS, PAUSES = 20.0, (1.0, 3.0, 9.0)
"""Time limit of a request, and the pauses before it is sent again."""


class NotMlflow(Exception):
    """Raised where something answers, but not as an MLflow server does: another try is of no use."""


class Server:
    """An MLflow tracking server. Credentials come from the environment, as MLflow names them:
    MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""

    def __init__(self, uri: str):
        self._base = f"{uri.rstrip('/')}/api/2.0/mlflow/"
        self._headers = {"Content-Type": "application/json", "User-Agent": "megalite"}
        if token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            self._headers["Authorization"] = f"Bearer {token}"
        elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            pair = f"{user}:{os.environ.get('MLFLOW_TRACKING_PASSWORD', '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"

    def call(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Make a call, a GET without a `body`, and return its answer; None where the server does not
        know what is asked for. Raise OSError where it does not answer, or refuses."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, self._headers)
        for pause in (*PAUSES, None):
            try:
                with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                    return self._parsed(path, answer.read())
            except urllib.error.HTTPError as error:
                text = error.read(2000).decode(errors="replace")
                # An answer and no failure: an experiment that is yet to be made, or a run that was
                # deleted.
                if "RESOURCE_DOES_NOT_EXIST" in text:
                    return None
                if pause is None or (error.code < 500 and error.code != 429):
                    raise OSError(f"{path}: {error.code} {text[:200]}") from None
            except (OSError, http.client.HTTPException) as error:  # the latter: a torn answer
                if pause is None:
                    reason = getattr(error, "reason", error)
                    raise OSError(f"{path}: {reason or type(error).__name__}") from None
            time.sleep(pause)
        raise AssertionError("not reached")

    def _parsed(self, path: str, answer: bytes) -> dict[str, Any]:
        """Return an answer's object. Raise NotMlflow for anything else, such as the page of a proxy
        that asks for a login."""
        try:
            found = json.loads(answer)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise NotMlflow(
                f"{path}: the answer is no JSON object; observe.mlflow.tracking_uri may not be that of an MLflow "
                "server, or a proxy in front of it asks for a login"
            )
        return found


class MlflowSink(QueuedSink):
    """Sink for one MLflow run, the same one in every resume."""

    name = "MLflow"

    def __init__(self, config: Config, folder: Path, say: Callable[[str], None]):
        """Start the thread. `folder` is the run's; `say` prints a line for the user."""
        self._config, self._path = config, folder / NAME
        super().__init__(say)

    def samples(self, step: int, prompts: Sequence[str], answers: Sequence[str]) -> None:
        """Leave samples to the other sinks."""

    def work(self) -> None:
        """Start or resume the run, and log records in batches until the exit code comes."""
        asked = self._config.observe.mlflow
        server = Server(asked.tracking_uri)
        run_id = self._resume(server) or self._start(server)
        self._say(f"MLflow run {run_id} of experiment {asked.experiment!r}")
        params = [
            {"key": name, "value": str(value)[:LONGEST_PARAM]}
            for name, value in flat(self._config.model_dump(mode="json")).items()
        ]
        for at in range(0, len(params), MOST_PARAMS):
            server.call(
                "runs/log-batch", {"run_id": run_id, "params": params[at : at + MOST_PARAMS]}
            )
        status: int | None = None
        while status is None:
            metrics: list[Any] = []
            # As many steps as have come meanwhile: a request each would be slower than short steps.
            while status is None and len(metrics) < MOST_METRICS // 2:
                try:
                    item = self.get() if not metrics else self._queue.get_nowait()
                except queue.Empty:
                    break
                if isinstance(item, int):
                    status = item
                else:
                    metrics += self._metrics(item)
            for at in range(0, len(metrics), MOST_METRICS):
                server.call(
                    "runs/log-batch", {"run_id": run_id, "metrics": metrics[at : at + MOST_METRICS]}
                )
        ended = {"status": "FAILED" if status else "FINISHED", "end_time": _now()}
        server.call("runs/update", {"run_id": run_id} | ended)

    def _metrics(self, record: Mapping[str, float]) -> Iterator[dict[str, Any]]:
        """Yield a record's values as the API takes them, with a time in ms and a step."""
        now = _now()
        # Tasks that are told without a step belong to the newest.
        self._step = int(record.get("step", getattr(self, "_step", 0)))
        for name, value in record.items():
            if name != "step":
                # As protobuf's JSON has what is no number of JSON.
                text = {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, value)
                text = "NaN" if math.isnan(value) else text
                yield {"key": name, "value": text, "timestamp": now, "step": self._step}

    def _start(self, server: Server) -> str:
        """Create the run, and the experiment if there is none. Return the run's id."""
        name = self._config.observe.mlflow.experiment
        query = urllib.parse.urlencode({"experiment_name": name})
        found = server.call(f"experiments/get-by-name?{query}")
        if found:
            number = _at(found, "experiment", "experiment_id")
        else:
            number = _at(server.call("experiments/create", {"name": name}), "experiment_id")
        body = {"experiment_id": number, "run_name": self._config.run.name, "start_time": _now()}
        run_id = str(_at(server.call("runs/create", body), "run", "info", "run_id"))
        # Noted before anything is sent: a crash from here on is resumed under this id.
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"run_id": run_id}))
        return run_id

    def _resume(self, server: Server) -> str | None:
        """Return the id of the run that this one goes on with; None where there is none, or the
        server does not know it."""
        try:
            run_id = str(read_object(self._path, DataError)["run_id"])
        except (DataError, KeyError):
            return None
        known = server.call("runs/update", {"run_id": run_id, "status": "RUNNING"})
        return None if known is None else run_id


def _at(answer: Any, *keys: str) -> Any:
    """Return what an answer has under nested `keys`. Raise NotMlflow where it has nothing there."""
    for key in keys:
        if not isinstance(answer, dict) or key not in answer:
            raise NotMlflow(f"the server's answer has no {'.'.join(keys)}, which MLflow's has")
        answer = answer[key]
    return answer


def _now() -> int:
    """Return the time in ms."""
    return time.time_ns() // 1_000_000
