"""The AdamW update (Loshchilov and Hutter 2019), momentum, and the sum of squares of the gradient
norm, over flat fp32 tensors."""

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
    """Update `master`, `exp_avg` and `exp_avg_sq` in place by one step of AdamW, as
    torch.optim.AdamW does.

    All are flat fp32 tensors of one size, like `grad`. `weights`, if given, are the model's bf16
    weights and receive the new master weights, rounded, in the same pass. `factors` come from
    `adamw_factors`: a divisor that is not above 0 refuses the update and leaves everything as it
    is. `lr`, `betas`, `eps` and `weight_decay` are AdamW's; the decay is decoupled from the
    gradient."""
    if pick("optimizer", master) == "megalite":
        torch.ops.megalite.adamw_(
            master, exp_avg, exp_avg_sq, weights, grad, factors, lr, *betas, eps, weight_decay
        )
        return
    beta1, beta2 = betas
    divisor, correction1, correction2 = factors
    # With a divisor of 0 this is inf or NaN, which the `where` below keeps out.
    grad = grad / divisor
    average = exp_avg.lerp(grad, 1 - beta1)
    square = (exp_avg_sq * beta2).addcmul_(grad, grad, value=1 - beta2)
    # As torch does it: eps is added behind the bias correction.
    denominator = (square.sqrt() / correction2.sqrt()).add_(eps)
    value = (master * (1 - lr * weight_decay)).sub_(lr / correction1 * average / denominator)
    # A `where` on the device instead of an `if`: the host must not wait to learn whether the update
    # is refused.
    refused = divisor <= 0
    for old, new in ((exp_avg, average), (exp_avg_sq, square), (master, value)):
        old.copy_(torch.where(refused, old, new))
    if weights is not None:
        rounded = value.to(weights.dtype)
        weights.copy_(torch.where(refused, weights, rounded))


def momentum_(
    buffer: Tensor,
    grad: Tensor,
    divisor: Tensor,
    momentum: float,
    nesterov: bool,
    out_dtype: torch.dtype,
) -> Tensor:
    """Average `grad`, divided by `divisor` (fp32 []), into `buffer` with decay `momentum`, in
    place.

    Returns what an update takes, in `out_dtype`, fp32 or bf16: the buffer, or with `nesterov` its
    average with the gradient. A divisor that is not above 0 leaves the buffer as it is, and gives
    zeros."""
    if pick("optimizer", buffer) == "megalite":
        return torch.ops.megalite.momentum_(buffer, grad, divisor, momentum, nesterov, out_dtype)
    grad = grad / divisor
    average = buffer.lerp(grad, 1 - momentum)
    refused = divisor <= 0
    buffer.copy_(torch.where(refused, buffer, average))
    # Zeros, so that what travels to the owners of matrices is finite even in a refused step.
    out = grad.lerp(average, momentum) if nesterov else average
    return torch.where(refused, 0.0, out).to(out_dtype)


def decayed_step_(
    master: Tensor,
    weights: Tensor | None,
    step: Tensor,
    divisor: Tensor,
    lr: float,
    weight_decay: float,
) -> None:
    """Subtract lr · (`step` + `weight_decay` · `master`) from `master`, in place, and give bf16
    `weights` the result. `step` is fp32 or bf16.

    A `divisor` (fp32 []) that is not above 0 leaves everything as it is."""
    if pick("optimizer", master) == "megalite":
        torch.ops.megalite.decayed_step_(master, weights, step, divisor, lr, weight_decay)
        return
    value = (master * (1 - lr * weight_decay)).sub_(step, alpha=lr)
    refused = divisor <= 0
    master.copy_(torch.where(refused, master, value))
    if weights is not None:
        weights.copy_(torch.where(refused, weights, value.to(weights.dtype)))


def adamw_factors(divisor: Tensor, step: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return the `factors` of `adamw_`, [3] on the device: `divisor` and the two bias corrections 1
    - beta^step.

    `divisor` [] divides the gradient. `step` (fp64 []) counts the updates made, the coming one
    included; `betas` are AdamW's."""
    # In fp64: beta2 is so near to 1 that fp32 would lose digits of the difference in early steps.
    corrections = [1 - beta**step for beta in betas]
    return torch.stack([divisor.double(), *corrections]).to(divisor.dtype)


def sum_of_squares(*flats: Tensor) -> Tensor:
    """Return the sum of squares of all elements of the tensors `flats`, fp64 [].

    torch's own norm on the CPU adds fp32 squares one after another: over 10 million elements it is
    off by up to 5e-4, by an amount that depends on the layout, and gradient clipping would pass
    that on to every weight."""
    if pick("optimizer", flats[0]) == "megalite":
        return torch.ops.megalite.sum_of_squares(flats)
    return torch.stack([_sum_of_squares(flat) for flat in flats]).sum()


def _sum_of_squares(flat: Tensor) -> Tensor:
    # Runs of 256 are short enough for fp32; they are added up in fp64.
    whole = flat.numel() // 256 * 256
    rows = flat[:whole].view(-1, 256)
    norms = torch.linalg.vector_norm(rows, dim=1).double()
    rest = torch.linalg.vector_norm(flat[whole:]).double()
    return norms.square().sum() + rest.square()


def _register() -> None:
    # Fake kernels give torch.compile the shapes and dtypes of the results without computing them.

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

    @torch.library.register_fake("megalite::momentum_")
    def _(
        buffer: Tensor,
        grad: Tensor,
        divisor: Tensor,
        momentum: float,
        nesterov: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        return torch.empty_like(buffer, dtype=out_dtype)

    @torch.library.register_fake("megalite::decayed_step_")
    def _(
        master: Tensor,
        weights: Tensor | None,
        step: Tensor,
        divisor: Tensor,
        lr: float,
        weight_decay: float,
    ) -> None:
        return None

    @torch.library.register_fake("megalite::sum_of_squares")
    def _(tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0].new_empty((), dtype=torch.float64)


if own():
    _register()
