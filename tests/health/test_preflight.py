"""What is wrong with a node is found, and the node named; nodes that are well are let through."""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from tampered_ranks import Clock, Ranks, started

import megalite.health.link
import megalite.health.preflight
from megalite.comm.mesh import Launch
from megalite.config import Config
from megalite.health import node
from megalite.health.node import Facts, gpu_remarks, gpu_troubles, usable_gb, within
from megalite.health.preflight import bandwidths, expected_times, links_of, preflight
from megalite.health.verdict import Problem, blames_nodes, judge
from megalite.plan import make_plan
from megalite.planner.hardware import find_interconnect
from megalite.runtime.exit_codes import Exit
from small_runs import make_config

Tamper = Callable[[int, Config], Config]


@contextmanager
def nodes(count: int, folder: Path, tamper: Tamper) -> Iterator[Ranks]:
    """A rank a node; the store lives in this process, as under torchrun it does in the launcher of
    the first node."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    config = make_config(folder, "llama", f"train.global_batch_size={count}")
    with started(count, folder, check, store.port, config, tamper) as ranks:
        yield ranks


def check(
    rank: int, world_size: int, folder: Path, port: int, config: Config, tamper: Tamper
) -> int:
    os.environ["SLURMD_NODENAME"] = f"node{rank}"
    store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
    return preflight(tamper(rank, config), Launch(rank, world_size, 0), store)


def leave_alone(rank: int, config: Config) -> Config:
    return config


def break_all_but_the_first(rank: int, config: Config) -> Config:
    set_clocks(rank)
    if rank == 1:
        return config.model_copy(update={"train": config.train.model_copy(update={"seed": 99})})
    if rank == 2:
        usage = os.statvfs

        def nothing_left(path: Any) -> os.statvfs_result:
            found = list(usage(path))
            found[4] = 0  # f_bavail
            return os.statvfs_result(found)

        os.statvfs = nothing_left
    return config


def set_clocks(rank: int) -> None:
    """On which only messages take time, however busy the machine is."""
    all_reduce, now = dist.all_reduce, 1e9 - (60.0 if rank == 3 else 0.0)

    def timed_all_reduce(*arguments: Any, **options: Any) -> Any:
        Clock.now += 0.11 if rank == 4 else 0.01
        return all_reduce(*arguments, **options)

    dist.all_reduce, time.time = timed_all_reduce, lambda: now
    node.host_or_device_event = lambda device: Clock


def test_each_bad_node_is_named_with_what_is_wrong(tmp_path: Path) -> None:
    with nodes(5, tmp_path, break_all_but_the_first) as ranks:
        assert ranks.exit_codes() == [Exit.UNFIT] * 5, ranks.said(0)
        lines = ranks.said(0).splitlines()
        assert lines[-1] == "--exclude=node1,node2,node3,node4"
        for wanted in (
            "node1: another config than most ranks: train.seed 99, there 3",
            "node2: temporary files: 0.00 GB free, wanted are 1.00 GB",
            "node3: its clock is 60.0 s behind",
            "node4: an all-reduce with its neighbours takes 110.0 ms, of others 10.0 ms",
        ):
            assert wanted in lines
        assert ranks.said(1) == ""  # one speaks for all


def test_well_nodes_are_let_through(tmp_path: Path) -> None:
    with nodes(2, tmp_path, leave_alone) as ranks:
        assert ranks.exit_codes() == [Exit.DONE] * 2, ranks.said(0)
        lines = ranks.said(0).splitlines()
        assert lines[-1] == "2 nodes are fit"
        assert re.search(r"all-reduce ms +GB/s ", lines[1])
        assert re.search(r" \d+\.\d +\d+\.\d +[+-]", lines[3])  # on CPUs nothing is expected


def never_answer(rank: int, config: Config) -> Config:
    if rank == 1:
        megalite.health.preflight.find_out = lambda *_: time.sleep(3600)
    megalite.health.preflight.PATIENCE_S = 1.0
    return config


def test_a_node_that_never_answers_is_missed_not_waited_for(tmp_path: Path) -> None:
    with nodes(2, tmp_path, never_answer) as ranks:
        assert ranks.exit_codes(of=[0])[0] == Exit.UNFIT, ranks.said(0)
        assert ranks.said(0).splitlines()[-2:] == ["node1: gave no answer", "--exclude=node1"]


def die_at_the_links_of_the_last(rank: int, config: Config) -> Config:
    preflight_module = megalite.health.preflight
    preflight_module.APART = ("gloo",)  # type: ignore[assignment]
    # As with NCCL_DEBUG=INFO, at length.
    program = """import os, sys
import megalite.health.link as link
time_all_reduce = link.time_all_reduce
def talkative(*of):
    os.write(1, b"NCCL INFO cudaDriverVersion 13000\\n" * 5000)
    return time_all_reduce(*of)
link.time_all_reduce = talkative
sys.exit(link.main(sys.argv[1]))"""
    program = "import os; os.abort()" if rank == 2 else program
    megalite.health.link.COMMAND = (sys.executable, "-c", program)
    return config


def test_a_link_at_which_processes_die_is_named_by_those_that_started_them(tmp_path: Path) -> None:
    with nodes(3, tmp_path, die_at_the_links_of_the_last) as ranks:
        assert ranks.exit_codes() == [Exit.UNFIT] * 3, ranks.said(0)
        lines = ranks.said(0).splitlines()
        assert lines[-2:] == ["node2: all-reduces with its neighbours failed", "--exclude=node2"]


def facts(number: int, **changes: Any) -> Facts:
    values = {
        "node": f"n{number}", "rank": number, "gpu": "", "chip": "", "gpu_troubles": [], "gpu_remarks": [],
        "disk_gb": {"run folder": 100.0}, "disk_troubles": {}, "memory_gb": 64.0, "code": {"a.py": "c"},
        "config": {"a": 1}, "product_s": 0.01, "product": "p",
    }  # fmt: skip
    return Facts(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"gpu": ""}, "0 GPUs for 1 rank"),
        ({"gpu_troubles": ["GPU 3: 2 uncorrected ECC errors"]}, "GPU 3: 2 uncorrected ECC errors"),
        ({"memory_gb": 20.0}, "20.0 GB of memory free, others have 64.0 GB"),
        ({"product_s": 0.02}, "rank 2: a matrix product takes 20.0 ms, others 10.0 ms"),
        ({"product": "q"}, "another result of a matrix product than most ranks"),
        (
            {"disk_troubles": {"cache": "cache /c: Read-only file system"}},
            "cache /c: Read-only file system",
        ),
        ({"disk_gb": {"run folder": 3.0}}, "run folder: 3.00 GB free, a checkpoint takes 5.00 GB"),
    ],
)
def test_verdict_on_one_of_four_nodes(changes: dict[str, Any], wanted: str) -> None:
    everyone = []
    for number in range(4):
        normal = {"gpu": f"GPU-{number}"} if "gpu" in changes else {}
        everyone.append(facts(number, **normal | (changes if number == 2 else {})))
    problems = judge(everyone, {}, {}, checkpoint_gb=5.0)
    assert [(problem.node, problem.text) for problem in problems] == [("n2", wanted)]
    assert blames_nodes(problems, [f"n{number}" for number in range(4)]) == ["n2"]


def test_ranks_that_share_a_gpu_are_counted_whatever_each_of_them_sees() -> None:
    def node_of_eight(node: str, gpus: int) -> list[Facts]:
        return [facts(rank, node=node, gpu=f"{node}-{rank % gpus}") for rank in range(8)]

    everyone = [*node_of_eight("n0", 8), *node_of_eight("n1", 7)]
    assert [(p.node, p.text) for p in judge(everyone, {}, {}, 0.0)] == [
        ("n1", "7 GPUs for 8 ranks")
    ]


def test_what_all_nodes_have_in_common_blames_none() -> None:
    full = [facts(number, disk_gb={"run folder": 0.0}) for number in range(3)]
    problems = judge(full, {}, {}, 5.0)
    assert [problem.node for problem in problems] == ["n0", "n1", "n2"]
    assert blames_nodes(problems, ["n0", "n1", "n2"]) == []
    assert blames_nodes(problems[:1], ["n0"]) == []  # alone as well: the folder is everybody's
    assert blames_nodes([Problem("n0", "GPU", "ECC")], ["n0"]) == ["n0"]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8])
def test_every_node_meets_its_two_neighbours_without_a_circle(count: int) -> None:
    nodes = [f"n{i}" for i in range(count)]
    waiting = {name: links_of(name, nodes) for name in nodes}
    assert all(len(links) == min(2, count - 1) for links in waiting.values())
    met = 0
    while any(waiting.values()):  # two meet when each is the other's next
        ready = [link for link in {links[0] for links in waiting.values() if links} if all(
            waiting[end][0] == link for end in link
        )]  # fmt: skip
        assert ready
        for link in ready:
            met += 1
            for end in link:
                waiting[end].pop(0)
    assert met == (1 if count == 2 else count)


@pytest.mark.parametrize("slow", range(4))
def test_a_slow_node_is_told_from_its_neighbours(slow: int) -> None:
    nodes = [f"n{i}" for i in range(4)]
    links = {
        link: 0.05 if nodes[slow] in link else 0.01
        for name in nodes
        for link in links_of(name, nodes)
    }
    assert [p.node for p in judge([facts(i) for i in range(4)], {}, links, 0.0)] == [nodes[slow]]


def test_a_link_that_failed_is_told_where_there_is_only_one() -> None:
    problems = judge([facts(0), facts(1)], {}, {("n0", "n1"): math.inf}, 0.0)
    assert [(p.node, p.text) for p in problems] == [
        ("n0", "all-reduces with its neighbours failed"),
        ("n1", "all-reduces with its neighbours failed"),
    ]


def test_gpus_whose_links_are_far_below_what_they_should_give_are_named(tmp_path: Path) -> None:
    everyone = [
        facts(rank, node=f"n{rank // 8}", gpu=f"GPU-{rank}", chip="H100 SXM") for rank in range(32)
    ]
    plan = make_plan(make_config(tmp_path, "llama", "train.global_batch_size=32"), [], 32)
    nodes = [f"n{i}" for i in range(4)]
    links = {link: 1.0 for node in nodes for link in [(node, node), *links_of(node, nodes)]}
    expected = expected_times(everyone, links, plan, find_interconnect("ib-ndr"))
    assert expected.keys() == links.keys()
    # 256 MiB over rings of 360 GB/s, each byte of which is sent nearly twice.
    assert expected["n0", "n1"] == pytest.approx(2 * 2**28 * 15 / 16 / 360e9, rel=0.1)

    # What nccl-tests would show, beside what it should: the better of two links; or the one within.
    size = 2**28
    said = bandwidths(
        everyone, {**expected, ("n0", "n1"): expected["n0", "n1"] * 4}, expected, size
    )
    should = 2 * 15 / 16 * size / expected["n1", "n2"] / 1e9
    assert said["n1"] == f"{should:.1f} of {should:.1f}"
    within = {("n0", "n0"): 2 * expected["n0", "n0"]}
    should = 2 * 7 / 8 * size / expected["n0", "n0"] / 1e9
    assert bandwidths(everyone, within, expected, size) == {
        "n0": f"{should / 2:.1f} of {should:.1f}"
    }
    assert bandwidths(everyone, within, {}, size) == {"n0": f"{should / 2:.1f}"}
    assert bandwidths(everyone, {}, {}, 0) == {}

    slow = {pair: seconds * (3.0 if "n2" in pair else 1.1) for pair, seconds in expected.items()}
    found = judge(everyone, {}, slow, 0.0, expected)
    assert {(p.node, p.text.partition(" takes")[0]) for p in found} == {
        ("n2", "an all-reduce of its own ranks"),
        ("n2", "an all-reduce with its neighbours"),
    }
    # All of them slow: none stands out, and only what they should give tells.
    slow = dict.fromkeys(expected, 0.02)
    assert {p.node for p in judge(everyone, {}, slow, 0.0, expected)} == set(nodes)
    assert not judge(everyone, {}, slow, 0.0)


def test_what_nvidia_smi_and_the_kernel_tell_of_gpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    answers = {
        "nvidia-smi": """case "$*" in
            *ecc.errors*) printf '0, 0\\n1, 3\\n2, [N/A]\\n' ;;
            *remapped*) printf '00000000:1B:00.0, 0, 0\\n00000000:3B:00.0, 1, 0\\n'
                printf '00000000:4B:00.0, [N/A], [N/A]\\n00000000:5B:00.0, No, Yes\\n' ;;
        esac""",
        "dmesg": """printf '[7.1] NVRM: Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus.\\n'
            printf '[8.1] NVRM: Xid (PCI:0000:3b:00): 31, pid=1, a page fault of a program\\n'""",
    }
    for name, body in answers.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    assert gpu_troubles() == [
        "GPU 1: 3 uncorrected ECC errors",
        "GPU 00000000:3B:00.0: memory rows wait to be remapped, which takes a reset",
        "GPU 00000000:5B:00.0: memory rows could not be remapped",
    ]
    assert gpu_remarks() == ["Xid (PCI:0000:3b:00): 79, pid=1, GPU has fallen off the bus."]
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver mismatch'; exit 18\n"
    )
    assert gpu_troubles() == ["nvidia-smi: Failed to initialize NVML: Driver mismatch"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nkill -SEGV $$\n")
    assert gpu_troubles() == ["nvidia-smi: exit status -11"]
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 30\n")
    monkeypatch.setattr(node, "PATIENCE_S", 0.2)
    assert gpu_troubles() == ["nvidia-smi gave no answer within 0.2 s"]


def test_a_gpu_that_does_not_compute_makes_its_node_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(launch: Launch) -> tuple[float, str]:
        raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nCompile with …")

    monkeypatch.setattr(node, "measure_product", broken)
    found = node.find_out(make_config(tmp_path), Launch(2, 4, 0))
    wanted = "cpu does not compute: CUDA error: uncorrectable ECC error encountered"
    assert found.gpu_troubles == [wanted]
    everyone = [facts(0), facts(1), facts(3), found]
    assert (found.node, wanted) in [(p.node, p.text) for p in judge(everyone, {}, {}, 0.0)]


def test_temporary_files_are_looked_at_where_they_would_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where that disk is full, and Python would take another folder."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "full"))
    assert node.disks(make_config(tmp_path))["temporary files"] == tmp_path / "full"


def test_a_disk_that_does_not_answer_or_cannot_be_written(tmp_path: Path) -> None:
    assert usable_gb(tmp_path / "not" / "yet" / "there") > 0
    with pytest.raises(TimeoutError, match="no answer"):
        within(0.05, lambda: time.sleep(1))
    with pytest.raises(OSError, match="proc"):
        usable_gb(Path("/proc/self"))
