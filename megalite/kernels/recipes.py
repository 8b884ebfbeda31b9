"""The recipes of `train.fp8` by name."""

from megalite.config import FP8_BLOCK
from megalite.kernels.fp8 import E5M2, Name, Recipe
from megalite.kernels.nvfp4 import LENGTH, Nvfp4

RECIPES: dict[Name, Recipe] = {
    "current": Recipe("current", None, rows=None, weight_rows=None, gradients=E5M2),
    "rowwise": Recipe("rowwise", None),
    "blockwise": Recipe("blockwise", FP8_BLOCK, weight_rows=FP8_BLOCK, multiple=FP8_BLOCK),
    "mxfp8": Recipe("mxfp8", 32, multiple=32),
    "nvfp4": Nvfp4("nvfp4", LENGTH, weight_rows=LENGTH, multiple=LENGTH),
}
