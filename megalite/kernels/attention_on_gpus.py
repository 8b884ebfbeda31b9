"""Which kernels compute attention on GPUs: torch's fused ones in their order, its variable-length
attention for windows and packed documents, or the package flash_attn.

Letters in shapes are those of `kernels.attention`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from megalite.kernels.attention_kinds import AttentionKind

CUDNN_IS_QUICKER = (9, 10)
"""Major compute capabilities, of Hopper and Blackwell, whose asynchronous products cuDNN's
attention uses and FlashAttention 2 does not: on an H100 the latter reaches 35% of the peak, the
former more than half (Shah et al. 2024)."""


LARGEST_FLASH_HEAD = 256
"""Largest head size that flash attention takes."""


def prefers_cudnn(capability: tuple[int, int], deterministic: bool) -> bool:
    """Return whether cuDNN's kernel comes before FlashAttention 2 for unmasked attention on a GPU:
    the rule by which torch's are chosen. It has no `deterministic` backward pass; tensors that it
    does not take go to the next."""
    return capability[0] in CUDNN_IS_QUICKER and not deterministic


def sdpa_backends(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which torch chooses by `prefers_cudnn`, whatever its version prefers."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    capability, deterministic = (
        torch.cuda.get_device_capability(device),
        torch.are_deterministic_algorithms_enabled(),
    )
    first = [SDPBackend.CUDNN_ATTENTION] if prefers_cudnn(capability, deterministic) else []
    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    return sdpa_kernel([*first, *others], set_priority=True)


def takes_varlen(q_BTHK: Tensor, v_BSGV: Tensor) -> bool:
    """Return whether torch's variable-length attention (its build of flash attention) computes such
    queries and values. It takes windows and documents without a mask, and looks at nothing that a
    query does not attend to."""
    size = q_BTHK.shape[-1]
    fits = (
        q_BTHK.dtype in (torch.bfloat16, torch.float16)
        and size == v_BSGV.shape[-1]
        and size % 8 == 0
    )
    if q_BTHK.device.type != "cuda" or not fits or size > LARGEST_FLASH_HEAD or not _has_varlen():
        return False
    return torch.cuda.get_device_capability(q_BTHK.device) >= (8, 0)


@functools.cache
def _has_varlen() -> bool:
    """Return whether this torch has variable-length attention with windows and grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa"} <= inspect.signature(
        varlen_attn
    ).parameters.keys()


def varlen_attention(
    q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, document_BT: Tensor | None, kind: AttentionKind
) -> Tensor:
    from torch.nn.attention import varlen

    batch, length = q_BTHK.shape[:2]
    if document_BT is None:
        # Each row is one sequence: only its window asks for this kernel.
        ends = torch.arange(
            0, (batch + 1) * length, length, dtype=torch.int32, device=q_BTHK.device
        )
    else:
        ends = _document_ends(document_BT)
    # -1: as many as there are, in flash attention's convention.
    before = -1 if kind.window is None else kind.window - 1
    # The tokens of all rows in one sequence, [B · T, heads, K].
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    out: Any = varlen.varlen_attn(
        q, k, v, ends, ends, length, length, scale=kind.scale, window_size=(before, 0 if kind.causal else before),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.view(batch, length, -1)


def flash_attention(
    q_BTHK: Tensor,
    k_BTGK: Tensor,
    v_BTGK: Tensor,
    document_BT: Tensor | None,
    kind: AttentionKind,
) -> Tensor:
    module = _flash_package(q_BTHK.device)
    # What is not asked for keeps the default of flash_attn.
    options: dict[str, Any] = {"causal": kind.causal}
    if kind.scale is not None:
        options["softmax_scale"] = kind.scale
    if kind.window is not None:
        # Tokens before and after.
        options["window_size"] = (
            kind.window - 1,
            0 if kind.causal else kind.window - 1,
        )
    if kind.softcap is not None:
        options["softcap"] = kind.softcap
    if torch.are_deterministic_algorithms_enabled():
        options["deterministic"] = True
    if document_BT is None:
        # Takes [B, T, heads, K] with grouped queries as they are.
        return _first(module.flash_attn_func(q_BTHK, k_BTGK, v_BTGK, **options)).flatten(2)
    batch, length = document_BT.shape
    ends = _document_ends(document_BT)
    # "varlen" wants the tokens of all rows in one sequence [B · T, heads, K], cut at `ends`.
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BTGK, v_BTGK))
    # No document is longer than a row: `length` is a bound that needs no wait for the device.
    out = _first(module.flash_attn_varlen_func(q, k, v, ends, ends, length, length, **options))
    return out.view(batch, length, -1)


def _flash_package(device: torch.device) -> Any:
    """Return FlashAttention 3, a package of its own, on Hopper where it is installed; otherwise
    FlashAttention 2."""
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    if importlib.util.find_spec("flash_attn") is None or (
        hopper and importlib.util.find_spec("flash_attn_interface")
    ):
        return importlib.import_module("flash_attn_interface")
    return importlib.import_module("flash_attn")


def _first(found: Any) -> Tensor:
    """Return the output: some versions of FlashAttention 3 return the log-sum-exp with it."""
    return found[0] if isinstance(found, tuple) else found


# Weak keys: an entry goes with its micro-batch.
_ends_of_documents = WeakIdKeyDictionary()


def _document_ends(document_BT: Tensor) -> Tensor:
    """Return the cumulative document lengths [documents + 1] int32, from 0, of the batch's rows
    laid end to end (cu_seqlens). All layers of a micro-batch get the same tensor.

    Where the host does not know the documents (`note_documents`), it waits for the device to learn
    how many there are: kernels start as many sequences as this tensor is long, so padding it to B·T
    would cost more than the wait."""
    if document_BT not in _ends_of_documents:
        _ends_of_documents[document_BT] = _find_ends(document_BT)
    return _ends_of_documents[document_BT]


def note_documents(document_BT: Tensor, on_host_BT: Tensor) -> None:
    """Note where documents end, from the same numbers on the host, so that it need not ask the
    device of `document_BT` for them."""
    if document_BT.device.type == "cuda":
        # From pageable memory the copy would wait for the device, even with non_blocking.
        ends = _find_ends(on_host_BT).pin_memory()
        _ends_of_documents[document_BT] = ends.to(document_BT.device, non_blocking=True)


def _find_ends(document_BT: Tensor) -> Tensor:
    # The first token of a row begins a document, whatever number the row before ended with.
    begins = torch.ones_like(document_BT, dtype=torch.bool)
    begins[:, 1:] = document_BT[:, 1:] != document_BT[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    return F.pad(starts, (0, 1), value=document_BT.numel()).int()
