"""What format a file has: known by its name or its content, or refused; never taken for text by
default."""

import bz2
import gzip
import importlib.util
import io
import json
import lzma

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megalite.data.documents import Reading, iter_documents, read_files
from megalite.data.inputs import Report, list_documents
from megalite.data.rows import list_rows
from megalite.errors import DataError


def json_lines(texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(inputs):
    report = Report()
    return [
        document.text for document in iter_documents([str(item) for item in inputs], "text", report)
    ], report


LINES = [f"line number {number}" for number in range(5)]
ARRAY = json.dumps([{"text": text} for text in LINES]).encode()
CSV = b"id,text\n" + b"".join(f'{n},"{text}"\n'.encode() for n, text in enumerate(LINES))


def parquet_bytes():
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": LINES}), sink, compression="snappy")
    return sink.getvalue()


JSONL, PARQUET = json_lines(LINES), parquet_bytes()
READ = {
    "array.json": ARRAY, "array.JSON": b"\xef\xbb\xbf \n" + ARRAY, "array.json.gz": gzip.compress(ARRAY),
    "rows": ARRAY, "a.JSONL": JSONL, "a.JSONL.GZ": gzip.compress(JSONL),
    "a.jsonlines": JSONL, "part-00000": JSONL, "part-r-00001-abc.gz": gzip.compress(JSONL),
    "a.data": JSONL, "b.data": b"\xef\xbb\xbf\r\n \n" + JSONL, "a.ZST": zstandard.ZstdCompressor().compress(JSONL),
    "a.parquet.snappy": PARQUET, "a.snappy.parquet": PARQUET, "A.PARQUET": PARQUET,
    "part-00002": PARQUET,
}  # fmt: skip
TEXTS = {
    "a.TXT": b"one text",
    "a.txt.gz": gzip.compress(b"one text"),
    "README": b"one text",
    "a.md": b"one text",
}
NOT_READ = {
    "a.csv": CSV, "a.tsv": CSV.replace(b",", b"\t"), "a.CSV.gz": gzip.compress(CSV),
    "a.json.bz2": bz2.compress(JSONL),
    "a.jsonl.xz": lzma.compress(JSONL), "a.warc": b"WARC/1.0\r\n", "a.parquet.gz": gzip.compress(PARQUET),
    "a.zip": b"PK\x03\x04", "a.pdf": b"%PDF-1.4",
}  # fmt: skip
NOT_SAID = {
    "part-00003": b"some words\nof a part\n", "b": bz2.compress(JSONL), "c": lzma.compress(CSV),
    "d": b"PK\x03\x04",
    "e": gzip.compress(JSONL), "f": b"WARC/1.0\r\n", "g.bin2": b"ARROW1\0\0",
}  # fmt: skip


@pytest.mark.parametrize("name", [*READ, *TEXTS])
def test_a_format_is_known_by_name_or_content(tmp_path, name):
    (tmp_path / name).write_bytes((READ | TEXTS)[name])
    texts, report = texts_of([tmp_path / name])
    assert texts == (LINES if name in READ else ["one text"]), report
    assert report.num_bad == 0


@pytest.mark.parametrize("reader", [list_documents, list_rows])
def test_a_missing_library_is_named_before_anything_is_read(tmp_path, monkeypatch, reader):
    find = importlib.util.find_spec
    absent = ("pyarrow", "zstandard")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    names = {"a.PARQUET": "pyarrow", "b.arrow": "pyarrow", "c.jsonl.ZST": "zstandard"}
    if reader is list_documents:
        names |= {"d.pq": "pyarrow", "e.parquet.snappy": "pyarrow"}
    for name, library in names.items():
        (tmp_path / name).write_bytes(PARQUET)
        with pytest.raises(DataError, match=rf"{name}: reading it needs {library}; pip install"):
            read_files(reader([str(tmp_path / name)], Report()), Reading(), Report())
    (tmp_path / "part-7").write_bytes(PARQUET)
    texts, report = texts_of([tmp_path / "part-7"])
    assert not texts
    assert "part-7:1: " in report.messages[0]
    assert "reading it needs pyarrow" in report.messages[0]


@pytest.mark.parametrize("content", [b"[]", b" [ \n ]\n", b""])
def test_an_empty_array_holds_no_document(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    texts, _ = texts_of([tmp_path / "a.json"])
    assert not any(texts)


@pytest.mark.parametrize("name", NOT_READ)
def test_a_format_that_is_not_read_is_refused_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(NOT_READ[name])
    with pytest.raises(
        DataError, match=r"files of the format \.\w+ are not read; known are JSON lines"
    ):
        texts_of([tmp_path / name])
    with pytest.raises(DataError, match="no file of documents: files of the format"):
        texts_of([tmp_path])
    (tmp_path / "b.jsonl").write_bytes(JSONL)
    texts, report = texts_of([tmp_path])
    assert texts == LINES, "nothing of it is taken for text"
    assert report.num_bad == 1


@pytest.mark.parametrize("name", NOT_SAID)
def test_a_file_that_says_nothing_of_its_format_is_no_text(tmp_path, name):
    (tmp_path / name).write_bytes(NOT_SAID[name])
    texts, report = texts_of([tmp_path / name])
    assert texts == []
    assert "known are JSON lines" in report.messages[0]


def test_what_is_taken_for_text_unasked_is_told(tmp_path):
    files = {
        "a.json": b'{\n "data": []\n}',
        "b.json": b"[1, 2]",
        "c.weird": b"x",
        "LICENSE": b"y",
        "d.py": b"z",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    texts, report = texts_of([tmp_path])
    assert len(texts) == 5
    assert report.as_text == {"": 1, ".json": 2, ".weird": 1}
    assert (
        "read as plain text, a document each: files 1 without a suffix, 2 .json, 1 .weird"
        in str(report)
    )


def test_rows_of_an_array_without_a_text_are_named(tmp_path):
    (tmp_path / "a.json").write_bytes(
        json.dumps([{"text": "a"}, {"body": "b"}, 3, {"text": 4}]).encode()
    )
    texts, report = texts_of([tmp_path])
    assert texts == ["a"]
    assert [
        message.rpartition(":")[0].rpartition("/")[2].split(":")[1]
        for message in report.messages[:1]
    ] == ["2"]
    assert report.num_bad == 3


def test_what_the_datasets_library_has_beside_its_rows_is_no_text(tmp_path):
    (tmp_path / "state.json").write_text('{\n "_data_files": []\n}')
    (tmp_path / "dataset_info.json").write_text('{\n "features": {}\n}')
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    texts, report = texts_of([tmp_path])
    assert (texts, report.num_hidden) == (LINES, 2)
