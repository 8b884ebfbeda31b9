"""Write rows of labelled data about lines of the Python standard library's own source files: chats,
preferences, classes, and questions that are held out of all of these, with both right answers."""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.quickstart.corpus import sources

KINDS = {
    "import": ("import ", "from "),
    "definition": ("def ", "class "),
    "comment": ("# ",),
    "return": ("return ",),
}
"""Kinds of lines by how they begin."""
LONG = {
    "import": "This line imports names from a module.",
    "definition": "This line defines a function or a class.",
    "comment": "This line is a comment for the reader.",
    "return": "This line returns a value to the caller.",
}
SHORT = {kind: f"A {kind}." if kind != "import" else "An import." for kind in KINDS}
QUESTION = "What is this line?\n"
COUNTS = {"chats": 800, "preferences": 400, "classes": 800, "held-out": 80}
LONGEST = 60
"""Most characters of a line."""


def lines_by_kind(root: Path) -> dict[str, list[str]]:
    """Return the different lines of each kind, in an order that is the same on every machine."""
    found: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for path in sources(root):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            line = line.strip()
            for kind, beginnings in KINDS.items():
                if line.startswith(beginnings) and len(line) <= LONGEST:
                    found[kind].add(line)
    return {kind: sorted(lines) for kind, lines in found.items()}


def row_of(name: str, line: str, kind: str) -> dict[str, Any]:
    """Return a row for one line."""
    question = QUESTION + line
    asked = [{"role": "user", "content": question}]
    if name == "classes":
        return {"text": line, "label": kind}
    if name == "preferences":
        sides = {"chosen": SHORT[kind], "rejected": LONG[kind]}
        return {"prompt": asked} | {
            side: [{"role": "assistant", "content": text}] for side, text in sides.items()
        }
    if name == "held-out":
        return {"prompt": asked, "completion": [LONG[kind], SHORT[kind]]}
    # One answer or the other: which is better, the preferences say.
    answer = (LONG if len(line) % 2 else SHORT)[kind]
    return {"messages": [*asked, {"role": "assistant", "content": answer}]}


def write(folder: Path, lines: Mapping[str, Sequence[str]]) -> None:
    """Write the files, each with lines of its own, as many of each kind."""
    draw = random.Random(1234)
    shuffled = {kind: draw.sample(texts, len(texts)) for kind, texts in lines.items()}
    for name, count in COUNTS.items():
        rows = []
        for kind, texts in shuffled.items():
            taken, shuffled[kind] = texts[: count // len(KINDS)], texts[count // len(KINDS) :]
            rows += [row_of(name, line, kind) for line in taken]
        draw.shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_rows(folder: Path) -> str:
    """Write the files, unless they are there, and return what they hold in words."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(not (folder / f"{name}.jsonl").exists() for name in COUNTS):
        write(folder, lines_by_kind(Path(sysconfig.get_paths()["stdlib"])))
    return f"{folder}: {', '.join(f'{name}.jsonl ({count})' for name, count in COUNTS.items())}"
