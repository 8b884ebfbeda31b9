"""Adapters trained over ranks, from one that PEFT made: the loss, every gradient and every weight
after two steps are those of PEFT, transformers and torch's AdamW in one process. So are they where
the model is held in few bits: there PEFT's has what bitsandbytes' formulas make of its weights."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from megalite.training.run import DISK
from megalite.training.schedules import learning_rate
from ranks import cases_asked_for, run_ranks
from tiny_models import CASES, auto_class, source_of, their_logits

BATCH, LENGTH, STEPS = 4, 32, 2
STILL = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
MODELS: dict[str, dict[str, Any]] = {
    "llama": CASES["llama-grouped-queries"],
    "qwen2": CASES["qwen2"] | {"tie_word_embeddings": True},
    "gpt2": CASES["gpt2"] | STILL,
    "gpt_neox": CASES["gpt_neox"],
    "phi3": CASES["phi3"],
    "mixtral": CASES["mixtral"] | {"num_local_experts": 4},
    "qwen3_moe": CASES["qwen3_moe"],
    "deepseek_v3": CASES["deepseek_v3"],
    # Its head unscaled: gradients then are far above the 1e-6 by which torch's clipping is off.
    "t5": CASES["t5-gated"],
}
WIDE = {"hidden_size": 128, "intermediate_size": 384}
MODELS |= {
    "wide": MODELS["llama"] | WIDE,
    "wide gpt2": MODELS["gpt2"] | {"n_embd": 128},
    "wide gpt_neox": MODELS["gpt_neox"] | WIDE,
    "wide phi3": MODELS["phi3"] | WIDE,
}
"""Those whose inputs divide into blocks of NF4 on two ranks. Each stores q, k and v in another
way."""
# Which modules have adapters; "all-linear" where a model is not named.
TARGETS = {
    "llama": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "wide": ["q_proj", "v_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "wide gpt2": ["c_attn", "c_proj"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "qwen3_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "deepseek_v3": ["q_b_proj", "kv_b_proj", "o_proj"],
}
PEFT = {"r": 5, "lora_alpha": 7}


@dataclass(frozen=True)
class Layout:
    ranks: int = 2
    tensor: int = 1
    sequence: bool = False
    pipeline: int = 1
    context: int = 1
    expert: int = 1
    schedule: str = "1f1b"
    zero: int = 1
    engine: str = "native"
    recompute: str = "none"
    loss_chunk: int | None = None
    compile: bool = False
    dropout: float = 0.0
    quantize: str | None = None
    dora: bool = False

    def __str__(self) -> str:
        shown = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Layout, name)
        ]
        return ",".join(shown) or "data=2"


EVERY = [
    Layout(1, recompute="selective"),
    Layout(tensor=2, recompute="full"),
    Layout(tensor=2, sequence=True),
    Layout(pipeline=2, schedule="zero_bubble"),
]
"""Of the two models in FAMILIES; the others of Llama. The rest of the families has two of them."""
FAMILIES = ("llama", "gpt2")
OF_EACH = (EVERY[0], EVERY[2])
LAYOUTS = [
    *EVERY,
    Layout(1, loss_chunk=5),
    Layout(1, compile=True),
    Layout(tensor=2, sequence=True, loss_chunk=5, zero=2),
    Layout(pipeline=2, recompute="full"),
    Layout(context=2),
    Layout(zero=0),
    Layout(zero=2),
    *(Layout(zero=zero, engine="deepspeed") for zero in (1, 2, 3)),
    Layout(tensor=2, sequence=True, zero=3, engine="deepspeed"),
    Layout(context=2, zero=3, engine="deepspeed", recompute="full"),
]
OF_T5 = [
    Layout(zero=2, recompute="full"),
    Layout(pipeline=2, recompute="full"),
    Layout(tensor=2, sequence=True, zero=2, loss_chunk=5),
]
DROPPING = [
    Layout(1, dropout=0.3),
    Layout(tensor=2, dropout=0.3),
    Layout(tensor=2, sequence=True, dropout=0.3, recompute="full"),
    Layout(pipeline=2, dropout=0.3, recompute="full"),
    Layout(context=2, dropout=0.3),
]
DRY = {"llama": Layout(1, loss_chunk=5), "t5": Layout(1, recompute="selective")}
"""Models that drop, and the layout of each that does not."""
IN_FEW_BITS = [
    Layout(1, quantize="nf4", recompute="full"),
    Layout(tensor=2, quantize="nf4"),
]
"""Of every wide model."""
RUNS = [
    (model, layout)
    for layout in LAYOUTS
    for model in MODELS
    if not model.startswith("wide")
    and (model == "llama" or layout in (EVERY if model in FAMILIES else OF_EACH))
]
RUNS += [(model, Layout(expert=2)) for model in ("mixtral", "qwen3_moe", "deepseek_v3")]
WIDE_MODELS = [model for model in MODELS if model.startswith("wide")]
RUNS += [(model, IN_FEW_BITS[0]) for model in WIDE_MODELS]
RUNS += [(model, IN_FEW_BITS[1]) for model in ("wide", "wide phi3")]
RUNS += [("t5", layout) for layout in OF_T5]
RUNS += [
    ("wide", Layout(tensor=2, sequence=True, recompute="full", quantize="nf4")),
    ("wide", Layout(pipeline=2, schedule="zero_bubble", quantize="nf4")),
    ("wide", Layout(zero=2, quantize="nf4")),
    ("wide", Layout(context=2, quantize="int8")),
    ("qwen3_moe", Layout(tensor=2, quantize="int8")),
]
WITH_MAGNITUDES = [
    *((model, replace(layout, dora=True)) for layout in EVERY for model in FAMILIES),
    ("qwen2", Layout(1, dora=True)),
    ("phi3", Layout(tensor=2, dora=True)),
    ("gpt_neox", Layout(tensor=2, sequence=True, dora=True)),
    ("deepseek_v3", Layout(tensor=2, dora=True)),
    *(("llama", Layout(zero=zero, engine="deepspeed", dora=True)) for zero in (1, 3)),
    *(("llama", each) for each in (Layout(zero=2, dora=True), Layout(context=2, dora=True))),
    ("wide", Layout(tensor=2, quantize="nf4", dora=True)),
    ("wide gpt2", Layout(1, quantize="int8", dora=True)),
]
"""DoRA: of models with and without biases, fused and not."""
OF_DORA = {model for model, _ in WITH_MAGNITUDES}
RUNS += WITH_MAGNITUDES
MORE_RUNS = [
    *((model, layout) for model in MODELS for layout in EVERY if not model.startswith("wide")),
    *((model, layout) for model in WIDE_MODELS for layout in IN_FEW_BITS),
    *(("qwen2", replace(layout, dora=True)) for layout in EVERY),
]
"""Run with --whole."""
ALL_RUNS = [*dict.fromkeys([*RUNS, *MORE_RUNS])]


def batches() -> list[tuple[Tensor, Tensor]]:
    """Tokens and labels, some of which carry no loss, of every step."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        tokens = torch.randint(0, 99, (BATCH, LENGTH + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[1, :7] = -100
        found.append((tokens[:, :-1], labels))
    return found


def adapter_of(dora: bool) -> str:
    return "adapter-dora" if dora else "adapter"


def config_of(folder: Path, layout: Layout) -> Config:
    is_pair = folder.name == "t5"
    return parse_config(
        {
            "run": {"name": "lora", "dir": str(folder / "runs")},
            "model": {"hf": str(folder)},
            "lora": {
                "adapter": str(folder / adapter_of(layout.dora)), "dropout": layout.dropout,
                "quantize_base": layout.quantize,
            },
            "objective": (
                {"name": "seq2seq", "target_length": LENGTH} if is_pair else {"name": "next_token"}
            ),
            "data": {
                "train": [{"path": "unused"}], "seq_length": LENGTH * 3 // 4 if is_pair else LENGTH,
                "document_mask": is_pair,
            },
            "parallel": {
                "tensor": layout.tensor, "sequence": layout.sequence, "pipeline": layout.pipeline,
                "context": layout.context, "expert": layout.expert, "schedule": layout.schedule,
                "zero_stage": layout.zero, "engine": layout.engine, "bucket_mb": 0.002,
            },
            "train": {
                "steps": STEPS, "global_batch_size": BATCH, "precision": "fp32", "recompute": layout.recompute,
                "loss_chunk": layout.loss_chunk, "compile": layout.compile,
            },
            # eps far above rounding: Adam's first steps would otherwise divide noise by noise.
            "optimizer": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.1, "clip": 0.05},
        }
    )  # fmt: skip


Result = dict[str, Any]
MESHES: dict[tuple[int, ...], Mesh] = {}


def run_all(rank: int, world_size: int, root: Path, runs: list[tuple[str, Layout]]) -> list[Result]:
    return [run(root / model, layout) for model, layout in runs]


def run(folder: Path, layout: Layout) -> Result:
    """Two steps. Gradients and weights under Hugging Face names: this rank's part."""
    config = config_of(folder, layout)
    table = weight_table(config.model, config.lora)
    plan = make_plan(config, table, layout.ranks)
    shape = (plan.pipeline, plan.data, plan.context, plan.tensor, *plan.experts)
    mesh = MESHES[shape] = MESHES.get(shape) or make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    parts.engine.load(DISK.initial_state(config, mesh, None))
    trained = [weight for weight in table if not weight.frozen]
    owners = {
        weight.name: plan.rank_at(
            next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
        )
        for weight in trained
    }

    def gather(kind: str) -> dict[str, Tensor]:
        found = parts.engine.gather(kind, owners)
        return {
            hf: x for w in trained if w.name in found for hf, x in w.to_hf(found[w.name]).items()
        }

    result: Result = {"loss": [], "norm": []}
    for step, (tokens, labels) in enumerate(batches()):
        rows = range(mesh.data.rank, BATCH, mesh.data.size)
        micro = [
            MicroBatch(
                tokens[i : i + 1], labels[i : i + 1], torch.tensor([i]),
                source=source_of(tokens[i : i + 1]) if folder.name == "t5" else None,
            )
            for i in rows
        ]  # fmt: skip
        result["loss"].append(forward_backward(parts, micro, mesh, seed=0)["loss"].item())
        result[f"gradient {step}"] = gather("grad")
        result["norm"].append(
            parts.engine.step(learning_rate(step + 1, STEPS, config.optimizer)).item()
        )
    parameters = [p for stage in parts.stages for p in stage.parameters()]
    result["frozen gradients"] = sum(p.grad is not None for p in parameters if not p.requires_grad)
    return result | {kind: gather(kind) for kind in ("weight", "exp_avg_sq")}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every model, as transformers saves it, and in it an adapter, as PEFT does."""
    # Here: ranks, which need it not, load this file.
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    root = tmp_path_factory.mktemp("models")
    for name, values in MODELS.items():
        torch.manual_seed(0)
        model = auto_class(values["model_type"]).from_config(
            transformers.AutoConfig.for_model(**values)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(mean=0.5 * (parameter.dim() == 1), std=0.25)
        model.save_pretrained(root / name)
        targets: Any = TARGETS.get(name, "all-linear")
        options = PEFT | {"use_rslora": name == "phi3", "fan_in_fan_out": name == "gpt2"}
        for dora in (False, True) if name in OF_DORA else (False,):
            adapted = peft.get_peft_model(
                model, peft.LoraConfig(target_modules=targets, use_dora=dora, **options)
            )
            with torch.no_grad():
                for called, parameter in adapted.named_parameters():
                    if "magnitude" in called:
                        parameter.mul_(torch.rand_like(parameter) + 0.5)
                    elif parameter.requires_grad:
                        parameter.normal_(std=0.1)  # PEFT begins with B = 0, which hides A
            adapted.save_pretrained(root / name / adapter_of(dora))
            model = adapted.unload()
    return root


@pytest.fixture(scope="module")
def results(root: Path, request: pytest.FixtureRequest) -> dict[tuple[str, Layout], Result]:
    """Every run that is asked for, all of two ranks in one spawn. DeepSpeed has its own, since it
    replaces functions of torch."""
    asked = [
        (each["model"], each["layout"])
        for each in cases_asked_for(request, test_two_steps_are_those_of_peft)
    ]
    dropping = cases_asked_for(request, test_every_layout_drops_the_same)
    for each in dropping:
        model = each["model"]
        asked += [(model, layout) for layout in (each["layout"], DROPPING[0], DRY[model])]
    found: dict[tuple[str, Layout], Result] = {}
    engines = ["native"] + ["deepspeed"] * (importlib.util.find_spec("deepspeed") is not None)
    every = [*ALL_RUNS, *((model, layout) for model in DRY for layout in DROPPING)]
    for ranks, engine in [(1, "native"), *((2, engine) for engine in engines)]:
        runs = [run for run in every if run in asked]
        runs = [run for run in runs if (run[1].ranks, run[1].engine) == (ranks, engine)]
        of_ranks = (
            run_ranks(ranks, run_all, root, runs, deepspeed=engine == "deepspeed")
            if ranks > 1 and runs
            else [run_all(0, 1, root, runs)]
        )
        for number, key in enumerate(runs):
            parts = [results[number] for results in of_ranks]
            found[key] = parts[0] | {
                kind: {name: x for part in parts for name, x in part[kind].items()}
                for kind, value in parts[0].items()
                if isinstance(value, dict)
            }
    return found


def nearest(x: Tensor, values: Tensor) -> Tensor:
    return values[(x[..., None] - values).abs().argmin(-1)]


def dynamic_numbers() -> Tensor:
    """Those of 8 bits: a sign, as many zeros as the power of ten is low, a one, and the fraction."""
    values = [0.0, 1.0]
    for zeros in range(7):
        steps = 2 ** (6 - zeros)
        means = [(0.1 + 0.9 * (step + 0.5) / steps) * 10.0**-zeros for step in range(steps)]
        values += [sign * mean for mean in means for sign in (1, -1)]
    return torch.tensor(sorted(values))


def in_few_bits(weight: Tensor, kind: str) -> Tensor:
    """A linear's weight [out, in] as bitsandbytes gives it back: `load_in_8bit`, or `load_in_4bit`
    with nf4 and double quantisation."""
    if kind == "int8":
        largest = weight.abs().amax(1, keepdim=True)
        return (weight * (127 / largest)).round() * largest / 127
    # The quantiles of a normal distribution that the paper's authors publish in their code.
    nf4 = torch.tensor([
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ])  # fmt: skip
    blocks = weight.flatten().view(-1, 64)
    scales = blocks.abs().amax(1)
    numbers = nearest(blocks / scales[:, None], nf4)
    nested = [
        nearest(some / some.abs().max(), dynamic_numbers()) * some.abs().max()
        for some in (scales - scales.mean()).split(256)
    ]
    return (numbers * (torch.cat(nested) + scales.mean())[:, None]).view_as(weight)


@cache
def reference(folder: Path, quantize: str | None = None, dora: bool = False) -> Result:
    from peft import PeftModel
    from transformers.pytorch_utils import Conv1D

    family = MODELS[folder.name]["model_type"]
    base = auto_class(family).from_pretrained(folder, attn_implementation="eager")
    head = base.get_output_embeddings()
    for module in base.modules() if quantize else ():
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head:
            turned = module.weight.data.t() if isinstance(module, Conv1D) else module.weight.data
            found = in_few_bits(turned.contiguous(), quantize)
            module.weight.data = found.t() if isinstance(module, Conv1D) else found
    model = PeftModel.from_pretrained(base, folder / adapter_of(dora), is_trainable=True).eval()
    trained = {
        n.replace(".default", "").replace("vector.weight", "vector"): p
        for n, p in model.named_parameters()
        if p.requires_grad
    }
    optimizer = torch.optim.AdamW(
        trained.values(), betas=(0.9, 0.95), eps=1e-3, weight_decay=0.1, foreach=False
    )
    config = config_of(folder, Layout(1)).optimizer
    result: Result = {"loss": [], "norm": []}
    for step, (tokens, labels) in enumerate(batches()):
        logits = their_logits(model, tokens, use_cache=False)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        result["loss"].append(loss.item())
        result[f"gradient {step}"] = {name: p.grad.clone() for name, p in trained.items()}
        result["norm"].append(torch.nn.utils.clip_grad_norm_(trained.values(), 0.05).item())
        optimizer.param_groups[0]["lr"] = learning_rate(step + 1, STEPS, config)
        optimizer.step()
    result["weight"] = {name: p.detach() for name, p in trained.items()}
    result["exp_avg_sq"] = {name: optimizer.state[p]["exp_avg_sq"] for name, p in trained.items()}
    return result


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function is test_two_steps_are_those_of_peft:
        whole = metafunc.config.getoption("--whole")
        metafunc.parametrize(("model", "layout"), ALL_RUNS if whole else RUNS, ids=str)


def test_two_steps_are_those_of_peft(
    model: str, layout: Layout, root: Path, results: dict[tuple[str, Layout], Result]
) -> None:
    if (model, layout) not in results:
        pytest.skip("DeepSpeed is not installed")
    found, wanted = results[model, layout], reference(root / model, layout.quantize, layout.dora)
    stored = load_file(root / model / adapter_of(layout.dora) / "adapter_model.safetensors")
    assert found["weight"].keys() == stored.keys()
    compare(found, wanted)


@pytest.mark.parametrize(
    ("model", "layout"),
    [(model, layout) for model in DRY for layout in DROPPING[1:]],
    ids=str,
)
def test_every_layout_drops_the_same(
    model: str, layout: Layout, results: dict[tuple[str, Layout], Result]
) -> None:
    """PEFT's masks are no function of the layout; one process of ours is what is compared with."""
    alone = results[model, DROPPING[0]]
    assert abs(alone["loss"][0] - results[model, DRY[model]]["loss"][0]) > 1e-3, (
        "something is dropped"
    )
    compare(results[model, layout], alone)


def compare(found: Result, wanted: Result) -> None:
    assert found["frozen gradients"] == 0
    assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    for kind in ("gradient 0", "gradient 1", "weight", "exp_avg_sq"):
        assert found[kind].keys() == wanted[kind].keys()
        for name, tensor in wanted[kind].items():
            # The project's bound for every layout; fp32 sums in another order, about 1e-7 an
            # operation, give 3e-6.
            error = ((found[kind][name] - tensor).norm() / tensor.norm()).item()
            assert error <= 1e-5, f"{kind} of {name} is off by {error:.1e}"
