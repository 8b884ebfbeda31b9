"""Measure the memory that each step of a recipe takes: `python tools/bench/recipe_memory.py COMMAND ...`.

Of each process that the command starts, the peak of its resident memory (VmHWM) is read four times a
second until it ends; those of the processes that a step has at the same time are added up. What
processes share, such as torch's libraries, is counted in each, so that the sum is an upper bound."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

SECONDS = 0.25


def main(command: list[str]) -> int:
    """Run a command, print a line for each process that it started itself, and return its status."""
    process = subprocess.Popen(command)
    # By the id of a step's first process: its words, its peak in KiB, and of how many processes.
    steps: dict[int, tuple[str, int, int]] = {}
    seen: set[int] = set()
    while process.poll() is None:
        for step in (process.pid, *_children(process.pid)):
            of_step = [step] if step == process.pid else [step, *_below(step)]
            # One just forked still shows its parent's memory: it counts from the second look on.
            peaks = [_peak(each) for each in of_step if each in seen]
            words, most, _ = steps.get(step, ("", -1, 0))
            if sum(peaks) > most:
                steps[step] = (_words(step) or words, sum(peaks), len(peaks))
            seen.update(of_step)
        time.sleep(SECONDS)
    print("\n| step | processes | peak, MiB |\n|---|---|---|")
    for words, peak, count in steps.values():
        print(f"| {words} | {count} | {peak / 1024:,.0f} |")
    return process.returncode


def _children(process: int) -> list[int]:
    """Return the ids of the processes that a process started and that still run."""
    found: list[int] = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        found += map(int, _text(path).split())
    return found


def _below(process: int) -> Iterator[int]:
    for child in _children(process):
        yield child
        yield from _below(child)


def _peak(process: int) -> int:
    """Return the peak of a process's resident memory in KiB; 0 where it has ended."""
    for line in _text(Path(f"/proc/{process}/status")).splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return 0


def _words(process: int) -> str:
    words = _text(Path(f"/proc/{process}/cmdline")).split("\0")
    return " ".join(words[words.index("megalite") + 1 :] if "megalite" in words else words).strip()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # it ended meanwhile


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
