"""The DeepSpeed engine beyond the layouts of tests/parallel/test_parity.py: offload, weights that
really are released, bf16, checkpoints shared with the native engine, what it is told, and what it
says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import megalite.engine.deepspeed as module
from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.data.loader import MicroBatch
from megalite.engine import ReadState
from megalite.engine.deepspeed import Fragment, deepspeed_config
from megalite.errors import ConfigError
from megalite.models import weight_table
from megalite.models.weights import Weight
from megalite.plan import make_plan
from megalite.training.parts import RankModel, build, forward_backward
from ranks import run_ranks
from small_runs import VOCAB, curve_of, make_config, metrics_of, train_on_rank

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)

Result = dict[str, Any]

CPU = torch.device("cpu")

# As in test_parity: eps far above rounding, and clipping is active.
BASE = ("optimizer.eps=1e-3", "optimizer.clip=0.5", "run.name=deepspeed")


def stage(number: int, *overrides: str) -> tuple[str, ...]:
    return ("parallel.engine=deepspeed", f"parallel.zero_stage={number}", *overrides)


def batch_of(step: int, mesh: Mesh, count: int) -> list[MicroBatch]:
    tokens = torch.randint(
        0, VOCAB, (count * mesh.data.size, 1, 17), generator=torch.Generator().manual_seed(step)
    )
    mine = list(enumerate(tokens))[mesh.data.rank :: mesh.data.size]
    return [MicroBatch(x[:, :-1], x[:, 1:], torch.tensor([number]), None) for number, x in mine]


def run_steps(
    parts: RankModel, mesh: Mesh, steps: range, count: int, owners: dict[str, int]
) -> Result:
    """What these steps give; on rank 0, also every gradient and the state after them."""
    found: Result = {}
    for step in steps:
        found[f"loss {step}"] = forward_backward(parts, batch_of(step, mesh, count), mesh, 3)[
            "loss"
        ]
        found |= {
            f"grad {step} {name}": x for name, x in parts.engine.gather("grad", owners).items()
        }
        found[f"norm {step}"] = parts.engine.step(1e-2).clone()
    return found | states_of(parts, owners)


def states_of(parts: RankModel, owners: dict[str, int]) -> Result:
    kinds = ("weight", *parts.engine.states)
    return {
        f"{kind} {name}": x
        for kind in kinds
        for name, x in parts.engine.gather(kind, owners).items()
    }


def from_result(state: Result) -> ReadState:
    """Continue from what `states_of` gave, at tensor 1."""

    def read(weight: Weight, kind: str, start: int, stop: int) -> Tensor:
        whole = state.get(f"{kind} {weight.name}", state[f"weight {weight.name}"])
        return whole.flatten()[start:stop]

    return read


def two_steps(rank: int, world_size: int, configs: list[Config]) -> list[Result]:
    module.deepspeed_config = releasing_everything
    results = []
    for config in configs:
        table = weight_table(config.model)
        plan = make_plan(config, table, world_size)
        mesh = make_mesh(plan, CPU)
        parts = build(config, plan, mesh)
        parts.engine.load(from_seed(3, mesh))
        results.append(
            run_steps(parts, mesh, range(2), plan.micro_batches, {w.name: 0 for w in table})
        )
        if plan.zero_stage == 3:
            results[-1]["released"] = all(
                p.ds_status.name == "NOT_AVAILABLE" for p in parts.stages[0].parameters()
            )
    return results


def releasing_everything(*arguments: Any) -> dict[str, Any]:
    """Models of tests are so small that stage 3 would keep all of their weights whole."""
    config = deepspeed_config(*arguments)
    config["zero_optimization"] |= {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_param_persistence_threshold": 0,
    }
    return config


def check_equal(found: Result, wanted: Result, tolerance: float) -> None:
    for name, tensor in wanted.items():
        error = (found[name].float() - tensor.float()).norm() / tensor.float().norm().clamp(
            min=1e-12
        )
        assert error <= tolerance, f"{name} is off by {error:.1e}"


@installed
def test_offload_to_the_host_and_released_weights_equal_native(tmp_path: Path) -> None:
    """Recompute runs a second forward amid the backward pass."""
    cpu = ("parallel.offload.optimizer=cpu",)
    variants = [
        stage(1, *cpu),
        stage(2, *cpu),
        stage(3, "train.recompute=full"),
        stage(3, *cpu, "parallel.offload.parameters=cpu"),
    ]
    configs = [make_config(tmp_path, "llama", *BASE, *variant) for variant in [(), *variants]]
    wanted, *all_found = run_ranks(2, two_steps, configs, deepspeed=True)[0]
    assert [found.pop("released", None) for found in all_found] == [None, None, True, True]
    for found in all_found:
        check_equal(found, wanted, 1e-5)  # the project's bound for every layout in fp32


@installed
def test_offload_to_nvme_equals_native(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """In a model with weights of more than the megabyte a rank below which nothing goes to the
    disk."""
    if not request.config.getoption("--nvme"):
        pytest.skip(
            "DeepSpeed would compile async_io for this, 5 minutes on two cores: pytest --nvme"
        )
    large = (*BASE, "model.hidden_size=128", "model.vocab_size=4096", "train.global_batch_size=2")
    nvme = ("parallel.offload.optimizer=nvme", f"parallel.offload.nvme_path={tmp_path / 'nvme'}")
    variants = [(), stage(3, *nvme), stage(3, *nvme, "parallel.offload.parameters=nvme")]
    configs = [make_config(tmp_path, "llama", *large, *variant) for variant in variants]
    wanted, *all_found = run_ranks(2, two_steps, configs, deepspeed=True)[0]
    files = {path.name.split("-")[0] for path in (tmp_path / "nvme").rglob("*.swp")}
    assert {"exp_avg", "exp_avg_sq"} < files
    assert any("param" in name for name in files)
    for found in all_found:
        check_equal(found, wanted, 1e-5)


def hand_over(
    rank: int, world_size: int, native: Config, others: list[Config]
) -> list[tuple[Result, Result, Result]]:
    """For each other engine: native state after a step, the same as the other gives it back, a
    second step of both."""
    table = weight_table(native.model)
    owners = {w.name: 0 for w in table}
    results = []
    for config in others:
        plan = make_plan(native, table, world_size)
        mesh = make_mesh(plan, CPU)
        parts = build(native, plan, mesh)
        parts.engine.load(from_seed(3, Mesh.alone()))
        run_steps(parts, mesh, range(1), plan.micro_batches, owners)
        # Every rank reads from it.
        state = states_of(parts, owners)
        shared: list[Any] = [state]
        torch.distributed.broadcast_object_list(shared)
        wanted = run_steps(parts, mesh, range(1, 2), plan.micro_batches, owners)
        parts = build(config, make_plan(config, table, world_size), mesh)
        parts.engine.load(from_result(shared[0]), num_updates=1)
        returned = states_of(parts, owners)
        found = run_steps(parts, mesh, range(1, 2), plan.micro_batches, owners)
        results.append((state, returned, {"wanted": wanted, "found": found}))
    return results


@installed
def test_bf16_state_passes_between_engines_bitwise(tmp_path: Path) -> None:
    base = (*BASE, "train.precision=bf16")
    # Our own product would not round the native engine's gradients to bf16, as autograd does
    # DeepSpeed's.
    native = make_config(tmp_path, "llama", *base, "kernels.weight_gradient=torch")
    variants = [stage(1), stage(2), stage(3)]
    others = [make_config(tmp_path, "llama", *base, *variant) for variant in variants]
    for state, returned, after in run_ranks(2, hand_over, native, others, deepspeed=True)[0]:
        assert {name.split()[0] for name in state} == {"weight", "master", "exp_avg", "exp_avg_sq"}
        assert returned.keys() == state.keys()
        assert all(torch.equal(returned[name], tensor) and returned[name].dtype == tensor.dtype
                   for name, tensor in state.items())  # fmt: skip
        # The same bf16 gradients, accumulated and reduced in fp32 by both.
        check_equal(after["found"], after["wanted"], 1e-5)


@installed
def test_runs_resume_bitwise_and_across_engines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bitwise on the same layout, and on the native curve (1e-4, the project's bound for curves)
    where engines change between the parts of a run. Nothing DeepSpeed says reaches the console."""
    short = ("train.steps=6", "observe.eval_every=0")
    layout = stage(3, "train.precision=bf16", "parallel.tensor=2", *short)
    names = ("run.name=unbroken",), ("run.name=broken", "train.stop_at=3"), ("run.name=broken",)
    unbroken, first, rest = (make_config(tmp_path, "gpt2", *layout, *name) for name in names)
    native = make_config(tmp_path, "llama", "run.name=native", *short)
    changes = [
        ("train.stop_at=2",),
        stage(3, "train.stop_at=3"),
        stage(1, "parallel.context=2", "train.stop_at=5"),
        (),
    ]
    changing = [
        make_config(tmp_path, "llama", "run.name=changing", *short, *change) for change in changes
    ]
    # Native ones first: DeepSpeed replaces functions of torch.
    run_ranks(2, train_on_rank, [native, unbroken, first, rest, *changing], deepspeed=True)
    assert curve_of(rest) == curve_of(unbroken)
    assert metrics_of(rest)[-1]["valid_loss"] == metrics_of(unbroken)[-1]["valid_loss"]
    for mine, theirs in zip(curve_of(changing[-1]), curve_of(native), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    said = capfd.readouterr()
    lines = (said.out + said.err).splitlines()
    assert not [
        line for line in lines if line.startswith(("[", "MA ", "CPU Virtual")) or "Warning" in line
    ]


def plan_and_config(tmp_path: Path, *overrides: str, ranks: int = 4) -> dict[str, Any]:
    config = make_config(tmp_path, "llama", *overrides)
    return deepspeed_config(config, make_plan(config, weight_table(config.model), ranks))


def test_config_follows_from_the_plan(tmp_path: Path) -> None:
    told = plan_and_config(tmp_path, *stage(3, "train.global_batch_size=8", "train.precision=bf16"))
    assert (told["train_micro_batch_size_per_gpu"], told["gradient_accumulation_steps"]) == (1, 2)
    assert told["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert (told["data_types"]["grad_accum_dtype"], told["communication_data_type"]) == (
        "fp32",
        "fp32",
    )
    assert told["gradient_clipping"] == 1.0
    zero = told["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["reduce_bucket_size"] % 2 == 0
    assert "offload_optimizer" not in zero
    assert "offload_param" not in zero


def test_config_of_offload(tmp_path: Path) -> None:
    nvme = (
        "parallel.offload.parameters=nvme",
        "parallel.offload.nvme_path=/fast",
        "parallel.offload.optimizer=cpu",
    )
    zero = plan_and_config(tmp_path, *stage(3, *nvme, "parallel.tensor=2"))["zero_optimization"]
    assert zero["offload_optimizer"] == {"device": "cpu"}
    # Two replicas share the largest weight: the embedding, 97 rows padded to 2 × 64, of which a
    # rank holds 64 × 32.
    assert zero["offload_param"] == {
        "device": "nvme",
        "nvme_path": "/fast",
        "buffer_size": 1024,
        "max_in_cpu": 0,
    }


def test_print_plan_shows_the_config_without_importing_deepspeed(tmp_path: Path) -> None:
    config = make_config(tmp_path, "llama", *stage(3))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    program = (
        "import sys; from megalite.cli import main; "
        f"main(['train', {str(tmp_path / 'config.yaml')!r}, '--print-plan']); assert 'deepspeed' not in sys.modules"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    told = json.loads(shown[shown.index("{") :])
    assert told == plan_and_config(tmp_path, *stage(3), ranks=1)


def alone() -> Mesh:
    return Mesh.alone()


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("DS_ACCELERATOR", "LOCAL_RANK", "LOCAL_SIZE"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))
    return monkeypatch


def test_a_missing_deepspeed_is_explained(untouched: pytest.MonkeyPatch) -> None:
    untouched.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'megalite\[deepspeed\]'.*engine: native"):
        module._import_deepspeed(alone())


def test_an_old_deepspeed_is_refused(untouched: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("deepspeed")
    old.__version__ = "0.19.7"  # type: ignore[attr-defined]
    untouched.setitem(sys.modules, "deepspeed", old)
    with pytest.raises(ConfigError, match=r"needs DeepSpeed 0\.19\.8 or newer, not 0\.19\.7"):
        module._import_deepspeed(alone())


@pytest.mark.parametrize(
    ("compatible", "message"), [(False, "apt install libaio-dev"), (True, "ninja.*no compiler")]
)
def test_what_nvme_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, compatible: bool, message: str
) -> None:
    class AsyncIOBuilder:
        def is_compatible(self, verbose: bool) -> bool:
            return compatible

        def load(self, verbose: bool) -> None:
            raise RuntimeError("no compiler")

    builders = types.ModuleType("deepspeed.ops.op_builder")
    builders.AsyncIOBuilder = AsyncIOBuilder  # type: ignore[attr-defined]
    for name in ("deepspeed", "deepspeed.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "deepspeed.ops.op_builder", builders)
    with pytest.raises(ConfigError, match=message):
        module._check_nvme()


def test_a_fragment_knows_its_place() -> None:
    weight = Weight("w", (4, 3), ("w",))
    fragment = Fragment(weight, torch.nn.Parameter(torch.zeros(0)), 0, offset=2, low=5, high=9)
    assert fragment.of(torch.arange(10)).tolist() == [2, 3, 4, 5]
