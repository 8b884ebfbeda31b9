"""Every command on a page runs as it stands there, block by block in one folder, and does what the page
promises: pages.yaml says what a page takes for given, and what cannot run here and why."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from doc_pages import PAGES, ROOT, Block, blocks
from megalite.quickstart.ask import free_port
from user_folder import make, type_in

TOLD = yaml.safe_load(Path(__file__).with_name("pages.yaml").read_text(encoding="utf-8"))
LEFT_OUT: dict[str, str] = TOLD.pop("left out")
"""What no page can run here, as patterns, and why."""
NAMES = {str(page.relative_to(ROOT)): page for page in PAGES}
WAIT_S = 600.0


def entry(name: str) -> dict[str, Any]:
    told: dict[str, Any] = TOLD.get(name, {})
    return told


def reason(name: str, command: str) -> str | None:
    """Why a command of a page is not run here; None where it is."""
    for pattern, why in {**LEFT_OUT, **entry(name).get("left out", {})}.items():
        if re.search(pattern, command):
            return str(why)
    return None


def yaml_blocks(name: str) -> list[Block]:
    return [block for block in blocks(NAMES[name]) if block.language == "yaml"]


class Reader:
    """Somebody who types what stands on a page, in a folder of their own."""

    def __init__(self, name: str, capfd: pytest.CaptureFixture[str]):
        self.name, self.capfd, self.said = name, capfd, ""
        self.told = entry(name)
        self.port = free_port()
        self.server: subprocess.Popen[bytes] | None = None

    def as_meant(self, text: str) -> str:
        """Return a text of the page with the reader's own names for what stands for these."""
        for stands, meant in self.told.get("names", {}).items():
            text = text.replace(stands, meant)
        return re.sub(r"(localhost|127\.0\.0\.1):8000", rf"\1:{self.port}", text)

    def type(self, command: str) -> None:
        """Type one command of the page, and what is typed before it."""
        for each in (*self._of("before", command, ()), self.as_meant(command)):
            self.start(each)

    def start(self, command: str) -> None:
        """Run a command; what is a server goes on while others are typed."""
        first, serve, rest = command.rpartition("megalite serve ")
        if not serve:
            self.run(command)
            return
        preparing, _, variables = first.rpartition("&& ")
        if preparing:
            self.run(preparing)
        self.serve(f"{variables}exec {serve}--port {self.port} {rest}")

    def _of(self, key: str, command: str, otherwise: Any) -> Any:
        for beginning, found in self.told.get(key, {}).items():
            if command.startswith(beginning):
                return found
        return otherwise

    def run(self, command: str) -> None:
        small = self._of("small", command, "")
        line, comment, rest = command.partition("  #")
        typed = f"{line.rstrip()} {small}{comment}{rest}" if small else command
        known = {"PORT": str(self.port), "SERVER": str(self.server.pid) if self.server else ""}
        status, printed = type_in(typed, self.capfd, known)
        self.said += f"$ {typed}\n{printed}"
        wanted = self._of("status", command, 0)
        assert status == wanted, self.said
        assert "Traceback" not in printed, self.said

    def serve(self, command: str) -> None:
        self.stop_server()
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        with open("server.log", "ab") as log:
            self.server = subprocess.Popen(
                ["bash", "-c", command], stdout=log, stderr=log, env=os.environ | {"PATH": path}
            )
        until = time.monotonic() + WAIT_S
        while time.monotonic() < until and self.server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health").close()
                return
            time.sleep(0.3)
        raise AssertionError(f"{self.said}$ {command}\n{Path('server.log').read_text()}")

    def stop_server(self) -> None:
        if self.server:
            self.server.terminate()
            assert self.server.wait(WAIT_S) == 0, Path("server.log").read_text()
            self.server = None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("user"))


@pytest.fixture
def reader(
    request: pytest.FixtureRequest,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Iterator[Reader]:
    """A reader of the page that the test names, in a folder with what the page takes for given."""
    if not request.config.getoption("--whole"):
        pytest.skip("minutes: one of the cases of --whole")
    reader = Reader(request.param, capfd)
    folder = shutil.copytree(made, tmp_path / "user")
    for name in ("configs", "slurm", "tools"):  # which some pages write into
        shutil.copytree(ROOT / name, folder / name)
    (folder / "megalite").symlink_to(ROOT / "megalite")
    monkeypatch.chdir(folder)
    write_files(reader.told.get("files", {}))
    for command in reader.told.get("given", ()):
        reader.run(command)
    yield reader
    with contextlib.suppress(AssertionError):
        reader.stop_server()


def write_files(files: Mapping[str, str]) -> None:
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")


RUN = [
    name
    for name in NAMES
    if any("left out" not in each for each in entry(name).get("settings", ()))
    or any(not reason(name, each) for block in blocks(NAMES[name]) for each in block.commands)
]


@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("reader", RUN, indirect=True)
def test_what_stands_on_a_page_runs(reader: Reader) -> None:
    settings = iter(reader.told.get("settings", ()))
    for block in blocks(NAMES[reader.name]):
        if block.language == "yaml":
            save(reader, block, next(settings))
        for command in block.commands:
            if not reason(reader.name, command):
                reader.type(command)
    reader.stop_server()
    for words in reader.told.get("says", ()):
        assert re.search(words, reader.said), reader.said
    for name in reader.told.get("makes", ()):
        assert Path(name).exists(), f"{name}\n{reader.said}"


def save(reader: Reader, block: Block, told: dict[str, Any]) -> None:
    """Write a block of settings to its file, within the config of `over` where it is a part of one,
    and type what is done with it."""
    if "left out" in told:
        return
    values = yaml.safe_load(reader.as_meant(block.text))
    if "over" in told:
        values = within(yaml.safe_load(Path(told["over"]).read_text(encoding="utf-8")), values)
    for key, value in told.get("but", {}).items():
        values = within(values, {key: value})
    write_files({told["file"]: yaml.safe_dump(values, sort_keys=False)})
    for command in told.get("types", ()):
        reader.run(command)


def within(config: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Return a config with a part's settings in place of its own; a model replaces a model."""
    found = dict(config)
    for key, value in part.items():
        mine = found.get(key)
        both = (
            isinstance(mine, dict)
            and isinstance(value, dict)
            and not {"hf", "preset", "family"} & {*value}
        )
        found[key] = within(mine, value) if both else value
    return found


def test_each_page_says_what_becomes_of_all_that_stands_on_it() -> None:
    for name in NAMES:
        said, text = entry(name), NAMES[name].read_text(encoding="utf-8")
        assert len(said.get("settings", ())) == len(yaml_blocks(name)), name
        commands = [each for block in blocks(NAMES[name]) for each in block.commands]
        for pattern in said.get("left out", {}):
            assert any(re.search(pattern, command) for command in commands), (name, pattern)
        for key in ("before", "small", "status"):
            for beginning in said.get(key, {}):
                assert any(command.startswith(beginning) for command in commands), (name, beginning)
        for words in said.get("small", {}).values():
            assert words in text, (name, words)
        for stands in said.get("names", {}):
            assert stands in text, (name, stands)
    assert {*TOLD} <= {*NAMES}
