"""The all-reduces by which `megalite preflight` times links, played over ranks of a cluster that is not
there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from megalite.comm.mesh import Launch
from megalite.dryrun.match import compare, play
from megalite.health import preflight
from megalite.health.link import Ranks


def meetings(nodes: Mapping[int, str], monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Ranks]]:
    """Return the all-reduces of every rank, in its order."""
    met: dict[int, list[Ranks]] = {rank: [] for rank in nodes}
    for rank in nodes:
        # Appended while this rank is at it.
        monkeypatch.setattr(
            preflight, "time_apart", lambda store, each, own=met[rank]: own.append(each)
        )
        launch = Launch(rank, len(nodes), rank % 4)
        preflight._meet(nodes, "nccl", launch, None)  # type: ignore[arg-type]
    return met


def traffics_of(met: Mapping[int, list[Ranks]]) -> dict[int, dict[str, Any]]:
    """Return them as what `dryrun` plays: each waits for the one before."""
    members: dict[str, dict[int, int]] = {}
    for rank, meant in met.items():
        for each in meant:
            members.setdefault(each.name, {})[each.rank] = rank
    found = {}
    for rank, meant in met.items():
        groups, parts = [], []
        for number, each in enumerate(meant):
            places = members[each.name]
            assert sorted(places) == list(range(each.world_size)), "a rank of each number"
            ranks = [places[place] for place in sorted(places)]
            groups.append({"name": each.name, "axis": each.name, "ranks": ranks})
            parts.append(
                {"kind": "all_reduce", "peer": -1, "numel": each.numel, "bytes": 4 * each.numel, "dtype": "float32",
                 "op": "SUM", "host": False, "place": number}
            )  # fmt: skip
        launches = [
            (number, [number], [number - 1] if number else []) for number in range(len(meant))
        ]
        found[rank] = {
            "groups": groups, "parts": parts, "places": [each.name for each in meant],
            "launches": launches, "phases": [("preflight", 0)],
        }  # fmt: skip
    return found


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 32, 33])
def test_ranks_meet_in_an_order_that_comes_to_an_end(
    num_nodes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = {rank: f"node{rank // 4:02}" for rank in range(4 * num_nodes)}
    met = meetings(nodes, monkeypatch)
    # Within the node, and with one neighbour or two.
    assert {len(each) for each in met.values()} == {min(num_nodes, 3)}
    traffics = traffics_of(met)
    assert compare(traffics) == []
    assert play(traffics) == []


def test_nodes_that_all_begin_with_the_next_one_would_wait_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def next_first(node: str, ring: list[str]) -> list[tuple[str, str]]:
        at = ring.index(node)
        pairs = [(node, ring[(at + 1) % len(ring)]), (ring[at - 1], node)]
        return [(min(pair), max(pair)) for pair in pairs]

    monkeypatch.setattr(preflight, "links_of", next_first)
    nodes = {rank: f"node{rank // 4:02}" for rank in range(20)}
    (found,) = play(traffics_of(meetings(nodes, monkeypatch)))
    assert "ranks wait for one another, for ever" in found
