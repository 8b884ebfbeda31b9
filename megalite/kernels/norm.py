"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) over the last dimension, with the addition to the
residual stream before it in the same pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.library import own, pick


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> Tensor:
    """x / √(mean(x²) + eps) · (unit + weight), computed in fp32. `x` is […,D] and `weight` [D], of one dtype."""
    match pick("norm", x):
        case "megalite":
            return torch.ops.megalite.rms_norm(x, weight, eps, unit)[0]
        case _ if unit:  # in bf16 the sum would lose what the weight has below 2⁻⁷ of it
            wide = x if x.dtype == torch.float64 else x.float()
            return F.rms_norm(wide, weight.shape, weight.to(wide.dtype) + unit, eps).to(x.dtype)
        case "apex":
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return fused_rms_norm_affine(x, weight, weight.shape, eps)
        case _:
            return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> tuple[Tensor, Tensor]:
    """(rms_norm(sum), sum) of sum = x + residual."""
    if pick("norm", x) == "megalite":
        return torch.ops.megalite.add_rms_norm(x, residual, weight, eps, unit)[:2]
    total = x + residual
    return rms_norm(total, weight, eps, unit), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean(x)) / √(var(x) + eps) · weight + bias, computed in fp32. `x` is […,D], `weight` and `bias` [D], of one
    dtype."""
    match pick("norm", x):
        case "megalite":
            return torch.ops.megalite.layer_norm(x, weight, bias, eps)[0]
        case "apex":
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            return fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
        case _:
            return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(layer_norm(sum), sum) of sum = x + residual."""
    if pick("norm", x) == "megalite":
        return torch.ops.megalite.add_layer_norm(x, residual, weight, bias, eps)[:2]
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def _of_rows(x: Tensor) -> Tensor:
    """One fp32 number a row: a mean, or 1 / √(variance + eps)."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _register_rms_norm() -> None:
    ops = torch.ops.megalite

    @torch.library.register_fake("megalite::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), _of_rows(x)

    @torch.library.register_fake("megalite::add_rms_norm")
    def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x), _of_rows(x)

    @torch.library.register_fake("megalite::rms_norm_backward")
    def _(
        grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, unit: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.unit = inputs
        ctx.save_for_backward(x, weight, output[1])

    def backward(ctx: Any, grad: Tensor, grad_rstd: Tensor | None) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        return *ops.rms_norm_backward(grad, None, x, weight, rstd, ctx.unit), None, None

    def keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.unit = inputs[4]
        ctx.save_for_backward(output[1], inputs[2], output[2])

    def backward_of_sum(
        ctx: Any, grad: Tensor, grad_sum: Tensor, grad_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        total, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ops.rms_norm_backward(grad, grad_sum, total, weight, rstd, ctx.unit)
        return grad_x, grad_x, grad_weight, None, None

    torch.library.register_autograd("megalite::rms_norm", backward, setup_context=keep)
    torch.library.register_autograd("megalite::add_rms_norm", backward_of_sum, setup_context=keep_sum)


def _register_layer_norm() -> None:
    ops = torch.ops.megalite

    @torch.library.register_fake("megalite::layer_norm")
    def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), _of_rows(x), _of_rows(x)

    @torch.library.register_fake("megalite::add_layer_norm")
    def _(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x), _of_rows(x), _of_rows(x)

    @torch.library.register_fake("megalite::layer_norm_backward")
    def _(
        grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:2], *output[1:])

    def backward(
        ctx: Any, grad: Tensor, grad_mean: Tensor | None, grad_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        return *ops.layer_norm_backward(grad, None, *ctx.saved_tensors), None

    def keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(output[1], inputs[2], *output[2:])

    def backward_of_sum(
        ctx: Any, grad: Tensor, grad_sum: Tensor, grad_mean: Tensor | None, grad_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        grad_x, *of_parameters = ops.layer_norm_backward(grad, grad_sum, *ctx.saved_tensors)
        return grad_x, grad_x, *of_parameters, None

    torch.library.register_autograd("megalite::layer_norm", backward, setup_context=keep)
    torch.library.register_autograd("megalite::add_layer_norm", backward_of_sum, setup_context=keep_sum)


if own():
    _register_rms_norm()
    _register_layer_norm()
