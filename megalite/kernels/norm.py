"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016) over the last dimension, alone
or fused with the residual addition before them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.kernels.library import added, own, pick


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> Tensor:
    """Return x / √(mean(x²) + `eps`) · (`unit` + weight), computed in fp32.

    `x` is […,D] and `weight` [D], of one dtype. `unit` is 1 for models that store the weight's
    difference from 1 (Gemma), else 0."""
    if function := added.get("rms_norm"):
        return function(x, weight, eps, unit)
    match pick("norm", x):
        case "megalite":
            return torch.ops.megalite.rms_norm(x, weight, eps, unit)[
                0
            ]  # [1] is rstd, for the backward pass
        case _ if unit:
            # In bf16, unit + weight would lose the weight's bits below 2⁻⁷ of the sum.
            wide = x if x.dtype == torch.float64 else x.float()
            scale = weight.to(wide.dtype) + unit
            return F.rms_norm(wide, weight.shape, scale, eps).to(x.dtype)
        case "apex":
            from apex.normalization.fused_layer_norm import fused_rms_norm_affine

            return fused_rms_norm_affine(x, weight, weight.shape, eps)
        case _:
            return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    unit: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(total), total) of total = `x` + `residual`, both […,D].

    `weight`, `eps` and `unit` are those of `rms_norm`. One kernel does both, which saves a pass
    over the stream."""
    if pick("norm", x) == "megalite":
        return torch.ops.megalite.add_rms_norm(x, residual, weight, eps, unit)[:2]
    # Rounded to the stream's dtype before it is normalised, as the fused kernel does: the same
    # bits.
    total = x + residual
    return rms_norm(total, weight, eps, unit), total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return (x - mean(x)) / √(var(x) + `eps`) · weight + bias, computed in fp32.

    `x` is […,D], `weight` and `bias` [D], all of one dtype."""
    if function := added.get("layer_norm"):
        return function(x, weight, bias, eps)
    match pick("norm", x):
        case "megalite":
            return torch.ops.megalite.layer_norm(x, weight, bias, eps)[
                0
            ]  # mean and rstd are for the backward pass
        case "apex":
            from apex.normalization.fused_layer_norm import fused_layer_norm_affine

            return fused_layer_norm_affine(x, weight, bias, weight.shape, eps)
        case _:
            return F.layer_norm(x, weight.shape, weight, bias, eps)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return (layer_norm(total), total) of total = `x` + `residual`, both […,D].

    `weight`, `bias` and `eps` are those of `layer_norm`."""
    if pick("norm", x) == "megalite":
        return torch.ops.megalite.add_layer_norm(x, residual, weight, bias, eps)[:2]
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def _row_statistic(x: Tensor) -> Tensor:
    """Return an empty fp32 tensor with one number a row, for a mean or for rstd = 1 / √(variance +
    eps)."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


# Below, fake kernels give torch.compile the shapes and dtypes of the results without computing
# them. The fused forms return the row statistics as well, which the backward kernels read instead
# of computing them again.


def _register_rms_norm() -> None:
    ops = torch.ops.megalite

    @torch.library.register_fake("megalite::rms_norm")
    def _(x: Tensor, weight: Tensor, eps: float, unit: float = 0.0) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), _row_statistic(x)

    @torch.library.register_fake("megalite::add_rms_norm")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        eps: float,
        unit: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # (norm, sum, rstd)
        return torch.empty_like(x), torch.empty_like(x), _row_statistic(x)

    @torch.library.register_fake("megalite::rms_norm_backward")
    def _(
        grad: Tensor,
        grad_sum: Tensor | None,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        unit: float = 0.0,
    ) -> tuple[Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, _, ctx.unit = inputs
        ctx.save_for_backward(x, weight, output[1])

    def backward(
        ctx: Any, grad: Tensor, grad_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor, None, None]:
        x, weight, rstd = ctx.saved_tensors
        grad_x, grad_weight = ops.rms_norm_backward(grad, None, x, weight, rstd, ctx.unit)
        return grad_x, grad_weight, None, None

    def keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, _, weight, _, ctx.unit = inputs
        _, total, rstd = output
        ctx.save_for_backward(total, weight, rstd)

    def backward_of_sum(
        ctx: Any,
        grad: Tensor,
        grad_sum: Tensor,
        grad_rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        total, weight, rstd = ctx.saved_tensors
        # `grad_sum` is what comes along the residual stream past the norm; the kernel adds it in.
        grad_x, grad_weight = ops.rms_norm_backward(grad, grad_sum, total, weight, rstd, ctx.unit)
        return grad_x, grad_x, grad_weight, None, None  # x and residual enter the sum alike

    torch.library.register_autograd("megalite::rms_norm", backward, setup_context=keep)
    torch.library.register_autograd(
        "megalite::add_rms_norm", backward_of_sum, setup_context=keep_sum
    )


def _register_layer_norm() -> None:
    """Register shapes and gradients of the layer norm, alone and behind an addition."""
    _register_layer_norm_shapes()
    ops = torch.ops.megalite

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, *_ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, weight, mean, rstd)

    def backward(
        ctx: Any, grad: Tensor, grad_mean: Tensor | None, grad_rstd: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ops.layer_norm_backward(grad, None, x, weight, mean, rstd)
        return grad_x, grad_weight, grad_bias, None

    def keep_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, _, weight, *_ = inputs
        _, total, mean, rstd = output
        ctx.save_for_backward(total, weight, mean, rstd)

    def backward_of_sum(
        ctx: Any,
        grad: Tensor,
        grad_sum: Tensor,
        grad_mean: Tensor | None,
        grad_rstd: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        total, weight, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = ops.layer_norm_backward(
            grad, grad_sum, total, weight, mean, rstd
        )
        return grad_x, grad_x, grad_weight, grad_bias, None  # x and residual enter the sum alike

    torch.library.register_autograd("megalite::layer_norm", backward, setup_context=keep)
    torch.library.register_autograd(
        "megalite::add_layer_norm", backward_of_sum, setup_context=keep_sum
    )


def _register_layer_norm_shapes() -> None:
    @torch.library.register_fake("megalite::layer_norm")
    def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), _row_statistic(x), _row_statistic(x)

    @torch.library.register_fake("megalite::add_layer_norm")
    def _(
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(x), _row_statistic(x), _row_statistic(x)

    @torch.library.register_fake("megalite::layer_norm_backward")
    def _(
        grad: Tensor,
        grad_sum: Tensor | None,
        x: Tensor,
        weight: Tensor,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)


if own():
    _register_rms_norm()
    _register_layer_norm()
