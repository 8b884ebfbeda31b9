"""Bad numbers planted into real runs: on one rank's gradient, in the loss, in the norm, in one
replica's weights."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tampered_ranks import started
from torch import Tensor

import megalite.training.loop
from megalite.checkpoint.folder import complete_steps
from megalite.checkpoint.train_state import read_train_state
from megalite.comm.mesh import Mesh, node_name
from megalite.config import Config
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import ConfigError
from megalite.health import numbers
from megalite.observe.environment import read_starts
from megalite.runtime.exit_codes import Exit
from megalite.train import train
from megalite.training.parts import RankModel
from small_runs import curve_of, make_config, metrics_of, write_corpus

BATCH, LENGTH = 4, 16
NUM_TOKENS = 50 * LENGTH + 1  # more than a run reads
QUIET = ("observe.eval_every=0", "data.order=sequential")
EIGHT = (*QUIET, "train.steps=8", "checkpoint.every=0")


@dataclass(frozen=True)
class Plant:
    """Bad numbers in the steps that train on these global batches, counted from 0 in the order of
    the data."""

    what: str
    """nan: in the gradient of one rank; loss, norm: a spike; flip: a bit of the weights of one
    rank."""
    batches: tuple[int, ...]
    rank: int = 0
    enough: int = numbers.ENOUGH
    weight: int = 0
    """Where the bit is flipped, in its bucket."""


class Watched:
    """Whether each step changed weights or moments. In the place of an engine's `step`."""

    def __init__(self, engine: Any):
        self.engine, self.step, self.changed = engine, engine.step, list[bool]()

    def state(self) -> list[Tensor]:
        if self.engine.zero_stage == 3:  # where no rank holds what another one holds
            return [
                x.clone() for kind in self.engine.states for x in self.engine._shares(kind).values()
            ]
        return [tensor.clone() for _, tensor in self.engine.copies()]

    def __call__(self, *arguments: Any) -> Tensor:
        before, updates = self.state(), self.engine.num_updates
        norm = self.step(*arguments)
        same = all(map(torch.equal, self.state(), before))
        assert same == (self.engine.num_updates == updates), (
            "an update counts where it changed something"
        )
        self.changed.append(not same)
        return norm


@contextmanager
def planted(plant: Plant, rank: int) -> Iterator[list[bool]]:
    """Whether each step of the rank changed its state."""
    original, changed = megalite.training.loop.forward_backward, list[bool]()

    def tampered(parts: RankModel, batch: Any, mesh: Mesh, seed: int) -> dict[str, Tensor]:
        engine: Any = parts.engine
        if not isinstance(engine.step, Watched):
            engine.step = Watched(engine)
            engine.step.changed = changed
        hit = int(batch[0].samples.min()) // BATCH in plant.batches
        mine = hit and rank == plant.rank
        hooks = []
        if (hit and plant.what == "norm") or (mine and plant.what == "nan"):
            factor = torch.nan if plant.what == "nan" else 1e3
            hooks = [
                parameter.register_hook(lambda grad: grad * factor)
                for stage in parts.stages
                for name, parameter in stage.named_parameters()
                if "norm" in name
            ]
        found = original(parts, batch, mesh, seed)
        for hook in hooks:
            hook.remove()
        if mine and plant.what == "flip":
            engine.wait_for_params()
            weights = next(bucket.weights for bucket in engine.buckets if not bucket.layout.cut)
            weights.view(torch.int32)[plant.weight] ^= 1 << 12
        return found | {"loss": found["loss"] * 100} if hit and plant.what == "loss" else found

    enough = numbers.ENOUGH
    megalite.training.loop.forward_backward, numbers.ENOUGH = tampered, plant.enough
    try:
        yield changed
    finally:
        megalite.training.loop.forward_backward, numbers.ENOUGH = original, enough


Cases = dict[str, tuple[Config, Plant]]


def train_cases(rank: int, world_size: int, folder: Path, cases: Cases) -> int:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    for name, (config, plant) in cases.items():
        with planted(plant, rank) as changed:
            status = train(config)
        (folder / f"{name}-{rank}.json").write_text(json.dumps([int(status), changed]))
    dist.destroy_process_group()
    return 0


@dataclass
class Outcome:
    config: Config
    status: list[int]
    """Of every rank."""
    changed: list[list[bool]]
    said: str

    @property
    def saved(self) -> list[int]:
        return complete_steps(self.config.run.folder / "checkpoints")

    def steps_with(self, flag: str) -> list[int]:
        return [line["step"] for line in metrics_of(self.config) if line.get(flag)]


def run_cases(world_size: int, folder: Path, cases: Cases) -> dict[str, Outcome]:
    with started(world_size, folder, train_cases, cases) as ranks:
        assert ranks.exit_codes() == [0] * world_size, ranks.said(0)
        said = ranks.said(0)
    found = {}
    for name, (config, _) in cases.items():
        results = [
            json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world_size)
        ]
        found[name] = Outcome(config, [r[0] for r in results], [r[1] for r in results], said)
    return found


def alone(config: Config, plant: Plant) -> tuple[Exit, list[bool]]:
    with planted(plant, 0) as changed:
        return train(config), changed


NEVER = Plant("nan", ())
NAN = Plant("nan", (5,), rank=1)
LAYOUTS = {
    "tensor-2": ("parallel.tensor=2",),
    "data-2-zero-0-bf16": ("parallel.zero_stage=0", "train.precision=bf16"),
    "data-2-zero-1-bf16": ("train.precision=bf16",),
    "data-2-zero-2": ("parallel.zero_stage=2",),
    "pipeline-2": ("parallel.pipeline=2",),
    "context-2-bf16": ("parallel.context=2", "train.precision=bf16"),
}
REWIND = ("health.not_finite=rewind", *QUIET, "train.steps=9", "checkpoint.every=4")
WENT_BACK = [True] * 5 + [False] * 3 + [True] * 5
"""Steps 1 to 5; 6 is bad, which the host hears of in step 8; then 5 to 9, from the checkpoint of
step 4."""


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All runs of two ranks in one start of the processes."""
    folder = tmp_path_factory.mktemp("two")
    cases = {
        f"skip-{name}": (
            make_config(folder, "llama", f"run.name=skip-{name}", *EIGHT, *layout),
            NAN,
        )
        for name, layout in LAYOUTS.items()
    }
    for name in ("data-2-zero-1-bf16", "tensor-2", "pipeline-2"):
        run = ("run.name=", *REWIND, *LAYOUTS[name])
        cases[f"rewind-{name}"] = (
            make_config(folder, "llama", f"{run[0]}rewind-{name}", *run[1:]),
            NAN,
        )
    # The same in two parts, the second of which begins after the rewind.
    parts = ("run.name=parts", *REWIND, *LAYOUTS["data-2-zero-1-bf16"])
    cases["parts-1"] = (make_config(folder, "llama", *parts, "train.stop_at=6"), NAN)
    cases["parts-2"] = (make_config(folder, "llama", *parts), NAN)
    flips = ("health.weights_check_every=2", *QUIET, "train.steps=9", "checkpoint.every=3")
    cases["flip-data"] = (
        make_config(folder, "llama", "run.name=flip-data", *flips),
        Plant("flip", (3,), 1),
    )
    cases["flip-tensor"] = (
        make_config(folder, "llama", "run.name=flip-tensor", *flips, "parallel.tensor=2"), Plant("flip", (3,), 1),
    )  # fmt: skip
    return run_cases(2, folder, cases)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_nan_in_a_gradient_of_one_rank_changes_nothing_on_any(
    on_two_ranks: dict[str, Outcome], layout: str
) -> None:
    found = on_two_ranks[f"skip-{layout}"]
    assert found.status == [Exit.DONE] * 2
    assert found.changed == [[step != 6 for step in range(1, 9)]] * 2
    assert found.steps_with("not_finite") == found.steps_with("skipped") == [6]
    steps = {line["step"]: line for line in metrics_of(found.config) if "lr" in line}
    assert steps[6]["grad_norm"] is None
    assert steps[8]["tokens"] == 8 * BATCH * LENGTH  # of the step that was skipped as well
    assert found.saved == [8]
    state = read_train_state(found.config.run.folder / "checkpoints" / "step-00000008")
    assert (state["updates"], state["hooks"]["guard"]["entered"]) == (7, 7)
    bad = found.config.run.folder / "bad_batches" / "step-00000006-sample-20.jsonl"
    assert f"warning: step 6: loss {steps[6]['loss']:.4g} and gradient norm nan" in found.said
    assert str(bad) in found.said
    assert len(bad.read_text().splitlines()) == BATCH


def without_batch_5(folder: Path) -> Path:
    """The corpus of `make_config` and, beside it, one that never had the samples of global batch 5.
    Sample 19 ends with the token that follows, which is made the same in both."""
    tokens = IndexedDataset(write_corpus(folder / "corpus", NUM_TOKENS)).read(0, NUM_TOKENS).copy()
    first, last = 5 * BATCH * LENGTH, 6 * BATCH * LENGTH
    tokens[last] = tokens[first]
    for name, part in (("corpus", tokens), ("without", np.delete(tokens, slice(first, last)))):
        with IndexedWriter(folder / name, np.uint16) as writer:
            writer.add_document(part)
    return folder / "without"


@pytest.mark.parametrize("what", ["nan", "norm"])
def test_rewound_is_a_run_whose_data_never_had_the_batch(
    tmp_path: Path, what: str, capfd: Any
) -> None:
    without = without_batch_5(tmp_path)
    policy = {"nan": "not_finite", "norm": "grad_norm_spike"}[what]
    rewound = make_config(tmp_path, "llama", "run.name=rewound", *REWIND, f"health.{policy}=rewind")
    never = make_config(
        tmp_path, "llama", "run.name=never", *REWIND, f"data.train=[{{path: {without}}}]"
    )
    status, changed = alone(rewound, Plant(what, (5,), enough=4))
    assert status == Exit.DONE
    assert changed == WENT_BACK
    train(never)
    assert len(curve_of(never)) == 9
    assert curve_of(rewound) == curve_of(never)
    said = capfd.readouterr().out
    assert "goes back to its newest checkpoint and passes over this batch" in said
    assert "resumed after step 4" in said
    steps = [line for line in metrics_of(rewound) if "lr" in line]
    assert [line.get("skipped_samples", 0) for line in steps] == [0] * 4 + [4] * 5
    state = read_train_state(rewound.run.folder / "checkpoints" / "step-00000009")
    assert state["data"]["skipped"] == [[20, 24]]
    assert state["data"]["consumed"] == {"corpus": 36}
    check_bad_batch(rewound, tmp_path)


def check_bad_batch(config: Config, folder: Path) -> None:
    (path,) = (config.run.folder / "bad_batches").iterdir()
    tokens = IndexedDataset(folder / "corpus").read(0, NUM_TOKENS)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["sample"] for line in lines] == [20, 21, 22, 23]
    for line in lines:
        assert (line["step"], line["source"], line["sample_of_source"]) == (
            6,
            "corpus",
            line["sample"],
        )
        assert line["tokens"] == tokens[line["sample"] * LENGTH :][:LENGTH].tolist()


@pytest.mark.parametrize("layout", ["data-2-zero-1-bf16", "tensor-2", "pipeline-2"])
def test_all_ranks_go_back_together(on_two_ranks: dict[str, Outcome], layout: str) -> None:
    found = on_two_ranks[f"rewind-{layout}"]
    assert found.status == [Exit.DONE] * 2
    assert found.changed == [WENT_BACK] * 2
    assert [line[0] for line in curve_of(found.config)] == list(range(1, 10))
    assert found.steps_with("skipped") == []


def test_resumed_after_going_back_is_bitwise_the_same(on_two_ranks: dict[str, Outcome]) -> None:
    whole, resumed = (on_two_ranks[name] for name in ("rewind-data-2-zero-1-bf16", "parts-2"))
    # A run that is about to save looks at once.
    assert on_two_ranks["parts-1"].changed == [[True] * 5 + [False] + [True] * 2] * 2
    assert resumed.changed == [[True] * 3] * 2
    assert curve_of(resumed.config) == curve_of(whole.config)
    first, second = (
        read_train_state(x.config.run.folder / "checkpoints" / "step-00000009")
        for x in (whole, resumed)
    )
    assert first == second


def test_stop_saves_what_was_before_and_is_met_again_until_skipped(
    tmp_path: Path, capfd: Any
) -> None:
    skipped = make_config(tmp_path, "llama", "run.name=skipped", *EIGHT)
    stopped = make_config(tmp_path, "llama", "run.name=stopped", *EIGHT, "health.not_finite=stop")
    on = make_config(tmp_path, "llama", "run.name=stopped", *EIGHT)
    plant = Plant("nan", (5,))
    assert alone(skipped, plant)[0] == Exit.DONE
    assert alone(stopped, plant) == (Exit.BAD_NUMBERS, [True] * 5 + [False] * 3)
    assert complete_steps(stopped.run.folder / "checkpoints") == [5]
    assert "error: bad numbers in step 6: " in capfd.readouterr().out
    assert read_starts(stopped.run.folder)[-1]["ended"]["status"] == "failed"
    assert alone(stopped, plant) == (Exit.BAD_NUMBERS, [False] * 3)
    assert alone(on, plant) == (Exit.DONE, [False, True, True])
    assert curve_of(on) == curve_of(skipped)


def test_too_many_in_a_row_end_the_run_also_over_two_starts(tmp_path: Path, capfd: Any) -> None:
    limit = (*EIGHT, "health.bad_steps_limit=3")
    plant = Plant("nan", (2, 3, 4, 5, 6, 7))
    first = make_config(tmp_path, "llama", *limit, "train.stop_at=4")
    assert alone(first, plant) == (Exit.DONE, [True] * 2 + [False] * 2)
    rest = make_config(tmp_path, "llama", *limit)
    status, changed = alone(rest, plant)
    assert status == Exit.BAD_NUMBERS
    assert len(changed) == 3  # the third in a row is step 5; the host hears of it in step 7
    assert complete_steps(rest.run.folder / "checkpoints") == [4, 7]
    assert (
        "error: 3 steps with bad numbers in a row (health.bad_steps_limit)"
        in capfd.readouterr().out
    )


@pytest.mark.parametrize(
    ("good", "kept", "way_back"),
    [
        (
            4,
            [2, 4],
            "if it comes again, checkpoint.resume={root}/step-00000002 goes back to the newest that is known",
        ),
        (0, [], "no checkpoint was saved: started again, the run begins afresh"),
    ],
)
def test_a_run_that_is_sent_back_again_and_again_gives_up(
    tmp_path: Path, capfd: Any, good: int, kept: list[int], way_back: str
) -> None:
    """Every batch is bad but the first few. It names the way back."""
    config = make_config(
        tmp_path, "llama", *REWIND, "health.bad_steps_limit=2", "checkpoint.every=2"
    )
    status, _ = alone(config, Plant("nan", tuple(range(good, 40))))
    assert status == Exit.BAD_NUMBERS
    root = config.run.folder / "checkpoints"
    assert complete_steps(root) == kept
    said = capfd.readouterr().out
    assert f"error: sent back to step {good} more than 2 times (health.bad_steps_limit)" in said
    assert way_back.format(root=root) in said


def test_spikes_are_reported_and_trained_on_unless_asked_otherwise(
    tmp_path: Path, capfd: Any
) -> None:
    config = make_config(tmp_path, "llama", *EIGHT)
    status, changed = alone(config, Plant("loss", (5,), enough=4))
    assert (status, changed) == (Exit.DONE, [True] * 8)
    flagged = [line["step"] for line in metrics_of(config) if line.get("loss_spike")]
    assert flagged == [6]
    assert not any("skipped" in line for line in metrics_of(config))
    assert "warning: step 6: loss spike: " in capfd.readouterr().out
    assert not (config.run.folder / "bad_batches").exists()
    again = make_config(tmp_path, "llama", *EIGHT, "run.name=again", "health.loss_spike=skip")
    assert alone(again, Plant("loss", (5,), enough=4)) == (
        Exit.DONE,
        [step != 6 for step in range(1, 9)],
    )


def test_megatrons_order_has_no_samples_to_go_past_with(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.order: megatron .* `rewind` of health"):
        make_config(tmp_path, "llama", "data.order=megatron", "health.loss_spike=rewind")


@pytest.mark.parametrize("case", ["flip-data", "flip-tensor"])
def test_of_two_that_differ_both_are_named(on_two_ranks: dict[str, Outcome], case: str) -> None:
    found = on_two_ranks[case]
    assert found.status == [Exit.CORRUPTED] * 2
    assert found.saved == [3]  # step 6, when it would have been saved, is when it was told
    host = node_name()
    assert (
        f"rank 0 on {host}, rank 1 on {host} must hold the same bits and do not; without a majority"
        in found.said
    )


@pytest.fixture(scope="module")
def on_three_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("three")
    more = (
        *QUIET,
        "train.steps=8",
        "checkpoint.every=0",
        "train.global_batch_size=6",
        "health.weights_check_every=2",
    )
    return run_cases(
        3, folder, {
            "flip": (make_config(folder, "llama", "run.name=flip", *more), Plant("flip", (4,), 1)),
            "none": (make_config(folder, "llama", "run.name=none", *more), NEVER),
        },
    )  # fmt: skip


def test_one_of_three_is_named(on_three_ranks: dict[str, Outcome]) -> None:
    found = on_three_ranks["flip"]
    assert found.status == [Exit.CORRUPTED] * 3
    assert f"rank 1 on {node_name()} holds other bits than the 2 ranks it must equal" in found.said
    assert found.saved == []


def test_ranks_that_agree_are_left_alone(on_three_ranks: dict[str, Outcome]) -> None:
    assert on_three_ranks["none"].status == [Exit.DONE] * 3
    assert on_three_ranks["none"].saved == [8]


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
def test_deepspeed_skips_and_goes_back_too(tmp_path: Path) -> None:
    stages = {
        "zero-1-bf16": ("parallel.zero_stage=1", "train.precision=bf16"),
        "zero-2-bf16": ("parallel.zero_stage=2", "train.precision=bf16"),
        "zero-3": ("parallel.zero_stage=3",),
    }
    engine = ("parallel.engine=deepspeed",)
    cases = {
        name: (make_config(tmp_path, "llama", *EIGHT, *engine, *stage, f"run.name={name}"), NAN)
        for name, stage in stages.items()
    }
    spike = Plant("norm", (5,), enough=4)
    cases["spike"] = (
        make_config(tmp_path, "llama", *EIGHT, *engine, "run.name=spike", "health.grad_norm_spike=skip"), spike,
    )  # fmt: skip
    cases["rewind"] = (make_config(tmp_path, "llama", *REWIND, *engine, "run.name=rewind"), NAN)
    found = run_cases(2, tmp_path, cases)
    for name in (*stages, "spike"):
        assert found[name].status == [Exit.DONE] * 2
        assert found[name].steps_with("skipped") == [6]
        state = read_train_state(found[name].config.run.folder / "checkpoints" / "step-00000008")
        assert state["updates"] == 7
        assert found[name].changed == [[step != 6 for step in range(1, 9)]] * 2
    assert found["rewind"].status == [Exit.DONE] * 2
    assert found["rewind"].changed == [WENT_BACK] * 2
