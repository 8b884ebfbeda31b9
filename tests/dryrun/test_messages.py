"""What ranks send one another: matched, played to its end, and bugs in it found and named."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from dry_runs import LLAMA, Case, Dry, built, run_dry
from megalite.dryrun.match import compare, play

pytestmark = built

SMALL = "data.seq_length=512"
DEEP = (
    "parallel.pipeline=3",
    "parallel.virtual=2",
    "train.global_batch_size=9",
    "model.num_layers=6",
    SMALL,
)
CASES = {
    "interleaved": Case(LLAMA, 3, (*DEEP, "parallel.schedule=interleaved")),
    "zero bubble": Case(LLAMA, 3, (*DEEP, "parallel.schedule=zero_bubble")),
    "two ranks": Case(
        LLAMA,
        2,
        ("parallel.pipeline=2", "parallel.virtual=2", "parallel.schedule=interleaved", SMALL),
    ),
    "1f1b": Case(LLAMA, 8, ("parallel.pipeline=2", "parallel.tensor=2", SMALL), "all"),
}


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Dry]:
    return run_dry(CASES, tmp_path_factory.mktemp("messages"))


@pytest.mark.parametrize("case", CASES)
def test_training_validation_and_save_come_to_an_end(case: str, dry: dict[str, Dry]) -> None:
    """Also where no message is buffered: ranks of several stages each would wait for one another
    around their ring."""
    traffics = dry[case].traffics
    phases = {phase for traffic in traffics.values() for phase, _ in traffic["phases"]}
    assert {"first step", "training", "validating", "saving"} <= phases
    assert compare(traffics) == []
    assert play(traffics) == []


def test_hosts_tell_each_other_something_only_in_the_group_of_all_ranks(
    dry: dict[str, Dry],
) -> None:
    """Groups of axes have no connections between hosts."""
    heard = 0
    for name, each in dry.items():
        for traffic in each.traffics.values():
            for group, parts, _ in traffic["launches"]:
                if any(traffic["parts"][part]["host"] for part in parts):
                    heard += 1
                    assert len(traffic["groups"][group]["ranks"]) == CASES[name].gpus, traffic[
                        "parts"
                    ][parts[0]]
    assert heard


def test_saves_bring_weights_to_pinned_memory_and_wait_before_they_read_it(
    dry: dict[str, Dry],
) -> None:
    found = set()
    for record in dry["1f1b"].records:
        waits = [(reason, place) for phase, reason, place, _ in record.waits if phase == "saving"]
        found |= {reason for reason, place in waits if "engine/gather.py" in place}
    assert found == {"stream"}


def tampered(dry: Dry, rank: int) -> tuple[dict[int, Any], dict[str, Any]]:
    """Return a copy of what the ranks did, and that of `rank` in it."""
    traffics = copy.deepcopy(dry.traffics)
    return traffics, traffics[rank]


def find(traffic: dict[str, Any], axis: str, *kinds: str, phase: str = "training") -> list[int]:
    """Return the launches of these kinds over an axis, in a phase."""
    begin = next(first for name, first in traffic["phases"] if name == phase)
    return [
        number
        for number, (group, (part, *_), _) in enumerate(traffic["launches"])
        if number >= begin
        and traffic["groups"][group]["axis"] == axis
        and traffic["parts"][part]["kind"] in kinds
    ]


def change(traffic: dict[str, Any], number: int, **values: Any) -> None:
    """Change one part of a launch."""
    traffic["parts"].append(traffic["parts"][traffic["launches"][number][1][0]] | values)
    traffic["launches"][number][1][0] = len(traffic["parts"]) - 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dtype": "float32"}, "float32"), ({"numel": 7}, "of 7 bfloat16"), ({"kind": "broadcast"}, "broadcast"),
        ({"op": "AVG"}, "(avg)"),
    ],
)  # fmt: skip
def test_a_collective_that_differs_is_named(
    values: dict[str, Any], said: str, dry: dict[str, Dry]
) -> None:
    traffics, broken = tampered(dry["1f1b"], 3)
    change(broken, find(broken, "tensor", "all_gather")[1], **values)
    (found,) = compare(traffics)
    assert "tensor group of ranks 2, 3" in found
    assert said in found
    assert "all_gather of 2,097,152 bfloat16 at megalite/comm/collectives.py" in found
    assert "for megalite/models/llama.py" in found


def test_a_collective_that_one_rank_leaves_out_is_found(dry: dict[str, Dry]) -> None:
    traffics, broken = tampered(dry["1f1b"], 5)
    broken["launches"][find(broken, "tensor", "reduce_scatter")[-1]][1][0] = find_part(
        broken, "recv"
    )
    (found, *_) = compare(traffics)
    assert "tensor group of ranks 4, 5" in found


def find_part(traffic: dict[str, Any], kind: str) -> int:
    return next(number for number, part in enumerate(traffic["parts"]) if part["kind"] == kind)


def test_messages_that_differ_at_their_ends_are_named(dry: dict[str, Dry]) -> None:
    traffics, broken = tampered(dry["1f1b"], 4)
    change(broken, find(broken, "pipeline", "recv")[0], dtype="float32")
    found = play(traffics)[0]
    assert "rank 0 starts send to 1" in found
    assert "rank 4 takes it by recv from 0 of 1,048,576 float32" in found


def test_a_rank_that_sends_before_it_receives_as_its_neighbour_does_is_a_dead_lock(
    dry: dict[str, Dry],
) -> None:
    """Rank 0 of the pipeline sends its second hidden states where it should take the first
    gradient."""
    traffics, broken = tampered(dry["1f1b"], 0)
    sends = find(broken, "pipeline", "send", phase="validating")
    receives = find(dry["1f1b"].traffics[4], "pipeline", "recv", phase="validating")
    assert len(sends) == len(receives) > 1
    # Two sends more than are taken, before the save.
    change(traffics[4], receives[0], kind="send", peer=0)
    (found,) = play(traffics)
    assert "wait for one another" in found
    assert "rank 0 waits in send to 1" in found
    assert "rank 4 waits in send to 0" in found
    assert "(validating)" in found


def by_hand(*axes: str, waits: bool) -> dict[str, Any]:
    """Return a rank's all-reduces over these axes of two ranks, one after another."""
    names = sorted(axes)
    part = {
        "kind": "all_reduce",
        "peer": -1,
        "numel": 1,
        "bytes": 4,
        "dtype": "float32",
        "op": "SUM",
        "host": False,
    }
    return {
        "groups": [{"name": axis, "axis": axis, "ranks": [0, 1]} for axis in names],
        "parts": [part | {"place": number} for number in range(len(names))],
        "places": [f"the line of {axis}" for axis in names],
        "launches": [
            (names.index(axis), [names.index(axis)], [number - 1] if waits and number else [])
            for number, axis in enumerate(axes)
        ],
        "phases": [("training", 0)],
    }


@pytest.mark.parametrize("waits", [True, False])
def test_collectives_in_another_order_over_two_groups_are_a_dead_lock(waits: bool) -> None:
    """Each group sees its own in one order. They wait for one another only where a rank waits in
    between."""
    traffics = {
        0: by_hand("data", "tensor", waits=waits),
        1: by_hand("tensor", "data", waits=waits),
    }
    assert compare(traffics) == []
    found = play(traffics)
    assert bool(found) == waits
    if waits:
        assert "rank 0 waits in all_reduce (sum) of 1 float32 at the line of data" in found[0]
        assert "rank 1 waits in all_reduce (sum) of 1 float32 at the line of tensor" in found[0]
