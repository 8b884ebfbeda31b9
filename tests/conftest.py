import os

import pytest

# Ranks and test processes share the two cores of a small machine; torch must not start a thread a core in each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cuda", action="store_true", help="let tests see the GPUs, as tools/gpu_check.sh does")


def pytest_configure(config: pytest.Config) -> None:
    # The suite is about CPU ranks over gloo, also where there are GPUs.
    if not config.getoption("--cuda"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
