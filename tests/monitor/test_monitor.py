"""`megalite monitor`: statistics against known values, alarms that come when they must and not
otherwise, and what is told to whom."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megalite.cli import main
from megalite.monitor import page as pages
from megalite.monitor.drift import drift_of_classes, drift_of_numbers, ks_p, ks_statistic, psi
from megalite.monitor.intervals import bootstrap, newcombe, wilson
from megalite.monitor.page import prometheus_text
from megalite.monitor.records import Window
from megalite.monitor.report import Limits, examine
from megalite.monitor.topics import NONE, topics_of
from megalite.runtime.exit_codes import Exit
from megalite.utils import webhooks
from request_logs import DAY_S, NOON, requests, write

CONFIGS = Path(__file__).parents[2] / "configs"
LATER = NOON + 6 * DAY_S


def window(count: int = 300, seed: int = 1, before: int = 900, **changed: Any) -> Window:
    """A day after six, in which something may have changed."""
    texts = changed.get("texts", True)
    reference = requests(before, 100 + seed, NOON, 6 * DAY_S, texts=texts)
    return Window(requests(count, seed, LATER, **changed), reference, LATER, LATER + DAY_S, 0)


def test_the_population_stability_index_by_its_formula() -> None:
    # ¼ · ln 2 + ¼ · ln 1.5
    assert psi(np.array([5e6, 5e6]), np.array([2.5e6, 7.5e6])) == pytest.approx(0.274653, abs=1e-5)
    assert psi(np.array([0.0, 9]), np.array([5.0, 5])) < 10, "an empty bin is no infinity"


def test_kolmogorov_and_smirnov_as_scipy_has_them() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for shift, sizes in ((0.0, (60, 300)), (0.2, (100, 150)), (0.5, (80, 70))):
        one, other = generator.normal(size=sizes[0]), generator.normal(shift, size=sizes[1])
        found = ks_statistic(one, other)
        wanted = stats.ks_2samp(one, other)
        assert found == pytest.approx(wanted.statistic)
        # Kolmogorov's limit against the exact distribution: some percent at such sizes.
        assert ks_p(found, *sizes) == pytest.approx(wanted.pvalue, rel=0.15)
    assert ks_p(0.0, 100, 100) == 1.0


def test_chance_is_called_chance() -> None:
    """Of 300 pairs without a difference 5% have p below 0.05, for numbers and for classes."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        one, other = generator.geometric(0.01, 200), generator.geometric(0.01, 400)
        classes = [
            [*generator.choice(["en", "de", "fr"], size, p=[0.7, 0.2, 0.1])] for size in (200, 400)
        ]
        found.append([drift_of_numbers("n", one, other).p, drift_of_classes("c", *classes).p])
    shares = (np.array(found) < 0.05).mean(0)
    assert (shares > 0.02).all(), shares
    assert (shares < 0.09).all(), shares


def test_intervals_of_published_examples() -> None:
    # Newcombe 1998, Statistics in Medicine 17:857 and 17:873.
    assert wilson(81, 263)[1:] == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20)[1:] == pytest.approx((0.0, 0.1611), abs=5e-5)
    found = newcombe(wilson(56, 70), wilson(48, 80))
    assert found == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    assert np.isnan(wilson(0, 0).low)


def test_clients_are_drawn_whole() -> None:
    generator = np.random.default_rng(0)
    values = np.repeat(generator.normal(size=20), 50)
    mean = lambda x: float(x.mean())  # noqa: E731
    apart = bootstrap([values], [[str(n) for n in range(1000)]], mean)
    together = bootstrap([values], [[str(n // 50) for n in range(1000)]], mean)
    assert apart.value == together.value == pytest.approx(values.mean())
    assert together.high - together.low > 4 * (apart.high - apart.low)


@pytest.mark.parametrize("seed", range(6))
def test_where_nothing_changes_no_alarm_stands(seed: int) -> None:
    assert examine(window(seed=seed), Limits(max_p95_s=4)).alarms == {}
    few = examine(window(60, seed, before=60, failed=0, texts=False), Limits(psi=0.1))
    assert max(each.psi for each in few.drifts) > 0.1, "which is chance, and is called so"
    assert few.alarms == {}


@pytest.mark.parametrize(
    ("changed", "alarm", "says"),
    [
        ({"length": 140}, "drift of prompt tokens", "> "),
        ({"score": -1.6}, "drift of score", "PSI"),
        ({"languages": ("de", "fr")}, "drift of language", "en was 7"),
        (
            {"languages": ("fr", "fr", "es")},
            "drift of language",
            "others, mostly fr was 0% and is 100%",
        ),
        ({"topics": ("law",)}, "drift of topic", NONE),
        ({"failed": 0.08}, "errors", "failed"),
        ({"took": 4}, "latency", "more than 4 s"),
        ({"good": 0.4}, "ratings", "of the ratings are good, and were"),
    ],
)
def test_what_changes_is_the_alarm(changed: dict[str, Any], alarm: str, says: str) -> None:
    found = examine(window(**changed), Limits(max_p95_s=4)).alarms
    assert [*found] == [alarm]
    assert says in found[alarm]


def test_few_requests_are_not_judged_and_without_texts_there_are_no_topics() -> None:
    found = examine(window(30, length=1000, failed=0, texts=False), Limits())
    assert found.alarms == {}
    assert [each.feature for each in found.drifts] == [
        "prompt_tokens", "completion_tokens", "score", "language",
    ]  # fmt: skip
    assert not any(each.is_judged for each in found.drifts)


def test_a_stream_that_broke_off_is_an_error_and_ratings_are_no_requests() -> None:
    found = examine(window(finish=["failed"]), Limits())
    assert found.errors.value == 1.0
    assert found.as_json()["requests"] == 300


def test_topics_are_words_that_stand_together() -> None:
    weather = [f"{a} {b}" for a in ("rain", "sun", "wind", "snow") for b in ("cold", "warm", "dry")]
    kitchen = [f"{a} {b}" for a in ("flour", "oven", "salt", "egg") for b in ("bake", "mix", "fry")]
    now, before = topics_of(["rain cold", "flour bake", "tenant lease"], (weather + kitchen) * 4)
    assert now[2] == NONE
    assert now[0] != now[1]
    assert before.count(NONE) <= 0.1 * len(before)
    assert topics_of(["a"], ["too", "few"]) == ([], [])


def test_texts_of_one_kind_have_the_same_topics() -> None:
    """Also where almost every text has words that no other has, and is nearest to what was drawn
    from itself."""
    generator = np.random.default_rng(0)
    words = [f"{a}{b}{c}" for a in "bcdfghklmn" for b in "aeiou" for c in "bcdfghklmnprst"]
    texts = [" ".join(generator.choice(words, 8)) for _ in range(900)]
    drift = drift_of_classes("topic", *topics_of(texts[:300], texts[300:]))
    assert drift.psi < 0.15
    assert drift.p > 0.01


class Hook(HTTPServer):
    """Answers with the statuses given, then with 200."""

    def __init__(self) -> None:
        self.statuses: list[int] = []
        self.bodies: list[Any] = []
        hook = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = hook.statuses.pop(0) if hook.statuses else 200
                if status == 200:
                    hook.bodies.append(json.loads(body))
                self.send_response(status)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?key=a-secret"


@pytest.fixture
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where matplotlib is not installed."""

    def draw(*_: Any) -> None:
        raise ImportError

    monkeypatch.setattr("megalite.monitor.run.draw", draw)


@pytest.fixture
def hook(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hook]:
    monkeypatch.setattr(webhooks, "WAIT_S", 0.01)
    server = Hook()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_curves_of_a_minute_are_drawn_over_that_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    made = pages.new_figure
    monkeypatch.setattr(pages, "new_figure", lambda *size: drawn.append(made(*size)) or drawn[-1])
    now = [row | {"time": LATER + 20} for row in requests(60, 1, LATER)]
    before = requests(60, 2, NOON)
    report = examine(Window(now, before, LATER, LATER + 40, 0), Limits())
    pages.draw(report, False, tmp_path / "monitor.png")
    [figure] = drawn
    widths = [np.ptp(axes.get_xlim()) * DAY_S for axes in figure.subfigs[0].axes]
    assert max(widths) < 121, "of a minute, or of the two that it touches"


def test_an_alarm_is_told_once_and_once_when_it_is_over(
    hook: Hook,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    found = window(length=140, texts=False)
    log = write(tmp_path / "log", [*found.reference, *found.now])
    command = ["monitor", str(log), "--output", str(tmp_path / "out"), "--webhook", hook.url]
    hook.statuses = [500, 503]
    assert main(command) == Exit.ALARM
    assert main([*command, "--window", "1d"]) == Exit.ALARM
    [told] = hook.bodies
    assert told["status"] == "firing"
    assert "ALARM prompt tokens: PSI" in told["text"]
    assert "; &gt; " in told["text"], "a chat shows the names of bins, and calls nobody"
    assert "; > " in told["alarms"][0]["text"]
    assert told["alarms"][0]["since"] == pytest.approx(found.end, abs=2)
    out = capsys.readouterr().out
    assert "warning" not in out
    assert "ALARM prompt tokens: PSI" in out
    page = (tmp_path / "out" / "monitor.html").read_text()
    assert "prompt tokens: PSI" in page
    assert page.count('src="data:image/png') == 1
    request.getfixturevalue("no_picture")
    well = window(texts=False)
    write(log, [*well.reference, *well.now])
    hook.statuses = [404]
    assert main(command) == Exit.DONE
    out = capsys.readouterr().out
    assert "warning: the webhook was not told, and will be next time: it answered 404" in out
    assert "a-secret" not in out
    assert hook.statuses == []
    assert main(command) == main(command) == Exit.DONE
    assert [body["resolved"] for body in hook.bodies[1:]] == [["drift of prompt tokens"]]
    assert hook.bodies[1]["status"] == "resolved"


@pytest.mark.usefixtures("no_picture")
def test_a_webhook_that_is_not_there_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhooks, "WAIT_S", 0.01)
    found = window(length=140, texts=False)
    log = write(tmp_path / "log", [*found.reference, *found.now])
    for url in ("http://127.0.0.1:9/x", "file:///etc/passwd", "nonsense", "http://["):
        command = ["monitor", str(log), "--output", str(tmp_path / "out"), "--webhook", url]
        assert main(command) == Exit.ALARM
        assert "warning: the webhook was not told" in capsys.readouterr().out


@pytest.mark.usefixtures("no_picture")
def test_damaged_lines_are_counted_and_mistakes_are_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = window(60, before=60, texts=False)
    log = write(tmp_path / "log", [*found.reference, *(x for x in found.now if "rating" not in x)])
    with open(log / "requests-2025-10-09.jsonl", "a") as file:
        file.write('{"time": 1\n[]\n{"time": "x", "seconds": 1, "status": 2}\n\n')
        file.write('{"time": "1", "seconds": "2", "status": "3", "path": "/v1/completions"}\n')
    command = ["monitor", str(log), "--output", str(tmp_path / "out")]
    assert main(command) == Exit.DONE
    assert "5 lines were damaged" in (tmp_path / "out" / "monitor.html").read_text()
    text = (tmp_path / "out" / "monitor.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["damaged_lines"] == 5, "NaN is no JSON"
    capsys.readouterr()
    (tmp_path / "out" / "alarms.json").write_text('{"standing": {"x": 1}}')
    assert main(command) == Exit.MISTAKE
    assert "alarms.json is not a state of alarms: delete it" in capsys.readouterr().err
    assert main(["monitor", str(tmp_path)]) == Exit.MISTAKE
    assert "holds no line of a request" in capsys.readouterr().err


@pytest.mark.usefixtures("no_picture")
def test_a_reference_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = window(length=140, texts=False)
    log = write(tmp_path / "log", found.now)
    output = ["--output", str(tmp_path / "out")]
    assert main(["monitor", str(log), *output]) == Exit.DONE, "nothing to compare with"
    assert "no picture: it needs matplotlib" in capsys.readouterr().out
    reference = write(tmp_path / "reference", found.reference)
    assert main(["monitor", str(log), *output, "--reference", str(reference)]) == Exit.ALARM


def test_what_is_shipped_asks_for_metrics_that_are_there() -> None:
    """Dashboards and rules name metrics in strings, which nobody else compares."""
    pytest.importorskip("prometheus_client")
    from prometheus_client import generate_latest
    from prometheus_client.parser import text_string_to_metric_families

    from megalite.infer.serving.metrics import Metrics

    metrics = Metrics()
    metrics.requests.labels("/v1/completions", "200").inc()
    texts = [
        generate_latest(metrics.registry).decode(),
        prometheus_text(examine(window(), Limits())),
    ]
    families = [family for text in texts for family in text_string_to_metric_families(text)]
    known = {f"{f.name}_total" if f.type == "counter" else f.name for f in families}
    known |= {f"{f.name}_bucket" for f in families if f.type == "histogram"}
    board = json.loads((CONFIGS / "grafana" / "serving.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    asked += [each["expr"] for each in board["annotations"]["list"]]
    rules = [
        rule
        for group in yaml.safe_load((CONFIGS / "prometheus" / "serving-rules.yaml").read_text())[
            "groups"
        ]
        for rule in group["rules"]
    ]
    recorded = {rule["record"] for rule in rules if "record" in rule}
    assert all(("alert" in rule) == ("annotations" in rule) for rule in rules)
    assert len(asked) > 15
    for expression in [*asked, *(rule["expr"] for rule in rules)]:
        used = set(re.findall(r"megalite[a-z0-9_:]*", re.sub(r'"[^"]*"', "", expression)))
        assert used, expression
        assert used <= known | recorded, expression
    # No two panels lie over one another.
    cells = [
        (x, y)
        for at in (panel["gridPos"] for panel in board["panels"])
        for x in range(at["x"], at["x"] + at["w"])
        for y in range(at["y"], at["y"] + at["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
