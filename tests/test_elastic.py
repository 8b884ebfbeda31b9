"""Fewer ranks than before: the same samples in the same order, and the same losses but for
rounding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tampered_ranks import training

import megalite.training.parts
from megalite.checkpoint.folder import complete_steps
from megalite.comm.mesh import Mesh
from megalite.config import Config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.parallel.stage import Inputs
from megalite.plan import make_plan, nodes_that_fit
from megalite.runtime.activity import NOW
from megalite.runtime.exit_codes import Exit
from small_runs import curve_of, make_config

LOST_IN, SAVED_EVERY = 8, 3


def watch_samples(rank: int) -> None:
    """Note the samples this rank trains on, of each step, beside the run."""
    make_inputs = megalite.training.parts.make_inputs

    def noted(
        micro: Any, mesh: Mesh, seed: int | None = None, *rest: Any, **options: Any
    ) -> Inputs:
        if seed is not None:
            with open(f"samples-{mesh.data.size}-{rank}.jsonl", "a") as file:
                print(json.dumps([NOW.step, micro.samples.tolist()]), file=file)
        return make_inputs(micro, mesh, seed, *rest, **options)

    megalite.training.parts.make_inputs = noted


def lose_the_last(rank: int) -> None:
    watch_samples(rank)
    all_reduce = megalite.training.parts.all_reduce

    def leave(*given: Any) -> Any:
        if NOW.step == LOST_IN:
            raise SystemExit(9)
        return all_reduce(*given)

    if rank == 2:
        megalite.training.parts.all_reduce = leave


def samples_of(folder: Path, ranks: int, steps: range) -> dict[int, list[int]]:
    """Of each step, those of all ranks, as the step has them in order."""
    found: dict[int, list[int]] = {}
    for path in folder.glob(f"samples-{ranks}-*.jsonl"):
        for line in path.read_text().splitlines():
            step, samples = json.loads(line)
            if step in steps:
                found.setdefault(step, []).extend(samples)
    return {step: sorted(samples) for step, samples in found.items()}


def elastic(folder: Path, name: str, *overrides: str) -> Config:
    settings = (
        "train.global_batch_size=12",
        "train.micro_batch_size=4",
        f"checkpoint.every={SAVED_EVERY}",
    )
    return make_config(
        folder, "llama", f"run.name={name}", "parallel.elastic=true", *settings, *overrides
    )


def test_three_ranks_then_two_then_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of 4, then of 3, which divide what each has to do, then of 4 again."""
    monkeypatch.chdir(tmp_path)
    unbroken, config = elastic(tmp_path, "unbroken"), elastic(tmp_path, "test")
    folders = [tmp_path / name for name in ("unbroken", "three", "two", "one")]
    for folder in folders:
        folder.mkdir()
    with training(1, folders[0], unbroken, watch_samples) as ranks:
        assert ranks.exit_codes() == [Exit.DONE], ranks.said(0)
    wanted = samples_of(tmp_path, 1, range(1, 17))
    (tmp_path / "samples-1-0.jsonl").unlink()
    with training(3, folders[1], config, lose_the_last) as ranks:
        assert 9 in ranks.exit_codes()
    checkpoints = config.run.folder / "checkpoints"
    lost = complete_steps(checkpoints)[-1]
    assert 0 < lost < LOST_IN
    with training(
        2, folders[2], elastic(tmp_path, "test", "train.stop_at=12"), watch_samples
    ) as ranks:
        assert ranks.exit_codes() == [Exit.DONE] * 2, ranks.said(0)
    with training(1, folders[3], config, watch_samples) as ranks:
        assert ranks.exit_codes() == [Exit.DONE], ranks.said(0)
    found = [
        samples_of(tmp_path, 3, range(1, lost + 1)),
        samples_of(tmp_path, 2, range(lost + 1, 13)),
    ]
    assert found[0] | found[1] | samples_of(tmp_path, 1, range(13, 17)) == wanted
    assert len(wanted) == 16
    # Sums over other ranks and micro-batches, in fp32, which 16 steps amplify a little.
    for mine, theirs in zip(curve_of(config), curve_of(unbroken), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-5)


def nodes(config: Config, count: int, ranks_per_node: int = 1) -> int:
    return nodes_that_fit(config, weight_table(config.model), count, ranks_per_node)


def test_nodes_that_can_be_used(tmp_path: Path) -> None:
    config = elastic(tmp_path, "test")
    assert [nodes(config, count) for count in range(1, 9)] == [1, 2, 3, 4, 4, 6, 6, 6]
    assert [nodes(config, count, 4) for count in (1, 2, 3)] == [1, 1, 3]
    wide = elastic(tmp_path, "test", "parallel.tensor=2", "parallel.pipeline=2")
    assert [nodes(wide, count, 2) for count in (2, 3, 4)] == [2, 2, 4], (
        "tensor and pipeline stay as they are"
    )
    with pytest.raises(
        ConfigError,
        match=r"no number of nodes up to 3 fits; of 3: .*; of 1: .*a multiple of 4 ranks",
    ):
        nodes(wide, 3, 1)


def test_the_micro_batch_is_the_largest_that_fits(tmp_path: Path) -> None:
    config = elastic(tmp_path, "test")
    plans = [
        make_plan(config, weight_table(config.model), world_size)
        for world_size in (1, 2, 3, 4, 6, 12)
    ]
    assert [(plan.micro_batch_size, plan.micro_batches) for plan in plans] == [
        (4, 3), (3, 2), (4, 1), (3, 1), (2, 1), (1, 1)
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="choose another global_batch_size"):
        make_plan(config, weight_table(config.model), 5)


def test_without_elastic_all_nodes_are_used_or_none(tmp_path: Path) -> None:
    config = elastic(tmp_path, "test", "parallel.elastic=false")
    assert nodes(config, 3) == 3
    with pytest.raises(ConfigError, match="micro_batch_size = 3 would fit"):
        nodes(config, 2)
