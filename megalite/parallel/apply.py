"""Everything that is done to a clean model, in the order in which it is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from megalite.comm.collectives import all_reduce
from megalite.comm.mesh import Axis, Mesh
from megalite.config import FakeQuantizeConfig, Fp8Config, TrainConfig
from megalite.kernels import library
from megalite.kernels.fake_quantize import FakeQuantised, Switch
from megalite.kernels.fp8 import Agree
from megalite.kernels.linear import WeightGradStore
from megalite.kernels.nvfp4 import Nvfp4
from megalite.kernels.recipes import RECIPES
from megalite.kernels.schemes import make_scheme
from megalite.models.core_attention import CoreAttention
from megalite.models.dropout import Dropout
from megalite.models.experts import Experts
from megalite.models.fp8 import fp8_weights
from megalite.models.layer_loss import LayerLoss
from megalite.models.layers import Decoder, SequenceInfo
from megalite.models.sharding import local_part
from megalite.models.weights import Weight
from megalite.parallel.expert import ParallelGroupedLinear
from megalite.parallel.rules import apply_rules, make_layout, vocab_size_of
from megalite.parallel.stage import cut
from megalite.parallel.tensor import ChunkedHead, ParallelLinear
from megalite.plan import Plan, StageSpan


def apply_parallelism(
    model: Decoder,
    weights: Sequence[Weight],
    plan: Plan,
    span: StageSpan,
    mesh: Mesh,
    train: TrainConfig,
    later: WeightGradStore | None = None,
) -> None:
    """Turn a clean model on the meta device into this rank's part of one pipeline stage, in place.

    `weights` is the whole table, `span` the layers of the stage. `later` defers weight-gradient
    GEMMs (zero-bubble schedules); `train` says what is recomputed, compiled and chunked.

    Each step finds what those before it have made. An engine then adopts the parameters, registers
    its hooks with modules and sets the `wgrad_callback` of linears."""
    # First: what another stage has must not be replaced, wrapped or compiled here.
    cut(model, span, at_both_ends=any(weight.place == "both" for weight in weights))
    # Modules become their parallel counterparts, whose `forward` is then another. torch.compile
    # cannot see what linears among them do besides computing, so those inside layers stay plain.
    parents = [model] if train.compile else list(model.modules())
    # All of this works on the meta device: shapes only, until the engine gives memory to
    # parameters.
    apply_rules(parents, make_layout(model, weights, plan, mesh, later))
    if train.fp8:
        apply_fp8(model, weights, train.fp8)
    if train.fake_quantize:
        apply_fake_quantize(model, weights, train.fake_quantize)
    if train.loss_chunk and span.last:
        apply_chunked_loss(model, weights, mesh.tensor, plan.sequence, train.loss_chunk)
    # The compiler is outermost: it sees what is recomputed, and decides with it what a layer keeps.
    apply_recompute(model, train)
    if train.compile:
        compile_layers(model)


def wrap(
    module: nn.Module, method: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Replace a method of one module by what `wrapper` makes of it. Recomputation and compilation
    change modules in this way only."""
    setattr(module, method, wrapper(getattr(module, method)))


def compile_layers(model: Decoder) -> None:
    """Compile the forward pass of every layer, in place, for fixed shapes."""
    library.tell_compiler()
    for layer in model.layers.values():
        for module in layer.modules():
            if isinstance(module, Dropout):
                # The compiler turns products that wrap around int64 into constants that do not fit.
                wrap(module, "drop", torch.compiler.disable)
            if isinstance(module, CoreAttention):
                # It writes beside the layer's own values.
                wrap(module, "note_logits", torch.compiler.disable)
            if isinstance(module, LayerLoss | Experts):
                # The backward pass of a loss takes note of it; an expert's rows are other ones in
                # every pass.
                wrap(module, "forward", torch.compiler.disable)
        wrap(layer, "forward", partial(torch.compile, dynamic=False))


def apply_fp8(model: Decoder, weights: Sequence[Weight], fp8: Fp8Config) -> None:
    """Have the linear modules that `fp8` chooses compute their products in fp8, in place.
    `weights` is the whole table."""
    rows = fp8_weights(weights, fp8, model.config.num_layers)
    chosen = {weight.name: weight for weight in rows}
    by_chance: list[ParallelLinear] = []
    for name, module in model.named_modules():
        if f"{name}.weight" in chosen:
            assert isinstance(module, ParallelLinear | ParallelGroupedLinear), name
            if isinstance(module, ParallelGroupedLinear):
                module.recipe = RECIPES[fp8.recipe]
                continue
            cut = chosen[f"{name}.weight"].shard
            recipe = RECIPES[fp8.recipe].on(cut, _agree(module.axis))
            if isinstance(recipe, Nvfp4):
                row, axis = chosen[f"{name}.weight"], module.axis
                recipe = recipe.of(name, local_part(row, axis.rank, axis.size)[0])
                by_chance.append(module)
            module.recipe = recipe
    if by_chance:
        wrap(model, "run_layers", partial(_with_samples, by_chance))


def _with_samples(
    modules: Sequence[ParallelLinear], run_layers: Callable[..., Any]
) -> Callable[..., Any]:
    """Return `run_layers` that tells the recipes of `modules` whose samples a forward pass is of: each
    pass keeps its own for the backward pass."""

    def run(x: Any, places: SequenceInfo) -> Any:
        for module in modules:
            assert isinstance(module.recipe, Nvfp4)
            module.recipe = module.recipe.of_samples(places.key_B)
        return run_layers(x, places)

    return run


def apply_fake_quantize(
    model: Decoder, weights: Sequence[Weight], fake_quantize: FakeQuantizeConfig
) -> None:
    """Have the layers' linear modules round their operands as quantising the model will, in place.
    `weights` is the whole table."""
    scheme = make_scheme(fake_quantize.scheme, fake_quantize.group)
    inputs = scheme.inputs() if fake_quantize.inputs else None
    chosen = {weight.name: weight for weight in weights if weight.is_matrix}
    switch = Switch(on=fake_quantize.start_step == 0)
    for name, module in model.named_modules():
        if f"{name}.weight" in chosen:
            assert isinstance(module, ParallelLinear), name
            cut = chosen[f"{name}.weight"].shard
            module.recipe = FakeQuantised(scheme, inputs, switch, cut, _agree(module.axis))


def _agree(axis: Axis) -> Agree | None:
    """Return what finds the largest of numbers over the ranks of an axis; None for one rank."""
    return partial(all_reduce, axis=axis, op=dist.ReduceOp.MAX) if axis.size > 1 else None


def apply_chunked_loss(
    model: Decoder, weights: Sequence[Weight], axis: Axis, sequence: bool, rows: int
) -> None:
    """Replace head and loss by a `ChunkedHead` that never holds the logits of more than `rows`
    tokens, in place.

    `weights` is the whole table, which tells the size of the vocabulary; `axis` is the tensor axis,
    and `sequence` says whether sequence parallelism is on."""
    assert isinstance(model.head.weight, nn.Parameter)
    head = ChunkedHead(model.head.weight, axis, sequence, vocab_size_of(weights), rows)
    model.head, model.loss = head, nn.Identity()  # nn.Identity is never called

    # The head computes the loss itself.
    model.losses_of = head.__call__  # type: ignore[method-assign]


def apply_recompute(model: Decoder, train: TrainConfig) -> None:
    """Recompute activations in the backward pass instead of keeping them (Chen et al. 2016).

    `selective` (Korthikanti et al. 2022) recomputes what is large and cheap: the element-wise part
    of an MLP (its `activation_and_down_proj`), and attention where it materialises its
    probabilities, which SDPA never does."""
    # The first layers of a stage, whose activations would be kept longest.
    for layer in list(model.layers.values())[: train.recompute_layers]:
        if train.recompute == "full":
            wrap(layer, "forward", _recomputed)
        elif train.recompute == "selective":
            for module in layer.modules():
                for method in _large_and_cheap(module):
                    wrap(module, method, _recomputed)


def _large_and_cheap(module: nn.Module) -> tuple[str, ...]:
    """Return the methods of a module that `selective` recomputes."""
    if isinstance(module, CoreAttention):
        return ("forward", "attend") if module.writes_scores else ()
    return ("activation_and_down_proj",) if hasattr(module, "activation_and_down_proj") else ()


def _recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that computes `function` under activation checkpointing."""
    # Dropout masks follow from keys, so there is no random state to restore.
    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
