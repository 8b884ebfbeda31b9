"""Products of fp8 codes with their scales, as GPUs have them (torch.nn.functional.scaled_mm): which
chips take which recipes, and in what layout cuBLAS wants their scales.

    recipe      scales of A [M,K] and B [N,K]                                        compute capability
    current     one number each                                                      8.9 and above
    rowwise     [M,1] and [1,N]                                                      8.9 and above
    blockwise   [M,K/128], column by column; of squares [N/128,K/128], whose rows    9.0
                are padded to fours
    mxfp8       e8m0, in tiles of 128 × 4                                            10.0 and above

Both matrices lie row by row, so that a product's sum runs along what is contiguous in each: B is
handed over transposed, column by column. On a CPU torch takes other layouts, and lacks blocks:
`check_layout` holds them to the rules of a GPU on any device.

Letters in shapes: M, N rows of the operands, K numbers of the sum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from megalite.kernels.fp8 import Name, Rounded

CUDA_OF_BLOCKS = (12, 9)
"""CUDA whose cuBLAS has blocks of 128."""


def takes(name: Name, x: Tensor) -> bool:
    """Return whether the chip that `x` is on multiplies codes of this recipe, in the dtype of `x`."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or torch.version.cuda is None:
        return False
    if not chip_takes(name, torch.cuda.get_device_capability(x.device)):
        return False
    version = tuple(map(int, torch.version.cuda.split(".")[:2]))
    return name != "blockwise" or version >= CUDA_OF_BLOCKS


def chip_takes(name: Name, capability: tuple[int, int]) -> bool:
    """Return whether chips of a compute capability multiply codes of this recipe."""
    if name == "nvfp4":  # studied, in torch
        return False
    if name == "blockwise":
        return capability == (9, 0)
    return capability >= ((10, 0) if name == "mxfp8" else (8, 9))


def scaled_product(
    a: Rounded, b: Rounded, dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Return A · Bᵀ + bias in `dtype`: [M,K] and [N,K] → [M,N]. Both are of one recipe."""
    check_layout(a, b)
    swizzle = F.SwizzleType.SWIZZLE_32_4_4 if a.recipe == "mxfp8" else None
    return F.scaled_mm(
        a.codes,
        b.codes.t(),
        scales_of(a),
        scaling_of(a),
        scales_of(b, second=True),
        scaling_of(b),
        swizzle,
        swizzle,
        bias=bias,
        output_dtype=dtype,
    )


def check_layout(a: Rounded, b: Rounded) -> None:
    """Raise ValueError for operands that a GPU would refuse, or take as others."""
    for name, matrix in (("a", a.codes), ("b", b.codes)):
        if not matrix.is_contiguous():
            raise ValueError(
                f"scaled_product: {name} has strides {matrix.stride()}, but must lie row by row"
            )
        if matrix.shape[1] % 16:
            raise ValueError(
                f"scaled_product: {name} has {matrix.shape[1]} columns, which must be a multiple of 16"
            )
    if a.codes.shape[1] != b.codes.shape[1]:
        raise ValueError(f"scaled_product: {a.codes.shape[1]} and {b.codes.shape[1]} columns")
    if b.codes.shape[0] % 16:
        raise ValueError(
            f"scaled_product: b has {b.codes.shape[0]} rows, which must be a multiple of 16"
        )
    if a.codes.dtype == b.codes.dtype == torch.float8_e5m2:
        raise ValueError("scaled_product: one of the operands must be e4m3")


def scales_of(x: Rounded, second: bool = False) -> Tensor:
    """Return the scales of an operand as cuBLAS wants them, of the `second` one where it is that."""
    if x.recipe == "current":
        return x.scales.reshape(())
    if x.recipe == "rowwise":
        return x.scales.t().contiguous() if second else x.scales
    if x.recipe == "mxfp8":
        return _in_tiles(x.scales.to(torch.float8_e8m0fnu))
    if x.block[0] > 1:
        # The rows of scales of squares are padded, and handed over as columns.
        return F.pad(x.scales, (0, -x.scales.shape[1] % 4)).t()
    return x.scales.t().contiguous().t()


def scaling_of(x: Rounded) -> Any:
    """Return torch's name of how an operand is scaled."""
    types = F.ScalingType
    if x.recipe == "blockwise":
        return types.BlockWise128x128 if x.block[0] > 1 else types.BlockWise1x128
    each = {"current": types.TensorWise, "rowwise": types.RowWise, "mxfp8": types.BlockWise1x32}
    return each[x.recipe]


def _in_tiles(scales: Tensor) -> Tensor:
    """Return scales [M,C] in tiles of 128 rows and 4 columns, one after another along the columns
    and padded with zeros. Inside of a tile, rows 32 apart lie side by side: flat."""
    rows, columns = scales.shape
    raw = F.pad(scales.view(torch.uint8), (0, -columns % 4, 0, -rows % 128))
    tiles = raw.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32))
    # [tiles down, 4, 32, tiles across, 4] → [tiles down, tiles across, 32, 4, 4]
    return tiles.permute(0, 3, 2, 1, 4).contiguous().flatten().view(scales.dtype)
