"""What DeepSpeed's ranks tell one another, where the others are not there."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import os
from typing import Any


def import_deepspeed() -> None:
    """Import DeepSpeed, where it is installed, for GPUs, and let every rank take what it knows for
    what rank 0 sends."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    with contextlib.suppress(ImportError):  # the engine says so
        utils: Any = importlib.import_module("deepspeed.runtime.zero.utils")
        send, send_length = utils.get_lst_from_rank0, utils.assert_lst_len_same_as_other_ranks

        def own(numbers: list[int]) -> list[int]:
            send(numbers)
            return numbers

        def own_length(numbers: list[int]) -> None:
            with contextlib.suppress(RuntimeError):  # behind the broadcast: another length came
                send_length(numbers)

        utils.get_lst_from_rank0, utils.assert_lst_len_same_as_other_ranks = own, own_length


def spans_of(engine: Any) -> list[list[tuple[int, int]]]:
    """Return what elements [low, high) of every weight each replica holds: [weight][replica].
    DeepSpeed's ranks tell one another; here the numbers of others are not there."""
    numbers = {id(fragment.parameter): number for number, fragment in enumerate(engine.fragments)}
    spans: list[list[tuple[int, int]]] = [[] for _ in engine.fragments]
    replicas = engine.mesh.replicas
    for group, members in enumerate(engine._members()):
        offset = 0
        with engine._resident(group) as (flat, _):
            share = flat.numel()
        for parameter in members:
            whole, size, begin = parameter.numel(), share, offset
            # Stage 3 cuts every weight; the others cut all of a group, one after another.
            if engine.zero_stage == 3:
                whole, size, begin = parameter.ds_numel, parameter.partition_numel(), 0
            ends = [min(max(each * size - begin, 0), whole) for each in range(replicas.size + 1)]
            spans[numbers[id(parameter)]] = list(itertools.pairwise(ends))
            offset += whole
    for fragment, span in zip(engine.fragments, spans, strict=True):
        low, high = span[replicas.rank]
        assert high - low == fragment.high - fragment.low, fragment.weight.name
    return spans
