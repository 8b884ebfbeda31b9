"""The table of weights: one row a weight, and everything that differs between weights is read from
the row.

A row says which Hugging Face tensors a weight is made of, how tensor parallelism cuts it, how it is
initialised, whether it decays, and whether sequence parallelism leaves each tensor rank with only a
part of its gradient. Conversion, sharding, initialisation, optimizer groups and checkpoints all
read this table; there is no second mapping.

Terms: the *logical* tensor is the whole weight as one device would hold it, [out, in] as in
torch.nn.Linear; the *local* tensor is what one of its *holders* has of it: of the tensor ranks, or
for a stack of experts of expert × expert-tensor ranks, in this order (see `Cut`, and sharding.py)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megalite.config import EMA, ModelConfig, OptimizerConfig
from megalite.kernels.blockwise import DYNAMIC_BLOCK
from megalite.kernels.quantised import BLOCK, Kind, num_bytes
from megalite.plan import Place
from megalite.utils.counter_random import normal, uniform
from megalite.utils.keys import key_of

VOCAB_MULTIPLE = 64
"""Rows of a vocabulary shard are padded to a multiple of this, so that its matrix products stay
aligned."""

STATE_SIZES = {"fp32": 1.0, "bf16": 0.5, "8bit": 0.25 + 1 / DYNAMIC_BLOCK}
"""Sizes of a state's numbers, in fp32's."""

Fetch = Callable[[str, tuple[slice, ...]], Tensor]
"""Reads a slice of the Hugging Face tensor of a name."""


class Uniform(NamedTuple):
    """Uniform initial values between -bound and bound."""

    bound: float


@dataclass(frozen=True)
class Weight:
    """One row of the table; see the module."""

    name: str
    """Parameter name in the megalite model."""
    shape: tuple[int, ...]
    """Logical shape."""
    hf: tuple[str, ...]
    """Names of its Hugging Face tensors: one, or one for each of `row_groups`."""
    shard: Literal["column", "row", "vocab", "expert"] | None = None
    """Which dimension tensor parallelism cuts. column: the output features (Megatron's
    column-parallel); row: the input features, which follow them; vocab: the first, padded; expert:
    the first of a stack; None: replicated."""
    parts: tuple[int, ...] = ()
    """Row groups that are each cut on their own, so that a rank gets matching rows of each: (q, k,
    v) or (gate, up)."""
    unit: int = 1
    """Rows (of a column-parallel weight) or columns (of a row-parallel one) that stay together:
    those of a head."""
    transpose: bool = False
    """The Hugging Face tensor is stored [in, out] (GPT-2's Conv1D), or [stack, in, out]."""
    by_unit: bool = False
    """The single Hugging Face tensor interleaves the parts: q, k and v of the first head, then of
    the second (GPT-NeoX). With fewer heads of k and v, those of q come with the k and v that they
    share (Falcon)."""
    stack: int = 0
    """Number of leading dimensions that index matrices of the same kind: 1 where the weight is
    [experts, out, in]."""
    used: float = 1.0
    """Share of its elements that a token is multiplied with: k / n for n experts of which each
    token visits k; 0 for an embedding, which is looked up, unless it is tied to the head."""
    init: float | tuple[float, ...] | Uniform | Literal["ones", "zeros"] = 0.02
    """Standard deviation of a normal distribution, or one for each of the `parts`, a uniform one,
    or a constant."""
    decay: bool = True
    """Takes weight decay."""
    by_counts: bool = False
    """A router's selection bias: no gradient trains it, but each step moves it by how many tokens
    its experts had. fp32 in every precision."""
    frozen: bool = False
    """Not trained: no gradient, no optimizer state, and in no checkpoint."""
    held: bool = False
    """Used by nothing and not updated, but in checkpoints: what a model brings along for other tasks."""
    quantised: Kind | None = None
    """The few bits that a frozen matrix is held in; None: as all weights."""
    coded: bool = False
    """Gathered as codes of fp8 where replicas gather it (`train.fp8.param_gather`)."""
    wider_in: float = 1.0
    """How many times as many input features it has as in the model that muP begins from
    (`models/mup.py`)."""
    wider_out: float = 1.0
    """The same of its output features."""
    place: Place = "first"
    """Where it is used: in a layer, before the layers, after them, or (tied) at both ends."""
    partial_grad: Literal["sequence", "heads"] | None = None
    """A replicated weight of whose gradient each tensor rank has a part, which is summed over them.
    sequence: used on activations that sequence parallelism cuts along the sequence; heads: used on
    the heads, or other features, that each rank has of a token."""
    one_hf: str | None = None
    """Name of a single Hugging Face tensor that holds all of it in some files instead: it is read,
    not written."""
    copies: tuple[str, ...] = ()
    """Names of Hugging Face tensors that hold all of it once more: they are written, and where they
    are there they must be copies."""

    def __post_init__(self) -> None:
        # Mistakes of a family's author, found as soon as the table is made.
        assert (
            sum(self.parts or self.shape[self.stack : self.stack + 1]) == self.shape[self.stack]
        ), self
        assert len(self.hf) in (1, len(self.row_groups)), self
        assert not self.by_unit or (
            len(self.hf) == 1 and self.interleaved and not self.transpose
        ), self
        assert self.stack == 0 or not (self.by_unit or self.shard == "vocab"), self
        # <= of two bools: the first implies the second.
        assert (self.shard == "expert") <= (self.stack > 0), self

    @property
    def row_groups(self) -> tuple[int, ...]:
        """Return the sizes of the groups of rows: the parts of each matrix, one matrix after
        another."""
        return (self.parts or (self.shape[self.stack],)) * prod(self.shape[: self.stack])

    @property
    def interleaved(self) -> tuple[int, ...]:
        """Return for a weight stored `by_unit` how many rows of each part follow one another."""
        # The part with the fewest heads, keys or values, says how many groups there are.
        groups = min(self.parts) // self.unit
        assert not any(size % groups for size in self.parts), self
        return tuple(size // groups for size in self.parts)

    @property
    def num_rows(self) -> int:
        """Return the rows of all matrices of the stack together. A row is the elements of one
        output feature."""
        return prod(self.shape[: self.stack + 1])

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Return the shape of one row: the dimensions after the output features."""
        return self.shape[self.stack + 1 :]

    @property
    def is_expert(self) -> bool:
        """Return whether it is of experts, which have ranks of their own to be cut over."""
        return self.stack > 0

    @property
    def is_matrix(self) -> bool:
        """Return whether it is a matrix of a layer, or a stack of them: what Muon is for.
        Embeddings, heads, norms and biases are not."""
        return isinstance(self.place, int) and len(self.shape) == self.stack + 2

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def multiplied(self) -> float:
        """Return the number of its elements that a token is multiplied with."""
        return 0.0 if self.held else self.numel * self.used

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return its dtype in a model of `dtype`."""
        return torch.float32 if self.by_counts else dtype

    @property
    def is_looked_up(self) -> bool:
        """Return whether tokens or positions pick rows of it, which are no product's operand: an
        embedding."""
        return self.used == 0.0 or self.place == "both"

    def num_states(self, optimizer: OptimizerConfig) -> float:
        """Return how many states `optimizer` keeps for each of its elements, by the memory that one
        takes in fp32. Those of another shape, which are small beside it, do not count."""
        size = 1.0 if optimizer.keeps_fp32(self) else STATE_SIZES[optimizer.state_dtype]
        own = (s for s in optimizer.states_of(self) if optimizer.state_row(self, s) is self)
        # The average of the weights is fp32 in any case.
        return sum(1.0 if state == EMA else size for state in own)

    def sums_over_tensor_ranks(self, sequence: bool) -> bool:
        """Return whether its gradient is summed over the tensor ranks; `sequence`: sequence
        parallelism is on."""
        return self.partial_grad == "heads" or (self.partial_grad == "sequence" and sequence)

    def quantised_bytes(self, tensor: int, expert: int = 1) -> int:
        """Return the bytes of what a rank holds of it, of `tensor` ranks, where that is quantised;
        0 where it is not."""
        if self.quantised is None:
            return 0
        rows, columns = self.local_shape(tensor)
        # Each Hugging Face tensor has blocks and scales of its own.
        sizes = self._rows_of_each()
        shares = ((rows * size // self.num_rows, size * self.shape[1]) for size in sizes)
        return sum(num_bytes(self.quantised, part, columns, all_) for part, all_ in shares)

    def hf_order(self) -> list[Tensor]:
        """Return the numbers of the logical rows of a matrix, int64, in the order in which each of
        its Hugging Face tensors has them as output features."""
        numbers = torch.arange(self.num_rows)[:, None]
        # Numbers of rows go the way of the rows themselves.
        column = replace(self, shape=(self.num_rows, 1), transpose=False)
        return [rows[:, 0] for rows in column.to_hf(numbers).values()]

    def local_shape(self, tensor: int, expert: int = 1) -> tuple[int, ...]:
        """Return the shape on each of `expert` × `tensor` ranks, of which `expert` share the
        experts. Raises ValueError when the weight cannot be cut evenly."""
        if expert > 1:
            return self.experts_of_one(expert, tensor).local_shape(tensor)
        if self.quantised == "nf4":
            width = self.shape[1] // (tensor if self.shard == "row" else 1)
            if width % BLOCK:
                raise ValueError(
                    f"{self.name} has {width} input features on a rank, which do not divide into the blocks of "
                    f"{BLOCK} of lora.quantize_base: nf4; int8 takes any number"
                )
        if self.shard is None or tensor == 1:
            return self.shape
        if self.shard == "vocab":
            # Padded alike on every rank, so that all shards have one shape.
            rows = -(-self.shape[0] // tensor)
            return (-(-rows // VOCAB_MULTIPLE) * VOCAB_MULTIPLE, *self.shape[1:])
        # [stack…, out, in]: which dimension is cut.
        cut = {"expert": 0, "column": self.stack, "row": self.stack + 1}[self.shard]
        whole = self.shape[cut]
        sizes = self.parts if self.parts and self.shard == "column" else (whole,)
        for size in sizes:
            if size % (self.unit * tensor):
                what = self._counted(size)
                raise ValueError(f"{self.name} has {what}, which do not divide by {tensor}")
        return (*self.shape[:cut], whole // tensor, *self.shape[cut + 1 :])

    def _counted(self, size: int) -> str:
        """Return what the dimension that is cut counts, of this `size`, for a message."""
        if self.shard == "expert":
            return f"{size} experts"
        if self.unit > 1:
            return f"{size // self.unit} heads of {self.unit}"
        return f"{size} features"

    def experts_of_one(self, expert: int, tensor: int) -> Weight:
        """Return the row as if the model had only those experts that one of `expert` ranks has."""
        num_experts = self.shape[0]
        if num_experts % expert:
            raise ValueError(
                f"{self.name} has {num_experts} experts, which do not divide by {expert}"
            )
        if self.shard is None and tensor > 1:
            raise ValueError(
                f"{self.name}, which tensor ranks do not share, cannot be on {tensor} of them"
            )
        # Asked for shapes and ranges only: it has no names of tensors.
        return replace(self, shape=(num_experts // expert, *self.shape[1:]), hf=("",))

    # --- as Hugging Face tensors ------------------------------------------------------------------

    def to_hf(self, logical: Tensor) -> dict[str, Tensor]:
        """Return the Hugging Face tensors of the logical tensor, by name."""
        if self.by_unit:
            # [parts · units · unit, …] → [parts, units, unit, …] → [units, parts, unit, …].
            pieces = zip(logical.split(self.parts), self.interleaved, strict=True)
            groups = [piece.unflatten(0, (-1, rows)) for piece, rows in pieces]
            return {self.hf[0]: torch.cat(groups, 1).reshape(self.shape).contiguous()}
        if len(self.hf) == 1:
            # safetensors writes no views.
            return {self.hf[0]: self._turned(logical).contiguous()}
        pieces = logical.flatten(0, self.stack).split(self.row_groups)
        return {
            name: self._turned(piece).contiguous()
            for name, piece in zip(self.hf, pieces, strict=True)
        }

    def from_hf(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the logical tensor of whole Hugging Face tensors, by name: the inverse of
        `to_hf`."""
        columns = (0, self.row_shape[0]) if self.row_shape else None
        rows = self.rows_from_hf(
            lambda name, where: tensors[name][where], 0, self.num_rows, columns
        )
        return rows.view(self.shape)

    def copies_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the copies of its only Hugging Face tensor in `tensors` that files have beside
        it."""
        # safetensors refuses two names of one memory.
        return {copy: tensors[self.hf[0]].clone() for copy in self.copies}

    def as_stored(self, names: Container[str]) -> Weight:
        """Return the row as it is in files that hold tensors of these names."""
        return (
            self
            if self.one_hf is None or self.one_hf not in names
            else replace(self, hf=(self.one_hf,))
        )

    def _turned(self, matrices: Tensor) -> Tensor:
        """Exchange the output and the input features of one matrix or of a stack, where Hugging
        Face stores them so."""
        outputs = self.stack if len(self.hf) == 1 else 0
        return matrices.transpose(outputs, outputs + 1) if self.transpose else matrices

    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the Hugging Face tensors, by name."""
        shapes = (
            [self.shape]
            if len(self.hf) == 1
            else [(size, *self.row_shape) for size in self.row_groups]
        )
        # On meta tensors, so that the rule of `_turned` need not be written twice.
        turned = [tuple(self._turned(torch.empty(shape, device="meta")).shape) for shape in shapes]
        return dict(zip(self.hf, turned, strict=True))

    def rows_from_hf(
        self, fetch: Fetch, start: int, stop: int, columns: tuple[int, int] | None
    ) -> Tensor:
        """Return logical rows [start, stop), cut to `columns` for a matrix, with `fetch` reading as
        few bytes as possible."""
        if self.by_unit:
            return self._rows_by_unit(fetch, start, stop, columns)
        stacked = self.stack > 0 and len(self.hf) == 1  # one tensor holds all matrices
        # Rows that are read from one place: of each matrix of a stack in one tensor, else of each
        # tensor.
        sizes = self._rows_of_each()
        if stacked:
            sizes = (self.shape[self.stack],) * prod(self.shape[: self.stack])
        pieces: list[Tensor] = []
        offset = 0
        for number, rows in enumerate(sizes):
            low = max(start, offset) - offset
            high = min(stop, offset + rows) - offset
            offset += rows
            if low >= high:
                continue
            where = _ranges_of(slice(low, high), columns)
            # Stored [in, out]: exchange the ranges here, and the dimensions of what was read below.
            if self.transpose:
                where = where[::-1]
            if stacked:
                indices = np.unravel_index(number, self.shape[: self.stack])
                matrix = [slice(int(at), int(at) + 1) for at in indices]
                piece = fetch(self.hf[0], (*matrix, *where)).flatten(0, self.stack)
            else:
                piece = fetch(self.hf[number], where)
            pieces.append(piece.transpose(0, 1) if self.transpose else piece)
        return joined(pieces)

    def _rows_of_each(self) -> tuple[int, ...]:
        """Return how many rows each Hugging Face tensor holds."""
        return self.row_groups if len(self.hf) > 1 else (self.num_rows,)

    def _rows_by_unit(
        self, fetch: Fetch, start: int, stop: int, columns: tuple[int, int] | None
    ) -> Tensor:
        """Return logical rows from a tensor that interleaves the parts."""
        pieces, sizes = [], self.interleaved
        ends = list(accumulate(self.parts))
        while start < stop:
            # Logical rows are ordered (part, group, row in group), stored ones (group, part, row in
            # group). At most one group's rows of a part are contiguous in both.
            part = bisect_right(ends, start)
            row_in_part = start - (ends[part] - self.parts[part])
            group, inside = divmod(row_in_part, sizes[part])
            count = min(sizes[part] - inside, stop - start)
            row = group * sum(sizes) + sum(sizes[:part]) + inside
            where = _ranges_of(slice(row, row + count), columns)
            pieces.append(fetch(self.hf[0], where))
            start += count
        return joined(pieces)

    def initial_rows(
        self,
        seed: int,
        start: int,
        stop: int,
        columns: tuple[int, int] | None,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return initial values of logical rows [start, stop), cut to `columns`, on `device`: a
        function of (`seed`, name, element index), whatever the layout."""
        # Whole rows are drawn, and cut to `columns` below: an element's random number goes by its
        # place in the logical tensor. Counter-based: no state, so any slice can be drawn on any
        # rank in any order.
        key = key_of(seed, self.name)
        width = prod(self.row_shape)
        first, last = start * width, stop * width
        if isinstance(self.init, float):
            flat = normal(key, first, last, device) * self.init
        elif isinstance(self.init, Uniform):
            index = torch.arange(first, last, device=device)
            flat = (uniform(key, index) * 2.0 - 1.0) * self.init.bound
        elif isinstance(self.init, tuple):
            sizes = torch.tensor(self.row_groups, device=device)
            stds = torch.tensor(self.init, device=device)
            std_of_rows = stds.repeat_interleave(sizes, output_size=self.num_rows)[start:stop]
            rows = normal(key, first, last, device).view(-1, width)
            flat = (rows * std_of_rows[:, None]).flatten()
        else:
            constant = 1.0 if self.init == "ones" else 0.0
            flat = torch.full((last - first,), constant, device=device)
        if columns is None:
            return flat
        return flat.view(-1, *self.row_shape)[:, slice(*columns)]


def _ranges_of(rows: slice, columns: tuple[int, int] | None) -> tuple[slice, ...]:
    """Return the ranges of a tensor's dimensions: `rows`, and the `columns` of a matrix."""
    return (rows,) if columns is None else (rows, slice(*columns))


def joined(pieces: list[Tensor]) -> Tensor:
    """Concatenate `pieces`; a single one is returned without a copy."""
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def embedding_row(config: ModelConfig, hf: str) -> Weight:
    """Return the row of the embedding of tokens, which Hugging Face calls `hf`."""
    # "both": the first pipeline stage looks it up, the last multiplies with it, and both keep a
    # copy.
    ends: Place = "both" if config.tie_embeddings else "first"
    # A look-up multiplies nothing; the head, where it is tied, does.
    used, shape = float(config.tie_embeddings), (config.vocab_size, config.hidden_size)
    std = config.init_std
    return Weight("embedding.weight", shape, (hf,), "vocab", used=used, init=std, place=ends)


def head_rows(
    size: int, width: int, std: float, hf: str | None, hf_bias: str | None = None
) -> Iterator[Weight]:
    """Yield the rows of a head of `size` features, which takes `width`: its matrix, where it is not
    tied, and its bias, where it has one. Hugging Face calls them `hf` and `hf_bias`."""
    if hf:
        yield Weight("head.weight", (size, width), (hf,), "vocab", init=std, place="last")
    if hf_bias:
        yield Weight(
            "head.bias", (size,), (hf_bias,), "vocab", init="zeros", decay=False, place="last"
        )


def layer_rows(
    index: int, hf_prefix: str, rows: Sequence[Weight], hf_index: int | None = None
) -> Iterator[Weight]:
    """Yield the rows of one layer, with the names of layer `index`; Hugging Face's begin with
    `hf_prefix`, and count the layer as `hf_index` where its stack is not the first."""
    prefix = f"{hf_prefix}.{index if hf_index is None else hf_index}"
    for row in rows:
        hf = tuple(f"{prefix}.{name}" for name in row.hf)
        one_hf = row.one_hf and f"{prefix}.{row.one_hf}"
        yield replace(row, name=f"layers.{index}.{row.name}", hf=hf, one_hf=one_hf, place=index)
