"""AdamW (Loshchilov and Hutter 2019) and the sum of squares behind a gradient's norm, over flat fp32 tensors."""

from __future__ import annotations

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
    factors: Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One update in place, as torch.optim.AdamW does it. `factors` are those of `adamw_factors`: where their divisor is
    not above 0, everything stays as it is. `weights` are bf16 and get the new master weights, rounded: nothing has to
    read these again."""
    if pick("optimizer", master) == "megalite":
        torch.ops.megalite.adamw_(master, exp_avg, exp_avg_sq, weights, grad, factors, lr, *betas, eps, weight_decay)
        return
    divisor, correction1, correction2 = factors
    grad = grad / divisor
    average = exp_avg.lerp(grad, 1 - betas[0])
    square = (exp_avg_sq * betas[1]).addcmul_(grad, grad, value=1 - betas[1])
    denominator = (square.sqrt() / correction2.sqrt()).add_(eps)
    value = (master * (1 - lr * weight_decay)).sub_(lr / correction1 * average / denominator)
    refused = divisor <= 0
    for old, new in ((exp_avg, average), (exp_avg_sq, square), (master, value)):
        old.copy_(torch.where(refused, old, new))
    if weights is not None:
        weights.copy_(torch.where(refused, weights, value.to(weights.dtype)))


def adamw_factors(divisor: Tensor, step: Tensor, betas: tuple[float, float]) -> Tensor:
    """What `adamw_` divides by, [3] on the device: the gradient by `divisor`, [], and both moments for being sums of
    `step` terms only, fp64 []. The step now taken counts."""
    corrections = [1 - beta**step for beta in betas]
    return torch.stack([divisor.double(), *corrections]).to(divisor.dtype)


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
        factors: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
    ) -> None:
        return None

    @torch.library.register_fake("megalite::sum_of_squares")
    def _(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)


if own():
    _register()
