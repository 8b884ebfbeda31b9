"""Two models side by side: differences that are there are found, others are not, and both in the right
direction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.cli import main
from megalite.monitor import intervals
from megalite.monitor.arms import Measured, compare_arms
from megalite.monitor.records import asked
from megalite.runtime.exit_codes import Exit
from request_logs import requests, write


def both(seed: int = 0, count: int = 400, **changed: Any) -> list[dict[str, Any]]:
    one = requests(count, seed, arm="a", texts=False, failed=0)
    other = requests(count, seed + 1000, arm="b", texts=False, **({"failed": 0} | changed))
    for row in other:
        row["client"] = f"other {row['client']}"
    return sorted(one + other, key=lambda row: float(row["time"]))


def differing(found: list[Measured]) -> dict[str, bool]:
    """Whether the second is larger, of what differs."""
    return {each.name: each.difference.value > 0 for each in found if each.differs}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({"score": -1.3}, {"score": False}),
        ({"took": 1.4}, {"seconds, p50": True, "seconds, p95": True}),
        ({"failed": 0.1}, {"failed by the server": True}),
        ({"good": 0.2}, {"good ratings": False}),
    ],
)
def test_what_differs_is_found(changed: dict[str, Any], names: dict[str, bool]) -> None:
    arms, found = compare_arms(both(**changed), "arm")
    assert arms == ("a", "b")
    assert differing(found) == names


def test_what_does_not_differ_seldom_seems_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intervals, "NUM_RESAMPLES", 100)
    found = [each for seed in range(12) for each in compare_arms(both(seed, 150), "arm")[1]]
    assert np.mean([each.differs for each in found]) < 0.12
    assert all(each.one.low <= each.one.value <= each.one.high for each in found)


def test_a_shadow_is_compared_pair_by_pair() -> None:
    rows = requests(200, 0, arm="a", texts=False, failed=0)
    clients = [row for row in rows if "rating" not in row]
    generator = np.random.default_rng(0)
    shadows = [
        row
        | {"arm": "shadow", "of": row["id"], "id": f"other {row['id']}"}
        | {"score": row["score"] + 0.02 + 0.01 * float(generator.normal())}
        for row in clients
    ]
    assert asked(rows + shadows) == clients, "nobody asked the shadow"
    arms, found = compare_arms(rows + shadows, "arm")
    assert arms == ("a", "shadow")
    # A difference far below the spread of either side.
    assert differing(found) == {"score, mean": True}
    [score] = [each for each in found if each.name == "score, mean"]
    assert score.difference.value == pytest.approx(0.02, abs=0.003)


def test_versions_one_after_the_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log", requests(100, 0, texts=False))
    output = ["--output", str(tmp_path / "out")]
    assert main(["monitor", str(log), "--compare", "version", *output]) == Exit.MISTAKE
    assert "the log has requests of 1 versions; two are compared" in capsys.readouterr().err
    rows = requests(100, 1, 2e9, version="b") + requests(100, 0, 1e9, version="z")
    rows += requests(100, 2, 2e9, version="of a shadow", arm="shadow", of="x")
    log = write(tmp_path / "log", rows)
    command = ["monitor", str(log), "--compare", "version", "--window", "99999d", *output]
    assert main(command) == Exit.DONE
    out = capsys.readouterr().out
    assert "b − z" in out
    assert "100 requests of version z, 100 of b" in (tmp_path / "out" / "compare.html").read_text()
