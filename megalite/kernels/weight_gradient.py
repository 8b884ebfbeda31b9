"""The product that gives a weight its gradient, accumulated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.library import pick


def accumulate_weight_gradient(into: Tensor, grad: Tensor, x: Tensor, add: bool) -> None:
    """`into` [N,K] fp32 becomes, or with `add` grows by, gradᵀ x of `grad` [T,N] and `x` [T,K], of one dtype."""
    if x.is_cuda and x.dtype == torch.bfloat16:  # cuBLAS adds its fp32 sums to `into` without rounding them first
        if add:
            torch.addmm(into, grad.t(), x, torch.float32, out=into)
        else:
            torch.mm(grad.t(), x, torch.float32, out=into)
    elif pick("weight_gradient", x) == "megalite":
        torch.ops.megalite.weight_gradient_(into, grad, x, add)
    elif x.dtype == torch.float32:
        into.addmm_(grad.t(), x, beta=1.0 if add else 0.0)
    else:
        product = grad.t() @ x
        into.add_(product) if add else into.copy_(product)
