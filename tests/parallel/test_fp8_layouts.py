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
from megalite.kernels.fp8 import Recipe
from megalite.models import build_model, weight_table
from megalite.models.fp8 import fp8_weights
from megalite.models.layers import SequenceInfo, last_of
from megalite.models.weights import Weight
from megalite.parallel.tensor import ParallelLinear
from megalite.plan import make_plan
from megalite.training.parts import build, forward_backward
from ranks import run_ranks

SEED, BATCH, LENGTH = 5, 2, 512

Layout = dict[str, Any]
LAYOUTS: dict[str, Layout] = {
    "one": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2, "schedule": "zero_bubble"},
    "zero-1": {"zero_stage": 1},
    "context": {"context": 2},
}
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
    rows, columns = weight.local_part(*((rank, 2) if "tensor" in layout else (0, 1)))
    if kind == 1:
        return whole[rows, slice(*columns)]
    if "context" in layout:  # a piece from the front and one from the back
        pieces = whole.chunk(4, whole.dim() - 2)
        whole = torch.cat((pieces[rank], pieces[3 - rank]), whole.dim() - 2)
    return whole[..., rows] if kind in (2, 3) else whole[..., slice(*columns)]


def train(rank: int, world_size: int, names: list[str], notes: Path | None) -> dict[str, Any]:
    """A step on this rank: loss, gradients, and what was rounded for each weight. With `notes`,
    those of one process, products go on with what that has rounded."""
    results = {}
    known = torch.load(notes) if notes else None
    for name in names:
        config = config_of(LAYOUTS[name])
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
                    ) -> Tensor:
                        return part_of(
                            row, kind, known[row.name][kind][number], layout, rank
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
        results[name] = {
            "loss": loss,
            "grads": parts.engine.gather("grad", owners),
            "rounded": rounded,
        }
    return results


SAME_SUMS = ("pipeline", "zero-1")
"""Layouts that add in the order of one process."""
OTHERS = ("tensor", "context")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    (alone,) = run_ranks(1, train, ["one"], None)
    notes = tmp_path_factory.mktemp("fp8") / "notes.pt"
    torch.save(alone["one"]["rounded"], notes)
    found = {
        name: run_ranks(2, train, [*names], path)
        for names, path in ((SAME_SUMS, None), (OTHERS, notes))
        for name in names[:1]
    }
    several = {
        name: [rank[name] for rank in ranks] for ranks in found.values() for name in ranks[0]
    }
    return {"one": [alone["one"]]} | several


def rounded_by_hand(x: Tensor, rows: int, columns: int) -> Tensor:
    blocks = x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    largest = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    scales = 2.0 ** torch.log2(largest / 448).ceil()
    return ((blocks / scales).to(torch.float8_e4m3fn).float() * scales).reshape(x.shape)


class ByHand(torch.autograd.Function):
    """A linear layer of DeepSeek-V3's report: activations and gradients in tiles of 128, weights in
    squares."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (
            rounded_by_hand(x.flatten(0, 1), 1, 128).view_as(x)
            @ rounded_by_hand(weight, 128, 128).t()
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        rows, x_rows = grad.flatten(0, 1), x.flatten(0, 1)
        grad_x = rounded_by_hand(rows, 1, 128) @ rounded_by_hand(weight, 128, 128)
        return grad_x.view_as(x), rounded_by_hand(rows, 128, 1).t() @ rounded_by_hand(
            x_rows, 128, 1
        )


@cache
def reference() -> tuple[float, dict[str, Tensor]]:
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
            linear.forward = lambda x, weight=linear.weight: ByHand.apply(x, weight)
    index, total = torch.arange(LENGTH), 0.0
    places = SequenceInfo(index, index[None], None, None)
    for row in range(BATCH):
        micro = batch(slice(row, row + 1))
        x = last_of(model.run_layers(model.embed(micro.tokens, places), places))
        losses = model.loss(model.predict(x), micro.labels)
        loss = losses.sum() / (BATCH * LENGTH)
        loss.backward()
        total += loss.item()
    return total, {name: p.grad for name, p in parameters.items()}  # type: ignore[misc]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_one_process(name: str, results: dict[str, list[dict[str, Any]]]) -> None:
    loss, grads = reference()
    found = results[name]
    assert all(rank["loss"] == pytest.approx(loss, rel=1e-5) for rank in found)
    merged = {key: grad for rank in found for key, grad in rank["grads"].items()}
    assert merged.keys() == grads.keys()
    for key, wanted in grads.items():
        error = float((merged[key] - wanted).norm() / wanted.norm())
        assert error <= 1e-5, f"{key}: {error:.1e}"


@pytest.mark.parametrize("name", [*SAME_SUMS, *OTHERS])
def test_what_is_rounded_is_equal_to_the_bit(
    name: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    """All of it where the layout adds in the order of one process. Over tensor and context ranks
    sums of fp32 end in other bits, and a number that is as near to two codes may become the other,
    which is why these go on with what one process has rounded: one in 10,000, and no weight."""
    (alone,), found = results["one"], results[name]
    config = config_of({})
    assert config.train.fp8
    chosen = {w.name: w for w in fp8_weights(weight_table(config.model), config.train.fp8, 4)}
    assert (
        chosen.keys()
        == alone["rounded"].keys()
        == {key for rank in found for key in rank["rounded"]}
    )
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
    assert other == 0 if name in SAME_SUMS else other <= 1e-4 * total, f"{other} of {total}"


NOT_ATTENTION = FP8 | {"exclude": ["q_proj", "k_proj", "v_proj", "o_proj"]}
REFUSED: dict[str, tuple[Layout, dict[str, Any], dict[str, Any]]] = {
    "the 256 output features of model.layers.1.self_attn.q_proj, model.layers.1.self_attn.k_proj, "
    "model.layers.1.self_attn.v_proj do not divide over parallel.tensor = 4": ({"tensor": 4}, FP8, {}),
    "the 256 output features of model.layers.1.mlp.gate_proj, model.layers.1.mlp.up_proj do not divide "
    "over parallel.tensor = 4": ({"tensor": 4}, NOT_ATTENTION, {}),
    "the 192 input features of model.layers.1.mlp.gate_proj": ({}, NOT_ATTENTION, {"hidden_size": 192}),
    "sequences of 96 tokens do not divide": ({}, FP8, {"length": 96}),
    "sequences of 512 tokens do not divide, over 2 × parallel.context = 8 pieces": ({"context": 4}, FP8, {}),
    "no linear module is called 'down'; did you mean 'down_proj'": ({}, FP8 | {"exclude": ["down"]}, {}),
    "k_proj is one product with q_proj and v_proj": ({}, FP8 | {"exclude": ["k_proj"]}, {}),
    "no product is left": ({}, FP8 | {"first_last_bf16": [2, 2]}, {}),
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
