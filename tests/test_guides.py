"""The pages that lead a user by words of messages, or of other trainers, know the words that there
are."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from megalite.config.aliases import key_of
from megalite.config.catalog import catalog
from megalite.runtime.exit_codes import Exit

ROOT = Path(__file__).parents[1]
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
COMING = (ROOT / "docs" / "coming-from.md").read_text(encoding="utf-8")
MESSAGES = re.findall(r"^\| ``?(.+?)``? \|", TROUBLE, re.M)
# Which mean other things in different trainers, or are a section here.
VAGUE = {"batch_size", "path", "optimizer", "run"}


@functools.cache
def texts() -> tuple[str, ...]:
    """Every text in the package, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "megalite").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_on_the_page_is_one_that_is_told(message: str) -> None:
    words = [word for word in re.split(r"\s*…[;:,.]?\s*", message) if word]
    pattern = re.compile(".*".join(map(re.escape, words)), re.S)
    assert any(pattern.search(text) for text in texts()), message


def test_the_page_has_messages_and_every_exit_status() -> None:
    assert len(MESSAGES) > 45
    told = {int(status) for status in re.findall(r"^\| (\d+) \|", TROUBLE, re.M)}
    assert told == {int(status) for status in Exit}


def test_names_of_other_trainers_lead_to_the_keys_beside_them() -> None:
    known = [key.name for keys in catalog().values() for key in keys]
    rows = [re.findall(r"`([^`]+)`", line) for line in COMING.splitlines() if line[:3] == "| `"]
    assert len(rows) > 50
    for key, *names in rows:
        assert key in known
        for name in names:
            last = name.removeprefix("--").replace("-", "_").rpartition(".")[2]
            if last not in VAGUE and last != key.rpartition(".")[2]:
                assert key_of(last, known) == key, name
