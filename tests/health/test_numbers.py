"""What is judged bad, worked out by hand and by numpy; that judging waits for no device; and who
holds other bits than those who should hold the same."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import ALONE, Axis, Fold, Mesh, make_mesh
from megalite.config import HealthConfig
from megalite.data.loader import Loader
from megalite.data.mixture import build_mixtures
from megalite.engine import Sharing
from megalite.engine.native import NativeEngine
from megalite.health import numbers as module
from megalite.health.guard import Ending, Guard
from megalite.health.late import Late
from megalite.health.numbers import BadStep, Numbers
from megalite.health.replicas import KINDS, Disagreement, ReplicaCheck, describe, disagreements
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.runtime.exit_codes import Exit
from megalite.training.parts import build
from ranks import run_ranks
from small_runs import make_config, write_corpus

CPU = torch.device("cpu")


def going_on_from(state: dict[str, Any], health: HealthConfig) -> Numbers:
    numbers = Numbers(health, CPU)
    numbers.load_state(state)
    return numbers


def judge(numbers: Numbers, loss: float, norm: float = 1.0) -> bool:
    return bool(numbers.update_gate(torch.tensor(loss))(torch.tensor(norm)))


def feed(numbers: Numbers, losses: list[float]) -> list[bool]:
    """Whether each was permitted."""
    return [judge(numbers, loss) for loss in losses]


def noise(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).normal(3.0, 0.1, count).astype(np.float32).tolist()


def spikes_by_numpy(losses: list[float], sigmas: float) -> tuple[list[int], list[float]]:
    """Places of spikes, and what is compared with at the end: the last 128 in float64, a spike
    entered as the highest number that is none."""
    window: list[float] = []
    found = []
    for place, loss in enumerate(losses):
        if not math.isfinite(loss):
            continue
        last = window[-128:]
        if len(last) >= 64:
            highest = np.mean(last) + sigmas * np.std(last, ddof=1)
            if loss > highest:
                found.append(place)
                loss = float(highest)
        window.append(loss)
    return found, window[-128:]


def test_spikes_are_those_that_numpy_finds() -> None:
    losses = noise(400)
    for place, value in {
        20: math.nan,
        64: 4.5,
        65: 5.0,
        70: math.inf,
        150: 4.0,
        151: 9.0,
        300: 3.5,
    }.items():
        losses[place] = value
    for place in range(330, 400):  # the level rises for good
        losses[place] += 1.0
    numbers = Numbers(HealthConfig(loss_spike="skip", spike_sigmas=4.0), CPU)
    refused = [place for place, permitted in enumerate(feed(numbers, losses)) if not permitted]
    wanted, window = spikes_by_numpy(losses, 4.0)
    assert sorted([*wanted, 20, 70]) == refused
    assert sorted(numbers.state()["losses"]) == pytest.approx(sorted(window), rel=1e-6)  # of fp32
    assert {65, 150, 151, 300, 330} <= set(wanted)
    assert 64 not in wanted  # too early to tell, by 63 finite ones
    assert max(wanted) < 360  # a new level is soon no spike


def test_what_hardly_varies_has_no_spikes() -> None:
    """A deviation of 0 is taken for a thousandth of the mean, and a number at the limit is no
    spike."""
    numbers = Numbers(HealthConfig(loss_spike="skip", spike_sigmas=8.0), CPU)
    assert feed(numbers, [*[2.0] * 64, 2.015, 2.05]) == [True] * 65 + [False]
    assert feed(Numbers(HealthConfig(loss_spike="skip"), CPU), [0.0] * 66) == [True] * 66


def test_what_is_not_finite_poisons_nothing() -> None:
    clean, poisoned = (Numbers(HealthConfig(), CPU) for _ in range(2))
    losses = noise(100)
    feed(clean, losses)
    for loss in losses:
        assert judge(poisoned, loss)
        assert not judge(poisoned, math.nan)
        assert not judge(poisoned, 1.0, math.inf)
        assert not judge(poisoned, -math.inf, math.nan)
    assert poisoned.state() == clean.state()


def test_going_on_from_its_state_is_bitwise_the_same() -> None:
    losses = [*noise(200), 30.0, *noise(20, 1)]
    whole = Numbers(HealthConfig(loss_spike="skip"), CPU)
    for place, loss in enumerate(losses):
        before = whole.state()
        permitted = judge(whole, loss)
        if place % 7 == 0 or place == 200:
            again = going_on_from(before, HealthConfig(loss_spike="skip"))
            assert judge(again, loss) == permitted
            assert again.state() == whole.state()


def noted(numbers: Numbers, step: int, loss: float, norm: float = 1.0) -> list[BadStep]:
    judge(numbers, loss, norm)
    numbers.note(step, 4 * (step - 1))
    return numbers.look(step, False)


def test_the_host_is_told_two_steps_later() -> None:
    numbers = Numbers(HealthConfig(), CPU)
    assert [noted(numbers, step, math.nan if step == 3 else 2.0) for step in range(1, 5)] == [
        []
    ] * 4
    (bad,) = noted(numbers, 5, 2.0)
    assert (bad.step, bad.samples, bad.kinds, bad.policy, bad.in_a_row) == (
        3,
        8,
        ("not_finite",),
        "skip",
        1,
    )
    assert "nan" in bad.text
    assert noted(numbers, 6, 2.0, math.inf) == []
    (bad,) = numbers.look(6, True)  # or at once
    assert bad.step == 6
    assert numbers.look(7, True) == []
    resumed = going_on_from(numbers.state(), HealthConfig())
    judge(resumed, math.nan)
    resumed.note(7, 24)
    assert [bad.in_a_row for bad in resumed.look(7, True)] == [2]


def test_the_severest_policy_counts_and_reports_refuse_nothing() -> None:
    numbers = Numbers(HealthConfig(loss_spike="report", grad_norm_spike="skip"), CPU)
    feed(numbers, noise(100))
    assert judge(numbers, 30.0)
    assert {key for key, flag in numbers.record().items() if flag} == {"loss_spike"}
    assert not judge(numbers, 30.0, 20.0)
    assert {key for key, flag in numbers.record().items() if flag} == {
        "loss_spike",
        "grad_norm_spike",
        "skipped",
    }
    for step in range(2):
        judge(numbers, 60.0, 40.0 if step else 1.0)
        numbers.note(step, 0)
    reported, skipped = numbers.look(2, True)
    assert (reported.policy, reported.in_a_row) == ("report", 0)
    assert (skipped.policy, skipped.in_a_row) == ("skip", 1)


@pytest.mark.parametrize("policy", ["rewind", "stop"])
def test_after_a_step_that_ends_the_run_nothing_is_updated_nor_entered(policy: Any) -> None:
    numbers = Numbers(HealthConfig(not_finite=policy), CPU)
    feed(numbers, noise(10))
    before = numbers.state()
    assert feed(numbers, [math.nan, 3.0, 3.0]) == [False] * 3
    assert numbers.state() == before


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its device."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in self.WAITING
        return func(*args, **(kwargs or {}))


def test_no_step_waits_for_the_device(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ENOUGH", 1)
    config = make_config(tmp_path, "llama")
    table = weight_table(config.model)
    plan = make_plan(config, table, 1)
    mesh = make_mesh(plan, CPU)
    parts = build(config, plan, mesh)
    parts.engine.load(from_seed(3, Mesh.alone()))
    numbers = Numbers(config.health, CPU)
    check = ReplicaCheck(mesh)

    def step(number: int, update_gate: Any) -> None:
        parts.engine.begin(1)
        for parameter in parts.stages[0].parameters():
            parameter.sum().backward()
        parts.engine.finish()
        check.begin(number, parts.engine.copies())
        parts.engine.step(1e-3, update_gate)
        numbers.note(number, 0)
        numbers.record()

    def and_wait(norm: Tensor) -> Tensor:
        return torch.tensor(bool(numbers.update_gate(norm)(norm)))

    with Waits() as waits:
        for number in range(3):
            step(number, numbers.update_gate(torch.tensor(1.0)))
    assert waits.count == 0
    with Waits() as waits:
        step(3, and_wait)
    assert waits.count == 1


def test_numbers_are_those_of_when_they_were_added() -> None:
    late: Late[str] = Late(CPU)
    numbers = torch.tensor([1, 2])
    late.add(7, "a", numbers)
    numbers += 1
    late.add(8, "b", numbers)
    assert list(late.take(8)) == []
    assert list(late.take(9)) == [("a", [1, 2])]
    assert list(late.take(9, True)) == [("b", [2, 3])]


def mesh_of(pipeline: int = 1, replicas: int = 1, tensor: int = 1) -> Mesh:
    sizes = {"pipeline": pipeline, "data": replicas, "tensor": tensor}
    stages, data, columns = (Axis(size, 0, None, name) for name, size in sizes.items())
    return Mesh(stages, data, ALONE, columns, data, ALONE, Axis(pipeline * replicas * tensor), CPU)


def table_of(mesh: Mesh, sharing: Sharing, others: dict[int, int]) -> list[list[int]]:
    """All hold 5 of what is shared so, but for `others`; and of all else, each its own..."""
    column = KINDS.index(sharing)
    return [
        [others.get(rank, 5) if number == column else 0 for number in range(len(KINDS))]
        for rank in range(mesh.world.size)
    ]


def folded_mesh() -> Mesh:
    """Two stages of tensor 2 × replicas 2, whose experts are whole: two of each."""
    two, mesh = Axis(2, 0, None, "two"), mesh_of(pipeline=2, replicas=2, tensor=2)
    return replace(mesh, expert_fold=Fold(two, two, ALONE, two))


OF_EXPERTS = Sharing(True, False, False, of_experts=True)
REPLICAS, TENSOR, ALL = (
    Sharing(True, False, False),
    Sharing(False, True, False),
    Sharing(True, True, False),
)


@pytest.mark.parametrize(
    ("mesh", "sharing", "others", "wanted"),
    [
        (mesh_of(replicas=4), REPLICAS, {}, []),
        (mesh_of(replicas=4), REPLICAS, {2: 6}, [((0, 1, 2, 3), (2,))]),
        (mesh_of(replicas=2), REPLICAS, {1: 6}, [((0, 1), (0, 1))]),
        (mesh_of(replicas=3, tensor=2), REPLICAS, {3: 6}, [((1, 3, 5), (3,))]),
        (mesh_of(replicas=2, tensor=3), TENSOR, {4: -1}, [((3, 4, 5), (4,))]),
        (mesh_of(replicas=2, tensor=2), ALL, {3: 0}, [((0, 1, 2, 3), (3,))]),
        (mesh_of(pipeline=2, replicas=3), REPLICAS, {5: 1}, [((3, 4, 5), (5,))]),
        (
            mesh_of(pipeline=2, replicas=2),
            Sharing(True, False, True),
            {2: 1},
            [((0, 1, 2, 3), (2,))],
        ),
        (mesh_of(replicas=4), REPLICAS, {0: 1, 1: 1}, [((0, 1, 2, 3), (0, 1, 2, 3))]),
        (folded_mesh(), OF_EXPERTS, {5: 6}, [((5, 7), (5, 7))]),
        (
            replace(mesh_of(replicas=8), expert_fold=Fold(Axis(2), Axis(4), ALONE, Axis(2))),
            OF_EXPERTS,
            {3: 1},
            [((1, 3, 5, 7), (3,))],
        ),
        (mesh_of(replicas=5), REPLICAS, {0: 1, 1: 2}, [((0, 1, 2, 3, 4), (0, 1))]),
    ],
)
def test_the_minority_is_named(
    mesh: Mesh, sharing: Sharing, others: dict[int, int], wanted: list[Any]
) -> None:
    found = disagreements(table_of(mesh, sharing, others), mesh)
    assert found == [Disagreement(*each) for each in wanted]


def test_a_disagreement_in_words() -> None:
    hosts = [f"n{rank}" for rank in range(12)]
    certain = describe(40, [Disagreement((0, 1, 2), (1,))], hosts)
    assert (
        "silent data corruption, found in step 40: rank 1 on n1 holds other bits than the 2 ranks"
        in certain
    )
    assert "rank 0 on n0, rank 1 on n1 must hold the same bits" in describe(
        40, [Disagreement((0, 1), (0, 1))], hosts
    )
    many = tuple(range(12))
    assert "rank 7 on n7 and 4 more" in describe(1, [Disagreement(many, many)], hosts)


@pytest.mark.parametrize("size", [64, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_every_flipped_bit_changes_the_sum(dtype: torch.dtype, size: int) -> None:
    check = ReplicaCheck(mesh_of())
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]
    numbers = 50 * torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).abs()
    x = numbers.to(dtype)[1:]

    def sums(step: int) -> list[int]:
        check.begin(step, [(REPLICAS, x), (Sharing(False, False, False), x)])
        ((_, table),) = check._late.take(step, True)
        return table[0]

    wanted = sums(0)
    assert sum(value != 0 for value in wanted) == 1  # what nobody else holds is not read
    for bit in range(8 * x.element_size()):
        flip = torch.tensor(1 << bit, dtype=torch.int64).to(words)
        x.view(words)[bit] ^= flip
        assert sums(1) != wanted
        x.view(words)[bit] ^= flip
    x = x.clone()  # elsewhere in memory
    assert sums(2) == wanted
    check.begin(3, [(REPLICAS, x[:2]), (REPLICAS, x[2:4])])
    check.begin(4, [(REPLICAS, x[2:4]), (REPLICAS, x[:2])])
    (_, swapped_not), (_, swapped) = check._late.take(4, True)
    assert swapped != swapped_not


def test_weights_and_all_of_the_optimizer_state_are_compared(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", "train.precision=bf16", "parallel.zero_stage=0")
    table = weight_table(config.model)
    engine = build(config, make_plan(config, table, 1), mesh_of()).engine
    assert isinstance(engine, NativeEngine)
    engine.load(from_seed(3, Mesh.alone()))
    check = ReplicaCheck(mesh_of())

    def sums() -> list[int]:
        check.begin(0, engine.copies())
        ((_, table),) = check._late.take(0, True)
        return table[0]

    wanted = sums()
    for kind in ("weights", *engine.states):
        bucket = engine.buckets[-1]
        held = bucket.weights if kind == "weights" else bucket.stepped_state(kind)
        held[0] += 1.0
        assert sums() != wanted, kind
        held[0] -= 1.0
        wanted = sums()


def flipped(rank: int, world_size: int, folder: Path) -> list[list[Disagreement]]:
    """Who is named where no bit has flipped, one in an expert on rank 2, and one in its router."""
    config = make_config(folder, "experts", "parallel.expert=2", "parallel.zero_stage=0")
    table = weight_table(config.model)
    mesh = make_mesh(make_plan(config, table, world_size), CPU)
    engine = build(config, make_plan(config, table, world_size), mesh).engine
    assert isinstance(engine, NativeEngine)
    engine.load(from_seed(3, mesh))
    check, named = ReplicaCheck(mesh), []
    for step, kind in enumerate(("", "experts.down.weight", "router.weight")):
        slots = [(b, s) for b in engine.buckets for s in b.layout.slots]
        for bucket, slot in slots:
            if rank == 2 and kind and slot.weight.name.endswith(f"1.mlp.{kind}"):
                bucket.weights[slot.start : slot.start + 1].view(torch.int32).bitwise_xor_(1)
        check.begin(step, engine.copies())
        ((_, sums),) = check._late.take(step, True)
        named.append(disagreements(sums, mesh))
    return named


def test_a_flipped_bit_in_an_expert_is_named(tmp_path: Path) -> None:
    """Among the ranks that hold this expert: 0 and 2 of four, of which each has half of them."""
    write_corpus(tmp_path / "corpus")
    expert = Disagreement((0, 2), (0, 2))
    for named in run_ranks(4, flipped, tmp_path):
        assert named == [[], [expert], [Disagreement((0, 1, 2, 3), (2,)), expert]]


def guarded(
    tmp_path: Path, norms: list[float], *overrides: str
) -> tuple[list[bool], list[Ending | None]]:
    """Which of these steps are permitted, and what follows after each."""
    config = make_config(tmp_path, "llama", "observe.eval_every=0", *overrides)
    mesh = make_mesh(make_plan(config, weight_table(config.model), 1), CPU)
    data = build_mixtures(config)["train"]
    assert data is not None
    with Loader(data, 4, 2, 0, 1) as loader:
        guard = Guard(config, mesh, loader)
        permitted, endings = [], []
        for step, norm in enumerate(norms, 1):
            before = loader.samples
            next(loader)
            permitted.append(bool(guard.update_gate(torch.tensor(1.0))(torch.tensor(norm))))
            guard.note(step, before)
            endings.append(guard.look(step, False))
    return permitted, endings


def test_what_is_saved_after_too_many_is_named_by_the_step_it_is_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last of them is followed by one that ends the run, of which the host has not
    heard yet."""
    monkeypatch.setattr(module, "ENOUGH", 2)
    overrides = ("health.bad_steps_limit=1", "health.grad_norm_spike=stop")
    permitted, endings = guarded(tmp_path, [1.0, 1.0, 1.0, math.nan, 1.0, 50.0], *overrides)
    assert permitted == [True, True, True, False, True, False]
    assert endings == [None] * 5 + [Ending(Exit.BAD_NUMBERS, saves=(5, 20))]


def test_as_many_in_a_row_as_the_limit_end_the_run(tmp_path: Path) -> None:
    """As soon as the host has heard of them, two steps later."""
    norms = [1.0, math.nan, 1.0, math.nan, math.nan, 1.0, 1.0]
    assert guarded(tmp_path, norms, "health.bad_steps_limit=2")[1] == [None] * 6 + [
        Ending(Exit.BAD_NUMBERS, (7, 28))
    ]


def test_ranks_are_compared_now_and_then_and_before_every_save(tmp_path: Path) -> None:
    config, engine, begun = (
        make_config(tmp_path, "llama", "health.weights_check_every=4"),
        Mock(),
        Mock(),
    )
    guard = Guard(config, mesh_of(replicas=2), Mock())
    guard._replicas = begun
    for step in range(1, 9):
        guard.compare(step, engine, saves=step == 6)
    assert [call.args[0] for call in begun.begin.call_args_list] == [4, 6, 8]
