"""Write the Python standard library's own source files, found on this machine, as train.jsonl and
valid.jsonl."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

LEFT_OUT = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idle_test",
    "__pycache__",
    "lib2to3",
    "pydoc_data",
    "encodings",
}


def sources(root: Path) -> Iterator[Path]:
    """Yield the standard library's source files below `root`, without tests and large tables."""
    # Sorted: file systems list in any order, and the text must be the same on every machine.
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            yield path


def write_corpus(folder: Path) -> str:
    """Write train.jsonl and valid.jsonl into a folder, and return how much text is in each."""
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(sysconfig.get_paths()["stdlib"])
    counts = {"train": 0, "valid": 0}
    with open(folder / "train.jsonl", "w") as train, open(folder / "valid.jsonl", "w") as valid:
        files = {"train": train, "valid": valid}
        for path in sources(root):
            name = str(path.relative_to(root))
            # Split by the hash of the name: the same files are held out on every machine.
            split = "valid" if hashlib.sha256(name.encode()).digest()[0] < 12 else "train"
            # A few files of the library are in other encodings, as tests of them.
            text = path.read_text(encoding="utf-8", errors="replace")
            files[split].write(json.dumps({"text": text, "path": name}) + "\n")
            counts[split] += len(text)
    sizes = ", ".join(f"{split}: {count / 1e6:.1f} MB" for split, count in counts.items())
    return f"{sizes} of Python from {root}"
