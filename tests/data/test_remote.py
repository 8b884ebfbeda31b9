import contextlib
import errno
import fcntl
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from megalite.config import Source
from megalite.config_file import parse_config
from megalite.data import remote, store
from megalite.data.documents import iter_documents
from megalite.data.indexed import IndexedDataset, read_note
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report
from megalite.data.remote import (
    BLOCK_BYTES,
    BLOCKS_PER_REQUEST,
    CachedObject,
    cache_folder,
    local_copy,
)
from megalite.errors import ConfigError, DataError
from megalite.quantization.layers import read_rows
from megalite.utils.locks import lock_byte
from object_store import ObjectStore
from ranks import run_ranks
from small_runs import curve_of, make_config, train_on_rank, write_corpus

pytest.importorskip("obstore")
pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "LONGEST_PAUSE", 0.01)
    return tmp_path / "cache"


@pytest.fixture
def server(monkeypatch):
    server = ObjectStore()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    # Stores are kept by their arguments, which do not say that the environment names another
    # server.
    import fsspec

    store._use_obstore.cache_clear()
    fsspec.config.conf.clear()
    yield server
    server.shutdown()


def random_bytes(num_blocks, seed=0):
    """The last block is not full."""
    return np.random.default_rng(seed).bytes(int(num_blocks * BLOCK_BYTES) - 1000)


def held(file):
    return Path(file.path).read_bytes()


def fetch(file, *ranges):
    starts, ends = np.array(ranges, np.int64).reshape(-1, 2).T
    file.fetch(starts, ends - starts)


def test_rows_to_calibrate_with_are_those_of_the_store(server, tmp_path):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.arange(1, 200))
    for kind in ("bin", "idx"):
        server.objects[f"b/x.{kind}"] = (tmp_path / f"x.{kind}").read_bytes()
    rows = read_rows("s3://b/x", 4, 8)
    assert rows.all(), "what is not fetched reads as zeros"
    assert rows.equal(read_rows(str(tmp_path / "x"), 4, 8))


def test_only_the_blocks_asked_for_are_fetched_and_once(server):
    content = server.objects["b/x"] = random_bytes(40)
    file = CachedObject("s3://b/x")
    assert file.size == len(held(file)) == len(content)
    assert not server.asked  # opening reads nothing
    B = BLOCK_BYTES
    fetch(
        file, (5, 6), (B - 1, B), (3 * B - 1, 3 * B + 1), (len(content) - 1, len(content)), (7, 7)
    )
    expected = bytearray(len(content))
    for block in (0, 2, 3, 39):
        expected[block * B : (block + 1) * B] = content[block * B : (block + 1) * B]
    assert held(file) == bytes(expected)
    assert server.asked == {
        ("b/x", 0, B): 1,
        ("b/x", 2 * B, 4 * B): 1,
        ("b/x", 39 * B, len(content)): 1,
    }
    fetch(file, (0, B), (2 * B, 4 * B))
    fetch(CachedObject("s3://b/x"), (0, B))  # another one, as another run would open it
    assert server.count("x") == 3
    fetch(file, (0, len(content)))
    assert held(file) == content
    longest = max(end - start for _, start, end in server.asked)
    assert longest == BLOCKS_PER_REQUEST * B
    assert max(server.asked.values()) == 1


def test_bytes_the_object_has_not(server):
    server.objects["b/x"] = bytes(10)
    file = CachedObject("s3://b/x")
    for bad in ((0, 11), (-1, 3)):
        with pytest.raises(IndexError, match="s3://b/x"):
            fetch(file, bad)
    server.objects["b/empty"] = b""
    assert local_copy("s3://b/empty").read_bytes() == b""


def test_faults_that_pass_are_waited_out(server):
    content = server.objects["b/x"] = random_bytes(8)
    failed = []

    def before(name, start, end):
        with server.lock:
            failed.append(start)
        return 503 if failed.count(start) < 4 else None

    server.before = before
    file = CachedObject("s3://b/x")
    fetch(file, (0, 1), (3 * BLOCK_BYTES, len(content)))
    assert held(file)[3 * BLOCK_BYTES :] == content[3 * BLOCK_BYTES :]
    assert len(failed) == 8  # two requests, four times


@pytest.mark.parametrize("fault", ["cut", "status"])
def test_faults_that_stay_name_the_object_and_leave_nothing_present(server, fault):
    content = server.objects["b/x"] = random_bytes(3)
    file = CachedObject("s3://b/x")
    if fault == "cut":
        server.cut = 1  # the connection ends before the last byte
    else:
        server.before = lambda name, start, end: 500 if start else None
    with pytest.raises(DataError, match=r"s3://b/x cannot be read \(attempt 9\): "):
        fetch(file, (0, 1), (2 * BLOCK_BYTES, 2 * BLOCK_BYTES + 1))
    server.cut, server.before = 0, lambda name, start, end: None
    fetch(file, (0, len(content)))
    assert held(file) == content


def test_a_store_that_answers_with_too_few_bytes(cache):
    """As a server does that takes no ranges, or a proxy that cuts."""
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    files.pipe("/short/x", b"0123456789")
    file = CachedObject("memory://short/x")
    file._store._files = type(
        "Short", (), {"cat_file": lambda self, path, start, end: b"01", "info": files.info}
    )()
    with pytest.raises(
        DataError, match=r"memory://short/x cannot be read .*2 bytes came of \[0, 10\)"
    ):
        fetch(file, (0, 10))
    assert local_copy("memory://short/x").read_bytes() == b"0123456789"


def test_objects_that_are_not_there_or_not_ours(server):
    server.objects["b/folder/x"] = b"x"
    with pytest.raises(DataError, match="s3://b/none does not exist"):
        CachedObject("s3://b/none")
    with pytest.raises(DataError, match="s3://b/folder is a folder"):
        CachedObject("s3://b/folder")
    server.before = lambda name, start, end: 403
    with pytest.raises(
        DataError, match=r"s3://b/folder/x cannot be read \(attempt 1\): PermissionDenied"
    ):
        local_copy("s3://b/folder/x")
    with pytest.raises(DataError, match="nonsense://b/x"):
        CachedObject("nonsense://b/x")


def test_a_changed_object_is_another_one(server, cache):
    old, new = random_bytes(3, seed=1), random_bytes(3, seed=2)
    server.objects["b/x"] = old
    first = CachedObject("s3://b/x")
    fetch(first, (0, 1))
    server.objects["b/x"] = new  # of the same size
    with pytest.raises(DataError, match="s3://b/x changed while it was read"):
        fetch(first, (BLOCK_BYTES, 2 * BLOCK_BYTES))
    assert held(first) == old[:BLOCK_BYTES] + held(first)[BLOCK_BYTES:]
    assert not first._present[1:].any()
    second = CachedObject("s3://b/x")
    fetch(second, (0, len(new)))
    assert held(second) == new
    assert first.path.exists()  # in use
    del first
    assert held(CachedObject("s3://b/x")) == new
    assert len(list(cache_folder().iterdir())) == 1  # the old one is gone


def test_changing_while_a_request_is_under_way(server):
    server.objects["b/x"] = random_bytes(2, seed=1)

    def before(name, start, end):
        server.objects["b/x"] = random_bytes(2, seed=2)

    server.before = before
    file = CachedObject("s3://b/x")
    with pytest.raises(DataError, match="changed while it was read"):
        fetch(file, (0, 1))
    assert not file._present.any()


def test_processes_share_the_cache_and_fetch_a_block_once(server):
    content = server.objects["b/x"] = random_bytes(24)
    server.before = lambda name, start, end: time.sleep(0.02)
    code = f"""
import hashlib, sys
import numpy as np
from megalite.data.remote import CachedObject

file = CachedObject("s3://b/x")
print("ready", flush=True)
input()
for block in eval(sys.argv[1]):
    start = block * {BLOCK_BYTES}
    file.fetch(np.array([start]), np.array([min({BLOCK_BYTES}, file.size - start)]))
print(hashlib.sha256(file.path.read_bytes()).hexdigest())
"""
    orders = ("range(24)", "range(24)", "range(23, -1, -1)")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, order],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for order in orders
    ]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    found = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert found == [hashlib.sha256(content).hexdigest()] * 3
    assert sum(server.asked.values()) == len(server.asked) == 24


def test_threads_fetch_a_block_once(server):
    content = server.objects["b/x"] = random_bytes(12)
    server.before = lambda name, start, end: time.sleep(0.01)
    file = CachedObject("s3://b/x")
    threads = [threading.Thread(target=fetch, args=(file, (0, len(content)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert held(file) == content
    assert max(server.asked.values()) == 1


def test_two_of_the_same_object_in_one_process_fetch_a_block_once(server, monkeypatch):
    """As the files of two splits are: the loader's thread reads one while an evaluation reads the
    other."""
    server.objects["b/x"] = random_bytes(1)
    asked, waits = threading.Event(), threading.Event()

    def before(name, start, end):
        asked.set()
        waits.wait(120)

    server.before = before
    files = [CachedObject("s3://b/x") for _ in range(2)]
    threads = [threading.Thread(target=fetch, args=(file, (0, 1))) for file in files]
    threads[0].start()
    assert asked.wait(120)
    threads[1].start()
    threads[1].join(0.2)  # in which it would ask, and get no answer either
    waits.set()
    for thread in threads:
        thread.join()
    assert sum(server.asked.values()) == 1


@pytest.mark.parametrize(
    "moment", ["after it is found to exist", "before the file is opened", "before it is locked"]
)
def test_another_process_removes_the_folder_just_then(server, monkeypatch, moment):
    server.objects["b/x"] = content = random_bytes(1)
    folder = CachedObject("s3://b/x").path.parent
    holder, name = {
        "after it is found to exist": (os, "mkdir"),
        "before the file is opened": (os, "open"),
        "before it is locked": (remote.fcntl, "flock"),
    }[moment]
    real = getattr(holder, name)

    def just_then(*arguments, **more):
        monkeypatch.setattr(holder, name, real)
        if name == "mkdir":
            with pytest.raises(FileExistsError):
                real(*arguments, **more)
        assert remote._remove_unused([folder]) == 1
        if name == "mkdir":
            raise FileExistsError(errno.EEXIST, "File exists")
        return real(*arguments, **more)

    monkeypatch.setattr(holder, name, just_then)
    assert local_copy("s3://b/x").read_bytes() == content


def test_killed_while_fetching(server):
    """What the process had begun does not look present, and its locks hold nobody up."""
    content = server.objects["b/x"] = random_bytes(6)
    reached = threading.Event()
    release = threading.Event()

    def before(name, start, end):
        if start >= 2 * BLOCK_BYTES:
            reached.set()
            release.wait(120)

    server.before = before
    code = (
        "import numpy as np; from megalite.data.remote import CachedObject as C;"
        "f = C('s3://b/x'); f.fetch(np.array([0]), np.array([1]));"
        f"f.fetch(np.array([0, 1, 2, 4]) * {BLOCK_BYTES}, np.array([1, 1, 1, 1]))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ)
    assert reached.wait(120)
    file = CachedObject("s3://b/x")
    deadline = time.monotonic() + 120
    while (
        held(file)[BLOCK_BYTES : 2 * BLOCK_BYTES] == bytes(BLOCK_BYTES)
        and time.monotonic() < deadline
    ):
        time.sleep(0.02)  # until block 1, which came first of its round, lies in the file
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file._present.tolist() == [True, False, False, False, False, False]
    release.set()
    server.asked.clear()
    fetch(file, (0, len(content)))
    assert held(file) == content
    assert min(start for _, start, _ in server.asked) == BLOCK_BYTES  # what was complete stayed


def test_a_full_disk_makes_room_from_what_is_not_in_use(server, monkeypatch):
    content = server.objects["b/new"] = random_bytes(2)
    server.objects["b/old"] = server.objects["b/used"] = random_bytes(2, seed=1)
    old, used = local_copy("s3://b/old"), CachedObject("s3://b/used")
    write, is_full = os.pwrite, old.exists

    def pwrite(*arguments):
        if is_full():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert local_copy("s3://b/new").read_bytes() == content
    assert not old.exists()
    assert used.path.exists()
    is_full = used.path.exists
    server.objects["b/third"] = b"x"
    with pytest.raises(
        DataError,
        match=r"s3://b/third: its cache .* cannot be used: No space left on device; .*MEGALITE_CACHE",
    ):
        local_copy("s3://b/third")


def test_a_cache_that_cannot_be_written(server, monkeypatch, tmp_path):
    server.objects["b/x"] = b"x"
    monkeypatch.setenv("MEGALITE_CACHE", "/proc/none")
    with pytest.raises(DataError, match=r"s3://b/x: its cache /proc/none.*MEGALITE_CACHE"):
        CachedObject("s3://b/x")
    (tmp_path / "link").symlink_to("/not/mounted")
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "link"))
    with pytest.raises(DataError, match=r"link/.* cannot be used: No such file or directory; let"):
        CachedObject("s3://b/x")


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    monkeypatch.delenv("MEGALITE_CACHE")
    assert cache_folder().parent == Path("/some/cache/megalite")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parent == Path.home() / ".cache" / "megalite"


def upload(server, prefix, name):
    for suffix in ("bin", "idx", "json"):
        path = Path(f"{prefix}.{suffix}")
        if path.exists():
            server.objects[f"{name}.{suffix}"] = path.read_bytes()


def test_token_files(server, tmp_path):
    """Opening them reads no tokens, and every way to read tokens gives those of the local files."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, 400)
    with IndexedWriter(tmp_path / "x", "u2") as writer:
        writer.add_documents(rng.integers(0, 60000, lengths.sum()), lengths)
    (tmp_path / "x.json").write_text('{"vocab_size": 60000}')
    upload(server, tmp_path / "x", "b/data/x")
    local, far = IndexedDataset(tmp_path / "x"), IndexedDataset("s3://b/data/x")
    assert server.count("x.bin") == 0
    assert server.count("x.idx") == 1
    assert far.num_tokens == local.num_tokens
    assert far.num_documents == local.num_documents
    assert far[17].tolist() == local[17].tolist()
    assert server.count("x.bin") == 1
    starts = rng.integers(0, local.num_tokens - 100, 10)
    far.fetch(starts, 100)
    for start in starts:
        assert (
            far.tokens[start : start + 100].tolist() == local.tokens[start : start + 100].tolist()
        )
    assert far.read(5, 9999).tolist() == local.read(5, 9999).tolist()
    assert far.fingerprint() == local.fingerprint()  # a run may go on from a copy elsewhere
    assert read_note("s3://b/data/x") == {"vocab_size": 60000}
    assert read_note("s3://b/data/none") == {}
    server.objects["b/data/x.bin"] += b"ab"
    with pytest.raises(DataError, match=r"s3://b/data/x\.idx ends at byte"):
        IndexedDataset("s3://b/data/x")
    with pytest.raises(DataError, match=r"s3://b/data/none\.bin does not exist"):
        IndexedDataset("s3://b/data/none")


def test_two_ranks_train_from_a_store_as_from_files(server, tmp_path):
    write_corpus(tmp_path / "corpus")
    upload(server, tmp_path / "corpus", "b/corpus")
    short = ("train.steps=4", "checkpoint.every=4", "observe.eval_every=4")
    sources = json.dumps([{"path": "s3://b/corpus"}])
    local = make_config(tmp_path, "llama", "run.name=local", *short)
    far = make_config(
        tmp_path, "llama", "run.name=far", *short, f"data.train={sources}", f"data.valid={sources}"
    )
    run_ranks(2, train_on_rank, [local, far])
    assert curve_of(far) == curve_of(local)
    assert len(curve_of(far)) == 4
    assert max(server.asked.values()) == 1  # of both ranks and both splits
    written = [
        path for path in (*far.run.folder.rglob("*"), *cache_folder().rglob("*")) if path.is_file()
    ]
    assert any(path.name == "config.yaml" for path in written)
    assert not any(b"secret-of-tests" in path.read_bytes() for path in written)


def test_texts(server, tmp_path):
    import gzip

    import pyarrow
    from pyarrow import parquet

    lines = [json.dumps({"text": f"number {i} " + "x" * 3000}) for i in range(400)]
    parquet.write_table(
        pyarrow.table({"text": [f"row {i}" for i in range(1000)]}),
        tmp_path / "t",
        row_group_size=100,
    )
    server.objects |= {
        "b/in/1.jsonl": "\n".join(lines[:200]).encode(),
        "b/in/2.jsonl.gz": gzip.compress("\n".join(lines[200:]).encode()),
        "b/in/3.parquet": (tmp_path / "t").read_bytes(),
        "b/in/deep/4.txt": b"plain",
        "b/in/.hidden/5.txt": b"hidden",
        "b/in/deep/.6.txt": b"hidden",
        "b/other/7.txt": b"other",
    }
    for name, content in server.objects.items():
        path = tmp_path / "local" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    def texts(*inputs):
        report = Report()
        found = [document.text for document in iter_documents(inputs, "text", report)]
        return found, report

    for item in ("b/in", "b/in/*.jsonl*", "b/in/1.jsonl", "b/**/*.txt", "b/in/?.parquet"):
        local, of_local = texts(str(tmp_path / "local" / item))
        far, of_far = texts(f"s3://{item}")
        assert far == local
        assert far
        if item == "b/in":
            assert of_far == of_local
            assert of_far.num_hidden == 2
            assert of_far.bytes_read == of_far.total_bytes
    assert texts("s3://b/in/1.jsonl", "s3://b/in/*.jsonl")[0] == texts("s3://b/in/1.jsonl")[0]
    with pytest.raises(DataError, match=r"s3://b/none/\*' matches no file"):
        texts("s3://b/none/*")
    with pytest.raises(DataError, match=r"s3://b/none"):
        texts("s3://b/none")


def test_a_text_that_breaks_off_is_reported_and_the_others_are_read(server):
    server.objects |= {"b/1.jsonl": b'{"text": "one"}\n', "b/2.jsonl": b'{"text": "two"}\n'}
    server.before = lambda name, start, end: 500 if name == "b/1.jsonl" else None
    report = Report()
    assert [document.text for document in iter_documents(["s3://b/*.jsonl"], "text", report)] == [
        "two"
    ]
    assert report.num_bad == 1
    assert (
        "s3://b/1.jsonl:1: unreadable from here on: s3://b/1.jsonl cannot be read (attempt 9)"
        in report.messages[0]
    )


def test_streams_are_read_ahead_and_end_with_their_reader(server, monkeypatch):
    monkeypatch.setattr(store, "REQUEST_BYTES", 1000)
    content = server.objects["b/x"] = random_bytes(1)
    assert b"".join(store.stream("s3://b/x")) == content
    server.asked.clear()
    with contextlib.closing(store.stream("s3://b/x")) as stream:
        assert next(stream) == content[:1000]
    assert server.count("x") <= 1 + store.READ_AHEAD
    file = store.open_file("s3://b/x")
    file.seek(-5500, os.SEEK_END)
    assert file.read(5000) == content[-5500:-500]
    assert file.read() == content[-500:]
    assert file.tell() == len(content)


@pytest.mark.parametrize(
    "url", ["s3://key:hush-hush@b/x", "https://host/x?X-Amz-Signature=hush-hush"]
)
def test_secrets_in_urls_are_refused_and_not_repeated(url, tmp_path):
    config = make_config(tmp_path).model_dump(mode="json")
    config["data"]["train"] = [{"path": url}]
    with pytest.raises(ConfigError, match="password or a signature") as refused:
        parse_config(config)
    assert "hush" not in str(refused.value)
    with pytest.raises(DataError, match="password or a signature") as other:
        list(iter_documents([url], "text", Report()))
    assert "hush" not in str(other.value)


@pytest.mark.parametrize(
    "path", ["s3://b/data//x", "abfs://box@account.dfs.core.windows.net/x", "data/x", "s3://b/p-?"]
)
def test_paths_of_sources_stay_as_they_are(path):
    assert Source(path=path).path == path


@pytest.mark.skipif(sys.platform != "linux", reason="locks of open files are Linux's")
def test_a_block_stays_locked_while_its_file_is_closed_elsewhere(tmp_path):
    path = tmp_path / "present"
    with open(path, "a+b") as first, open(path, "a+b") as second:
        lock_byte(first, fcntl.F_WRLCK, 3)
        open(path, "rb").close()  # with locks of a process, all of them would be gone
        with pytest.raises((BlockingIOError, PermissionError)):
            lock_byte(second, fcntl.F_WRLCK, 3)
        lock_byte(second, fcntl.F_WRLCK, 4)
        lock_byte(first, fcntl.F_UNLCK, 3)
        lock_byte(second, fcntl.F_WRLCK, 3)
