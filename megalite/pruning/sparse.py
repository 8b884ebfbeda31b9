"""Sets single weights of the matrices to 0: those of the least size (Han et al. 2015), of the least
size times that of their inputs (Wanda, Sun et al. 2024), or those that cost least when the columns
behind make up for them (SparseGPT, Frantar and Alistarh 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megalite.checkpoint.convert import Model, open_source
from megalite.errors import ConfigError
from megalite.models.weights import Weight
from megalite.quantization.gptq import BLOCK, column_by_column, inverse_factor
from megalite.quantization.layers import LayerRuns
from megalite.quantization.matrices import MatrixChanges, Report

METHODS = ("magnitude", "wanda", "sparsegpt")
GATES = ("router.weight", "shared_gate.weight")
"""Ends of the names of matrices that stay whole."""


@dataclass(frozen=True)
class Sparsity:
    """How many weights are set to 0."""

    share: float
    """Share of those that are compared with each other."""
    of: int | None = None
    """Neighbours within a row that are compared with each other; None: as the method says."""

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """Return what "0.5" or "2:4" (2 of every 4 stay) says. Raises ConfigError."""
        try:
            kept, colon, group = text.partition(":")
            if not colon:
                found = cls(float(text))
            else:
                found = cls(1 - int(kept) / int(group), int(group))
        except (ValueError, ZeroDivisionError):
            raise ConfigError(f"--sparsity {text!r} is no share such as 0.5, and no 2:4") from None
        if not 0 < found.share < 1:
            raise ConfigError(f"--sparsity {text}: the share that is set to 0 is between 0 and 1")
        if found.of is not None and (found.of < 2 or BLOCK % found.of):
            raise ConfigError(f"--sparsity {text}: the neighbours must divide {BLOCK}")
        return found

    def mask(self, scores: Tensor) -> Tensor:
        """Return where the lowest of `scores` [N,K] are, of the whole or of the neighbours: bool
        [N,K]."""
        if self.of is None:
            groups = scores.flatten()[None]
        else:
            groups = scores.unflatten(1, (-1, self.of))
        # Rounded once for a group, so that each has the same number of zeros, as 2:4 must have.
        count = round(self.share * groups.shape[-1])
        return lowest(groups, count).view(scores.shape)


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return where the `count` lowest of the last dimension are, the first of equal ones; bool."""
    # Stable, and no threshold: of many equal scores exactly `count` are taken.
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def magnitude(weight: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight` [N,K] without its smallest elements, of the matrix or of their
    neighbours."""
    return weight.masked_fill(sparsity.mask(weight.abs()), 0.0)


def wanda(weight: Tensor, inputs: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight` [N,K] without the elements of the lowest |W|·‖x‖₂, of their row or of their
    neighbours. `inputs` [K,K] is the sum of x xᵀ over the inputs."""
    # (Σ x xᵀ)ₖₖ is the square of the length of input feature k over all tokens.
    lengths = inputs.diagonal().sqrt().float()
    # Without any input, as of an expert that no token has visited, the size alone decides.
    scores = weight.abs() * (lengths if lengths.any() else 1.0)
    if sparsity.of is None:
        return weight.masked_fill(lowest(scores, round(sparsity.share * scores.shape[1])), 0.0)
    return weight.masked_fill(sparsity.mask(scores), 0.0)


def sparsegpt(weight: Tensor, inputs: Tensor, sparsity: Sparsity) -> Tensor:
    """Return `weight` [N,K] without the elements that cost least, w² / [H⁻¹]ₖₖ with H of the columns
    from k on, which make up for them: of a block of columns, chosen as it begins, or of their
    neighbours. `inputs` is as in `wanda`."""
    rest, factor = weight.clone(), inverse_factor(inputs)
    pruned, removed = torch.empty_like(weight), torch.empty_like(weight, dtype=torch.bool)
    width = sparsity.of or BLOCK

    def settle(column: int) -> Tensor:
        # At the first of a group all before it are settled, and `rest` has what makes up for them.
        if column % width == 0:
            here = slice(column, column + width)
            # The factor's diagonal squared is [H⁻¹]ₖₖ without the columns before k.
            costs = rest[:, here].square() / factor.diagonal()[here].square()
            removed[:, here] = sparsity.mask(costs)
        kept = rest[:, column].masked_fill(removed[:, column], 0.0)
        pruned[:, column] = kept
        return kept[:, None]

    column_by_column(rest, factor, settle)
    return pruned


class SparsePruner(MatrixChanges):
    """Gives the tensors to write for each weight, in the order of the table."""

    def __init__(
        self, model: Model, sparsity: Sparsity, method: str, runs: LayerRuns | None = None
    ):
        """`method` is one of METHODS; all but magnitude need `runs`, which give the inputs of the
        matrices. Raises ConfigError for a model or a matrix that cannot be pruned so."""
        if method != "magnitude" and runs is None:
            raise ConfigError(f"--method {method} needs inputs of the matrices: give --data")
        super().__init__(model, runs)
        self.sparsity, self.method = sparsity, method
        for weight in self.matrices:
            # A row must be what one output takes from its inputs, and a tensor one matrix.
            if weight.transpose or (weight.stack and len(weight.hf) != len(weight.row_groups)):
                raise ConfigError(
                    f"{weight.name}: single weights of matrices stored as [in, out], or of all experts in one tensor, "
                    "are not pruned here"
                )
            (columns,) = weight.row_shape
            if sparsity.of and columns % sparsity.of:
                raise ConfigError(
                    f"{weight.name} has {columns} columns, no multiple of {sparsity.of}"
                )

    def takes(self, weight: Weight) -> bool:
        # What chooses experts, or weighs them, is small, and every token goes by it.
        return weight.is_matrix and not weight.name.endswith(GATES)

    def change(
        self, name: str, value: Tensor, dtype: torch.dtype, inputs: Tensor | None
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        weight = value.float()
        if self.method == "magnitude":
            pruned = magnitude(weight, self.sparsity)
        else:
            assert inputs is not None
            prune = wanda if self.method == "wanda" else sparsegpt
            pruned = prune(weight, inputs, self.sparsity)
        return pruned, {name: pruned.to(dtype)}


def sparse(
    folder: Path, sparsity: Sparsity, method: str = "magnitude", runs: LayerRuns | None = None
) -> tuple[Model, Report]:
    """Return the model in `folder` as `write_model` is to write it, and the report that is filled
    in as it does. Raises ConfigError or CheckpointError."""
    model = open_source(folder)
    pruner = SparsePruner(model, sparsity, method, runs)
    return replace(model, encode=pruner.encode), pruner.report
