"""Selects the implementation of each fused operation: megalite's own kernels (`csrc/ops`), plain
torch, an installed library such as flash_attn, or what a plugin has registered
(`registry.kernels`).

`use` takes the `kernels:` section of the config once, before a model runs; `pick` answers for a
given tensor. The plain torch version of every operation is its reference. It also serves where the
kernels are not built, for dtypes they do not take, and for attention with soft-capping
(`attention.AttentionKind`).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from megalite.config import KernelsConfig, implementations
from megalite.errors import ConfigError
from megalite.registry import kernels

OPERATIONS = tuple(KernelsConfig.model_fields)
FUNCTIONS = {
    "norm": ("rms_norm", "layer_norm"),
    "rope": ("rotate",),
    "activation": ("swiglu", "gelu"),
    "attention": ("self_attention", "attention"),
    "loss": ("cross_entropy_forward", "cross_entropy_backward_"),
    "weight_gradient": ("accumulate_weight_gradient",),
}
"""Functions of `megalite.kernels` that a plugin can stand for, by operation. A plugin that updates
weights is an optimizer (`megalite.engine.optimizers`)."""
CPU_ONLY = ("attention", "weight_gradient")
"""Operations that megalite has no CUDA kernel for; torch computes them on a GPU."""

# Of the process, not of a model: kernels are called from deep inside modules that hold no config.
_wishes = KernelsConfig()
_assumed = False
added: dict[str, Callable[..., Any]] = {}
"""Functions of plugins that `use` has chosen, by the name of the one here that each stands for, and
whose signature it has."""


def use(wishes: KernelsConfig, deterministic: bool = False) -> None:
    """Choose implementations for this process, `deterministic` ones where torch has others as well.

    Raises ConfigError for kernels that are not built, for a library that is not installed, and for
    a plugin's that has no function of its operation."""
    global _wishes
    for operation in OPERATIONS:
        wish = getattr(wishes, operation)
        if wish == "megalite" and own() is None:
            raise ConfigError(f"kernels.{operation} is megalite, but {why_not_built()}")
        # Looked for, not imported: that happens where it is first used.
        packages = ("flash_attn", "flash_attn_interface") if wish == "flash_attn" else (wish,)
        if wish in ("apex", "flash_attn") and not any(map(importlib.util.find_spec, packages)):
            raise ConfigError(
                f"kernels.{operation} is {wish}, but {wish} is not installed here; auto takes what there is"
            )
    if own() is None and any(getattr(wishes, operation) == "auto" for operation in OPERATIONS):
        _warn_once()
    # What is none of an operation's built-in names must be a plugin's.
    chosen = {operation: getattr(wishes, operation) for operation in OPERATIONS}
    found: dict[str, Callable[..., Any]] = {}
    for operation, wish in chosen.items():
        if wish in implementations(operation):
            continue
        part, functions = kernels.get(f"{operation}.{wish}"), FUNCTIONS.get(operation, ())
        # It need not have all functions of an operation: megalite computes the others.
        there = {name: getattr(part, name) for name in functions if hasattr(part, name)}
        found |= there
        if not there:
            raise ConfigError(
                f"kernels.{operation} is {wish}, but what its plugin registers has none of the functions "
                f"that it could stand for: {', '.join(functions) or 'there are none'}"
            )
    # Asked first, since it imports the compiler.
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # Only now, when nothing can fail any more: a refused section leaves the old choice.
    _wishes = wishes
    added.clear()
    added.update(found)


def pick(operation: str, x: Tensor) -> str:
    """Return which implementation computes `operation` on `x`: `megalite`, `torch`, or a library's
    name."""
    wish = getattr(_wishes, operation)
    # "megalite" is a wish and no command: dtypes and devices that its kernels do not take go to
    # torch.
    if wish not in ("auto", "megalite"):
        return wish
    return "megalite" if _takes(operation, x.device.type, x.dtype) else "torch"


def explain(operation: str, device: str) -> tuple[str, str]:
    """Return (implementation, reason) of `operation` for fp32 and bf16 tensors of a `device` type,
    for a person."""
    wish = getattr(_wishes, operation)
    if wish not in ("auto", "megalite"):
        return wish, f"kernels.{operation} asks for it"
    if _takes(operation, device, torch.float32):
        isa = f", runs with {own().isa()}" if device == "cpu" else ""  # type: ignore[union-attr]
        return "megalite", f"built{isa}"
    if operation == "attention" and device == "cuda" and torch.cuda.is_available():
        return "torch", _attention_on(torch.cuda.get_device_capability())
    if operation in CPU_ONLY and device != "cpu":
        return "torch", f"megalite's own {operation} is for the CPU"
    return "torch", why_not_built() if own() is None else "built without CUDA"


def _attention_on(capability: tuple[int, int]) -> str:
    """Say which of torch's kernels computes attention on a GPU of this compute capability, and
    why."""
    from megalite.kernels.attention_on_gpus import CUDNN_IS_QUICKER, prefers_cudnn

    quick = " and ".join(f"{major}.x" for major in CUDNN_IS_QUICKER)
    if prefers_cudnn(capability, deterministic=False):
        return (
            f"cuDNN's, as on compute capability {quick}; "
            "FlashAttention 2 for windows, documents, train.deterministic"
        )
    return f"FlashAttention 2; cuDNN's is for compute capability {quick}"


@functools.cache
def own() -> ModuleType | None:
    """Return the compiled module, or None where it was not built or does not fit the installed
    torch."""
    try:
        # Importing it registers the operators under torch.ops.megalite.
        return importlib.import_module("megalite._ops")
    except ImportError:
        return None


def why_not_built() -> str:
    """Say why `own()` is None, and what to do about it."""
    try:
        importlib.import_module("megalite._ops")
    except ModuleNotFoundError:
        return (
            "megalite's kernels are not built: install a C++ compiler, then megalite again with "
            "pip install --no-build-isolation"
        )
    except ImportError as error:
        return f"megalite's kernels do not fit this torch and must be built again: {error}"
    return "they are built"


@functools.cache
def _warn_once() -> None:
    warnings.warn(f"{why_not_built()}. Plain torch computes instead, more slowly.", stacklevel=3)


def tell_compiler() -> None:
    """Mark the choice of implementation as constant for torch.compile. Call it before compiling
    anything.

    This is not a decorator on `_takes`, because that would import torch's compiler, which takes a
    second of every process."""
    torch.compiler.assume_constant_result(_takes)


def assume_built() -> None:
    """Choose from now on as if every kernel were built for GPUs: a dry run asks for shapes alone."""
    global _assumed
    _assumed = True


def _takes(operation: str, device: str, dtype: torch.dtype) -> bool:
    if _assumed:
        return device == "cpu" or operation not in CPU_ONLY
    module = own()
    # What is no floating point are numbers of experts.
    if module is None or (dtype.is_floating_point and dtype not in (torch.float32, torch.bfloat16)):
        return False
    return device == "cpu" or (
        device == "cuda" and bool(module.has_cuda) and operation not in CPU_ONLY
    )
