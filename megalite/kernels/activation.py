"""Activations of the MLP: SwiGLU and GeGLU (Shazeer 2020), and GELU in its tanh approximation
(Hendrycks and Gimpel 2016).

megalite's own kernels for SwiGLU and GELU take one pass over memory forward and one backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megalite.kernels.library import added, own, pick


def swiglu(gate_up: Tensor) -> Tensor:
    """Return silu(gate) · up, computed in fp32: […,2I] → […,I].

    `gate_up` holds the gate in the first half of its last dimension and up in the second."""
    if function := added.get("swiglu"):
        return function(gate_up)
    if pick("activation", gate_up) == "megalite":
        return torch.ops.megalite.swiglu(gate_up)
    # The reference: in bf16 silu(gate) is rounded before it is multiplied, where the kernel rounds
    # once.
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return GELU of `x` + `bias`, computed in fp32. `x` is […,D] and `bias` [D], of one dtype."""
    if function := added.get("gelu"):
        return function(x, bias)
    if pick("activation", x) == "megalite":
        return torch.ops.megalite.gelu(x, bias)
    # Here a sum in x's dtype; the kernel adds in fp32 and saves the pass over x (Megatron's
    # bias-GELU fusion).
    if bias is not None:
        x = x + bias
    return F.gelu(x, approximate="tanh")


def geglu(gate_up: Tensor) -> Tensor:
    """Return gelu(gate) · up: […,2I] → […,I]. The gate is the first half of the last dimension of
    `gate_up`."""
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate) * up


def clamped_glu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """Return gate · sigmoid(α · gate) · (up + 1) with gates of at most `limit`, and ups of at most
    that size (gpt-oss): […,2I] → […,I]. In the last dimension of `gate_up` each gate stands before
    its up."""
    return _ClampedGlu.apply(gate_up, alpha, limit)


class _ClampedGlu(Function):
    """Keep the input alone, not what lies between."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.alpha, ctx.limit = alpha, limit
        gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
        gate = gate.clamp(max=limit)
        return torch.sigmoid(gate * alpha).mul_(gate).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,), alpha, limit = ctx.saved_tensors, ctx.alpha, ctx.limit
        grad_pairs = torch.empty_like(gate_up).unflatten(-1, (-1, 2))
        gate, up = gate_up.unflatten(-1, (-1, 2)).unbind(-1)
        clamped = gate.clamp(max=limit)
        share = torch.sigmoid(clamped * alpha)
        # Numbers beyond the limit have no gradient.
        grad_pairs[..., 1] = (grad * clamped * share).masked_fill_(up.abs() > limit, 0.0)
        # Of gate · sigmoid(α · gate).
        slope = (1 - share).mul_(clamped).mul_(alpha).add_(1).mul_(share)
        grad_pairs[..., 0] = (
            slope.mul_(grad).mul_(up.clamp(-limit, limit).add_(1)).masked_fill_(gate > limit, 0.0)
        )
        return grad_pairs.flatten(-2), None, None


def _register() -> None:
    ops = torch.ops.megalite

    # Fake kernels give torch.compile the shapes and dtypes of the results without computing them.

    @torch.library.register_fake("megalite::swiglu")
    def _(gate_up: Tensor) -> Tensor:
        *batch, features = gate_up.shape
        return gate_up.new_empty(*batch, features // 2)

    @torch.library.register_fake("megalite::swiglu_backward")
    def _(grad: Tensor, gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(gate_up.shape)

    @torch.library.register_fake("megalite::gelu")
    def _(x: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("megalite::gelu_backward")
    def _(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        # An operator cannot return None for one of two tensors: an empty one stands for "no bias".
        grad_bias = x.new_empty(0 if bias is None else x.shape[-1])
        return x.new_empty(x.shape), grad_bias

    # The inputs are saved, not the outputs: what lies between is cheap to compute again in the
    # backward kernel.
    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        # The gradient of gelu by its bias is the column sum of grad_x, so the operator returns
        # both.
        ctx.save_for_backward(*inputs)

    def swiglu_backward(ctx: Any, grad: Tensor) -> Tensor:
        return ops.swiglu_backward(grad, *ctx.saved_tensors)

    def gelu_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        x, bias = ctx.saved_tensors
        grad_x, grad_bias = ops.gelu_backward(grad, x, bias)
        return grad_x, None if bias is None else grad_bias

    torch.library.register_autograd("megalite::swiglu", swiglu_backward, setup_context=keep)
    torch.library.register_autograd("megalite::gelu", gelu_backward, setup_context=keep)


if own():
    _register()
