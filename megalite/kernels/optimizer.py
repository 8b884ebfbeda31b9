"""AdamW (Loshchilov and Hutter 2019) and the sum of squares behind a gradient's norm, over flat fp32 tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from megalite.kernels.library import own, pick


def adamw_(
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weights: Tensor | None,
    grad: Tensor,
    divisor: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    """One update in place, as torch.optim.AdamW does it; `step` counts from 1. The gradient is divided by `divisor`, a
    number on the device, on the way. `weights` are bf16 and get the new master weights, rounded: nothing has to read
    these again."""
    if pick("optimizer", master) == "megalite":
        torch.ops.megalite.adamw_(
            master, exp_avg, exp_avg_sq, weights, grad, divisor, lr, *betas, eps, weight_decay, step
        )
        return
    grad = grad / divisor
    exp_avg.lerp_(grad, 1 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - betas[1] ** step)).add_(eps)
    master.mul_(1 - lr * weight_decay).addcdiv_(exp_avg, denominator, value=-lr / (1 - betas[0] ** step))
    if weights is not None:
        weights.copy_(master)


def sum_of_squares(*flats: Tensor) -> Tensor:
    """fp64 [], of one or more tensors. In short runs, because on the CPU torch adds up a norm in fp32, one element
    after another: of 10 million it is off by up to 5e-4, by how much depends on the layout, and clipping passes that
    on to every weight."""
    if pick("optimizer", flats[0]) == "megalite":
        return torch.ops.megalite.sum_of_squares(flats)
    return torch.stack([_sum_of_squares(flat) for flat in flats]).sum()


def _sum_of_squares(flat: Tensor) -> Tensor:
    whole = flat.numel() // 256 * 256
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, 256), dim=1)
    return rows.double().square().sum() + torch.linalg.vector_norm(flat[whole:]).double().square()


def _register() -> None:
    @torch.library.register_fake("megalite::adamw_")
    def _(
        master: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        weights: Tensor | None,
        grad: Tensor,
        divisor: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
    ) -> None:
        return None

    @torch.library.register_fake("megalite::sum_of_squares")
    def _(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)


if own():
    _register()
