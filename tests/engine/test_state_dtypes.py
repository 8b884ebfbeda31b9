"""Optimizer states in fewer bits than fp32: what they are rounded to, that layouts and resumed runs
have the same, and what memory they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from live_bytes import measure_step
from megalite.checkpoint.folder import step_folder
from megalite.comm.mesh import make_mesh
from megalite.config import Config, OptimizerConfig
from megalite.data.loader import MicroBatch
from megalite.engine.optimizers.states import DynamicState, make_state
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.planner.estimate import memory_of
from megalite.train import train
from megalite.training.parts import build, forward_backward
from megalite.training.run import DISK
from ranks import run_ranks
from small_runs import curve_of, make_config

CPU = torch.device("cpu")
DTYPES = ("bf16", "8bit")


def numbers(signed: bool) -> list[float]:
    """Of 8 bits: where they have one a sign, as many zeros as the power of ten is low, a one, and
    the fraction."""
    values = [0.0, 1.0]
    for zeros in range(7):
        steps = 2 ** (6 - zeros + (not signed))
        means = [(0.1 + 0.9 * (step + 0.5) / steps) * 10.0**-zeros for step in range(steps)]
        values += [sign * mean for mean in means for sign in ((1, -1) if signed else (1,))]
    return sorted(values)


@pytest.mark.parametrize("signed", [True, False])
def test_eight_bits_are_those_of_bitsandbytes(signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    # Over many powers of ten, as squared gradients are.
    x = torch.randn(8, 256, generator=generator) * 10 ** (
        4 * torch.rand(8, 256, generator=generator)
    )
    x[0] = 0
    x = x if signed else x.abs()
    state = DynamicState(x.numel(), CPU, signed)
    state.write(slice(0, x.numel()), x.flatten())
    found = state.read(slice(0, x.numel())).view_as(x)
    table = torch.tensor(numbers(signed), dtype=torch.float64)
    for row, values in zip(x.double(), found.double(), strict=True):
        largest = row.abs().max()
        # Its sign goes with the scale, so that the largest is kept as it is.
        sign = -1 if row.min() == -largest else 1
        scale = (sign * largest) if largest else torch.ones((), dtype=torch.float64)
        wanted = table[(row[:, None] / scale - table).abs().argmin(1)] * scale
        torch.testing.assert_close(values, wanted * (largest > 0), rtol=1e-6, atol=0)
        assert values[row.abs().argmax()] == row[row.abs().argmax()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq"])
def test_rounding_what_was_rounded_changes_nothing(dtype: str, name: str) -> None:
    """Down to the smallest numbers: it is what resuming, and a refused step, depend on."""
    optimizer = OptimizerConfig.model_validate({"lr": 1.0, "state_dtype": dtype})
    scales = 10.0 ** torch.arange(-36, 4)
    x = (torch.randn(40, 256, generator=torch.Generator().manual_seed(1)) * scales[:, None]).abs()
    x = (-x if name == "exp_avg" else x).flatten()
    state, again = (make_state(optimizer, name, x.numel(), CPU) for _ in range(2))
    every = slice(0, x.numel())
    state.write(every, x)
    again.write(every, state.read(every))
    assert torch.equal(again.read(every), state.read(every))


def test_a_part_is_rounded_as_the_whole() -> None:
    """Where a rank's part begins and ends between blocks of the whole, of rows or of columns."""
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(2))
    whole = DynamicState(x.numel(), CPU, True)
    whole.write(slice(0, x.numel()), x.flatten())
    wanted = whole.read(slice(0, x.numel())).view_as(x)
    for rows, columns in ((slice(2, 5), slice(None)), (slice(None), slice(256, 512))):
        part = x[rows, columns].flatten()
        state = DynamicState(part.numel(), CPU, True)
        state.write(slice(0, part.numel()), part)
        assert torch.equal(state.read(slice(0, part.numel())), wanted[rows, columns].flatten())


STEPS, BATCH, LENGTH = 3, 2, 16
LAYOUTS: dict[str, tuple[str, ...]] = {
    "zero 0": ("parallel.zero_stage=0",),
    "zero 1": (),
    "zero 2": ("parallel.zero_stage=2",),
    "pipeline": ("parallel.pipeline=2",),
}


def layout_config(folder: Path, dtype: str, *overrides: str) -> Config:
    settings = (f"optimizer.state_dtype={dtype}", "train.global_batch_size=2", "train.steps=3")
    return make_config(folder, "llama", *settings, *overrides)


def steps_on(rank: int, world_size: int, configs: list[Config]) -> list[dict[str, Tensor]]:
    """Weights and states after some steps of each config, those that this rank owns."""
    found = []
    for config in configs:
        table = weight_table(config.model)
        plan = make_plan(config, table, world_size)
        mesh = make_mesh(plan, CPU)
        parts = build(config, plan, mesh)
        parts.engine.load(DISK.initial_state(config, mesh, None))
        generator = torch.Generator().manual_seed(0)
        owners = {
            weight.name: plan.rank_at(
                next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
            )
            for weight in table
        }
        for _ in range(STEPS):
            tokens = torch.randint(0, 97, (BATCH, LENGTH + 1), generator=generator)
            rows = range(mesh.data.rank, BATCH, mesh.data.size)
            micro = [
                MicroBatch(tokens[i : i + 1, :-1], tokens[i : i + 1, 1:], torch.tensor([i]))
                for i in rows
            ]
            forward_backward(parts, micro, mesh, seed=0)
            parts.engine.step(1e-2)
        found.append(
            {
                f"{kind} {name}": x
                for kind in ("weight", "exp_avg", "exp_avg_sq")
                for name, x in parts.engine.gather(kind, owners).items()
            }
        )
    return found


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_round_alike(tmp_path: Path, dtype: str) -> None:
    """To the bit: one process adds the gradients of two micro-batches, as two ranks add theirs."""
    (alone,) = steps_on(0, 1, [layout_config(tmp_path, dtype)])
    (exact,) = steps_on(0, 1, [layout_config(tmp_path, "fp32")])
    assert any(not torch.equal(x, exact[name]) for name, x in alone.items()), "something is rounded"
    configs = [layout_config(tmp_path, dtype, *overrides) for overrides in LAYOUTS.values()]
    first, second = run_ranks(2, steps_on, configs)
    for layout, one, other in zip(LAYOUTS, first, second, strict=True):
        found = one | other
        assert found.keys() == alone.keys()
        differ = [name for name, x in alone.items() if not torch.equal(found[name], x)]
        assert not differ, f"{layout}: {differ}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_run_resumes_bitwise(tmp_path: Path, dtype: str) -> None:
    def run(name: str, *overrides: str) -> Config:
        config = make_config(
            tmp_path, "llama", f"run.name={name}", "train.precision=bf16", "checkpoint.every=4", *overrides
        )  # fmt: skip
        train(config)
        return config

    few = f"optimizer.state_dtype={dtype}"
    whole = run("whole", few)
    run("broken", few, "train.stop_at=8")
    broken = run("broken", few)
    assert curve_of(broken) == curve_of(whole)
    files = [
        {path.name: load_file(path) for path in step_folder(c.run.folder / "checkpoints", 16).rglob("*.safetensors")}
        for c in (whole, broken)
    ]  # fmt: skip
    assert files[0].keys() == files[1].keys()
    for name, tensors in files[0].items():
        assert all(torch.equal(x, files[1][name][key]) for key, x in tensors.items()), name
    # It learns as much as with states in fp32: the losses of noisy steps differ by less than this.
    exact = run("exact")
    assert curve_of(whole)[-1][1] == pytest.approx(curve_of(exact)[-1][1], rel=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_take_as_much_memory_as_planned(tmp_path: Path, dtype: str) -> None:
    sizes = "model.hidden_size=128", "model.intermediate_size=256", "train.precision=bf16"
    config, exact = (
        make_config(tmp_path, "llama", *sizes, f"optimizer.state_dtype={each}")
        for each in (dtype, "fp32")
    )
    table = weight_table(config.model)
    plan = make_plan(config, table, 1)
    resident = measure_step(0, 1, config)["resident"]
    (memory,) = memory_of(config, plan, device="cpu")
    assert memory.weights + memory.gradients + memory.optimizer == sum(plan.memory_bytes.values())
    assert sum(plan.memory_bytes.values()) == pytest.approx(resident, rel=0.02)
    matrices = sum(weight.numel for weight in table if weight.row_shape and not weight.is_looked_up)
    saved = {"bf16": 2 * 2, "8bit": 2 * (4 - 1 - 4 / 256)}[dtype] * matrices
    assert measure_step(0, 1, exact)["resident"] - resident == pytest.approx(saved, rel=0.02)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "muon": ({"optimizer.name": "muon"}, "update each number on its own, such as adamw; muon has fp32"),
    "deepspeed": ({"parallel.engine": "deepspeed"}, "optimizer.state_dtype needs parallel.engine: native"),
    "a wrong name": ({"optimizer.state_dtype": "int8"}, "optimizer.state_dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said(tmp_path: Path, case: str) -> None:
    settings, said = WRONG[case]
    overrides = {"optimizer.state_dtype": "8bit"} | settings
    with pytest.raises(ConfigError, match=said):
        train(make_config(tmp_path, "llama", *(f"{k}={v}" for k, v in overrides.items())))
