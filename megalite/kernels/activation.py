"""The nonlinearities between a block's two products: SwiGLU and GeGLU (Shazeer 2020), and GELU (Hendrycks and Gimpel
2016) in its tanh approximation, SwiGLU and GELU each in one pass forward and one backward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.library import own, pick


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) · up, computed in fp32: […,2I] → […,I], the gate being the first half of the last dimension."""
    if pick("activation", gate_up) == "megalite":
        return torch.ops.megalite.swiglu(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GELU of x + bias, computed in fp32. `x` is […,D] and `bias` [D], of one dtype."""
    if pick("activation", x) == "megalite":
        return torch.ops.megalite.gelu(x, bias)
    return F.gelu(x if bias is None else x + bias, approximate="tanh")


def geglu(gate_up: Tensor) -> Tensor:
    """gelu(gate) · up: […,2I] → […,I], the gate being the first half of the last dimension."""
    gate, up = gate_up.chunk(2, -1)
    return gelu(gate) * up


def _register() -> None:
    ops = torch.ops.megalite

    @torch.library.register_fake("megalite::swiglu")
    def _(gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)

    @torch.library.register_fake("megalite::swiglu_backward")
    def _(grad: Tensor, gate_up: Tensor) -> Tensor:
        return gate_up.new_empty(gate_up.shape)

    @torch.library.register_fake("megalite::gelu")
    def _(x: Tensor, bias: Tensor | None) -> Tensor:
        return x.new_empty(x.shape)

    @torch.library.register_fake("megalite::gelu_backward")
    def _(grad: Tensor, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
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
