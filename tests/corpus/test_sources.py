"""Every format that a source may have, and which files come into which shard."""

import errno
import fcntl
import gzip
import itertools
import json
import os
import time
import tracemalloc
from collections import Counter
from types import SimpleNamespace

import fsspec
import pyarrow
import pytest
import zstandard
from datatrove.data import Document
from machine_corpus import html, prose, warc_record
from pyarrow import parquet

from megalite.corpus.checks import Extract
from megalite.corpus.config import CorpusConfig, ExtractConfig, Source
from megalite.corpus.files import whole_file
from megalite.corpus.run import _remove_leftovers, prepare_corpus
from megalite.corpus.sources import InputFile, ReadInputs, list_inputs, shards_of
from megalite.corpus.warc import OTHER_TYPES, read_warc
from megalite.data.documents import Reading, read_files
from megalite.data.inputs import Report, list_files
from megalite.errors import DataError
from megalite.utils.locks import alone_in


def kept_of(output):
    files = list_files([str(output / "train")], Report())
    return {
        document.text: document.metadata
        for document in read_files(files, Reading(metadata=True), Report())
    }


def prepare(tmp_path, **source):
    settings = {"output": tmp_path / "out", "workers": 1, "split": {"valid": 0, "test": 0}}
    config = CorpusConfig.model_validate(
        settings | {"sources": [{"name": "a", "path": str(tmp_path / "in")} | source]}
    )
    return prepare_corpus(config), kept_of(tmp_path / "out")


def write_arrow(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, table.schema) as writer,
    ):
        for batch in table.to_batches(max_chunksize=2):
            writer.write_batch(batch)


@pytest.mark.parametrize("kind", ["parquet", "datasets"])
def test_columns_come_along(tmp_path, kind):
    texts = [prose(seed) for seed in range(5)]
    table = pyarrow.table(
        {"body": [*texts, None], "stars": range(6), "id": [f"id-{n}" for n in range(6)]}
    )
    folder = tmp_path / "in"
    if kind == "parquet":
        folder.mkdir()
        parquet.write_table(table, folder / "0.parquet")
    else:  # as `save_to_disk` lays it out
        write_arrow(folder / "train" / "data-00000-of-00002.arrow", table.slice(0, 4))
        write_arrow(folder / "train" / "data-00001-of-00002.arrow", table.slice(4))
        for name in ("dataset_dict.json", "train/state.json", "train/dataset_info.json"):
            (folder / name).write_text('{"text": "bookkeeping"}')
    report, kept = prepare(tmp_path, json_key="body")
    assert [kept[text]["metadata"] for text in texts] == [{"stars": number} for number in range(5)]
    assert [kept[text]["id"] for text in texts] == [f"id-{number}" for number in range(5)]
    assert len(kept) == 5
    row = {"parquet": 6, "datasets": 2}[kind]  # of its file
    assert report["messages"][0].endswith(f":{row}: 'body' is not text but NoneType")


def test_damaged_arrow_is_reported_and_what_came_before_is_read(tmp_path):
    write_arrow(
        tmp_path / "a.arrow", pyarrow.table({"text": [str(number) * 1000 for number in range(10)]})
    )
    data = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(data[: len(data) // 2])
    report = Report()
    documents = list(read_files([str(tmp_path / "a.arrow")], Reading(), report))
    assert [document.text for document in documents] == [
        str(number) * 1000 for number in range(len(documents))
    ]
    assert 0 < len(documents) < 10
    assert report.num_bad == 1
    (tmp_path / "a.arrow").write_bytes(b"no Arrow at all")
    assert not list(read_files([str(tmp_path / "a.arrow")], Reading(), report))
    assert report.num_bad == 2


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_warc(tmp_path, packing):
    pages = [b"".join(warc_record(f"p{seed}", html(prose(seed)))) for seed in range(3)]
    pages.insert(1, pages[0].replace(b"text/html", b"image/png").replace(b"urn:p0", b"urn:image"))
    pages.insert(0, pages[0].replace(b"WARC-Type: response", b"WARC-Type: request"))
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[packing]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.warc{packing}").write_bytes(b"".join(map(pack, pages)))
    report, kept = prepare(tmp_path)
    assert [metadata["id"] for metadata in kept.values()] == ["<urn:p0>", "<urn:p1>", "<urn:p2>"]
    assert set(kept) == {prose(seed) for seed in range(3)}
    assert report["stages"][0]["dropped"][OTHER_TYPES]["documents"] == 1


def test_wet_is_text_and_other_charsets_are_decoded(tmp_path):
    text = prose(0).replace("village", "pâtisserie").replace("harbour", "château")
    record = b"".join(warc_record("wet", ""))
    body = text.encode()
    header = record.partition(b"Content-Type")[0].replace(b"response", b"conversion")
    wet = (
        header
        + b"Content-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % len(body)
        + body
        + b"\r\n\r\n"
    )
    (tmp_path / "a.wet.gz").write_bytes(gzip.compress(wet))
    documents = list(read_warc(str(tmp_path / "a.wet.gz"), Report()))
    assert [document.text for document in documents] == [text]
    page = html(text).replace("<head>", '<head><meta charset="iso-8859-1">')
    latin = page.encode("latin-1")
    http = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + latin
    header = b"".join(warc_record("latin", "")).partition(b"Content-Length")[0]
    (tmp_path / "a.warc").write_bytes(
        header + b"Content-Length: %d\r\n\r\n" % len(http) + http + b"\r\n\r\n"
    )
    assert "pâtisserie" in next(read_warc(str(tmp_path / "a.warc"), Report())).text


def test_html_in_json_lines(tmp_path):
    (tmp_path / "in").mkdir()
    pages = [html(prose(0)), "<html><body><script>x</script></body></html>", ""]
    (tmp_path / "in" / "a.jsonl").write_text(
        "".join(json.dumps({"text": page}) + "\n" for page in pages)
    )
    report, kept = prepare(tmp_path, html=True)
    assert list(kept) == [prose(0)]
    extract = report["stages"][1]
    dropped = {reason: dropped["documents"] for reason, dropped in extract["dropped"].items()}
    assert (extract["name"], dropped) == ("extract", {"no text in the HTML": 1})


def test_pages_that_hang_or_crash_the_parser_are_dropped(monkeypatch):
    """By a clock that runs out for a page that hangs alone, not for a process that is slow to
    start."""

    def extract(page):
        if page == "":  # as it begins
            time.sleep(0.3)
        if page == "hang":
            time.sleep(60)
        if page == "crash":
            os._exit(139)
        return page

    step = Extract(ExtractConfig(timeout_seconds=0.1))
    clock = SimpleNamespace()
    monkeypatch.setattr("datatrove.pipeline.extractors.base.time", clock)
    step._extractor.extract = extract
    documents = [
        Document(text=text, id=text, metadata={"html": True})
        for text in ("one", "hang", "two", "crash", "three")
    ]
    said = []
    with step:
        for document in documents:
            times = itertools.chain(
                [0.0], itertools.repeat(0.1 if document.text == "hang" else 0.0)
            )
            clock.monotonic = times.__next__
            said.append(step(document, Counter()))
    assert said == [None, "no text after 0.1 s", None, "the HTML crashed the parser", None]


def test_bytes_that_are_not_utf8_are_mended_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes("Un été à la plage, œuvre".encode("cp1252"))
    (tmp_path / "b.txt").write_bytes("Долгое лето на берегу".encode("koi8-r"))
    (tmp_path / "c.jsonl").write_bytes(
        b'{"text": "caf\xe9 \xc3\xa9", "k\xe9": "\xe9"}\n{"text": "\\ud83d alone"}\n'
    )
    report = Report()
    files = list_files([str(tmp_path)], report)
    documents = list(read_files(files, Reading(metadata=True, mend=True), report))
    assert [document.text for document in documents] == ["Un été à la plage, œuvre", "café é"]
    assert [document.num_mended for document in documents] == [4, 1]
    assert (report.num_mended, report.num_bad) == (2, 2)
    assert "not UTF-8: 18 bytes of 21 characters" in report.messages[0]
    assert "lone surrogate" in report.messages[1]
    assert "mended: 2 documents" in str(report)


def test_shards_follow_from_the_files(tmp_path):
    files = [
        InputFile("a", str(number), size) for number, size in enumerate([3, 3, 3, 20, 1, 1, 1])
    ]
    assert [[file.num_bytes for file in shard] for shard in shards_of(files, 6)] == [
        [3, 3],
        [3],
        [20],
        [1, 1, 1],
    ]
    many = [InputFile("a", str(number), 10**10) for number in range(5000)]
    assert len(shards_of(many, None)) == 1000


def test_a_file_in_two_sources_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    sources = [
        Source(name="one", path=str(tmp_path)),
        Source(name="two", path=str(tmp_path / "*.jsonl")),
    ]
    with pytest.raises(DataError, match=r"a\.jsonl is in two sources, one and two"):
        list_inputs(sources, Report())


def test_sources_in_an_object_store(tmp_path):
    pages = [b"".join(warc_record(f"page-{seed}", html(prose(seed)))) for seed in (1, 2)]
    texts = [prose(seed) for seed in (3, 4)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    store = fsspec.filesystem("memory")
    store.pipe("/sources/a.jsonl", lines.encode())
    store.pipe("/sources/b.warc.gz", b"".join(map(gzip.compress, pages)))
    report, kept = prepare(tmp_path, path="memory://sources/*")
    assert report["sources"]["a"]["read"]["documents"] == 4
    assert {kept[text]["path"] for text in texts} == {"memory:///sources/a.jsonl"}
    store.rm("/sources", recursive=True)


def test_files_that_vanish_after_they_were_listed_are_told(tmp_path):
    names = ["a.jsonl", "b.txt", "c.parquet", "d.warc.gz", "e"]
    files = [{"source": "a", "path": str(tmp_path / name), "num_bytes": 9} for name in names]
    (tmp_path / "shards.json").write_text(json.dumps([files]))
    reader = ReadInputs([Source(name="a", path="x")], tmp_path / "shards.json")
    assert not list(reader.run())
    assert reader.report.num_bad == len(names)
    for name, message in zip(names, reader.report.messages, strict=True):
        assert f"/{name}:1: " in message
        assert "No such file" in message


def test_a_folder_of_one_process_at_a_time_where_files_have_locks(tmp_path, monkeypatch):
    with (
        alone_in(tmp_path / "out"),
        pytest.raises(DataError, match="is being written by another process"),
        alone_in(tmp_path / "out"),
    ):
        pass

    def refused(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refused)
    with alone_in(tmp_path / "out"):
        assert (tmp_path / "out" / "lock").exists()


def test_a_full_disk_is_named(tmp_path):
    def fill():
        with whole_file(tmp_path / "x.json") as file, open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), file.fileno())
            file.write(b"{}")

    with pytest.raises(OSError, match=r"No space left on device: .*x\.json"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_only_leftovers_of_its_own_are_removed(tmp_path):
    kept = [tmp_path / name for name in (".another.1.tmp", "theirs/.x.json.2.tmp")]
    left = [tmp_path / name for name in ("train/.0.jsonl.3.tmp", ".report.html.4.tmp")]
    for path in kept + left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    _remove_leftovers(tmp_path)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in left)


def test_a_line_without_end_is_reported_and_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr("megalite.data.documents.LONGEST_LINE", 1_000_000)
    lines = [json.dumps({"text": text}) for text in ("first", "x" * 30_000_000, "last")]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = Report()
    tracemalloc.start()
    documents = list(read_files([str(tmp_path / "a.jsonl")], Reading(), report))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [document.text for document in documents] == ["first", "last"]
    assert report.messages == [f"{tmp_path}/a.jsonl:2: the line is longer than 1,000,000 bytes"]
    assert peak < 5_000_000
