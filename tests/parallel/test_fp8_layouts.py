"""In fp8, too, every layout trains the same model: what is rounded is equal to the bit, losses and
gradients by the tolerance of fp32, against a clean model in one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megalite.checkpoint.load import from_seed
from megalite.comm.mesh import Mesh, make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.loader import MicroBatch
from megalite.errors import ConfigError
from megalite.kernels.fp8 import Name, Recipe
from megalite.models import build_model, weight_table
from megalite.models.fp8 import fp8_weights
from megalite.models.layers import SequenceInfo, last_of
from megalite.models.sharding import local_part
from megalite.models.weights import Weight
from megalite.parallel.tensor import ParallelLinear
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from ranks import run_ranks

SEED, BATCH, LENGTH = 5, 2, 512

Layout = dict[str, Any]
Case = tuple[str, str]
"""A recipe and a layout."""
LAYOUTS: dict[str, Layout] = {
    "one": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "schedule": "zero_bubble"},
    "zero-1": {"zero_stage": 1},
    "context": {"context": 2},
}
RECIPE_NAMES: tuple[Name, ...] = ("blockwise", "mxfp8", "rowwise", "current")
ALONE: list[Case] = [(recipe, "one") for recipe in RECIPE_NAMES]
SAME_SUMS: list[Case] = [("blockwise", "pipeline"), ("blockwise", "zero-1")]
"""These add in the order of one process."""
OTHERS: list[Case] = [("blockwise", "context"), *((recipe, "tensor") for recipe in RECIPE_NAMES)]
FP8 = {"recipe": "blockwise", "exclude": ["model.layers.1.mlp.down_proj"]}
MODEL = {
    "family": "llama", "vocab_size": 193, "hidden_size": 256, "intermediate_size": 256, "num_layers": 4,
    "num_attention_heads": 4, "max_positions": LENGTH, "init_std": 0.05,
}  # fmt: skip


def config_of(
    layout: Layout, fp8: dict[str, Any] = FP8, length: int = LENGTH, **model: Any
) -> Config:
    return parse_config(
        {
            "run": {"name": "fp8"}, "model": MODEL | model, "data": {"train": [{"path": "-"}], "seq_length": length},
            "parallel": layout, "optimizer": {"lr": 1e-2, "eps": 1e-3},
            "train": {"steps": 1, "global_batch_size": BATCH, "precision": "fp32", "fp8": fp8},
        }
    )  # fmt: skip


def batch(rows: slice = slice(None)) -> MicroBatch:
    tokens = torch.randint(0, 193, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))[
        rows
    ]
    return MicroBatch(tokens[:, :-1], tokens[:, 1:], torch.arange(BATCH)[rows])


class Noting:
    """Notes what a recipe makes of x, W, grad, and of grad and x by tokens (0 to 4), in the order of
    the micro-batches. With `wanted`, notes of one process, products go on with these instead."""

    def __init__(self, recipe: Recipe, wanted: Callable[[int, int, Tensor], Tensor] | None):
        self.recipe, self.wanted = recipe, wanted
        self.log: dict[int, list[Tensor]] = {kind: [] for kind in range(5)}

    def _note(self, kind: int, rounded: Tensor) -> Tensor:
        self.log[kind].append(rounded)
        if self.wanted is None:
            return rounded
        return self.wanted(kind, len(self.log[kind]) - 1, rounded)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        # Against an identity, a product is its other operand.
        eye = torch.eye(x.shape[-1])
        rounded = self._note(0, self.recipe.product(x, eye))
        return rounded @ self._note(1, self.recipe.product(eye, weight).t()).t()

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        rounded = self._note(2, self.recipe.input_gradient(grad, torch.eye(grad.shape[-1])))
        return self.recipe.input_gradient(rounded, weight)

    def wgrad_operands(self, grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        rounded_grad, rounded_x = self.recipe.wgrad_operands(grad, x)
        return self._note(3, rounded_grad), self._note(4, rounded_x)


def part_of(weight: Weight, kind: int, whole: Tensor, layout: Layout, rank: int) -> Tensor:
    """What a rank should have of one of these, of which one process has the whole."""
    rows, columns = local_part(weight, *((rank, 2) if "tensor" in layout else (0, 1)))
    if kind == 1:
        return whole[rows, slice(*columns)]
    if "context" in layout:  # a piece from the front and one from the back
        pieces = whole.chunk(4, whole.dim() - 2)
        whole = torch.cat((pieces[rank], pieces[3 - rank]), whole.dim() - 2)
    return whole[..., rows] if kind in (2, 3) else whole[..., slice(*columns)]


def train(rank: int, world_size: int, cases: list[Case], notes: Path | None) -> dict[Case, Any]:
    """A step on this rank: loss, gradients, and what was rounded for each weight. With `notes`,
    those of one process, products go on with what that has rounded."""
    results = {}
    known = torch.load(notes) if notes else None
    for recipe, name in cases:
        config = config_of(LAYOUTS[name], FP8 | {"recipe": recipe})
        weights = weight_table(config.model)
        plan = make_plan(config, weights, world_size)
        mesh = make_mesh(plan, torch.device("cpu"))
        parts = build(config, plan, mesh)
        noting: dict[str, Noting] = {}
        for stage in parts.stages:
            for module_name, module in stage.model.named_modules():
                if isinstance(module, ParallelLinear) and isinstance(module.recipe, Recipe):
                    key = f"{module_name}.weight"
                    row = next(weight for weight in weights if weight.name == key)

                    def wanted(
                        kind: int,
                        number: int,
                        mine: Tensor,
                        row: Weight = row,
                        layout: Layout = LAYOUTS[name],
                        recipe: str = recipe,
                    ) -> Tensor:
                        return part_of(
                            row, kind, known[recipe][row.name][kind][number], layout, rank
                        ).view_as(mine)  # type: ignore[index]

                    noting[key] = module.recipe = Noting(module.recipe, wanted if known else None)
        parts.engine.load(from_seed(SEED, mesh))
        own = range(mesh.data.rank, BATCH, mesh.data.size)
        micro = [batch(slice(row, row + 1)) for row in own]
        loss = forward_backward(parts, micro, mesh, SEED)["loss"].item()
        owners = {
            w.name: plan.rank_at(next(s.index for s in plan.stages if s.holds(w.place)), 0, 0)
            for w in weights
        }
        rounded = {key: each.log for key, each in noting.items()}
        results[recipe, name] = {
            "loss": loss,
            "grads": parts.engine.gather("grad", owners),
            "rounded": rounded,
        }
    return results


Results = dict[Case, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank has of each case."""
    (alone,) = run_ranks(1, train, ALONE, None)
    notes = tmp_path_factory.mktemp("fp8") / "notes.pt"
    torch.save({recipe: alone[recipe, "one"]["rounded"] for recipe in RECIPE_NAMES}, notes)
    plain, told = run_ranks(2, train, SAME_SUMS, None), run_ranks(2, train, OTHERS, notes)
    ranks = [{**first, **second} for first, second in zip(plain, told, strict=True)]
    return {case: [found] for case, found in alone.items()} | {
        case: [rank[case] for rank in ranks] for case in ranks[0]
    }


BLOCKS: dict[str, tuple[int, int, int]] = {
    "blockwise": (128, 1, 128), "mxfp8": (32, 1, 1), "rowwise": (0, 1, 1), "current": (0, 0, 0)
}  # fmt: skip
"""Numbers along a product's sum that share a scale, rows of activations that do, and of weights; 0:
all."""


def rounded_by_hand(x: Tensor, rows: int, columns: int, e5m2: bool = False) -> Tensor:
    blocks = x.unflatten(1, (-1, columns or x.shape[1])).unflatten(0, (-1, rows or x.shape[0]))
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    kind, top = (torch.float8_e5m2, 57344) if e5m2 else (torch.float8_e4m3fn, 448)
    scales = 2.0 ** torch.log2(largest / top).ceil()
    return ((blocks / scales).to(kind).float() * scales).reshape(x.shape)


class ByHand(torch.autograd.Function):
    """A linear layer by the tables of docs/fp8.md."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe, (length, rows, weight_rows) = recipe, BLOCKS[recipe]
        rounded = rounded_by_hand(x.flatten(0, 1), rows, length).view_as(x)
        return rounded @ rounded_by_hand(weight, weight_rows, length).t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = (each.flatten(0, -2) for each in ctx.saved_tensors)
        length, rows, weight_rows = BLOCKS[ctx.recipe]
        grad_rows, e5m2 = grad.flatten(0, 1), ctx.recipe == "current"
        grad_x = rounded_by_hand(grad_rows, rows, length, e5m2)
        grad_x = grad_x @ rounded_by_hand(weight, length, weight_rows)
        of_weight = rounded_by_hand(grad_rows, length, rows, e5m2)
        of_weight = of_weight.t() @ rounded_by_hand(x, length, rows)
        return grad_x.view(ctx.saved_tensors[0].shape), of_weight, None


@cache
def reference(recipe: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the clean model. Layers 1 and 2 of 0 to 3
    are in fp8, but for one product."""
    config = config_of({})
    read, model = from_seed(SEED, Mesh.alone()), build_model(config.model).to_empty(device="cpu")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for weight in weight_table(config.model):
            parameters[weight.name].copy_(
                read(weight, "weight", 0, weight.numel).view(weight.shape)
            )
    for number, name in itertools.product(
        (1, 2), ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    ):
        if (number, name) != (1, "mlp.down"):
            linear = model.layers[str(number)].get_submodule(name)
            linear.forward = lambda x, weight=linear.weight: ByHand.apply(x, weight, recipe)
    index, total = torch.arange(LENGTH)[None], 0.0
    places = SequenceInfo(index, index, None, None)
    for row in range(BATCH):
        micro = batch(slice(row, row + 1))
        x = last_of(model.run_layers(model.embed(micro.tokens, places), places))
        losses = model.loss(model.predict(x), micro.labels)
        loss = losses.sum() / (BATCH * LENGTH)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in parameters.items()}  # type: ignore[misc]


@pytest.mark.parametrize("case", [*ALONE, *SAME_SUMS, *OTHERS], ids="-".join)
def test_layout_equals_one_process(case: Case, results: Results) -> None:
    loss, grads = reference(case[0])
    found = results[case]
    assert all(rank["loss"] == pytest.approx(loss, rel=1e-5) for rank in found)
    merged = {key: grad for rank in found for key, grad in rank["grads"].items()}
    assert merged.keys() == grads.keys()
    for key, wanted in grads.items():
        error = float((merged[key] - wanted).norm() / wanted.norm())
        assert error <= 1e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize("case", [*SAME_SUMS, *OTHERS], ids="-".join)
def test_what_is_rounded_is_equal_to_the_bit(case: Case, results: Results) -> None:
    """All of it where the layout adds in the order of one process. Over tensor and context ranks
    sums of fp32 end in other bits, and a number that is as near to two codes may become the other,
    which is why these go on with what one process has rounded: one in 10,000, and no weight."""
    recipe, name = case
    (alone,), found = results[recipe, "one"], results[case]
    config = config_of({})
    assert config.train.fp8
    chosen = {w.name: w for w in fp8_weights(weight_table(config.model), config.train.fp8, 4)}
    there = {key for rank in found for key in rank["rounded"]}
    assert chosen.keys() == alone["rounded"].keys() == there
    assert len(chosen) == 7
    total, other = 0, 0
    for rank, result in enumerate(found):
        for key, kind in itertools.product(result["rounded"], range(5)):
            wholes = alone["rounded"][key][kind]
            # A data rank has every second micro-batch.
            wholes = wholes[rank::2] if name == "zero-1" else wholes
            for mine, whole in zip(result["rounded"][key][kind], wholes, strict=True):
                wanted = part_of(chosen[key], kind, whole, LAYOUTS[name], rank)
                differ = int((mine.view_as(wanted) != wanted).sum())
                assert kind != 1 or not differ, key
                total, other = total + mine.numel(), other + differ
    assert total > 10**6
    assert other <= (0 if case in SAME_SUMS else 1e-4 * total), f"{other} of {total}"


EXPERTS = {
    "family": "qwen3_moe", "intermediate_size": 256, "moe_intermediate_size": 128, "num_experts": 4,
    "experts_per_token": 2, "num_layers": 3, "num_kv_heads": 2,
}  # fmt: skip


def train_experts(rank: int, world_size: int, layout: Layout) -> tuple[float, dict[str, Tensor]]:
    config = config_of(
        layout, {"recipe": "blockwise", "exclude": ["q_proj", "k_proj", "v_proj"]}, **EXPERTS
    )
    weights = weight_table(config.model)
    plan = make_plan(config, weights, world_size)
    mesh = make_mesh(plan, torch.device("cpu"))
    parts = build(config, plan, mesh)
    recipes = {
        name for stage in parts.stages for name, module in stage.model.named_modules()
        if isinstance(getattr(module, "recipe", None), Recipe)
    }  # fmt: skip
    inside = {"layers.1.attention.out", "layers.1.mlp.experts.gate_up", "layers.1.mlp.experts.down"}
    assert recipes == (inside if any(1 in stage.span.layers for stage in parts.stages) else set())
    parts.engine.load(from_seed(SEED, mesh))
    micro = [batch(slice(row, row + 1)) for row in range(mesh.data.rank, BATCH, mesh.data.size)]
    loss = forward_backward(parts, micro, mesh, SEED)["loss"].item()
    owners = {
        w.name: plan.rank_at(next(s.index for s in plan.stages if s.holds(w.place)), 0, 0)
        for w in weights
    }
    return loss, parts.engine.gather("grad", owners)


def test_experts_are_the_same_on_expert_and_pipeline_ranks() -> None:
    ((loss, grads),) = run_ranks(1, train_experts, {})
    for layout in ({"expert": 2}, {"pipeline": 2, "schedule": "zero_bubble"}):
        found = run_ranks(2, train_experts, layout)
        assert [each[0] for each in found] == pytest.approx([loss] * 2, rel=1e-5)
        merged = {name: grad for _, each in found for name, grad in each.items()}
        for name, wanted in grads.items():
            assert float((merged[name] - wanted).norm() / wanted.norm()) <= 1e-5, name


NOT_ATTENTION = FP8 | {"exclude": ["q_proj", "k_proj", "v_proj", "o_proj"]}
REFUSED: dict[str, tuple[Layout, dict[str, Any], dict[str, Any]]] = {
    "the 128 output features of model.layers.1.self_attn.k_proj do not divide over parallel.tensor = 2; "
    "train.fp8.exclude: [q_proj, k_proj, v_proj] leaves": ({"tensor": 2}, FP8, {"num_kv_heads": 2}),
    "the 256 output features of model.layers.1.mlp.gate_proj do not divide over parallel.tensor = 4; "
    "train.fp8.exclude: [gate_proj, up_proj] leaves": ({"tensor": 4}, NOT_ATTENTION, {}),
    "the 192 input features of model.layers.1.mlp.gate_proj": ({}, NOT_ATTENTION, {"hidden_size": 192}),
    "takes multiples of 128 tokens, into which sequences of 96 do not divide": ({}, FP8, {"length": 96}),
    "sequences of 512 do not divide over 2 × parallel.context = 8 pieces": ({"context": 4}, FP8, {}),
    "rowwise needs parallel.context: 1, not 2": ({"context": 2}, FP8 | {"recipe": "rowwise"}, {}),
    "rowwise takes multiples of 16 tokens": ({}, FP8 | {"recipe": "rowwise"}, {"length": 72}),
    "no linear module is called 'down'; did you mean 'down_proj'": ({}, FP8 | {"exclude": ["down"]}, {}),
    "self_attn.k_proj is one product with model.layers.1.self_attn.q_proj, "
    "model.layers.1.self_attn.v_proj; name": ({}, FP8 | {"exclude": ["k_proj"]}, {}),
    "no product is left": ({}, FP8 | {"first_last_bf16": [2, 2]}, {}),
    "the 192 output features of model.layers.1.mlp.experts.0.gate_proj": (
        {}, {"exclude": ["q_proj", "k_proj", "v_proj"]}, EXPERTS | {"moe_intermediate_size": 192},
    ),
    "experts.1.gate_proj and 5 more; name all of them": (
        {}, {"exclude": ["experts.0.gate_proj"]}, EXPERTS,
    ),
    "train.fp8 needs parallel.engine: native": ({"engine": "deepspeed"}, FP8, {}),
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_would_be_another_model_is_refused(said: str) -> None:
    layout, fp8, model = REFUSED[said]
    config = config_of(layout, fp8, **model)
    ranks = layout.get("tensor", 1) * layout.get("context", 1)
    with pytest.raises(ConfigError) as refused:
        make_plan(config, weight_table(config.model), ranks)
    assert said in str(refused.value)
    assert "train.fp8" in str(refused.value)
