"""How a process finds out who it is, and where it stands in the mesh."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from megalite.comm import mesh
from megalite.comm.mesh import Launch, make_mesh
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import make_plan
from ranks import run_ranks
from small_runs import MODELS, make_config

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"
)  # fmt: skip


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*VARIABLES, *(name for name in os.environ if name.startswith("SLURM_"))):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def set_all(bare: pytest.MonkeyPatch, **variables: object) -> None:
    for name, value in variables.items():
        bare.setenv(name, str(value))


def test_alone(bare: pytest.MonkeyPatch) -> None:
    assert Launch.from_environment() == Launch(0, 1, 0)
    Launch(0, 1, 0).join()  # needs nobody
    assert not torch.distributed.is_initialized()


def test_torchrun(bare: pytest.MonkeyPatch) -> None:
    set_all(bare, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, SLURM_PROCID=0, SLURM_STEP_NUM_TASKS=4)
    assert Launch.from_environment() == Launch(5, 8, 1)  # torchrun inside a Slurm step counts


def test_srun_with_a_task_a_rank(bare: pytest.MonkeyPatch) -> None:
    set_all(bare, SLURM_PROCID=5, SLURM_STEP_NUM_TASKS=8, SLURM_LOCALID=1)
    assert Launch.from_environment() == Launch(5, 8, 1)


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": 4, "SLURM_STEP_TASKS_PER_NODE": 1}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, 1),
    ],
)
def test_ranks_on_a_host_are_counted_by_who_started_them(
    variables: dict[str, object], wanted: int, bare: pytest.MonkeyPatch
) -> None:
    set_all(bare, **variables)
    assert mesh.ranks_on_host.__wrapped__() == wanted


@pytest.mark.parametrize(("visible", "wanted"), [(8, 5), (1, 0)])
def test_a_rank_takes_the_gpu_of_its_number_or_the_only_one_it_sees(
    visible: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert Launch(13, 16, 5).device == torch.device("cuda", wanted)


def test_in_a_slurm_allocation_but_not_in_a_step(bare: pytest.MonkeyPatch) -> None:
    set_all(bare, SLURM_PROCID=0, SLURM_NTASKS=8, SLURM_JOB_ID=7)
    assert Launch.from_environment() == Launch(0, 1, 0)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": 2}, "variable RANK = 'x' is no number"),
        ({"RANK": 0}, "variable WORLD_SIZE is not set"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK=2 is none of WORLD_SIZE=2 ranks"),
        ({"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": ""}, "variable LOCAL_RANK = '' is no number"),
        ({"SLURM_STEP_NUM_TASKS": "2(x4)"}, "SLURM_STEP_NUM_TASKS = '2\\(x4\\)' is no number"),
        ({"SLURM_STEP_NUM_TASKS": 2, "SLURM_PROCID": 1}, "variable SLURM_LOCALID is not set"),
    ],
)
def test_a_variable_that_a_rank_cannot_be_told_by_is_named(
    bare: pytest.MonkeyPatch, variables: dict[str, object], told: str
) -> None:
    set_all(bare, **variables)
    with pytest.raises(ConfigError, match=told):
        Launch.from_environment()


def test_ranks_without_a_meeting_place_say_so(bare: pytest.MonkeyPatch) -> None:
    set_all(bare, RANK=0, WORLD_SIZE=2)
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        Launch.from_environment().join()


def test_srun_ranks_meet_on_the_first_host(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$3" = "node[3-4]" ] && printf "127.0.0.1\\nnode4\\n"\n')
    scontrol.chmod(0o755)
    # The port follows from the number of the job: tests that run beside these must have another.
    set_all(
        bare, PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_JOB_NODELIST="node[1-4]", SLURM_JOB_ID=os.getpid(),
        SLURM_STEP_NODELIST="node[3-4]", SLURM_STEP_ID=5, SLURM_STEP_NUM_TASKS=2,
    )  # fmt: skip
    ports = run_ranks(2, join_over_slurm)
    assert len(set(ports)) == 1


def test_steps_that_are_under_way_together_meet_apart(
    bare: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Those of a job, those of jobs that share a node, and what slurm/pretrain.sh starts in
    them."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\nprintf "first-of-$3\\nother\\n"\n')
    scontrol.chmod(0o755)
    bare.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found = {}
    for job in (7, 8, 9):
        for step in range(4):
            set_all(
                bare,
                SLURM_JOB_ID=job,
                SLURM_JOB_NODELIST="job",
                SLURM_STEP_NODELIST="step",
                SLURM_STEP_ID=step,
            )
            places = mesh._slurm_rendezvous()
            assert places["MASTER_ADDR"] == "first-of-step"
            found[job, step] = int(places["MASTER_PORT"])
    assert len(set(found.values())) == len(found)
    assert all(10_000 <= port < 30_000 for port in found.values())


def join_over_slurm(rank: int, world_size: int) -> int:
    torch.distributed.destroy_process_group()  # the test helper's own
    for name in VARIABLES:
        os.environ.pop(name, None)
    os.environ |= {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
    Launch.from_environment().join(timeout_s=60)
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"
    count = torch.ones(())
    torch.distributed.all_reduce(count)
    assert count == 2
    return int(os.environ["MASTER_PORT"])


def coordinates(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    config = make_config(folder, "llama", "parallel.tensor=2")
    mesh = make_mesh(make_plan(config, weight_table(config.model), world_size), torch.device("cpu"))
    peers = torch.tensor([rank, rank])
    torch.distributed.all_reduce(peers[:1], group=mesh.tensor.group)
    torch.distributed.all_reduce(peers[1:], group=mesh.data.group)
    return {"tensor": (mesh.tensor.rank, int(peers[0])), "data": (mesh.data.rank, int(peers[1]))}


def folded(rank: int, world_size: int, folder: Path) -> dict[str, tuple[int, int]]:
    """Places and sums of ranks in the groups of experts, of pipeline 2 × (tensor 2 × data 2 =
    expert 2 × ...)."""
    model = MODELS["llama"] | {"family": "mixtral", "num_experts": 4, "experts_per_token": 2}
    config = make_config(
        folder,
        model,
        "parallel.tensor=2",
        "parallel.pipeline=2",
        "parallel.expert=2",
        "parallel.expert_tensor=1",
    )
    experts = make_mesh(
        make_plan(config, weight_table(config.model), world_size), torch.device("cpu")
    ).experts
    found = {}
    for name in ("holders", "replicas", "expert", "tensor"):
        axis, sum_ = getattr(experts, name), torch.tensor(rank)
        if axis.size > 1:
            torch.distributed.all_reduce(sum_, group=axis.group)
        found[name] = (axis.rank, int(sum_))
    return found


def test_experts_are_folded_over_the_ranks_of_a_stage(tmp_path: Path) -> None:
    make_config(tmp_path)  # writes the corpus once
    found = run_ranks(8, folded, tmp_path)
    for rank, places in enumerate(found):
        first, inside = rank - rank % 4, rank % 4
        neighbours, replicas = 2 * (rank - rank % 2) + 1, 2 * first + 2 * (inside % 2) + 2
        assert places == {
            "holders": (inside % 2, neighbours), "expert": (inside % 2, neighbours),
            "replicas": (inside // 2, replicas), "tensor": (0, rank),
        }  # fmt: skip


def test_tensor_groups_are_neighbours(tmp_path: Path) -> None:
    make_config(tmp_path)  # writes the corpus once
    assert run_ranks(4, coordinates, tmp_path) == [
        {"tensor": (0, 0 + 1), "data": (0, 0 + 2)},
        {"tensor": (1, 0 + 1), "data": (0, 1 + 3)},
        {"tensor": (0, 2 + 3), "data": (1, 0 + 2)},
        {"tensor": (1, 2 + 3), "data": (1, 1 + 3)},
    ]


def test_of_gpus_only_the_world_has_connections_between_hosts(tmp_path: Path) -> None:
    overrides = (
        "parallel.pipeline=2",
        "parallel.context=2",
        "parallel.tensor=2",
        "train.global_batch_size=4",
    )
    config = make_config(tmp_path, "llama", *overrides)
    plan = make_plan(config, weight_table(config.model), 16)
    torch.distributed.init_process_group(
        "cpu:fake,cuda:fake", rank=5, world_size=16, store=FakeStore()
    )
    try:
        made = make_mesh(plan, torch.device("cuda", 0))
        both = {torch.device("cpu"), torch.device("cuda")}
        assert set(made.world.group._device_types) == both  # type: ignore[union-attr]
        for axis in (
            made.pipeline,
            made.data,
            made.context,
            made.tensor,
            made.replicas,
            made.stage,
        ):
            assert torch.distributed.get_backend_config(axis.group) != "cpu:fake,cuda:fake", (
                axis.name
            )
    finally:
        torch.distributed.destroy_process_group()
