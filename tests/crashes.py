"""A folder whose every file operation is recorded, to be seen as a crash at any moment would leave
it.

A killed process leaves what it has done. A power cut leaves at least what was made durable: a
file's content as of its last fsync, and a folder's entries as of its own. What lies between may be
there or not: names whose folder was not synced, and files that have their name but not their
content. `Recorded.crashes` gives the extremes of it.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

WATCHED = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}
Tree = dict[str, int | None]
"""Paths below the folder, with the number of a file's content; None: a folder."""


@dataclass(frozen=True)
class Crash:
    """What a crash at some moment leaves behind."""

    moment: int
    kind: str
    """killed: all is there; lost: only what is durable; torn: all names, but contents only where
    they are durable."""
    files: dict[str, bytes | None]
    """Paths below the folder; None: a folder."""
    claimed: tuple[Any, ...]
    """What had been `claim`ed to be safe by then."""

    def write(self, folder: Path) -> None:
        """Lay the files out below a new folder."""
        folder.mkdir()
        for path, content in sorted(self.files.items()):
            if content is None:
                (folder / path).mkdir()
            else:
                (folder / path).write_bytes(content)


@dataclass
class Recorded:
    """What has happened to a folder, and to every file and folder in it."""

    root: Path
    contents: list[bytes] = field(default_factory=list)
    # (inode, size, mtime) → content.
    _known: dict[tuple[int, int, int], int] = field(default_factory=dict)
    # Inode → a descriptor that keeps its number its own.
    _held: dict[int, int] = field(default_factory=dict)
    _synced: dict[int, int] = field(default_factory=dict)  # inode of a file → content
    # Inode of a folder → name → inode.
    _entries: dict[int, dict[str, int]] = field(default_factory=dict)
    _folders: set[int] = field(default_factory=set)
    _moments: list[tuple[Tree, Tree, Tree, tuple[Any, ...]]] = field(default_factory=list)
    _claimed: tuple[Any, ...] = ()

    def look(self, settle: bool = False) -> None:
        """Take down how everything is now. `settle` makes all of it durable."""
        now: Tree = {}
        torn: Tree = {}
        for path in sorted(self.root.rglob("*")):
            name, inode = str(path.relative_to(self.root)), self._hold(path)
            if inode is None:
                continue
            if path.is_dir():
                now[name] = torn[name] = None
            else:
                now[name] = self._content(path)
                if settle and (content := now[name]) is not None:
                    self._synced[inode] = content
                torn[name] = self._synced.get(inode, self._number(b""))
        if settle:
            for folder in (self.root, *(path for path in self.root.rglob("*") if path.is_dir())):
                self._sync_folder(folder)
        self._moments.append(
            (now, dict(self._durable(self.root.stat().st_ino, "")), torn, self._claimed)
        )

    def synced(self, descriptor: int) -> None:
        """What is open under this descriptor has become durable."""
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path != self.root and self.root not in path.parents:
            return
        if path.is_dir():
            self._sync_folder(path)
        elif (inode := self._hold(path)) is not None:
            self._synced[inode] = self._content(path)
        self.look()

    def claim(self, what: Any) -> None:
        """From now on this must survive a crash."""
        self._claimed = (*self._claimed, what)
        self.look()

    def crashes(self) -> Iterator[Crash]:
        """Every different state that a crash can have left."""
        seen = set()
        for moment, (*trees, claimed) in enumerate(self._moments):
            for kind, tree in zip(("killed", "lost", "torn"), trees, strict=True):
                key = (tuple(sorted(tree.items())), claimed)
                if key not in seen:
                    seen.add(key)
                    files = {
                        path: None if n is None else self.contents[n] for path, n in tree.items()
                    }
                    yield Crash(moment, kind, files, claimed)

    def _hold(self, path: Path) -> int | None:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        inode = os.fstat(descriptor).st_ino
        if inode in self._held:
            os.close(descriptor)
        else:
            self._held[inode] = descriptor
        return inode

    def _content(self, path: Path) -> int:
        found = path.stat()
        key = (found.st_ino, found.st_size, found.st_mtime_ns)
        if key not in self._known:
            self._known[key] = self._number(path.read_bytes())
        return self._known[key]

    def _number(self, content: bytes) -> int:
        if content not in self.contents:
            self.contents.append(content)
        return self.contents.index(content)

    def _sync_folder(self, path: Path) -> None:
        inodes = {entry.name: self._hold(Path(entry.path)) for entry in os.scandir(path)}
        self._folders |= {entry.inode() for entry in os.scandir(path) if entry.is_dir()}
        self._entries[path.stat().st_ino] = {
            name: inode for name, inode in inodes.items() if inode is not None
        }

    def _durable(self, folder: int, prefix: str) -> Iterator[tuple[str, int | None]]:
        for name, inode in self._entries.get(folder, {}).items():
            if inode in self._folders:
                yield prefix + name, None
                yield from self._durable(inode, f"{prefix}{name}/")
            else:
                yield prefix + name, self._synced.get(inode, self._number(b""))

    def close(self) -> None:
        for descriptor in self._held.values():
            os.close(descriptor)


_watching: list[Recorded] = []
_busy = threading.local()


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching or event not in WATCHED or getattr(_busy, "now", False):
        return
    paths = [str(argument) for argument in arguments[:2] if isinstance(argument, str | os.PathLike)]
    _busy.now = True
    try:
        for recorded in _watching:
            if any(path.startswith(str(recorded.root)) for path in paths):
                recorded.look()
    finally:
        _busy.now = False


_installed: list[bool] = []


@contextmanager
def recorded(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorded]:
    """Record what is done below a folder, by any thread. What is there at first counts as
    durable."""
    if not _installed:  # an audit hook cannot be taken away again
        sys.addaudithook(_hook)
        _installed.append(True)
    record, real = Recorded(root.resolve()), os.fsync

    def fsync(descriptor: Any) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        real(number)
        _busy.now = True
        try:
            record.synced(number)
        finally:
            _busy.now = False

    record.look(settle=True)
    monkeypatch.setattr(os, "fsync", fsync)
    _watching.append(record)
    try:
        yield record
        record.look()
    finally:
        _watching.remove(record)
        monkeypatch.setattr(os, "fsync", real)
        record.close()
