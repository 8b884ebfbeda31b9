"""Whole runs that train adapters: what they save is PEFT's to open and ours to go on from, and what
is wrong is said before the first step."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from live_bytes import measure_step
from megalite.checkpoint.folder import read_manifest, step_folder
from megalite.checkpoint.load import from_seed
from megalite.checkpoint.tensors import CheckpointError
from megalite.comm.mesh import Axis, Launch, Mesh
from megalite.config import Config, LoraConfig
from megalite.errors import ConfigError
from megalite.infer.generate import find_model, load_model
from megalite.infer.ranks import load_on_ranks
from megalite.models import model_config, weight_table
from megalite.models.layers import SequenceInfo
from megalite.models.peft import with_adapter_fields
from megalite.models.sharding import assemble
from megalite.plan import make_plan
from megalite.planner.estimate import memory_of
from megalite.train import train
from megalite.training.run import DISK
from ranks import run_ranks
from small_runs import VOCAB, curve_of, make_config, train_on_rank
from tiny_models import CASES

transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(2))


def save_model(folder: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        **CASES["llama-grouped-queries"] | {"vocab_size": VOCAB} | fields
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    save_model(folder / "base")
    return folder


def run_of(root: Path, name: str, *overrides: str) -> Config:
    settings = (
        f"run.name={name}",
        f"model.hf={root / 'base'}",
        "lora.rank=4",
        "train.steps=6",
        "checkpoint.every=3",
    )
    return make_config(root, {}, *settings, *overrides)


SPLIT = ("parallel.pipeline=2", "lora.targets=[q_proj, gate_proj, down_proj]", "lora.rslora=true")
FEW = ("lora.quantize_base=int8", "health.weights_check_every=1")
DORA = ("lora.dora=true", "parallel.tensor=2")
DROPPING = ("parallel.tensor=2", "train.precision=bf16", "lora.dropout=0.1")


def train_and_open(rank: int, world_size: int, configs: list[Config]) -> list[Tensor]:
    """Train all, and open the first one's model and the last one's over ranks: their logits."""
    train_on_rank(rank, world_size, configs)
    found = []
    for config in (configs[0], configs[-1]):
        folder = find_model(config.run.folder)
        model = load_on_ranks(folder, Launch(rank, world_size, rank), world_size, 1, num_slots=1)
        found.append(model.logits(TOKENS, SequenceInfo.whole(TOKENS.shape[1], TOKENS.device)))
    return found


LOGITS: list[Tensor] = []
"""Of each rank."""
DORA_LOGITS: list[Tensor] = []


@pytest.fixture(scope="module")
def runs(root: Path) -> dict[str, Config]:
    pipeline = run_of(root, "pipeline", *SPLIT)
    whole, first = (
        run_of(root, "whole", *DROPPING),
        run_of(root, "broken", *DROPPING, "train.stop_at=3"),
    )
    rest, few = run_of(root, "broken", *DROPPING), run_of(root, "few", *FEW)
    dora = run_of(root, "dora", *DORA)
    found = run_ranks(2, train_and_open, [pipeline, whole, first, rest, few, dora])
    LOGITS[:], DORA_LOGITS[:] = zip(*found, strict=True)
    return {"pipeline": pipeline, "whole": whole, "broken": rest, "few": few, "dora": dora}


def checkpoint_of(config: Config) -> Path:
    return step_folder(config.run.folder / "checkpoints", 6)


def test_a_resumed_run_is_bitwise_the_unbroken_one(runs: dict[str, Config]) -> None:
    whole, broken = (
        {
            path.relative_to(folder): load_file(path)
            for path in sorted(folder.rglob("*.safetensors"))
        }
        for folder in (checkpoint_of(runs["whole"]), checkpoint_of(runs["broken"]))
    )
    assert curve_of(runs["broken"]) == curve_of(runs["whole"])
    assert whole.keys() == broken.keys()
    assert all(
        torch.equal(x, broken[file][name])
        for file, found in whole.items()
        for name, x in found.items()
    )


@pytest.mark.parametrize("optimizer", ["muon", "adafactor"])
def test_a_run_goes_on_without_states_that_no_adapter_has(root: Path, optimizer: str) -> None:
    """Both keep other states of embeddings, norms and biases, of which adapters have none."""
    settings = (f"optimizer.name={optimizer}", "observe.eval_every=0")
    unbroken = run_of(root, f"{optimizer}-unbroken", *settings)
    train(unbroken)
    for stop_at in (3, 6):
        broken = run_of(root, f"{optimizer}-broken", *settings, f"train.stop_at={stop_at}")
        train(broken)
    assert curve_of(broken) == curve_of(unbroken)


@pytest.mark.parametrize("name", ["pipeline", "whole", "few", "dora"])
def test_peft_opens_a_checkpoint(root: Path, runs: dict[str, Config], name: str) -> None:
    """Over a pipeline two ranks write, and PEFT reads one file."""
    peft = pytest.importorskip("peft")
    folder = checkpoint_of(runs[name])
    assert "adapter_model.safetensors" in read_manifest(folder), "and nothing of it is damaged"
    assert not list(folder.glob("model*")), "what is frozen is saved nowhere"
    base = transformers.AutoModelForCausalLM.from_pretrained(
        root / "base", attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        before = base(TOKENS).logits
        theirs = peft.PeftModel.from_pretrained(base, folder).eval()(TOKENS).logits
        ours = load_model(folder)(TOKENS)
    assert (before - theirs).abs().max() > 0.1, "something was learned"
    # The project's bound; fp32 sums in another order, W x + B A x against (W + B A) x, give 1e-5.
    assert (ours - theirs).abs().max() <= 1e-4


@pytest.mark.parametrize(("name", "logits"), [("pipeline", LOGITS), ("dora", DORA_LOGITS)])
def test_ranks_merge_their_parts(runs: dict[str, Config], name: str, logits: list[Tensor]) -> None:
    with torch.no_grad():
        wanted = load_model(checkpoint_of(runs[name]))(TOKENS)
    assert all((found - wanted).abs().max() <= 1e-4 for found in logits)  # the project's bound


@pytest.mark.parametrize("kind", [None, "int8"])
def test_magnitudes_begin_as_the_norms_of_what_is_multiplied_by(
    root: Path, kind: str | None
) -> None:
    """On every rank's part, so that DoRA begins as the model it starts from."""
    config = run_of(root, "begin", "lora.dora=true", f"lora.quantize_base={kind or 'null'}")
    assert config.lora is not None
    table = weight_table(config.model, config.lora)
    stored = load_file(root / "base" / "model.safetensors")
    for rank in range(2):
        mesh = replace(Mesh.alone(), tensor=Axis(2, rank))
        read = DISK.initial_state(config, mesh, None)
        for row in (each for each in table if each.name.endswith("_m")):
            (shape,) = row.local_shape(2)
            module = (
                row.hf[0].removeprefix("base_model.model.").removesuffix(".lora_magnitude_vector")
            )
            weight = stored[f"{module}.weight"]
            if kind:
                largest = weight.abs().amax(1, keepdim=True)
                weight = (weight * (127 / largest)).round() * largest / 127
            norms = weight.norm(dim=1)
            wanted = norms.chunk(2)[rank] if row.shard == "column" else norms
            # fp32 sums of squares in another order.
            torch.testing.assert_close(read(row, "weight", 0, shape), wanted, rtol=1e-6, atol=0)
            assert not read(row, "exp_avg", 0, shape).any()


def test_a_run_goes_on_from_the_adapter_of_another(root: Path, runs: dict[str, Config]) -> None:
    """With its rank, scale and targets, where nothing else is said."""
    folder = checkpoint_of(runs["pipeline"])
    config = make_config(root, {}, f"model.hf={root / 'base'}", f"lora.adapter={folder}")
    earlier = runs["pipeline"].lora
    assert earlier is not None
    assert config.lora == earlier.model_copy(
        update={"adapter": folder, "targets": tuple(sorted(earlier.targets))}
    )
    table = weight_table(config.model, config.lora)
    stored = load_file(folder / "adapter_model.safetensors")
    read = DISK.initial_state(config, Mesh.alone(), None)
    for weight in (weight for weight in table if not weight.frozen):
        assert torch.equal(
            read(weight, "weight", 0, weight.numel).view(weight.shape), stored.pop(weight.hf[0])
        )
    assert not stored


def test_adapters_begin_as_peft_has_them() -> None:
    """A uniform with variance 1/(3 · features), B zero; cut or not, from the seed alone."""
    model = model_config({"preset": "llama-1m"})
    rows = {row.name: row for row in weight_table(model, LoraConfig(rank=8))}
    for name in ("layers.0.attention.qkv.q_proj", "layers.1.mlp.down.down_proj"):
        a, b = rows[f"{name}_a"], rows[f"{name}_b"]
        values = from_seed(3, Mesh.alone())(a, "weight", 0, a.numel)
        bound = a.shape[1] ** -0.5
        assert 0.98 * bound < values.abs().max() <= bound
        assert values.var().item() == pytest.approx(bound**2 / 3, rel=0.1)
        assert abs(values.mean().item()) < 0.1 * bound
        assert not from_seed(3, Mesh.alone())(b, "weight", 0, b.numel).any()
        meshes = [replace(Mesh.alone(), tensor=Axis(2, rank)) for rank in range(2)]
        locals_ = [from_seed(3, mesh)(a, "weight", 0, a.numel // 2) for mesh in meshes]
        if a.shard == "row":
            whole = assemble(a, [x.view(a.local_shape(2)) for x in locals_])
            assert torch.equal(whole, values.view(a.shape))


def test_frozen_weights_take_no_memory_but_their_own(tmp_path: Path) -> None:
    """As the planner says beforehand, by the tensors of real steps."""
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
    }
    save_model(tmp_path / "base", **sizes, max_position_embeddings=256)
    settings = (f"model.hf={tmp_path / 'base'}", "train.precision=bf16", "data.seq_length=256")
    full, lora = (
        make_config(tmp_path, {}, *settings),
        make_config(tmp_path, {}, *settings, "lora.rank=8"),
    )
    found = {name: measure_step(0, 1, config) for name, config in (("full", full), ("lora", lora))}
    plan = make_plan(lora, weight_table(lora.model, lora.lora), 1)
    (memory,) = memory_of(lora, plan, device="cpu")
    frozen = plan.num_params - plan.num_trained
    assert memory.weights == 2 * plan.num_params
    assert memory.gradients + memory.optimizer == 16 * plan.num_trained
    assert memory.weights + memory.gradients + memory.optimizer == pytest.approx(
        found["lora"]["resident"], rel=0.02
    )
    # 16 bytes of gradient, master weight and moments for each frozen weight; the adapters' own come
    # on top.
    saved = found["full"]["resident"] - found["lora"]["resident"]
    assert saved == pytest.approx(16 * frozen - 18 * plan.num_trained, rel=0.02)
    assert memory.total == pytest.approx(found["lora"]["peak"], rel=0.05)


def test_magnitudes_take_as_much_memory_as_planned(tmp_path: Path) -> None:
    """What each matrix returns is kept once more, for their gradients."""
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
    }
    save_model(tmp_path / "base", **sizes, max_position_embeddings=256)
    settings = (f"model.hf={tmp_path / 'base'}", "train.precision=bf16", "data.seq_length=256")
    config = make_config(tmp_path, {}, *settings, "lora.rank=8", "lora.dora=true")
    found = measure_step(0, 1, config)
    plan = make_plan(config, weight_table(config.model, config.lora), 1)
    (memory,) = memory_of(config, plan, device="cpu")
    assert memory.total == pytest.approx(found["peak"], rel=0.05)


@pytest.mark.parametrize(("kind", "most"), [("nf4", 0.45), ("int8", 0.55)])
def test_a_model_in_few_bits_takes_as_much_memory_as_planned(
    tmp_path: Path, kind: str, most: float
) -> None:
    """By the tensors of real steps; `most`: the share of its layers' bytes in bf16."""
    sizes = {
        "vocab_size": 1000,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_hidden_layers": 4,
    }
    save_model(tmp_path / "base", **sizes, max_position_embeddings=256)
    settings = (
        f"model.hf={tmp_path / 'base'}", "train.precision=bf16", "data.seq_length=64", "lora.rank=8",
    )  # fmt: skip
    dense = make_config(tmp_path, {}, *settings)
    few = make_config(tmp_path, {}, *settings, f"lora.quantize_base={kind}")
    found = {name: measure_step(0, 1, each) for name, each in (("dense", dense), ("few", few))}
    table = weight_table(few.model, few.lora)
    plan = make_plan(few, table, 1)
    (memory,) = memory_of(few, plan, device="cpu")
    planned = memory.weights + memory.gradients + memory.optimizer
    assert planned == sum(plan.memory_bytes.values())
    assert planned == pytest.approx(found["few"]["resident"], rel=0.02)
    assert memory.total == pytest.approx(found["few"]["peak"], rel=0.05)
    whole = 2 * sum(weight.numel for weight in table if weight.quantised)
    saved = found["dense"]["resident"] - found["few"]["resident"]
    assert 1 - saved / whole <= most


WRONG = {
    "lora.quantize_base=nf4": "has 32 input features on a rank, which do not divide into the blocks of 64",
    "lora={rank: 4, dora: true, dropout: 0.1}": "dropout = 0.1 must be 0 with dora",
    "lora.quantize_base=int4": "lora.quantize_base",
    "lora={rank: 4, quantize_base: int8} parallel.engine=deepspeed": "needs parallel.engine: native",
    "lora={rank: 4, quantize_base: int8} train.compile=true": "needs train.compile: false",
    "lora={rank: 4} parallel.tensor_overlap=true": "parallel.tensor_overlap: true is for training without lora",
    "lora.targets=[q_prj]": "no linear module is called 'q_prj'; did you mean 'q_proj'",
    "lora.targets=lm_head": "no linear module is called 'lm_head'; those of this model are down_proj",
    "lora.rank=0": "lora.rank",
    "lora.adapter=nowhere": "nowhere/adapter_config.json: No such file",
    "lora.rnk=4": "did you mean 'rank'",
}


@pytest.mark.parametrize("override", WRONG)
def test_what_is_wrong_is_said(root: Path, override: str) -> None:
    with pytest.raises(ConfigError, match=r"lora") as error:
        train(run_of(root, "wrong", *re.split(" (?=[a-z]+\\.)", override)))
    assert WRONG[override] in str(error.value)


def test_lora_needs_a_model_to_start_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lora needs model\.hf"):
        make_config(tmp_path, "llama", "lora.rank=4")


def test_an_adapter_of_an_adapter_is_refused(root: Path, runs: dict[str, Config]) -> None:
    with pytest.raises(ConfigError, match="PEFT opens no adapter of an adapter"):
        train(
            make_config(
                root,
                {},
                f"model.hf={checkpoint_of(runs['whole'])}",
                "lora.rank=4",
                "run.name=second",
            )
        )


@pytest.mark.parametrize("key", ["lora_bias", "modules_to_save", "rank_pattern"])
def test_adapters_of_other_kinds_are_refused(
    tmp_path: Path, runs: dict[str, Config], key: str
) -> None:
    values = json.loads((checkpoint_of(runs["whole"]) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {key: ["x"]}))
    with pytest.raises(ConfigError, match=rf"{key} = \['x'\], which is not supported"):
        with_adapter_fields({"adapter": tmp_path})


def test_an_adapter_without_its_base_says_so(tmp_path: Path, runs: dict[str, Config]) -> None:
    folder = shutil.copytree(checkpoint_of(runs["whole"]), tmp_path / "adapter")
    values = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(values | {"base_model_name_or_path": "gone"})
    )
    with pytest.raises(ConfigError, match=r"base_model_name_or_path = .gone. is no folder"):
        load_model(folder)


def test_an_adapter_of_another_shape_is_refused(
    root: Path, runs: dict[str, Config], tmp_path: Path
) -> None:
    config = run_of(root, "shape", f"lora.adapter={checkpoint_of(runs['whole'])}", "lora.rank=5")
    with pytest.raises(
        CheckpointError, match=r"lora_A.weight has shape \[4, 32\], the model needs \[5, 32\]"
    ):
        train(config)
