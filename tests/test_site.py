"""The pages as a site: every page is in the navigation, every link leads somewhere, and every command is
one. tests/journeys runs them."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from doc_pages import PAGES, blocks
from megalite.cli import make_parser

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="pip install '.[docs]'")
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    pages = {path.parent.name for path in tmp_path.rglob("index.html")}
    assert {"finetuning", "config", "family"} <= pages
    # The column of keys is not as wide as the longest one.
    assert "num_<wbr>layers" in (tmp_path / "config" / "index.html").read_text(encoding="utf-8")
    # What is no page of the site is named, not linked.
    text = (tmp_path / "architecture" / "index.html").read_text(encoding="utf-8")
    assert "<code>CONTRIBUTING.md</code>" in text
    assert 'href="../../' not in text


def commands(page: Path) -> Iterator[str]:
    """Yield the commands on a page that this repository has, without comments."""
    for command in (each for block in blocks(page) for each in block.commands):
        found = re.search(
            r"(?:^|&& |until |=\S+ )((megalite|bash|sbatch|python|torchrun) .*)", command
        )
        if found:
            yield re.sub(r"\s#.*|; do\b.*", "", found[1])


COMMANDS = [(page, command) for page in PAGES for command in commands(page)]


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.stem}: {command}" for page, command in COMMANDS]
)
def test_a_command_on_a_page_is_one(page: Path, command: str) -> None:
    words = shlex.split(re.split(r" [|>&]", command)[0])
    if "megalite" in words and words[0] != "bash":
        make_parser().parse_args(words[words.index("megalite") + 1 :])
    for word in words:
        if re.match(r"(tools|slurm|configs)/[\w/.-]+$", word) and "my" not in Path(word).stem:
            assert (ROOT / word).exists(), word


def test_pages_have_commands() -> None:
    assert len(COMMANDS) > 80
    assert {command.split()[1] for _, command in COMMANDS if command[:8] == "megalite"} > {
        *("train", "finetune", "preprocess", "plan", "serve", "eval", "convert")
    }
