"""Read rows of labelled data from files: JSON lines (plain, .gz, .zst), JSON arrays, parquet,
Arrow, and folders of these as the `datasets` library saves them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from megalite.data.documents import (
    BOM,
    LONGEST_LINE,
    check_batch,
    check_libraries,
    lines_of,
    read_bytes,
)
from megalite.data.inputs import HF_COMPANIONS, Report, list_files
from megalite.data.kinds import JSON_LINES, PARQUET, kind_by_name, suffix_of
from megalite.data.store import open_file
from megalite.errors import DataError
from megalite.utils.outside import reading

SUFFIXES = (*JSON_LINES, ".json", *PARQUET, ".arrow")
SHOWN = 300  # characters of a row that a message shows


class Row(NamedTuple):
    """Holds one row and where it comes from, or why it is none."""

    path: str
    line: int  # counted from 1; the number of the row in parquet, Arrow and JSON arrays
    values: Mapping[str, Any]
    why: str = ""  # it is none
    start: int = -1  # first byte of its line in the file, unpacked; -1: not known
    num_bytes: int = 0


def list_rows(inputs: Sequence[str], report: Report) -> dict[str, int]:
    """Return the files of rows that `inputs` (files, folders, globs; paths or URLs) match, with
    their sizes. Other files are counted in `report`. Raise DataError if there are none, and for a
    missing library."""
    files = {}
    for path, size in list_files(inputs, report).items():
        folder, name = os.path.split(path)
        if name == "dataset_dict.json":
            raise DataError(
                f"{folder} holds several splits; give one of them, such as {folder}/train"
            )
        if not _kind(path):
            report.bad(path, 1, f"not a file of rows, which end in {', '.join(SUFFIXES)}")
        elif name not in HF_COMPANIONS:
            files[path] = size
    if not files:
        raise DataError(f"{', '.join(inputs)}: no file of rows, which end in {', '.join(SUFFIXES)}")
    check_libraries(files)
    return files


def read_rows(files: Mapping[str, int], report: Report) -> Iterator[Row]:
    """Yield every row in order, including unusable ones. Bytes and empty lines are counted in
    `report`."""
    for path, size in files.items():
        before = report.bytes_read
        reader = _read_json if _kind(path) == "lines" else _read_batches
        row = Row(path, 0, {})
        try:
            for row in reader(path, report):
                yield row
        except Exception as error:  # each library has classes of its own for a damaged file
            yield Row(path, row.line + 1, {}, f"unreadable from here on: {error}")
        report.bytes_read = before + size


def class_names(path: str) -> dict[str, list[str]]:
    """Return the class names of each field that the `datasets` library wrote as numbers; none of a
    file without columns."""
    if _kind(path) == "lines":
        return {}
    import pyarrow
    from pyarrow import parquet

    with reading(path, DataError), open_file(path) as source:
        is_parquet = _kind(path) == "parquet"
        schema = (
            parquet.read_schema(source) if is_parquet else pyarrow.ipc.open_stream(source).schema
        )
    found = {}
    with reading(f"what the datasets library wrote into {path}", DataError):
        described = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        for field, feature in described.get("info", {}).get("features", {}).items():
            inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
            if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
                found[field] = [str(name) for name in inner.get("names") or ()]
    return found


def excerpt(values: Mapping[str, Any]) -> str:
    """Return a row as text for a message, shortened."""
    text = json.dumps(values, ensure_ascii=False, default=str).encode(errors="replace").decode()
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} …"


def _kind(path: str) -> str:
    """Return "lines" (or an array, which its beginning tells), "parquet" or "arrow"; "" for a file
    of no rows."""
    kind = "lines" if suffix_of(path) == ".json" else kind_by_name(path)
    return kind if kind in ("lines", "parquet", "arrow") else ""


def _read_json(path: str, report: Report) -> Iterator[Row]:
    """Yield the rows of JSON lines, or of one JSON array."""
    next_start, is_first = 0, True
    for number, line in enumerate(lines_of(read_bytes(path, report)), 1):
        start, num_bytes = next_start, len(line)
        # Of an overlong line only the beginning came: what follows is somewhere in the file.
        is_known = start >= 0 and num_bytes <= LONGEST_LINE
        next_start = start + num_bytes + 1 if is_known else -1
        if number == 1:
            line = line.removeprefix(BOM)  # some editors write it
        if not line.strip():
            report.num_empty += 1
            continue
        # An array is one value, and may be on one line or on many: it is read as a whole, anew.
        if is_first and line.lstrip().startswith(b"["):
            values = _parsed(b"".join(read_bytes(path, Report())).removeprefix(BOM))
            yield from (_row(path, item, value) for item, value in enumerate(values, 1))
            return
        is_first = False
        if len(line) > LONGEST_LINE:
            yield Row(path, number, {}, f"the line is longer than {LONGEST_LINE:,} bytes")
        else:
            try:
                row = _row(path, number, _parsed(line))
                yield row._replace(start=start, num_bytes=num_bytes)
            except (ValueError, RecursionError) as error:
                yield Row(
                    path, number, {"": line[:SHOWN].decode(errors="replace")}, f"not JSON: {error}"
                )


def _parsed(text: bytes) -> Any:
    """Parse JSON, including NaN, which Python and pandas write, and halves of surrogate pairs: only
    a row that uses them is bad."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def _row(path: str, number: int, values: Any) -> Row:
    """Return a parsed value as a row; anything but an object is a row with an error."""
    if isinstance(values, dict):
        return Row(path, number, values)
    return Row(path, number, {"": values}, f"expected a JSON object, got {type(values).__name__}")


def _read_batches(path: str, report: Report) -> Iterator[Row]:
    """Yield the rows of parquet, or of Arrow as a stream of record batches."""
    import pyarrow
    from pyarrow import parquet

    before, count = report.bytes_read, 0
    with open_file(path) as source:
        batches = (
            parquet.ParquetFile(source).iter_batches(batch_size=256)
            if _kind(path) == "parquet"
            else pyarrow.ipc.open_stream(source)
        )
        for batch in batches:
            report.bytes_read = before + source.tell()
            check_batch(batch)
            yield from _rows_of(path, batch, count + 1)
            count += batch.num_rows


def _rows_of(path: str, batch: Any, first: int) -> Iterator[Row]:
    """Yield the rows of a batch. If it cannot be converted, convert row by row, so that an error
    costs only its own row."""
    try:
        yield from [
            Row(path, number, values) for number, values in enumerate(batch.to_pylist(), first)
        ]
    except (
        ValueError,
        OverflowError,
    ) as error:
        # A text that is not UTF-8, a date that Python does not have.
        if batch.num_rows == 1:
            yield Row(path, first, {}, f"unreadable: {error}")
            return
        for index in range(batch.num_rows):
            yield from _rows_of(path, batch.slice(index, 1), first + index)
