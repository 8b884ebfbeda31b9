"""The blocks of the pages of docs/ and README.md, and the commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
WORDS = "megalite|bash|sbatch|python|torchrun|source|pip|cat|cp|ln|kill|curl|until|docker|kubectl|apptainer"
FIRST_WORD = re.compile(rf"(?:\w+=(?:'[^']*'|\S+) )*({WORDS})\b")
HERE_DOCUMENT = re.compile(r"<<'(\w+)'")


@dataclass(frozen=True)
class Block:
    """A block of a page: in a language, or commands, or something shown."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """The commands of the block, none where it shows something else."""
        if self.language not in ("", "bash"):
            return []
        found = [command for command in statements(self.text) if FIRST_WORD.match(command)]
        return found


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page, in their order."""
    return [Block(*found) for found in BLOCK.findall(page.read_text(encoding="utf-8"))]


def statements(text: str) -> Iterator[str]:
    """Yield the statements of a shell's text: lines, with those that go on, loops and here-documents
    as one. Comments of a line of their own are left out."""
    lines = iter(text.splitlines())
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        end = HERE_DOCUMENT.search(line)
        while line.endswith("\\"):
            line = line[:-1] + next(lines).strip()
        if end or line.startswith(("until ", "for ", "while ")):
            last = end[1] if end else "done"
            for more in lines:
                line += f"\n{more}"
                if more == last:
                    break
        yield line
