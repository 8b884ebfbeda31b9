"""Schedules and their simulation: the order against torch's own run of it, times against what can
be worked out."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from megalite.planner.schedule import Action, Order, order_of
from megalite.planner.simulate import Links, Piece, StageWork, Timeline, simulate

LINKS = Links(hand_over=0.0, waits_for_hand_over=False, reduces_every_time=False)


def work_of(
    forward: float = 1.0, backward: float = 2.0, gather: float = 0.0, reduce: float = 0.0
) -> StageWork:
    piece = Piece(forward, backward, gather, reduce)
    return StageWork(forward, backward, backward / 2, backward / 2, (piece,))


def run(
    schedule: str, pipeline: int, virtual: int, micro_batches: int, links: Links = LINKS
) -> Timeline:
    order = order_of(schedule, pipeline, virtual, micro_batches)
    # A rank's work is the same however many stages it is cut into.
    work = [work_of(1.0 / virtual, 2.0 / virtual)] * (pipeline * virtual)
    return simulate(order, work, links, micro_batches, record=True)


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(1, 4), (2, 2), (4, 4), (4, 9), (3, 16)])
def test_order_is_what_torch_runs(pipeline: int, micro_batches: int) -> None:
    """Schedule1F1B's own loop, with a stage that only notes what it is told to do."""
    from torch.distributed.pipelining import Schedule1F1B

    order = order_of("1f1b", pipeline, 1, micro_batches)
    for rank in range(pipeline):
        if pipeline > 1:
            assert order[rank] == tuple(noted(Schedule1F1B, rank, pipeline, micro_batches))
        else:
            assert [action.kind for action in order[rank]] == ["F", "B"] * micro_batches


def noted(schedule: Any, rank: int, pipeline: int, micro_batches: int) -> list[Action]:
    actions: list[Action] = []

    def nothing(*arguments: Any, **options: Any) -> list[Any]:
        return []

    stage = SimpleNamespace(
        stage_index=rank,
        forward_one_chunk=lambda number, *a, **o: actions.append(Action("F", rank, number)),
        backward_one_chunk=lambda number, **o: actions.append(Action("B", rank, number)),
        get_fwd_recv_ops=nothing, get_fwd_send_ops=nothing, get_bwd_recv_ops=nothing, get_bwd_send_ops=nothing,
        perform_reduce_grad=nothing,
    )  # fmt: skip
    self = SimpleNamespace(
        _stage=stage, _num_stages=pipeline, _n_microbatches=micro_batches, scale_grads=False,
        _check_inputs=lambda *a: ([()] * micro_batches, [{}] * micro_batches), _initialize_stage=nothing,
        _maybe_compute_loss=nothing, _maybe_get_loss=nothing, _update_losses=nothing,
    )  # fmt: skip
    schedule._step_microbatches(self)
    return actions


@pytest.mark.parametrize("schedule", ["interleaved", "zero_bubble"])
@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(2, 2, 4), (4, 3, 8), (4, 2, 10), (3, 2, 2)]
)
def test_every_pass_once_and_gradients_after_their_forward(
    schedule: str, pipeline: int, virtual: int, micro_batches: int
) -> None:
    order: Order = order_of(schedule, pipeline, virtual, micro_batches)
    kinds = "FIW" if schedule == "zero_bubble" else "FB"
    for rank, actions in enumerate(order):
        stages = range(rank, pipeline * virtual, pipeline)
        assert sorted(actions) == sorted(
            Action(kind, stage, number)
            for kind in kinds
            for stage in stages
            for number in range(micro_batches)
        )
        place = {action: index for index, action in enumerate(actions)}
        for before, after in pairwise(kinds):
            assert all(
                place[Action(before, s, m)] < place[Action(after, s, m)]
                for s in stages
                for m in range(micro_batches)
            )


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 4), (4, 16), (8, 32)])
def test_bubble_of_1f1b_is_the_known_one(pipeline: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1) of the time (Narayanan et al. 2021), with messages that take none."""
    found = run("1f1b", pipeline, 1, micro_batches)
    assert found.bubble == pytest.approx((pipeline - 1) / (micro_batches + pipeline - 1))
    assert found.passes_end == pytest.approx(3.0 * (micro_batches + pipeline - 1))


@pytest.mark.parametrize(
    ("pipeline", "virtual", "micro_batches"), [(4, 2, 8), (4, 4, 16), (2, 3, 8)]
)
def test_interleaving_divides_the_bubble(pipeline: int, virtual: int, micro_batches: int) -> None:
    """By the stages of a rank (Narayanan et al. 2021, 2.2)."""
    found = run("interleaved", pipeline, virtual, micro_batches)
    assert found.passes_end == pytest.approx(3.0 * (micro_batches + (pipeline - 1) / virtual))


@pytest.mark.parametrize(("pipeline", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 16)])
def test_schedules_rank_as_published(pipeline: int, micro_batches: int) -> None:
    bubbles = {
        name: run(schedule, pipeline, virtual, micro_batches).bubble
        for name, schedule, virtual in [
            ("1f1b", "1f1b", 1), ("interleaved", "interleaved", 2), ("zero", "zero_bubble", 1), ("both", "zero_bubble",
            2)
        ]
    }  # fmt: skip
    assert bubbles["both"] < bubbles["interleaved"] < bubbles["1f1b"]
    assert bubbles["zero"] < bubbles["1f1b"]


def test_passes_of_a_rank_do_not_overlap_and_wait_for_their_input() -> None:
    found = run("interleaved", 4, 2, 8, Links(0.1, False, False))
    passes = [event for event in found.events if event.kind in "FB"]
    ends = {(event.kind, event.stage, event.micro_batch): event.end for event in passes}
    for rank in range(4):
        own = sorted(
            (event for event in passes if event.rank == rank), key=lambda event: event.start
        )
        assert all(one.end <= other.start + 1e-9 for one, other in pairwise(own))
    for event in passes:
        before = event.stage - 1 if event.kind == "F" else event.stage + 1
        if 0 <= before < 8:
            assert event.start >= ends[event.kind, before, event.micro_batch] + 0.1 - 1e-9


def test_hand_overs_cost_more_where_ranks_wait_for_them() -> None:
    free, beside, waited = (
        run("1f1b", 4, 1, 8, Links(hand_over, waits, False)).passes_end
        for hand_over, waits in [(0.0, False), (0.1, False), (0.1, True)]
    )
    assert free < beside < waited


def test_reduction_hides_behind_the_last_backward_pass() -> None:
    """Four layers' gradients of 1 s each, made one a second: only the last reduction is left when
    the passes end."""
    pieces = tuple(Piece(0.5, 1.0, 0.0, 1.0) for _ in range(4))
    work = StageWork(2.0, 4.0, 0.0, 0.0, pieces)
    found = simulate(order_of("1f1b", 1, 1, 2), [work], LINKS, 2)
    assert found.passes_end == pytest.approx(12.0)
    assert found.end == pytest.approx(13.0)


def test_first_forward_waits_for_weights_layer_by_layer() -> None:
    pieces = tuple(Piece(0.5, 1.0, 1.0, 0.0) for _ in range(4))
    work = StageWork(2.0, 4.0, 0.0, 0.0, pieces)
    found = simulate(order_of("1f1b", 1, 1, 2), [work], LINKS, 2)
    # The fourth layer's weights arrive after 4 s and its work takes 0.5; the second micro-batch
    # waits for nothing.
    assert found.passes_end == pytest.approx(4.5 + 4.0 + 6.0)


def test_reducing_every_time_is_seen_in_the_traffic() -> None:
    """Backward passes end every 3 s: reductions of 4 s are behind by one more of them each time."""
    work = work_of(1.0, 2.0, reduce=4.0)
    once = simulate(order_of("1f1b", 1, 1, 4), [work], LINKS, 4)
    always = simulate(order_of("1f1b", 1, 1, 4), [work], Links(0.0, False, True), 4)
    assert once.end == pytest.approx(12.0 + 4.0)
    assert always.end == pytest.approx(3.0 + 4 * 4.0)
