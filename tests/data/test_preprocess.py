import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from megalite.data import preprocess as module
from megalite.data.blocks import iter_blocks
from megalite.data.documents import iter_documents
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.inputs import Report
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import load_tokenizer
from megalite.data.tokenizer_training import train_tokenizer
from megalite.errors import DataError

ROOT = Path(__file__).parents[2]
LIBRARY = Path(json.__file__).parents[1]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    train_tokenizer([str(LIBRARY / "argparse.py")], folder, 1000)
    return folder


def json_lines(texts, key="text"):
    return "".join(json.dumps({key: text}) + "\n" for text in texts).encode()


def texts_of(inputs, json_key="text"):
    report = Report()
    return [
        document.text
        for document in iter_documents([str(item) for item in inputs], json_key, report)
    ], report


def parts_of(text, size):
    return [text[start : start + size] for start in range(0, len(text), size)]


SOME = ["one", "  two\n\ttwo ", "drei é 日本 😀", "x" * 200_000, "last"]


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.ndjson", "a.json", "a.jsonl.gz", "a.json.gz", "a.jsonl.zst"]
)
def test_json_lines(tmp_path, name):
    data = json_lines(SOME)
    packed = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(
        Path(name).suffix, bytes
    )(data)
    (tmp_path / name).write_bytes(packed)
    texts, report = texts_of([tmp_path / name])
    assert texts == SOME
    assert (report.bytes_read, report.total_bytes, report.num_bad) == (len(packed), len(packed), 0)


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_frames_joined_in_one_file(tmp_path, suffix):
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    half = len(json_lines(SOME[:2])) - 3  # the joint lies within a line
    data = json_lines(SOME)
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(
        pack(data[:half]) + pack(data[half:]) + bytes(100_000)
    )
    assert texts_of([tmp_path / f"a.jsonl.{suffix}"])[0] == SOME


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_truncated_and_damaged_files_are_reported(tmp_path, suffix):
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    texts = [np.random.default_rng(i).bytes(300).hex() for i in range(1000)]
    packed, path = pack(json_lines(texts)), tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl").write_bytes(json_lines(["after"]))
    found, report = texts_of([path, tmp_path / "b.jsonl"])
    assert 0 < len(found) - 1 < 600
    assert found == [*texts[: len(found) - 1], "after"]
    assert report.messages == [
        f"{path}:{len(found)}: unreadable from here on: truncated: the packed data ends too early"
    ]
    assert report.bytes_read == report.total_bytes
    path.write_bytes(b"no such format at all")
    found, report = texts_of([path])
    assert (found, report.num_bad) == ([], 1)
    assert report.messages[0].startswith(f"{path}:1: unreadable from here on: damaged: ")


def test_bad_lines_are_reported_where_they_are(tmp_path):
    planted = [
        (b'\xef\xbb\xbf{"text": "first"}', None),
        (b'{"text": "cut', "not JSON: Unterminated string starting at at column 10"),
        (b"", None),
        (b'{"other": "x", "more": 1}', "no key 'text'; keys here: other, more"),
        (b'{"text": null}', "'text' is not text but NoneType"),
        (b'{"text": ["a"]}', "'text' is not text but list"),
        (b'{"text": "\xff"}', "not UTF-8: invalid start byte at byte 10"),
        (b'{"text": "\\ud83d"}', "the text has a lone surrogate, which UTF-8 cannot hold"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"text": ""}', None),
        (b"[" * 100_000, "JSON nested too deeply"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "a number has more digits than Python reads"),
        (b'{"text": "last"}', None),
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(line for line, _ in planted))
    texts, report = texts_of([path])
    assert texts == ["first", "last"]
    assert report.messages == [f"{path}:{i}: {why}" for i, (_, why) in enumerate(planted, 1) if why]
    assert (report.num_bad, report.num_empty, report.num_documents) == (9, 2, 2)


def test_report_keeps_the_first_messages_and_counts_all(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n" * 50)
    report = texts_of([tmp_path / "a.jsonl"])[1]
    assert (report.num_bad, len(report.messages)) == (50, 20)
    assert str(report).startswith("left out: 50 bad lines or files\n")
    assert str(report).endswith("… and 30 more")


def test_parquet(tmp_path):
    texts = [*SOME, None, "", *map(str, range(700))]
    parquet.write_table(
        pyarrow.table({"text": texts, "id": range(len(texts))}), tmp_path / "a.parquet"
    )
    broken = pyarrow.array([b"good", b"\xff", b"fine"], pyarrow.binary()).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes(b"PAR1 nonsense")
    found, report = texts_of([tmp_path / f"{name}.parquet" for name in "abc"])
    assert found == [text for text in texts if text] + ["good", "fine"]
    assert report.num_empty == 1
    assert report.messages[:2] == [
        f"{tmp_path}/a.parquet:6: 'text' is not text but NoneType",
        f"{tmp_path}/b.parquet:2: not UTF-8: invalid start byte at byte 0",
    ]
    assert report.messages[2].startswith(f"{tmp_path}/c.parquet:1: unreadable from this row on: ")
    assert report.bytes_read == report.total_bytes
    found, report = texts_of([tmp_path / "a.parquet"], "body")
    assert (found, report.messages) == (
        [],
        [
            f"{tmp_path}/a.parquet:1: unreadable from this row on: no column 'body'; columns here: text, id"
        ],
    )


@pytest.fixture
def tree(tmp_path):
    base = tmp_path / "tree"
    files = {
        "b.py": b"import os\r\n",
        "a/z.md": b"# z",
        "a/y.rst": b"y",
        "c.jsonl": json_lines(["in c"]),
        "d.txt.gz": gzip.compress(b"packed text"),
        "pretty.json": b'{\n  "text": 1\n}\n',
        "empty.txt": b"",
        "latin.txt": b"one\ntwo \xe9\n",
        "image.png": b"\x89PNG\0\0",
        ".hidden.txt": b"no",
        ".git/config": b"no",
    }
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)
    return base


def test_folders(tree):
    texts, report = texts_of([tree])
    assert texts == ["import os\r\n", "in c", "packed text", '{\n  "text": 1\n}\n', "y", "# z"]
    assert report.messages == [
        f"{tree}/latin.txt:2: not UTF-8: invalid continuation byte at byte 8"
    ]
    assert (report.num_hidden, report.num_binary, report.num_empty, report.num_bad) == (2, 1, 1, 1)


def test_globs_in_order_and_each_file_once(tree):
    texts, _ = texts_of([f"{tree}/**/*.[mr]*", f"{tree}/b.py", f"{tree}/a", f"{tree}/b.py"])
    assert texts == ["y", "# z", "import os\r\n"]


@pytest.mark.parametrize("item", ["missing.txt", "*.nothing", "void"])
def test_inputs_that_match_nothing_are_errors(tree, item, monkeypatch):
    monkeypatch.chdir(tree)
    (tree / "void").mkdir()
    with pytest.raises(DataError, match=f"input '{item.replace('*', '[*]')}' matches no file"):
        texts_of(["b.py", item])
    os.mkfifo("pipe.txt")
    with pytest.raises(DataError, match=r"input 'pipe\.txt' is a pipe or a device"):
        texts_of(["pipe.txt"])


@pytest.mark.parametrize("item", [".", "**/*.py"])
def test_folders_that_cannot_be_read_are_told(tree, monkeypatch, item):
    monkeypatch.chdir(tree)
    (tree / "shut").mkdir()
    real = os.scandir

    def scandir(path="."):
        if str(path).endswith("shut"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    texts, report = texts_of([item])
    assert texts
    assert "shut:1: unreadable folder: Permission denied" in report.messages[0]


def corpus(tmp_path, batches=8):
    """Library sources in pieces of all sizes, among them empty ones, over several batches."""
    text = "".join(
        (LIBRARY / name).read_text() for name in ("argparse.py", "inspect.py", "typing.py")
    )
    texts = [*parts_of(text, 3000), "", text, *parts_of(text, 500), "", "日本 é"] * max(
        batches // 2, 1
    )
    (tmp_path / "a.jsonl").write_bytes(json_lines(texts))
    return tmp_path / "a.jsonl", texts


def test_same_bytes_for_any_workers_and_same_ids_as_transformers(tmp_path, tokenizer):
    from transformers import AutoTokenizer

    path, texts = corpus(tmp_path)
    for workers in (1, 2, 3):
        preprocess(
            [str(path)], tmp_path / f"w{workers}", tokenizer, append_eod=True, workers=workers
        )
    preprocess([str(path)], tmp_path / "exact", tokenizer, append_eod=True, workers=2, exact=True)
    for suffix in ("bin", "idx", "json"):
        one, two, three = (
            (tmp_path / f"w{w}_text_document.{suffix}").read_bytes() for w in (1, 2, 3)
        )
        assert one == two == three
        if suffix != "json":
            assert (tmp_path / f"exact_text_document.{suffix}").read_bytes() == one
    theirs = AutoTokenizer.from_pretrained(tokenizer)
    expected = [
        [*ids, theirs.eos_token_id] for ids in theirs([text for text in texts if text])["input_ids"]
    ]
    dataset = IndexedDataset(tmp_path / "w2_text_document")
    assert dataset.dtype == np.dtype("<u2")
    assert [dataset[i].tolist() for i in range(len(dataset))] == expected


def test_metadata_and_key_in_the_name(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one", "", "two"], "body") + b"nonsense\n")
    result = preprocess(
        [str(tmp_path / "a.jsonl")], tmp_path / "deep" / "x", tokenizer, json_key="body"
    )
    assert result.prefix == str(tmp_path / "deep" / "x_body_document")
    dataset = IndexedDataset(result.prefix)
    opened = load_tokenizer(tokenizer)
    ended = ["one<|endoftext|>", "two<|endoftext|>"]
    assert [opened.decode(dataset[i]) for i in range(len(dataset))] == ended
    metadata = json.loads(Path(f"{result.prefix}.json").read_text())
    assert metadata["tokenizer_fingerprint"] == opened.fingerprint()
    assert metadata["inputs"] == [str(tmp_path / "a.jsonl")]
    wanted = {
        "num_documents": 2,
        "num_tokens": dataset.num_tokens,
        "vocab_size": 1000,
        "num_empty": 1,
        "num_bad": 1,
    }
    assert {key: metadata[key] for key in wanted} == wanted
    assert "a.jsonl:4: not JSON" in str(result)


def begins_with(tokenizer, folder, adds):
    """The tokenizer with a BOS token, which it has every text begin with if `adds`, as Llama
    3's."""
    import tokenizers
    from tokenizers import processors

    raw = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    raw.add_special_tokens(["<|begin|>"])
    if adds:
        begin = raw.token_to_id("<|begin|>")
        raw.post_processor = processors.TemplateProcessing(
            "<|begin|> $A", special_tokens=[("<|begin|>", begin)]
        )
    folder.mkdir()
    raw.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|endoftext|>"})
    )
    return folder


@pytest.mark.parametrize("exact", [False, True])
def test_documents_begin_and_end_once(tmp_path, tokenizer, exact):
    """With BOS where the tokenizer has texts begin so, or as asked; never twice, whatever the text
    spells out."""
    texts = [
        "one",
        "<|begin|>two",
        "three<|endoftext|>",
        "<|begin|>",
        "<|endoftext|>",
        "<|begin|>x<|endoftext|>\n",
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines([*texts, ""]))
    for adds in (True, False):
        folder = begins_with(tokenizer, tmp_path / f"adds-{adds}", adds)
        opened = load_tokenizer(folder)
        begin, end = opened.begin_id, opened.eod_id
        for prepend, append in [
            (None, None),
            (True, True),
            (False, True),
            (True, False),
            (None, False),
        ]:
            result = preprocess(
                [str(tmp_path / "a.jsonl")],
                tmp_path / "x",
                folder,
                append_eod=append,
                exact=exact,
                prepend_bos=prepend,
            )
            begun = adds if prepend is None else prepend
            expected = [
                [begin] * (begun and ids[0] != begin)
                + ids
                + [end] * (append is not False and ids[-1] != end)
                for ids in opened.encode_batch(texts)
            ]
            dataset = IndexedDataset(result.prefix)
            assert [dataset[i].tolist() for i in range(len(dataset))] == expected
            assert ("each document begins with <|begin|>" in str(result)) == begun
            assert result.settings["begin_id"] == (begin if begun else None)
    with pytest.raises(
        DataError, match="names no token that begins a text, which --prepend-bos needs"
    ):
        preprocess([str(tmp_path / "a.jsonl")], tmp_path / "x", tokenizer, prepend_bos=True)


def test_no_document_or_no_end_of_document_writes_nothing(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_bytes(b"nonsense\n")
    with pytest.raises(DataError, match=r"(?s)no document came out.*a\.jsonl:1: not JSON"):
        preprocess([str(tmp_path / "a.jsonl")], tmp_path / "x", tokenizer)
    bare = tmp_path / "bare"
    bare.mkdir()
    content = (tokenizer / "tokenizer.json").read_text().replace("<|endoftext|>", "<|other|>")
    (bare / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="names no end-of-document token"):
        preprocess(["missing"], tmp_path / "x", bare, append_eod=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bare"]
    # Where nobody asks for an end, a tokenizer may lack one.
    (tmp_path / "a.jsonl").write_bytes(json_lines(["one"], "text"))
    result = preprocess([str(tmp_path / "a.jsonl")], tmp_path / "x", bare)
    assert not result.settings["append_eod"]


@pytest.mark.parametrize("workers", [1, 2])
def test_failure_half_way_leaves_what_was_there(tmp_path, tokenizer, monkeypatch, workers):
    path, _ = corpus(tmp_path, batches=2)
    preprocess([str(path)], tmp_path / "x", tokenizer)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def interrupted(*args):
        yield from list(iter_blocks(*args))[:-1]
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "iter_blocks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        preprocess([str(path)], tmp_path / "x", tokenizer, workers=workers)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_reading_never_runs_far_ahead():
    """What bounds the memory: however long the input, only so many blocks are read before results
    are taken."""
    read = 0

    def endless():
        nonlocal read
        while True:
            read += 1
            yield "block"

    with ThreadPoolExecutor(2) as pool:
        # Len stands in for the tokenizer.
        results = module.in_order(endless(), len, pool, workers=2)
        for taken in range(1, 50):
            assert next(results) == ("block", 5)
            assert read - taken < module.BLOCKS_PER_WORKER * 2
        results.close()


def tool(tmp_path, *arguments):
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, arguments)]
    # As a console outside of the C locale is: it takes no byte that is not UTF-8.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8:strict"}
    return subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def test_tool_succeeds_with_warnings_and_fails_without_documents(tmp_path, tokenizer):
    name = os.fsdecode(b"a\xff.jsonl")
    (tmp_path / name).write_bytes(json_lines(["one"]) + b"nonsense\n")
    process = tool(
        tmp_path,
        "--input",
        name,
        "--output-prefix",
        "x",
        "--tokenizer",
        tokenizer,
        "--append-eod",
    )
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "x_text_document: 1 documents" in out
    assert "a\\udcff.jsonl:2: not JSON" in out
    assert read_note(str(tmp_path / "x_text_document"))["inputs"] == [name]
    assert IndexedDataset(tmp_path / "x_text_document")[0][-1] == load_tokenizer(tokenizer).eod_id
    process = tool(tmp_path, "--input", "none", "--output-prefix", "y", "--tokenizer", tokenizer)
    out, error = process.communicate()
    assert (process.returncode, out, error) == (
        2,
        "",
        "error: input 'none' matches no file; give existing files, folders or a quoted glob\n",
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_tool_leaves_no_files_and_no_processes(tmp_path, tokenizer, number):
    path, _ = corpus(tmp_path, batches=60)
    process = tool(
        tmp_path,
        "--input",
        path,
        "--output-prefix",
        "x",
        "--tokenizer",
        tokenizer,
        "--workers",
        2,
        "--exact",
    )
    partial = tmp_path / "x_text_document.bin.tmp"
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, number)
    _, error = process.communicate()  # the pipes close once the workers have ended as well
    *progress, last = error.splitlines()  # of which a slow machine may have come to print some
    assert (process.returncode, last) == (130, "interrupted")
    assert all("tokens/s" in line for line in progress)
    assert list(tmp_path.iterdir()) == [path]
    assert group_ends(process.pid)


IDLE_POOL = """
import multiprocessing, time
from concurrent.futures import ProcessPoolExecutor
from megalite.runtime.processes import start_worker

if __name__ == "__main__":
    pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), initializer=start_worker)
    print(list(pool.map(len, ["a", "bb"])), flush=True)
    time.sleep(60)
"""


def test_idle_workers_end_with_a_killed_parent(tmp_path):
    (tmp_path / "idle.py").write_text(IDLE_POOL)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "idle.py")]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"[1, 2]\n"
        process.kill()
        process.wait()
        ended = group_ends(process.pid)
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
    assert ended


def group_ends(group):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("longest", [1, 7, 100, 1 << 20])
def test_a_long_text_file_becomes_several_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: int
) -> None:
    """Cut at line ends, losing nothing: memory must not grow with the size of a file."""
    monkeypatch.setattr("megalite.data.documents.LONGEST_TEXT", longest)
    monkeypatch.setattr("megalite.data.documents.CHUNK_BYTES", 5)
    text = "".join(f"line {i} é日\n" for i in range(40))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    report = Report()
    found = [
        document.text for document in iter_documents([str(tmp_path / "a.txt")], "text", report)
    ]
    assert "".join(found) == text
    assert (len(found) == 1) == (longest > len(text.encode()))
    if 7 < longest <= len(text):
        assert all(piece.endswith("\n") for piece in found)
        assert max(map(len, found)) <= longest + 20
    (tmp_path / "a.txt").write_bytes(text.encode() + b"ab\xff")
    list(iter_documents([str(tmp_path / "a.txt")], "text", report))
    assert report.messages == [
        f"{tmp_path}/a.txt:41: not UTF-8: invalid start byte at byte {len(text.encode()) + 2}"
    ]
