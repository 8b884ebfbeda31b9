"""Compares what the CPU kernels computed on two processors: `python compare.py ONE OTHER`, the outputs
of kernels.cpp. Exits with status 1 where a number differs by more than its rounding."""

from __future__ import annotations

import sys
from pathlib import Path

ROUNDING = {"fp32": 2e-5, "bf16": 2**-7}
"""Of a result's largest number: some sums of hundreds of terms, with products fused on one processor
only; and a last bit of bf16 that falls the other way."""


def compare(one: str, other: str) -> list[str]:
    """Return what differs between two outputs."""
    lines, others = one.splitlines(), other.splitlines()
    if len(lines) != len(others):
        return [f"{len(lines)} results on one processor, {len(others)} on the other"]
    found = []
    for line, line_of_other in zip(lines, others, strict=True):
        name, *values = line.split()
        name_of_other, *values_of_other = line_of_other.split()
        if (name, len(values)) != (name_of_other, len(values_of_other)):
            found.append(f"{name} of {len(values)} numbers is {name_of_other} on the other")
            continue
        numbers = [float(each) for each in values]
        allowed = ROUNDING[name.rpartition(".")[2]] * max(map(abs, numbers))
        for place, (number, text) in enumerate(zip(numbers, values_of_other, strict=True)):
            if not abs(number - float(text)) <= allowed:  # NaN differs from all
                found.append(f"{name}[{place}] is {number}, and {text} on the other processor")
                break
    return found


if __name__ == "__main__":
    differences = compare(*(Path(path).read_text() for path in sys.argv[1:]))
    print("\n".join(differences) or "aarch64.sh: the CPU kernels compute the same")
    sys.exit(bool(differences))
