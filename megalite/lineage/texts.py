"""Read the text that a document was made of, where it still lies, and hold it against the document's
tokens."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np

from megalite.data.documents import Reading, is_json_lines, lines_of, read_bytes, read_files
from megalite.data.indexed import IndexedDataset
from megalite.data.inputs import Report
from megalite.data.kinds import is_packed
from megalite.data.origins import Origin
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.errors import DataError
from megalite.utils.outside import shown
from megalite.utils.urls import is_url


class SourceText(NamedTuple):
    """Holds what stands in a file where a document was read."""

    text: str
    notes: dict[str, str]
    """What else the line says, such as prepare_corpus's record of a document."""
    spans: dict[int, tuple[int, int]] | None
    """For each token of the document the bytes [first, last) of the text that it is made of; None
    where that cannot be told."""


def read_source(
    dataset: IndexedDataset,
    document: int,
    origin: Origin,
    key: str | None,
    tokenizer: Tokenizer | None,
) -> SourceText | str:
    """Return what stands at the `origin` of a document, its text under `key`, or why that is not
    known."""
    if key is None:
        return "a row, whose text is not the document's tokens alone"
    try:
        record = read_record(key, origin)
    except (OSError, DataError, ValueError) as error:
        return f"its text is not there any more: {error}"
    text = record.pop(key)
    start, stop = dataset.document_start(document), dataset.document_start(document + 1)
    ids = dataset.read(start, stop)
    spans = None
    # Other tokenizers do not say which characters a token is made of.
    if isinstance(tokenizer, HuggingFaceTokenizer):
        found, places = tokenizer.encode_with_offsets([text])[0]
        begin = spelled_from(ids.tolist(), list(found))
        if begin is None:
            return "another text stands there now: its tokens are not those of the document"
        spans = _in_bytes(text, places, begin)
    return SourceText(text, {key: shown(value) for key, value in record.items()}, spans)


def spelled_from(ids: list[int], found: list[int]) -> int | None:
    """Return how many tokens precede those of the text in a document (a BOS token at most); None if
    they are not its tokens."""
    for begin in (0, 1):
        end = begin + len(found)
        # Behind the text an end-of-document token may stand, and nothing else.
        if ids[begin:end] == found and len(ids) - end in (0, 1):
            return begin
    return None


def _in_bytes(text: str, places: Any, begin: int) -> dict[int, tuple[int, int]]:
    """Return the bytes of a text that belong to each token, from characters [first, last)."""
    sizes = [len(letter.encode()) for letter in text]
    # Bytes in front of each character, and of the end.
    before = np.cumsum([0, *sizes]).tolist()
    spans = {}
    for token, (first, last) in enumerate(places, begin):
        spans[token] = (before[first], before[last])
    return spans


def read_record(key: str, origin: Origin) -> dict[str, Any]:
    """Return the record at an origin. Raise OSError, DataError or ValueError."""
    if is_json_lines(origin.path):
        [(_, line)] = json_lines_at(origin.path, [origin])
        return parse_record(key, origin, line)
    reading = Reading(json_key=key, metadata=True)
    for document in read_files([origin.path], reading, Report()):
        if document.line == origin.line:
            return {key: document.text, **document.metadata}
    raise ValueError(f"it has no line {origin.line}")


def parse_record(key: str, origin: Origin, line: bytes) -> dict[str, Any]:
    """Return the record in a `line` of JSON, whose text stands under `key`. Raise ValueError."""
    record = json.loads(line)
    if not isinstance(record, dict) or not isinstance(record.get(key), str):
        raise ValueError(f"line {origin.line} has no {key!r}")
    return record


def json_lines_at(path: str, origins: Collection[Origin]) -> Iterator[tuple[Origin, bytes]]:
    """Yield each of `origins`, which are all of the file `path`, with its line; an empty one where
    the file has no such line any more. Raise OSError, and DataError for a packed file that is
    damaged."""
    can_seek = not is_url(path) and not is_packed(path)
    if can_seek and all(origin.start >= 0 for origin in origins):
        with open(path, "rb") as file:
            for origin in origins:
                file.seek(origin.start)
                # A byte order mark is part of the first line, but not of its JSON.
                yield origin, file.read(origin.length).removeprefix(b"\xef\xbb\xbf")
        return
    # One pass for all of them: a packed file can only be read from its beginning.
    wanted = {origin.line: origin for origin in origins}
    for number, line in enumerate(lines_of(read_bytes(path, Report())), 1):
        if number in wanted:
            yield wanted.pop(number), line
        if not wanted:
            return
    for origin in wanted.values():
        yield origin, b""
