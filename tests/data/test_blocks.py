import gzip
import json

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from megalite.data import blocks as module
from megalite.data.blocks import LineNumbers, Shard, add_to, iter_blocks, texts_of
from megalite.data.documents import iter_documents
from megalite.data.inputs import Report, list_files

LINES = [
    b'{"text": "one"}',
    b'{"text": "two \xc3\xa9", "n": NaN}',
    b'{"text": "",\t"x": 1}',
    b'{"text": "\\ud83d\\ude00 \\u00e9"}',
    b'{"text": "lone \\ud83d"}',
    b'{"text": "twice", "text": "again"}',
    b'{"text": "\xff"}',
    b'{"text": "x", "y": "\xff"}',
    b'{"text": "raw \t tab"}',
    b'{"text": 7}',
    b'{"n": 1}',
    b'["text"]',
    b'"text"',
    b"7",
    b"nonsense",
    b"   ",
    b"",
    b"\r",
    b'{"text": "cr"}\r',
    b'\xef\xbb\xbf{"text": "marked"}',
    b'{"text": "' + b"long " * 30 + b'"}',
    b'{"text": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text": "deep", "y": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    b'{"text": "big", "y": 123456789012345678901234567890}',
]


def read(files, shard):
    texts, report = [], Report()
    numbers = LineNumbers(report)
    for block in iter_blocks(list_files(files, Report()), "text", shard):
        found = texts_of(block, "text")
        texts += found.texts
        numbers.add(block, *found[1:])
    return texts, report


@settings(
    deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=st.lists(st.sampled_from(LINES), max_size=30),
    ends=st.booleans(),
    read_bytes=st.integers(1, 300),
    block_bytes=st.integers(1, 300),
    count=st.integers(1, 9),
    json_texts=st.sampled_from([module.json_texts, module.json_texts_reference]),
)
def test_the_documents_of_one_reader_however_cut(
    tmp_path, lines, ends, read_bytes, block_bytes, count, json_texts
):
    """The same texts, and the same messages with the same line numbers, as `iter_documents`; and
    each in one shard."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n" * ends)
    expected = Report()
    texts = [document.text.encode() for document in iter_documents([str(path)], "text", expected)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "READ_BYTES", read_bytes)
        patch.setattr(module, "BLOCK_BYTES", block_bytes)
        patch.setattr(module, "json_texts", json_texts)
        parts = [read([str(path)], Shard(index, count)) for index in range(count)]
    assert [text for part, _ in parts for text in part] == texts
    total = Report()
    for _, report in parts:
        add_to(total, report)
    assert total.messages == expected.messages
    assert (total.num_bad, total.num_empty, total.bytes_read) == (
        expected.num_bad,
        expected.num_empty,
        expected.total_bytes,
    )


def test_all_kinds_of_files_each_in_one_shard(tmp_path, monkeypatch):
    lines = [json.dumps({"text": f"document {i} " + "x" * (i * 7 % 50)}) for i in range(400)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines[:100]) + "\nnonsense\n")
    (tmp_path / "b.txt").write_text("plain")
    (tmp_path / "c.bin").write_bytes(b"\0\0")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[100:300]).encode())[:-20])
    parquet.write_table(pyarrow.table({"text": [*lines[300:], "", None]}), tmp_path / "e.parquet")
    (tmp_path / "f.txt").write_text("")
    (tmp_path / "g.json").write_text("\n".join(lines[:50]))
    (tmp_path / "h.txt").write_text("")
    monkeypatch.setattr(module, "BLOCK_BYTES", 500)
    files, expected = list_files([str(tmp_path)], Report()), Report()
    texts = [document.text.encode() for document in iter_documents(list(files), "text", expected)]
    for count in (1, 2, 3, 5, 40):
        total, found = Report(), []
        for index in range(count):
            part, report = read(list(files), Shard(index, count))
            found += part
            add_to(total, report)
        assert found == texts
        for name in ("messages", "num_bad", "num_empty", "num_binary", "bytes_read"):
            expected_value = (
                expected.total_bytes if name == "bytes_read" else getattr(expected, name)
            )
            assert getattr(total, name) == expected_value, (count, name)


def test_a_file_that_is_gone_when_its_turn_comes(tmp_path):
    """Also in a shard that begins within it."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    files = list_files([str(tmp_path)], Report())
    blocks = list(iter_blocks(files, "text", Shard(1, 4)))
    assert [block.first > 0 for block in blocks] == [True]
    (tmp_path / "a.jsonl").unlink()
    total = Report()
    for block in blocks:
        texts = texts_of(block, "text")
        LineNumbers(total).add(block, *texts[1:])
    assert total.num_bad == 1
    assert "a.jsonl:1: unreadable from here on: [Errno 2] No such file" in total.messages[0]


def test_lines_before_a_shard_are_counted_once(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" * 100)
    real, calls = module._lines_before, []

    def counted(path, first):
        calls.append(first)
        return real(path, first)

    monkeypatch.setattr(module, "_lines_before", counted)
    _, report = read([str(tmp_path / "a.jsonl")], Shard(1, 4))
    assert (report.num_bad, len(calls)) == (25, 1)
    assert report.messages[0].startswith(f"{tmp_path}/a.jsonl:26: not JSON")


def test_a_file_that_is_cut_while_it_is_read(tmp_path, monkeypatch):
    """What is there still counts, and that the rest is missing is told."""
    monkeypatch.setattr(module, "BLOCK_BYTES", 40)
    line, path = b'{"text": "x"}\n', tmp_path / "a.jsonl"
    path.write_bytes(line * 9)
    blocks = list(iter_blocks(list_files([str(path)], Report()), "text", Shard()))
    path.write_bytes(line * 4)
    total, texts = Report(), []
    numbers = LineNumbers(total)
    for block in blocks:
        found = texts_of(block, "text")
        numbers.add(block, *found[1:])
        texts += found.texts
    assert texts == [b"x"] * 4
    assert total.messages[0] == f"{path}:5: the file has become shorter since it was listed"
    path.write_bytes(line * 12)
    assert sum(len(texts_of(block, "text").texts) for block in blocks) == 9


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_too_long_are_named_and_not_kept(tmp_path, monkeypatch, name):
    monkeypatch.setattr(module, "LONGEST_TEXT", 1000)
    monkeypatch.setattr(module, "READ_BYTES", 100)
    monkeypatch.setattr("megalite.data.documents.CHUNK_BYTES", 10)
    data = b"\n".join(
        b'{"text": "%s"}' % (b"x" * size) for size in (5, 50_000, 980, 989, 5, 70_000)
    )
    (tmp_path / name).write_bytes(gzip.compress(data, 1) if name.endswith("gz") else data)
    monkeypatch.setattr(module, "BLOCK_BYTES", 2000)
    held = [
        len(block.lines)
        for block in iter_blocks(list_files([str(tmp_path / name)], Report()), "text", Shard())
    ]
    texts, report = read([str(tmp_path / name)], Shard())
    assert [len(text) for text in texts] == [5, 980, 5]
    assert [message.split(":")[1] for message in report.messages] == ["2", "4", "6"]
    assert report.messages[0] == f"{tmp_path / name}:2: {module.TOO_LONG}"
    assert max(held) < 20_000


def test_parquet_texts_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LONGEST_TEXT", 1000)
    parquet.write_table(
        pyarrow.table({"text": ["a", "b" * 1001, "c" * 1000]}), tmp_path / "a.parquet"
    )
    texts, report = read([str(tmp_path / "a.parquet")], Shard())
    assert [len(text) for text in texts] == [1, 1000]
    assert report.messages == [f"{tmp_path}/a.parquet:2: {module.TOO_LONG}"]
