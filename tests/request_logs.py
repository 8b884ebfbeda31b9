"""Logs of requests as a server writes them, drawn from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

WORDS = {
    "weather": "rain sun wind cloud storm snow warm cold degrees forecast",
    "cooking": "flour oven butter salt recipe onion boil bake garlic sauce",
    "law": "contract clause tenant notice court appeal statute liability deposit lease",
}
DAY_S = 86400.0
NOON = 1_760_000_000.0


def requests(
    count: int,
    seed: int,
    start: float = NOON,
    seconds: float = DAY_S,
    *,
    length: float = 60,
    score: float = -1.0,
    took: float = 1.0,
    languages: Sequence[str] = ("en", "en", "en", "de"),
    topics: Sequence[str] = ("weather", "cooking"),
    failed: float = 0.002,
    good: float = 0.8,
    texts: bool = True,
    clients: int = 40,
    **more: Any,
) -> list[dict[str, Any]]:
    """Rows of `count` requests, of which every fifth is rated."""
    generator = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        at = start + seconds * (number + 1) / count
        own = generator.choice(WORDS[str(generator.choice(topics))].split(), 6)
        status = 500 if generator.random() < failed else 200
        row = {
            "time": at, "seconds": took * float(generator.lognormal(0, 0.5)), "path": "/v1/chat/completions",
            "status": status, "client": f"client-{generator.integers(clients)}", "id": f"chatcmpl-{seed}-{number}",
            "version": "a", "prompt_tokens": int(generator.lognormal(np.log(length), 0.6)) + 1,
            "completion_tokens": int(generator.geometric(1 / 80)), "finish": ["stop"],
            "first_token_s": took * float(generator.lognormal(-2, 0.4)), 
            "score": score + 0.3 * float(generator.normal()), "language": str(generator.choice(languages)),
        }  # fmt: skip
        rows.append(row | ({"prompt": " ".join(own)} if texts else {}) | more)
        if number % 5 == 0:
            kind = (
                "up" if generator.random() < good else str(generator.choice(["down", "corrected"]))
            )
            rating = {"time": at + 1, "seconds": 0.01, "path": "/v1/ratings", "status": 201}
            rows.append(rating | {"client": row["client"], "rating": kind, "of": row["id"]})
    return rows


def write(folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows as one day's file of a log."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "requests-2025-10-09.jsonl").write_text(lines)
    return folder
