"""What a real training step allocates: every tensor that exists is counted, from its first
appearance until it is freed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megalite.comm.mesh import Launch, make_mesh
from megalite.config import Config
from megalite.data.loader import MicroBatch
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from megalite.training.run import DISK


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations have touched and that are still alive;
    `peak` is the most there were at once. What a kernel allocates for itself and frees before it
    returns is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, result)):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.count(leaf)
        self.peak = max(self.peak, self.now)
        return result

    def count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known:
            self._known[key] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)

    def reset_peak(self) -> None:
        self.peak = self.now


def measure_step(rank: int, world_size: int, config: Config) -> dict[str, int]:
    """Bytes of this rank: `resident` between two steps, and `peak` within the second step (the
    first one allocates what later ones keep)."""
    torch.manual_seed(rank)
    plan = make_plan(config, weight_table(config.model, config.lora), world_size)
    with LiveBytes() as live:
        mesh = make_mesh(plan, Launch(rank, world_size, 0).device)
        parts = build(config, plan, mesh)
        parts.engine.load(DISK.initial_state(config, mesh, None))
        batch = [_micro_batch(config, number) for number in range(plan.micro_batches)]
        for _ in range(2):
            live.reset_peak()
            forward_backward(parts, batch, mesh, config.train.seed)
            parts.engine.step(1e-3)
        return {"resident": live.now, "peak": live.peak}


def _micro_batch(config: Config, number: int) -> MicroBatch:
    rows, (_, of_source, length) = config.train.micro_batch_size, config.lengths
    shape = (rows, length)
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    if of_source:
        source = torch.randint(0, config.model.vocab_size, (rows, of_source), generator=generator)
        return MicroBatch(tokens, tokens.roll(-1, 1), torch.arange(rows), source=source)
    return MicroBatch(tokens, tokens.roll(-1, 1), torch.arange(shape[0]))
