"""Find documents of token files by what a person calls them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from typing import NamedTuple

import orjson

from megalite.data.documents import is_json_lines, lines_of, read_bytes
from megalite.data.indexed import IndexedDataset
from megalite.data.inputs import Report
from megalite.data.origins import Origins, full_path, open_origins
from megalite.errors import ConfigError, DataError

Found = dict[str, list[tuple[int, int]]]
"""Number of a token file, and document of it, of each document that a name stands for."""


class _Name(NamedTuple):
    """Holds FILE:LINE, or PREFIX#NUMBER."""

    file: str
    is_line: bool
    number: int

    def is_of(self, path: str, line: int) -> bool:
        """Return whether it names a line of `path`, whose end is enough."""
        return line == self.number and (
            full_path(path) == full_path(self.file) or path.endswith(f"/{self.file}")
        )


class Documents:
    """Finds documents of several token files."""

    def __init__(self, datasets: Sequence[IndexedDataset]) -> None:
        self.datasets = tuple(datasets)
        self.origins = cache(self._open_origins)
        """Returns what the documents of a token file, by its number, were made of."""

    def _open_origins(self, number: int) -> Origins | None:
        return open_origins(self.datasets[number])

    def find(self, wanted: Sequence[str]) -> Found:
        """Return the documents that each of `wanted` names: PREFIX#NUMBER; or FILE:LINE, of a file
        that was preprocessed, or of one that prepare_corpus made this of, which takes reading the
        former. Raise DataError for a name without a document, and ConfigError for one that is
        neither."""
        names = {each: _parsed(each) for each in wanted}
        found = {each: list(self._named(name)) for each, name in names.items()}
        # What was preprocessed goes first: only for the rest are the files themselves read.
        missing = {each: name for each, name in names.items() if name.is_line and not found[each]}
        if missing:
            for each, place in self._recorded(missing):
                found[each].append(place)
        for each in names:
            if not found[each]:
                raise DataError(
                    f"{each}: no document of the run's data, of which lines count from 1{self._why()}"
                )
        return found

    def _why(self) -> str:
        """Return why a line may not be found, as the end of a sentence."""
        without = [
            dataset.prefix
            for file, dataset in enumerate(self.datasets)
            if self.origins(file) is None
        ]
        if not without:
            return ""
        return f"; of {', '.join(without)} there is no .src that says what it was made of: name PREFIX#NUMBER instead"

    def _named(self, name: _Name) -> Iterator[tuple[int, int]]:
        """Yield the documents that a name stands for by what was noted in preprocessing."""
        for file, dataset in enumerate(self.datasets):
            if name.is_line:
                origins = self.origins(file)
                lines = origins.documents_of(name.file, name.number) if origins else ()
                yield from ((file, document) for document in lines)
            # The end of a path is enough, but whole parts of it: "a/b" does not name "aa/b".
            elif dataset.prefix == name.file or dataset.prefix.endswith(f"/{name.file}"):
                if name.number >= dataset.num_documents:
                    raise DataError(
                        f"{dataset.prefix}#{name.number}: its documents are 0 to {dataset.num_documents - 1:,}"
                    )
                yield file, name.number

    def _recorded(self, names: dict[str, _Name]) -> Iterator[tuple[str, tuple[int, int]]]:
        """Yield the documents whose lines were made of the lines `names`, as prepare_corpus has
        noted there."""
        # By their number first: corpora have many lines, and thousands of names may be asked for.
        by_number: dict[int, list[str]] = {}
        for each, name in names.items():
            by_number.setdefault(name.number, []).append(each)
        for file in range(len(self.datasets)):
            origins = self.origins(file)
            if origins is None:
                continue
            for path in dict.fromkeys(path for path, *_ in origins.parts):
                for line, (source, number) in _sources_in(path):
                    for each in by_number.get(number, ()):
                        if names[each].is_of(source, number):
                            for document in origins.documents_of(path, line):
                                yield each, (file, document)


def _parsed(wanted: str) -> _Name:
    """Return the parts of FILE:LINE or PREFIX#NUMBER. Raise ConfigError."""
    match = re.fullmatch(r"(.+)([:#])(\d+)", wanted)
    if not match or (match[2] == ":" and int(match[3]) < 1):
        raise ConfigError(
            f"{wanted!r} is neither FILE:LINE, with lines counted from 1, nor PREFIX#NUMBER of a token file"
        )
    return _Name(match[1], match[2] == ":", int(match[3]))


def _sources_in(path: str) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield the number of each line of JSON that names the path and the line that it was made of,
    with these. A file that is gone names nothing."""
    with suppress(OSError, DataError):
        if not is_json_lines(path):
            return
        for number, line in enumerate(lines_of(read_bytes(path, Report())), 1):
            # Most corpora have no such record: a line without one is no error.
            with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                record = orjson.loads(line)
                if isinstance(record["path"], str) and isinstance(record["line"], int):
                    yield number, (record["path"], record["line"])
