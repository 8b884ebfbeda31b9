"""The linear layer's product x · Wᵀ and its two gradients: every linear in training computes them
here.

Tensor-parallel linears, the output head, the chunked loss and adapters call `linear`, or its three
products by name (`product`, `input_gradient`, and `weight_gradient` or
`accumulate_weight_gradient`). A `Recipe` (fp8) rounds their operands first; a frozen weight in few
bits (`quantised.py`) is dequantised in the first two. The collectives on the way in come from
outside, as `InputCollectives`.

Letters in shapes: T tokens, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from megalite.kernels.fp8 import Rounded
from megalite.kernels.library import added, pick
from megalite.kernels.quantised import QuantisedWeight
from megalite.kernels.scaled_product import scaled_product

Result = Callable[[], Tensor]
"""Waits for a collective and returns its result."""

Operand = Tensor | Rounded
"""Of a weight-gradient GEMM: [T,N] or [T,K], or in codes, which lie transposed."""

WgradCallback = Callable[[Tensor, Operand, Operand, bool], Tensor | None]
"""Callback for a weight-gradient GEMM: takes (parameter, grad [T,N], x [T,K], last) and adds gradᵀ
x to the parameter's gradient, or returns it for autograd to add. `last` is true for the last, most
often only, GEMM of the weight in a micro-batch."""


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x · Wᵀ + bias: [… ,K] and [N,K] → [… ,N]."""
    return F.linear(x, _dense(weight, x.dtype), bias)


def input_gradient(grad: Tensor, weight: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the gradient of the input, grad · W: [… ,N] and [N,K] → [… ,K]; written to `out` where
    it is given."""
    return torch.matmul(grad, _dense(weight, grad.dtype), out=out)


def _dense(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight as products take it: one in few bits is dequantised anew for each, and not
    kept between the passes."""
    return weight.dequantise(dtype) if isinstance(weight, QuantisedWeight) else weight


def weight_gradient(grad: Operand, x: Operand) -> Tensor:
    """Return the gradient of the weight, gradᵀ · x, in their dtype: [T,N] and [T,K] → [N,K]."""
    if isinstance(grad, Tensor) and isinstance(x, Tensor):
        return grad.t() @ x
    return _product_of_codes(grad, x, torch.bfloat16)


def to_autograd(parameter: Tensor, grad: Operand, x: Operand, last: bool) -> Tensor:
    """Return the weight's gradient: the callback of linears whose weight no engine sums."""
    return weight_gradient(grad, x)


def _product_of_codes(grad: Operand, x: Operand, dtype: torch.dtype) -> Tensor:
    assert isinstance(grad, Rounded)
    assert isinstance(x, Rounded)
    return scaled_product(grad, x, dtype)


def accumulate_weight_gradient(into: Tensor, grad: Operand, x: Operand, add: bool) -> None:
    """Write gradᵀ x to `into`, or accumulate it there with `add`.

    `into` is the fp32 gradient [N,K] of a weight, `grad` [T,N] that of the layer's output and `x`
    [T,K] the layer's input, both of one dtype."""
    if isinstance(grad, Rounded) or isinstance(x, Rounded):
        found = _product_of_codes(grad, x, torch.float32)
        into.add_(found) if add else into.copy_(found)
        return
    if function := added.get("accumulate_weight_gradient"):
        function(into, grad, x, add)
    elif x.is_cuda and x.dtype == torch.bfloat16:
        # cuBLAS adds its fp32 accumulators to `into` directly; a bf16 product would be rounded
        # first.
        if add:
            torch.addmm(into, grad.t(), x, torch.float32, out=into)
        else:
            torch.mm(grad.t(), x, torch.float32, out=into)
    elif pick("weight_gradient", x) == "megalite":
        torch.ops.megalite.weight_gradient_(into, grad, x, add)
    # beta = 0: BLAS does not read `into`, which may hold anything.
    elif x.dtype == torch.float32:
        into.addmm_(grad.t(), x, beta=1.0 if add else 0.0)
    else:  # the product is rounded to bf16 before it is accumulated in fp32
        rounded = weight_gradient(grad, x)
        into.add_(rounded) if add else into.copy_(rounded)


class InputCollectives(Protocol):
    """Communicate the input of a linear layer, and its gradient, with the ranks that hold the rest
    of the weight."""

    def start_gather(self, x: Tensor) -> Result:
        """Start to make the whole input from this rank's part of it."""

    def multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe) -> Tensor:
        """Return the recipe's product of the whole input. Who can begin it before the whole input
        is there replaces this."""
        return recipe.product(self.start_gather(x)(), weight, bias)

    def start_reduce(self, grad_x: Tensor) -> Result:
        """Start summing the gradient of the whole input over the ranks; the result is this rank's
        part."""


class NoCollectives(InputCollectives):
    """Leave an input alone that is whole on this rank and whose gradient is, too."""

    def start_gather(self, x: Tensor) -> Result:
        return lambda: x

    def start_reduce(self, grad_x: Tensor) -> Result:
        return lambda: grad_x


ALONE = NoCollectives()


class Recipe(Protocol):
    """Computes a linear layer's products by other operands than those at hand."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Stand for `product`."""

    def input_gradient(self, grad: Tensor, weight: Tensor) -> Tensor:
        """Stand for `input_gradient`."""

    def wgrad_operands(self, grad: Tensor, x: Tensor) -> tuple[Operand, Operand]:
        """Return what takes the place of `grad` [T,N] and `x` [T,K] in the weight-gradient GEMM."""

    def grouped_operands(
        self, rows: Tensor, weight: Tensor, over: Literal["input", "output"]
    ) -> tuple[Tensor, Tensor]:
        """Return what takes the place of `rows` [… ,I] or [… ,O] and `weight` [E,O,I] in experts'
        products, which sum over input or output features."""


class AsGiven:
    """Take the operands as they are."""

    product = staticmethod(product)
    input_gradient = staticmethod(input_gradient)

    def wgrad_operands(self, grad: Tensor, x: Tensor) -> tuple[Operand, Operand]:
        return grad, x

    def grouped_operands(
        self, rows: Tensor, weight: Tensor, over: Literal["input", "output"]
    ) -> tuple[Tensor, Tensor]:
        return rows, weight


AS_GIVEN = AsGiven()


class WeightGradStore:
    """Store weight-gradient GEMMs that a zero-bubble schedule (Qi et al. 2023) defers until a
    pipeline would idle.

    `put` is called in a backward pass; `take`, after it, returns the function that computes what
    was put since."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], object]] = []

    def put(self, gemm: Callable[[], object]) -> None:
        """Defer `gemm`, which computes and delivers one weight-gradient GEMM."""
        self._waiting.append(gemm)

    def take(self) -> Callable[[], None]:
        """Return a function that computes every GEMM stored so far, in order; the store is empty
        from here on."""
        # One list for each micro-batch: the schedule calls what `take` returned for it later, and
        # other micro-batches' backward passes come between.
        waiting, self._waiting = self._waiting, []

        def run() -> None:
            while waiting:  # what a GEMM has kept is freed as soon as it is computed
                with torch.no_grad():
                    waiting.pop(0)()

        return run


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    collectives: InputCollectives = ALONE,
    wgrad_callback: WgradCallback | None = None,
    later: WeightGradStore | None = None,
    recipe: Recipe = AS_GIVEN,
) -> Tensor:
    """Compute `product` and, in the backward pass, its gradients: [… ,K] → [… ,N], whose memory is
    its own.

    `collectives` communicate the input. With `wgrad_callback` the weight's gradient is handed over
    as the operands of its GEMM, and autograd gives the weight none; `later` defers that to a time
    of its own. `recipe` rounds the operands of all three."""
    return _Linear.apply(x, weight, bias, collectives, wgrad_callback, later, recipe)


class _Linear(Function):
    """Compute a linear layer together with the collective on its way in.

    They are one autograd function for three reasons. Under sequence parallelism only this rank's
    slice of the input is kept, and gathered again in the backward pass. The gradient of the input
    travels while that of the weight is computed. And the weight-gradient GEMM goes straight to the
    engine, which sums it in fp32. A frozen weight has no such GEMM, and the input is not kept for
    it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        collectives: InputCollectives,
        wgrad_callback: WgradCallback | None,
        later: WeightGradStore | None,
        recipe: Recipe,
    ) -> Tensor:
        of_input, of_weight, of_bias, *_ = ctx.needs_input_grad
        # The weight's gradient needs x, that of x needs the weight: what has no gradient is not
        # kept.
        ctx.save_for_backward(x if of_weight else None, weight if of_input else None)
        ctx.collectives, ctx.of_bias = collectives, bias is not None and of_bias
        # `parameter` even where `weight` is not saved: the engine finds the bucket by it.
        ctx.wgrad_callback, ctx.later, ctx.parameter = wgrad_callback or to_autograd, later, weight
        ctx.recipe = recipe
        out = collectives.multiply(x, weight, bias, recipe)
        # With a bias, F.linear returns a view, on which autograd forbids in-place operations such
        # as the rotation of RoPE.
        return out if bias is None else torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        collectives, recipe = ctx.collectives, ctx.recipe
        wgrad_callback, parameter = ctx.wgrad_callback, ctx.parameter
        # [B, T, N] → [B · T, N]: to a weight, all tokens are alike.
        grad_rows = grad.flatten(0, -2)
        grad_bias = grad_rows.sum(0) if ctx.of_bias else None
        # Two collectives, each behind a GEMM: x is gathered while the input's gradient is computed,
        # whose reduction runs while the weight-gradient GEMM is. A frozen weight, as under LoRA,
        # has no such GEMM.
        whole_x = None if x is None or ctx.later else collectives.start_gather(x)
        grad_x, grad_weight = None, None
        if weight is not None:
            grad_x = collectives.start_reduce(recipe.input_gradient(grad, weight))
        if whole_x is not None:
            operands = recipe.wgrad_operands(grad_rows, whole_x().flatten(0, -2))
            # The engine adds the GEMM to its fp32 buffer and returns None, so that autograd makes
            # no .grad in the weight's dtype.
            grad_weight = wgrad_callback(parameter, *operands, True)
        elif x is not None:
            # Zero bubble: the previous stage waits for grad_x alone, so the weight-gradient GEMM is
            # put off. Until then it holds grad_rows and this rank's slice of x; the whole x is
            # gathered again only when the GEMM runs.
            def deferred() -> None:
                rows = collectives.start_gather(x)().flatten(0, -2)
                wgrad_callback(parameter, *recipe.wgrad_operands(grad_rows, rows), True)

            ctx.later.put(deferred)
        # grad_x() waits for the reduction: not before this line, or nothing would have run beside
        # it.
        return grad_x and grad_x(), grad_weight, grad_bias, None, None, None, None
