"""Settings of torch, NCCL and cuBLAS that are environment variables. docs/cluster.md lists them."""

from __future__ import annotations

import os

ALLOCATOR = "PYTORCH_ALLOC_CONF"
OLD_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""Its name before torch 2.9, which torch still reads."""

ALWAYS = {
    # Blocks of memory grow in place: micro-batches of several sizes do not leave holes that none of
    # them fits in.
    ALLOCATOR: "expandable_segments:True",
    # A collective is put on the device before the products that were launched ahead of it, and runs
    # beside them.
    "TORCH_NCCL_HIGH_PRIORITY": "1",
    # Tensors on the CPU of 2 MB and more ask Linux for huge pages: memory is found with fewer
    # lookups, and steps are a few percent shorter.
    "THP_MEM_ALLOC_ENABLE": "1",
}
DETERMINISTIC = {
    # Without it, cuBLAS may sum in another order in each run.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}
"""For `train.deterministic`."""


def set_defaults(deterministic: bool) -> None:
    """Set the variables that nobody has set. Call it before torch makes its first tensor, uses a
    GPU or makes a process group."""
    for name, value in (ALWAYS | (DETERMINISTIC if deterministic else {})).items():
        if name != ALLOCATOR or OLD_ALLOCATOR not in os.environ:
            os.environ.setdefault(name, value)
