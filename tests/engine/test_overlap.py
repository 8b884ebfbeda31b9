"""Messages travel while matrices are multiplied: read from the traces that `profile` writes."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megalite.config import Config
from ranks import run_ranks
from small_runs import make_config, train_on_rank

MODEL = {
    "family": "llama", "vocab_size": 97, "hidden_size": 128, "intermediate_size": 384, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": 64,
}  # fmt: skip
RUNS = {
    "reduction": ("parallel.zero_stage=0",),
    "gather": ("parallel.zero_stage=1",),
    "tensor": ("parallel.tensor=2",),
    "tensor without sequence": ("parallel.tensor=2", "parallel.sequence=false"),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "megalite::weight_gradient_")
Span = tuple[float, float]


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Config]:
    folder = tmp_path_factory.mktemp("overlap")
    base = (
        "train.steps=4",
        "parallel.bucket_mb=0.2",
        "observe.eval_every=0",
        "profile={steps: [2, 4], ranks: [0]}",
    )
    found = {
        name: make_config(folder, MODEL, f"run.name={name.replace(' ', '-')}", *base, *overrides)
        for name, overrides in RUNS.items()
    }
    run_ranks(2, train_on_rank, list(found.values()))
    return found


def spans(config: Config, *names: str) -> list[Span]:
    (path,) = (config.run.folder / "trace").iterdir()
    events: list[dict[str, Any]] = json.loads(gzip.decompress(Path(path).read_bytes()))[
        "traceEvents"
    ]
    found = [
        event for event in events if event.get("ph") == "X" and event["name"].startswith(names)
    ]
    return [(event["ts"], event["ts"] + event["dur"]) for event in found]


def inside(products: list[Span], messages: list[Span]) -> int:
    return sum(any(low < start and end < high for low, high in messages) for start, end in products)


def test_gradients_are_reduced_beside_the_backward_pass(configs: dict[str, Config]) -> None:
    """Stage 0 sends nothing but sums of gradients (and a number or two, which nothing waits
    beside)."""
    config = configs["reduction"]
    assert inside(spans(config, *PRODUCTS), spans(config, "gloo:all_reduce")) > 5


def test_new_weights_travel_beside_the_next_forward_pass(configs: dict[str, Config]) -> None:
    """What is asked for between an update and the first product behind it is the all-gather."""
    config = configs["gather"]
    products, messages = spans(config, *PRODUCTS), spans(config, "gloo:recv")
    gathers: list[Span] = []
    for _, updated in spans(config, "Optimizer.step"):
        first = min((start for start, _ in products if start > updated), default=updated)
        gathers += [message for message in messages if updated < message[0] < first]
    assert gathers
    assert inside(products, gathers) > 3


@pytest.mark.parametrize("name", ["tensor", "tensor without sequence"])
def test_input_gradients_travel_beside_the_weights_product(
    configs: dict[str, Config], name: str
) -> None:
    config = configs[name]
    messages = "gloo:recv" if name == "tensor" else "gloo:all_reduce"
    # 4 layers of two column-parallel products and a head, 4 micro-batches, 3 steps; some messages
    # are quicker.
    assert inside(spans(config, *PRODUCTS), spans(config, messages)) > 20
