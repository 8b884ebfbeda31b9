import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from undrawn import drawn  # noqa: F401

# Ranks and test processes share the two cores of a small machine; torch must not start a thread a
# core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# DeepSpeed's operators are compiled into this checkout: a build that another one left locked cannot
# hold up the tests.
os.environ.setdefault(
    "TORCH_EXTENSIONS_DIR", str(Path(__file__).parents[1] / "build" / "torch_extensions")
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cuda", action="store_true", help="let tests see the GPUs, as tools/gpu_check.sh does"
    )
    parser.addoption(
        "--whole",
        action="store_true",
        help="run complete sweeps, of which a sample is run otherwise",
    )
    parser.addoption(
        "--nvme",
        action="store_true",
        help="run the test that compiles DeepSpeed's async_io (5 minutes)",
    )


SLOWEST_FIRST = (
    "test_parity.py",
    "test_emulated_cuda.py",
    "test_cluster.py",
    "test_lora_on_ranks.py",
    "test_train.py",
    "test_retrain.py",
    "test_faults.py",
    "test_targets_in_training.py",
    "test_corpus.py",
    "test_planner_memory.py",
    "test_bad_numbers.py",
    "test_plugin.py",
    "test_deepspeed.py",
    "test_meeting.py",
)
"""Files that take long. A lane of tools/test.sh takes a file at a time: one of these at the very end
would have the other lane wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: place for place, name in enumerate(SLOWEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_configure(config: pytest.Config) -> None:
    # The suite is about CPU ranks over gloo, also where there are GPUs.
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # As Ctrl-C does: tests end what they have started.
    signal.signal(signal.SIGTERM, _interrupt)


@pytest.fixture(autouse=True, scope="module")
def constants_stay() -> Iterator[None]:
    """A constant that one file sets and leaves would be met by whatever file a lane takes next."""
    before = _constants()
    yield
    now = _constants()
    changed = [name for name, value in before.items() if now.get(name, value) is not value]
    assert not changed, f"this file's tests leave other values in {', '.join(changed)}"


def _constants() -> dict[str, Any]:
    """Of each module of megalite that is imported, by their full names."""
    return {
        f"{module.__name__}.{name}": value
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").partition(".")[0] == "megalite"
        for name, value in vars(module).items()
        if name.isupper()
    }


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt
