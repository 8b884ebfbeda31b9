"""The emulated CUDA device finds the faults of faulty.cu, and nothing where there is none.

tools/emulated_cuda.sh runs this file; the kernels are compiled into the library that the plugin
loads."""

from __future__ import annotations

import pytest
import torch

from emulated_cuda import EmulatedCuda

RACE = "without a barrier between, at faulty.cu:"
FAULTS = {
    "no_barrier": RACE,
    "read_before_barrier": RACE,
    "no_warp_barrier": RACE,
    "warp_barrier_for_a_block": RACE,
    "never_written": "reads shared memory that its block has not written, at faulty.cu:",
    "shared_index": "an index outside of an array, at faulty.cu:",
    "past_the_end": "writes 4 bytes outside of any tensor, at faulty.cu:",
    "misaligned": "a null or misaligned address, at faulty.cu:",
    "barrier_for_some": "threads that have ended",
    "two_barriers": "threads are at the barriers of",
    "shuffle_without_all": "waits for lane 5 of a warp, which is gone",
    "shuffle_from_outside": "which is not in its mask",
    "barrier_and_shuffle": "16 of its threads wait at a barrier, others elsewhere, for ever",
    "blocks_write_one_place": f"writes global memory that another thread has written {RACE}",
    "bounded": "larger than the kernel's __launch_bounds__, 32",
    "dynamic_too_small": "outside of the block's shared memory",
    "dynamic_too_large": "invalid configuration argument",
    "another_stream": "launched on another stream than torch's current one",
    "no_blocks": "invalid configuration argument",
    "large_block": "invalid configuration argument",
    "large_grid": "invalid configuration argument",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, emulated: EmulatedCuda) -> None:
    assert FAULTS[name] in emulated.try_launch(name, torch.zeros(64))


@pytest.mark.parametrize("name", ["with_barrier", "with_warp_barrier", "with_dynamic", "shuffles"])
def test_nothing_is_found_without_a_fault(name: str, emulated: EmulatedCuda) -> None:
    out = torch.zeros(64)
    assert emulated.try_launch(name, out) == ""
    assert (out == 1).all()
