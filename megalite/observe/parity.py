"""Settles whether two runs differ by more than rounding: their recorded weights, losses and
gradients, step by step (`megalite parity`). What comes first is the cause: the weights before a
step, the loss, and the gradients in the order of the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megalite.errors import DataError
from megalite.observe.tensors import RecordedStep, folder_of, read_steps

SHOWN = 8
"""Number of tensors of a step that are named."""
TITLES = {"weight": "weights before", "grad": "gradients"}
"""What the kinds of tensors are called, in the order in which a step has them."""


@dataclass(frozen=True)
class Difference:
    """How two tensors of one name differ."""

    name: str
    shape: tuple[int, ...]
    error: float
    """Norm of the difference, relative to the norm of the first."""
    where: str
    """The part that differs, where it is a part."""

    def __str__(self) -> str:
        part = f", {self.where}" if self.where else ""
        return f"{self.name} {list(self.shape)}: off by {self.error:.1e}{part}"


def compare_runs(
    a: Path, b: Path, tolerance: float, steps: Sequence[int] = ()
) -> tuple[list[str], bool]:
    """Return what a person is told about two runs, and whether they agree.

    `tolerance` bounds the relative difference of losses and of each tensor; `steps` are those to
    compare, by default all that both have recorded. Raises DataError where there are none, or where
    neither has recorded a tensor that a step has."""
    ours, theirs = read_steps(a), read_steps(b)
    common = [step for step in ours if step in theirs and (not steps or step in steps)]
    if not common:
        has = [f"{run} has {', '.join(map(str, found))}" for run, found in ((a, ours), (b, theirs))]
        raise DataError(f"no step was recorded by both: {has[0]}, {has[1]}")
    lines: list[str] = []
    agree = True
    for step in common:
        for kind, what in TITLES.items():
            if lacking := _in_neither(kind, ours[step], theirs[step]):
                raise DataError(
                    f"step {step}: neither {a} nor {b} has recorded {lacking}: of the {what} nothing can be said; "
                    f"a step is whole with the files of all ranks in {folder_of(a, step)}"
                )
        said, equal = _compare_step(ours[step], theirs[step], tolerance)
        lines += [f"step {step}", *(f"  {line}" for line in said)]
        agree &= equal
    verdict = (
        "no difference beyond rounding"
        if agree
        else "the runs differ; the first of what is named is the cause"
    )
    return [*lines, f"{verdict} (tolerance {tolerance:g})"], agree


def _in_neither(kind: str, ours: RecordedStep, theirs: RecordedStep) -> str:
    """Name the tensors of a kind that two steps should both have and neither has; empty where there
    are none. Two that recorded nothing would agree in everything."""
    recorded = {
        key.partition("/")[2] for key in (*ours.files, *theirs.files) if key.startswith(f"{kind}/")
    }
    if not recorded:
        return f"any {kind}"
    # A weight that the loss does not depend on has no gradient; each has a value.
    missing = [name for name in ours.names if name not in recorded] if kind == "weight" else []
    more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
    return f"the weight {missing[0]}{more}" if missing else ""


def _compare_step(
    ours: RecordedStep, theirs: RecordedStep, tolerance: float
) -> tuple[list[str], bool]:
    lines, agree = [], True
    # Relative, so that one tolerance does for all.
    off = abs(ours.loss - theirs.loss) / max(abs(ours.loss), 1e-12)
    numbers = [("loss", ours.loss, theirs.loss, off)]
    if ours.grad_norm is not None and theirs.grad_norm is not None:
        off = abs(ours.grad_norm - theirs.grad_norm) / max(abs(ours.grad_norm), 1e-12)
        numbers.append(("norm", ours.grad_norm, theirs.grad_norm, off))
    # In the order in which a step computes them, so that the first difference is the cause: the
    # gradients of the last layer come first.
    for kind, title in TITLES.items():
        names = ours.names if kind == "weight" else tuple(reversed(ours.names))
        said, equal = _compare_tensors(kind, names, ours, theirs, tolerance)
        lines.append(f"{title:<16}{said[0]}")
        lines += [f"{'':16}{line}" for line in said[1:]]
        agree &= equal
        if kind == "weight":
            for name, mine, other, error in numbers:
                lines.append(f"{name:<16}{mine:.7g} and {other:.7g}: off by {error:.1e}")
                agree &= error <= tolerance  # NaN is above any
    return lines, agree


def _compare_tensors(
    kind: str, names: Sequence[str], ours: RecordedStep, theirs: RecordedStep, tolerance: float
) -> tuple[list[str], bool]:
    mine = {name for name in names if f"{kind}/{name}" in ours.files}
    others = {key.partition("/")[2] for key in theirs.files if key.startswith(f"{kind}/")}
    found = list(
        _differences(kind, [name for name in names if name in mine & others], ours, theirs)
    )
    beyond = [each for each in found if not each.error <= tolerance]  # NaN as well
    worst = max(found, key=lambda each: each.error, default=None)
    if worst is None:
        lines = ["no tensor of one name"]
    elif beyond:
        lines = [f"{len(beyond)} of {len(found)} tensors differ:", *map(str, beyond[:SHOWN])]
        lines += [f"and {len(beyond) - SHOWN} more"] if len(beyond) > SHOWN else []
    elif worst.error == 0:
        lines = [f"{len(found)} tensors, equal bit for bit"]
    else:
        lines = [
            f"{len(found)} tensors; the largest difference is {worst.error:.1e}, of {worst.name}"
        ]
    alone = [(name, "first") for name in sorted(mine - others)] + [
        (name, "second") for name in sorted(others - mine)
    ]
    lines += [f"{name} is in the {side} alone" for name, side in alone[:SHOWN]]
    lines += [f"and {len(alone) - SHOWN} more in one alone"] if len(alone) > SHOWN else []
    return lines, not beyond and not alone


def _differences(
    kind: str, names: Sequence[str], ours: RecordedStep, theirs: RecordedStep
) -> Iterator[Difference]:
    for name in names:
        a, b = (each.read(f"{kind}/{name}").double() for each in (ours, theirs))
        if a.shape != b.shape:
            yield Difference(name, tuple(a.shape), torch.inf, f"and not {list(b.shape)}")
            continue
        # A NaN on either side is the largest difference there is, and must not vanish in
        # comparisons.
        off = (a - b).nan_to_num(torch.inf, torch.inf, torch.inf)
        error = (off.norm() / a.norm().clamp(min=1e-30)).item() if off.any() else 0.0
        yield Difference(name, tuple(a.shape), error, _where(off))


def _where(off: Tensor) -> str:
    """Say in which part of a tensor nearly all of a difference is, if it is one range of an
    axis."""
    total = off.square().sum()
    if off.numel() < 2 or not total > 0 or not total.isfinite():
        return ""
    for axis in range(off.dim()):
        # How much of the difference each index along the axis has: a tensor rank's part stands out.
        by_index = off.movedim(axis, 0).reshape(off.shape[axis], -1)
        squares = by_index.square().sum(1)
        # An even share of the rest would be rounding.
        high = (squares > 1e-4 * total / len(squares)).nonzero().flatten()
        first, last = int(high[0]), int(high[-1])
        if last - first + 1 <= 0.75 * len(squares):
            return f"only in {first} to {last} of the {len(squares)} along axis {axis}"
    return ""
