import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megalite.data import preprocess as module
from megalite.data import shards
from megalite.data.blocks import Shard
from megalite.data.indexed import HEADER, MAGIC, IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import DataError

ROOT = Path(__file__).parents[2]
SUFFIXES = ("bin", "idx", "json", "src")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer([json.__file__], folder, 600)
    return folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Of all kinds, with bad lines and empty documents all over."""
    folder = tmp_path_factory.mktemp("inputs")
    source = Path(json.decoder.__file__).read_text()
    lines = [json.dumps({"text": source[i : i + 90 + i % 200]}) for i in range(0, len(source), 50)]
    lines[::9] = ["nonsense"] * len(lines[::9])
    lines[1::11] = ['{"text": ""}'] * len(lines[1::11])
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(lines[:40]).encode()))
    (folder / "c.py").write_text(source)
    (folder / ".hidden").write_text("no")
    return [str(folder)]


@pytest.fixture
def alone(tmp_path, tokenizer, inputs):
    """The content of the files that one job alone writes."""
    prefix = preprocess(inputs, tmp_path / "alone", tokenizer, append_eod=True).prefix
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in SUFFIXES]


def shard(tmp_path, tokenizer, inputs, index, count, **options):
    return preprocess(
        inputs,
        tmp_path / "x" / "x",
        tokenizer,
        append_eod=True,
        shard=Shard(index, count),
        **options,
    )


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
def test_shards_join_into_the_bytes_of_one_job(tmp_path, tokenizer, inputs, alone, count):
    order = [*range(1, count), 0][::-1]
    for index in order[:-1]:
        part = shard(tmp_path, tokenizer, inputs, index, count, workers=1 + index % 2)
        assert part.prefix.endswith(f"x_text_document.{index:05}-of-{count:05}")
        assert not list(tmp_path.glob("x/x_text_document.bin"))
    whole = shard(tmp_path, tokenizer, inputs, order[-1], count)
    assert [Path(f"{whole.prefix}.{suffix}").read_bytes() for suffix in SUFFIXES] == alone
    assert sorted(path.name for path in tmp_path.glob("x/*")) == [
        f"x_text_document.{s}" for s in SUFFIXES
    ]
    again = shard(tmp_path, tokenizer, inputs, 0, count)
    assert (again.remark, again.num_tokens) == ("complete already", whole.num_tokens)


def test_finished_shards_are_kept_unless_something_changed(
    tmp_path, tokenizer, inputs, alone, monkeypatch
):
    first = shard(tmp_path, tokenizer, inputs, 0, 3)
    monkeypatch.setattr(module, "iter_blocks", lambda *_: pytest.fail("it was tokenized again"))
    assert shard(tmp_path, tokenizer, inputs, 0, 3).remark == "complete already"
    monkeypatch.undo()
    assert shard(tmp_path, tokenizer, inputs, 0, 3, exact=True).tokenized_by == "tokenizers"
    # Exact serves as well.
    assert shard(tmp_path, tokenizer, inputs, 0, 3).remark == "complete already"
    with open(f"{first.prefix}.bin", "ab") as file:
        file.write(b"..")  # not what its .idx says
    assert shard(tmp_path, tokenizer, inputs, 0, 3).tokenized_by == "gigatoken"
    # Without ends of documents.
    preprocess(inputs, tmp_path / "x" / "x", tokenizer, shard=Shard(1, 3), append_eod=False)
    shard(tmp_path, tokenizer, inputs, 2, 3)
    # The second one does not belong to the others.
    assert not list(tmp_path.glob("x/x_text_document.bin"))
    whole = shard(tmp_path, tokenizer, inputs, 1, 3)
    assert [Path(f"{whole.prefix}.{suffix}").read_bytes() for suffix in SUFFIXES] == alone


def test_what_changed_is_told_where_a_shard_is_made_anew(tmp_path, tokenizer, inputs):
    console = Console(file=io.StringIO(), width=40)
    shard(tmp_path, tokenizer, inputs, 0, 2, console=console)
    shard(tmp_path, tokenizer, inputs, 0, 2, console=console)
    assert not console.file.getvalue()
    plain = {"append_eod": False, "console": console}
    preprocess(inputs, tmp_path / "x" / "x", tokenizer, shard=Shard(0, 2), **plain)
    name = shards.name_of(str(tmp_path / "x" / "x_text_document"), Shard(0, 2))
    told = f"{name} was made with other settings and is made anew: append_eod true → false\n"
    assert console.file.getvalue() == told


def test_no_document_in_any_shard(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text("nonsense\n" * 4)
    shard(tmp_path, tokenizer, [str(tmp_path / "a.jsonl")], 0, 2)
    with pytest.raises(DataError, match="no document"):
        shard(tmp_path, tokenizer, [str(tmp_path / "a.jsonl")], 1, 2)
    assert not list(tmp_path.glob("x/*.bin*")) + list(tmp_path.glob("x/*.tmp"))


def tool(tmp_path, tokenizer, inputs, *options):
    command = [
        sys.executable,
        str(ROOT / "tools" / "preprocess_data.py"),
        "--input",
        *inputs,
        "--output-prefix",
        "x/x",
    ]
    command += ["--tokenizer", str(tokenizer), "--append-eod", "--workers", "1", *options]
    return subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE
    )


def test_jobs_side_by_side(tmp_path, tokenizer, inputs, alone):
    """Two finish at about the same time: one of them joins."""
    jobs = [tool(tmp_path, tokenizer, inputs, "--shard", f"{index}/2") for index in range(2)]
    outputs = [job.communicate()[0].decode() for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any("x_text_document: " in output for output in outputs)
    assert [
        (tmp_path / "x" / f"x_text_document.{suffix}").read_bytes() for suffix in SUFFIXES
    ] == alone
    assert len(list(tmp_path.glob("x/*"))) == len(SUFFIXES)


@pytest.mark.parametrize(
    ("holder", "name", "number"),
    [
        *[
            (IndexedDataset, name, number)
            for name in ("_read_header", "_check_ends")
            for number in (1, 2, 3)
        ],
        *[(shards, "read_metadata", number) for number in (1, 2, 3, 4)],
        (shards, "open", 1),
        (shards.fcntl, "flock", 1),
    ],
)
def test_another_job_joins_just_then(
    tmp_path, tokenizer, inputs, alone, monkeypatch, holder, name, number
):
    monkeypatch.setattr(shards, "join", lambda *_: None)
    for index in range(2):
        shard(tmp_path, tokenizer, inputs, index, 2)
    monkeypatch.undo()
    real, calls = getattr(holder, name, open), []

    def after_the_other(*arguments):
        calls.append(arguments)
        if len(calls) == number:
            monkeypatch.undo()
            assert shard(tmp_path, tokenizer, inputs, 0, 2).prefix.endswith("x_text_document")
        return real(*arguments)

    monkeypatch.setattr(holder, name, after_the_other, raising=False)
    assert shard(tmp_path, tokenizer, inputs, 1, 2).num_tokens
    assert len(calls) == number
    assert [
        (tmp_path / "x" / f"x_text_document.{suffix}").read_bytes() for suffix in SUFFIXES
    ] == alone
    assert len(list(tmp_path.glob("x/*"))) == len(SUFFIXES)


def test_a_join_that_was_killed_leaves_no_shards_for_good(
    tmp_path, tokenizer, inputs, alone, monkeypatch
):
    shard(tmp_path, tokenizer, inputs, 0, 2)
    real = shards.remove

    def killed(name):
        if (tmp_path / "x" / "x_text_document.json").exists():
            raise KeyboardInterrupt
        real(name)

    monkeypatch.setattr(shards, "remove", killed)
    with pytest.raises(KeyboardInterrupt):
        shard(tmp_path, tokenizer, inputs, 1, 2)
    monkeypatch.undo()
    for index in range(2):
        assert shard(tmp_path, tokenizer, inputs, index, 2).remark == "complete already"
    assert {path.name: path.read_bytes() for path in tmp_path.glob("x/*")} == {
        f"x_text_document.{suffix}": data for suffix, data in zip(SUFFIXES, alone, strict=True)
    }


def test_shards_are_kept_where_files_have_no_locks(tmp_path, tokenizer, inputs, alone, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", refuse)
    shard(tmp_path, tokenizer, inputs, 0, 2)
    with pytest.raises(DataError, match="all 2 shards are there, but cannot be joined"):
        shard(tmp_path, tokenizer, inputs, 1, 2)
    monkeypatch.undo()
    whole = shard(tmp_path, tokenizer, inputs, 1, 2)
    assert [Path(f"{whole.prefix}.{suffix}").read_bytes() for suffix in SUFFIXES] == alone


def test_a_killed_shard_leaves_nothing_that_counts(tmp_path, tokenizer, inputs, alone):
    shard(tmp_path, tokenizer, inputs, 0, 2)
    script = f"""
import time
from megalite.data import preprocess as module
from megalite.data import shards
from megalite.data.blocks import Shard
def stuck(writer):
    writer._bin.flush()
    print("half-written", flush=True)
    time.sleep(60)
module.IndexedWriter.finish = stuck
module.preprocess({inputs!r}, {str(tmp_path / "x" / "x")!r}, {str(tokenizer)!r}, append_eod=True, shard=Shard(1, 2))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"half-written\n"
        process.send_signal(signal.SIGKILL)
    names = {path.name for path in tmp_path.glob("x/*")}
    assert {name for name in names if "00001-of-00002" in name} == {
        f"x_text_document.00001-of-00002.{suffix}.tmp" for suffix in ("bin", "idx", "src")
    }
    kept = os.stat(tmp_path / "x" / "x_text_document.00000-of-00002.bin").st_mtime_ns
    time.sleep(0.01)
    assert shard(tmp_path, tokenizer, inputs, 0, 2).remark == "complete already"
    assert os.stat(tmp_path / "x" / "x_text_document.00000-of-00002.bin").st_mtime_ns == kept
    whole = shard(tmp_path, tokenizer, inputs, 1, 2)
    assert [Path(f"{whole.prefix}.{suffix}").read_bytes() for suffix in SUFFIXES] == alone
    assert len(list(tmp_path.glob("x/*"))) == len(SUFFIXES)


def pair(prefix, documents, dtype="u2"):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)


@pytest.mark.parametrize("kernel", ["copies", "refuses", "gives up", "has nothing"])
def test_pairs_are_appended_without_their_tokens_being_read(tmp_path, monkeypatch, kernel):
    first, second = [[1, 2, 3], [4]], [[5] * 1000, [6, 7]]
    pair(tmp_path / "a", first)
    pair(tmp_path / "b", second)
    pair(tmp_path / "whole", [[9], *first, *second, [8]])
    copy, calls = os.copy_file_range, []

    def refuse(source, target, count):
        calls.append(count)
        if kernel == "refuses" or (kernel == "gives up" and len(calls) % 2 == 0):
            raise OSError(errno.EXDEV, "another file system")
        # The kernel may copy less than it was asked for.
        return copy(source, target, min(count, 700))

    if kernel == "has nothing":
        monkeypatch.delattr(os, "copy_file_range")
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse)
    with IndexedWriter(tmp_path / "joined", "u2") as writer:
        writer.add_document([9])
        for name in "ab":
            writer.add_pair(tmp_path / name)
        writer.add_document([8])
    assert bool(calls) == (kernel != "has nothing")
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"joined.{suffix}").read_bytes() == (
            tmp_path / f"whole.{suffix}"
        ).read_bytes()


def test_pairs_of_another_kind_are_refused(tmp_path):
    pair(tmp_path / "a", [[1]], "i4")
    parts = [np.array([2, 1], "<i4"), np.array([0, 4], "<i8"), np.array([0, 2], "<i8")]
    (tmp_path / "b.idx").write_bytes(
        HEADER.pack(MAGIC, 1, 8, 2, 2) + b"".join(part.tobytes() for part in parts)
    )
    (tmp_path / "b.bin").write_bytes(np.arange(3, dtype="<u2").tobytes())
    assert IndexedDataset(tmp_path / "b").num_documents == 1
    for name, why in {
        "a": "1 documents of 1 int32 sequences",
        "b": "1 documents of 2 uint16 sequences",
    }.items():
        with pytest.raises(DataError, match=why), IndexedWriter(tmp_path / "x", "u2") as writer:
            writer.add_pair(tmp_path / name)
