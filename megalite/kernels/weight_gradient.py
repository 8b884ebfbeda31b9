"""The weight-gradient GEMM, accumulated in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.kernels.library import added, pick


def accumulate_weight_gradient(into: Tensor, grad: Tensor, x: Tensor, add: bool) -> None:
    """Write gradᵀ x to `into`, or accumulate it there with `add`.

    `into` is the fp32 gradient [N,K] of a weight, `grad` [T,N] that of the layer's output and `x` [T,K] the layer's
    input, both of one dtype."""
    if function := added("weight_gradient", "accumulate_weight_gradient"):
        function(into, grad, x, add)
    elif x.is_cuda and x.dtype == torch.bfloat16:
        # cuBLAS adds its fp32 accumulators to `into` directly; a bf16 product would be rounded first.
        if add:
            torch.addmm(into, grad.t(), x, torch.float32, out=into)
        else:
            torch.mm(grad.t(), x, torch.float32, out=into)
    elif pick("weight_gradient", x) == "megalite":
        torch.ops.megalite.weight_gradient_(into, grad, x, add)
    elif x.dtype == torch.float32:
        into.addmm_(grad.t(), x, beta=1.0 if add else 0.0)
    else:  # the product is rounded to bf16 before it is accumulated in fp32
        product = grad.t() @ x
        into.add_(product) if add else into.copy_(product)
