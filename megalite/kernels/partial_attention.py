"""Attention to some of the keys that a query attends to, with the log-sum-exp by which such results
are merged, and its gradients: torch's fused kernels of each device, called alike.

Letters in shapes: B batch, T queries, S keys, H heads, G key/value heads, K head size of queries
and keys, V of values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attend from q [B,H,T,K] to k [B,G,S,K] and v [B,G,S,V] where the bool `mask` [B or 1,1,T,S]
    is true. Returns the output [B,H,T,V] and the log-sum-exp [B,H,T] (fp32, or fp64 for fp64). A
    query with nothing to attend to gets 0 and -inf.

    `causal`, where T = S, leaves out the keys after a query. Scores are multiplied by `scale`; None
    means 1/√K."""
    if q.shape[-1] != v.shape[-1]:
        wide_q, wide_k, wide_v = _of_one_size(q, k, v)
        out, lse = attend(wide_q, wide_k, wide_v, causal, mask, scale or q.shape[-1] ** -0.5)
        return out[..., : v.shape[-1]], lse
    bias = None if mask is None else _bias(mask, q)
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=causal, attn_mask=bias, scale=scale
        )
    elif _flash_on_cuda(q, mask):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, is_causal=causal, scale=scale)[
            :2
        ]
    else:
        k, v = (_for_every_head(x, q) for x in (k, v))
        out, lse = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, True, is_causal=causal, scale=scale
        )[:2]
        lse = lse[:, :, : q.shape[2]]  # the kernel pads it to a multiple of 32
    # Kernels differ in what they return for empty rows, and none of it can be merged.
    if mask is not None:
        empty = ~mask.any(-1)
        out.masked_fill_(empty[..., None], 0.0)
        lse.masked_fill_(empty, -torch.inf)
    return out, lse


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    mask: Tensor | None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what these keys and values add to the gradients of q, k and v, from `grad`, that of
    the output. `out` and `lse` are those of the attention to ALL keys: a probability is exp(score -
    lse), and what normalises its gradient is the sum of out · grad (Dao 2023). `causal`, `mask` and
    `scale` are as in `attend`."""
    if q.shape[-1] != v.shape[-1]:
        wide_grad, wide_q, wide_k, wide_v, wide_out = _of_one_size(grad, q, k, v, out)
        scale = scale or q.shape[-1] ** -0.5
        grads = attend_backward(
            wide_grad, wide_q, wide_k, wide_v, wide_out, lse, causal, mask, scale
        )
        dq, dk, dv = (x[..., : like.shape[-1]] for x, like in zip(grads, (q, k, v), strict=True))
        return dq, dk, dv
    bias = None if mask is None else _bias(mask, q)
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, attn_mask=bias, scale=scale
        )
    # A slice of the queries is not contiguous, and these kernels do not check.
    lse = lse.contiguous()
    # the kernels ask for a dropout state; there is no dropout
    seed = offset = torch.zeros(2, dtype=torch.int64, device=q.device)
    if _flash_on_cuda(q, mask):
        return aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            k,
            v,
            out,
            lse,
            None,
            None,
            q.shape[2],
            k.shape[2],
            0.0,
            causal,
            seed,
            offset,
            scale=scale,
        )
    # Padded as the forward kernel leaves it.
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    many_k, many_v = (_for_every_head(x, q) for x in (k, v))
    wanted = [True, True, True, False]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, many_k, many_v, bias, out, lse, seed, offset, 0.0, wanted, causal, scale=scale
    )
    dk, dv = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _of_one_size(*tensors: Tensor) -> list[Tensor]:
    """Return tensors whose heads have one size, as these kernels need it: zeros behind the shorter
    heads change no score, and give outputs and gradients of 0."""
    size = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, size - x.shape[-1])) for x in tensors]


def _flash_on_cuda(q: Tensor, mask: Tensor | None) -> bool:
    """Return whether the flash kernel can be used: it takes neither masks nor fp32, which the
    "efficient" one does."""
    return mask is None and q.dtype in (torch.bfloat16, torch.float16)


def _for_every_head(x_BGSK: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values for every query head, [B,H,S,K]: the "efficient" kernel has no grouped
    queries."""
    return x_BGSK.repeat_interleave(q.shape[1] // x_BGSK.shape[1], dim=1)


def _bias(mask: Tensor, q: Tensor) -> Tensor:
    """Return the mask as a bias to add to the scores: [B,H,T,S], all heads sharing one memory, rows
    a multiple of 16 numbers apart as the CUDA kernel requires."""
    num_keys = mask.shape[-1]
    padded = q.new_zeros(*mask.shape[:-1], num_keys + -num_keys % 16)
    bias = padded[..., :num_keys].masked_fill_(~mask, -torch.inf)
    return bias.expand(q.shape[0], q.shape[1], -1, -1)
