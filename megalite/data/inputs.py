"""List the files that a user's inputs (files, folders, globs; paths or URLs) match, in a fixed
order, and report what became of them: unusable input is never fatal and never silent."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megalite.data.kinds import KNOWN, kind_by_name, suffix_of
from megalite.data.store import Store
from megalite.errors import DataError
from megalite.utils.spelling import instead_of
from megalite.utils.urls import is_url

MAX_MESSAGES = 20
# Files that the `datasets` library (`save_to_disk`) and hub snapshots keep beside the data.
HF_COMPANIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


@dataclass
class Report:
    """Counts what became of the inputs. `bytes_read` of `total_bytes` is the progress, in bytes on
    disk."""

    total_bytes: int = 0
    bytes_read: int = 0
    num_documents: int = 0
    num_empty: int = 0
    num_bad: int = 0
    num_mended: int = 0
    num_hidden: int = 0
    num_binary: int = 0
    # What else is no document, by what it is.
    left_out: dict[str, int] = field(default_factory=dict)
    # Files whose name did not say so, by its suffix.
    as_text: dict[str, int] = field(default_factory=dict)
    num_repeated: int = 0
    messages: list[str] = field(default_factory=list)

    def leave_out(self, what: str) -> None:
        """Count one item that is no document, by what it is."""
        self.left_out[what] = self.left_out.get(what, 0) + 1

    def bad(self, path: str, line: int, why: object) -> None:
        """Count one unusable line or file, and keep the message if it is among the first."""
        self.num_bad += 1
        if len(self.messages) < MAX_MESSAGES:
            self.messages.append(printable(f"{path}:{line}: {why}"))

    def bad_folder(self, error: OSError) -> None:
        """Count a folder that cannot be read, which os.walk would pass over in silence."""
        self.bad(str(error.filename), 1, f"unreadable folder: {error.strerror}")

    def __str__(self) -> str:
        """Return everything that was left out, one line each; empty if nothing was."""
        counts = {
            "bad lines or files": self.num_bad,
            "empty documents": self.num_empty,
            "hidden files or folders": self.num_hidden,
            "binary files": self.num_binary,
            **self.left_out,
            "more names of files that are taken already": self.num_repeated,
        }
        lines = [f"left out: {count:,} {what}" for what, count in counts.items() if count]
        if self.num_mended:
            lines.append(f"mended: {self.num_mended:,} documents that were not all UTF-8")
        if self.as_text:
            named = (
                f"{count:,} {suffix or 'without a suffix'}"
                for suffix, count in self.as_text.items()
            )
            lines.append(f"read as plain text, a document each: files {', '.join(named)}")
        lines += _grouped(self.messages)
        if (more := self.num_bad - len(self.messages)) > 0:
            lines.append(f"… and {more:,} more")
        return "\n".join(lines)


def printable(text: str) -> str:
    """Return a text as a console takes it. A byte of a file's name that is not UTF-8, which is a
    lone surrogate in Python, is written as an escape."""
    return text.encode(errors="backslashreplace").decode()


def _grouped(messages: Sequence[str]) -> list[str]:
    """Return the messages `file:line: why`, one for each reason, with how many more there are."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for message in messages:
        place, why = re.fullmatch(r"(.*?:\d+): (.*)", message, re.S).groups()  # type: ignore[union-attr]
        first.setdefault(why, place)
        counts[why] += 1
    return [
        f"{place}{f' and {counts[why] - 1} more' * (counts[why] > 1)}: {why}"
        for why, place in first.items()
    ]


def list_documents(
    inputs: Sequence[str], report: Report, also: tuple[str, ...] = ()
) -> dict[str, int]:
    """Return the files of `inputs` that hold documents, with their sizes, as `list_files` does;
    `also` are suffixes that the caller reads itself. Other files are counted in `report`. Raise
    DataError for one that is named explicitly, and if no file is left."""
    files = list_files(inputs, report)
    refused = ""
    for path in list(files):
        if os.path.basename(path) in HF_COMPANIONS:
            report.num_hidden += 1
        elif kind_by_name(path) != "refused" or path.lower().endswith(also):
            continue
        else:
            refused = f"files of the format {suffix_of(path)} are not read; {KNOWN}"
            if path in inputs:
                raise DataError(f"{path}: {refused}")
            report.bad(path, 1, refused)
        del files[path]
    if not files:
        raise DataError(
            f"{', '.join(inputs)}: no file of documents{f': {refused}' if refused else ''}"
        )
    return files


def list_files(inputs: Sequence[str], report: Report) -> dict[str, int]:
    """Return the files, with sizes in bytes, that `inputs` (files, folders, globs; paths or URLs)
    match, in a fixed order. Each file comes once, whatever links and spellings lead to it. `~` is
    the home directory. Raise DataError if an input matches nothing."""
    found: dict[str, int] = {}
    for item in inputs:
        found |= _expand(item, report)
    taken: dict[str, str] = {}
    # Prefer a file's own name to that of a link.
    # False sorts before True: real names come first, and setdefault keeps the first.
    for path in sorted(
        found, key=lambda path: is_url(path) or os.path.realpath(path) != os.path.abspath(path)
    ):
        taken.setdefault(path if is_url(path) else os.path.realpath(path), path)
    report.num_repeated += len(found) - len(taken)
    kept = set(taken.values())
    return {path: size for path, size in found.items() if path in kept}


def _expand(item: str, report: Report) -> list[tuple[str, int]]:
    """Return the files that one input matches, with sizes, sorted. Raise DataError if there are
    none."""
    files = _find(item, report) if is_url(item) else _match(item, report)
    if not files and not is_url(item) and os.path.exists(item) and not os.path.isdir(item):
        raise DataError(
            f"input {item!r} is a pipe or a device, which cannot be read more than once; write it to a file first"
        )
    if not files:
        raise DataError(
            f"input {item!r} matches no file; give existing files, folders or a quoted glob"
            f"{instead_of(item)}"
        )
    return files


def _match(item: str, report: Report) -> list[tuple[str, int]]:
    """Return the local files that a path, folder or glob matches, with sizes."""
    if not os.path.exists(item):
        item = os.path.expanduser(item)
    # A file may have brackets in its name: what exists is no pattern.
    matches = [item] if os.path.exists(item) else sorted(set(_glob(item, report)))
    files: list[str] = []
    for match in matches:
        files += _walk(match, report) if os.path.isdir(match) else [match]
    return [(path, os.stat(path).st_size) for path in files if os.path.isfile(path)]


def _glob(pattern: str, report: Report) -> Iterator[str]:
    """Yield the paths that match a glob. `**` is any folder below, as in Python's glob, but links
    that lead back are not followed. Folders that cannot be read are counted in `report`."""
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    place = parts.index("**")
    tops = glob.glob("/".join([*parts[:place], ""])) if place else ["."]
    if place == len(parts) - 1:  # all below, as a folder stands for
        yield from tops
        return
    for top in tops:
        for folder in _folders(top, report):
            below = os.path.join(glob.escape(folder), *parts[place + 1 :])
            yield from _glob(below if place else below.removeprefix("./"), report)


def _folders(top: str, report: Report) -> Iterator[str]:
    """Yield a folder and all visible ones below it, also behind links, each once."""
    entered: set[str] = set()
    for root, folders, _ in os.walk(top, followlinks=True, onerror=report.bad_folder):
        real = os.path.realpath(root)
        if real in entered:
            folders.clear()
            continue
        entered.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield root


def _find(url: str, report: Report) -> list[tuple[str, int]]:
    """Return the visible objects that a URL matches, with sizes."""
    found = Store(url).find()
    visible = [
        item for item in found if not any(part.startswith(".") for part in item.below.split("/"))
    ]
    report.num_hidden += len(found) - len(visible)
    return [(item.url, item.size) for item in visible]


def _walk(folder: str, report: Report) -> Iterator[str]:
    """Yield the visible files below `folder`, sorted, and count the hidden ones."""
    for root, folders, names in os.walk(folder, onerror=report.bad_folder):
        visible = [name for name in names if not name.startswith(".")]
        entered = sorted(name for name in folders if not name.startswith("."))
        report.num_hidden += len(names) - len(visible) + len(folders) - len(entered)
        folders[:] = entered  # os.walk goes on with what is left here, in this order
        yield from (os.path.join(root, name) for name in sorted(visible))
