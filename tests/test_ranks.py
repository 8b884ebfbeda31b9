"""The server that ranks of tests are forked from has imported what it was asked to."""

from __future__ import annotations

import importlib.util
import sys

import pytest

from ranks import PRELOADED, run_ranks


def preloaded(rank: int, world_size: int) -> set[str]:
    return set(sys.modules)


@pytest.mark.parametrize("deepspeed", [False, True])
def test_ranks_begin_with_what_takes_long(deepspeed: bool) -> None:
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    wanted = {*PRELOADED, "with_deepspeed"} if deepspeed else {*PRELOADED}
    assert wanted <= run_ranks(1, preloaded, deepspeed=deepspeed)[0]
