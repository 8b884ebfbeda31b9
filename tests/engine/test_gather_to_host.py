"""What is gathered to the host of an owner comes piece by piece, and is whole there."""

from __future__ import annotations

import pytest
import torch

from megalite.comm.mesh import Launch, make_mesh
from megalite.config_file import parse_config
from megalite.engine import gather
from megalite.engine.gather import gather_to_host
from megalite.models import weight_table
from megalite.plan import make_plan
from ranks import run_ranks
from small_runs import MODELS


def gathered(rank: int, world_size: int, piece: int) -> list[float] | None:
    gather.PIECE = piece
    config = parse_config(
        {
            "run": {"name": "x"}, "model": MODELS["llama"], "data": {"train": [{"path": "x"}], "seq_length": 16},
            "train": {"steps": 1, "global_batch_size": 2}, "optimizer": {"lr": 1.0},
        }
    )  # fmt: skip
    mesh = make_mesh(
        make_plan(config, weight_table(config.model), world_size), Launch.from_environment().device
    )
    whole = torch.zeros(world_size, 7) if rank == 1 else None
    gather_to_host(torch.arange(7.0) + 10 * rank, mesh.replicas, 1, whole)
    return None if whole is None else whole.flatten().tolist()


@pytest.mark.parametrize("piece", [1, 6, 2**24])
def test_pieces_of_any_size_make_the_whole(piece: int) -> None:
    others, owner = run_ranks(2, gathered, piece)
    assert others is None
    assert owner == [*map(float, range(7)), *map(float, range(10, 17))]
