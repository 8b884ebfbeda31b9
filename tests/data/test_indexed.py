import errno
import fcntl
import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megalite.data.indexed import DTYPES, HEADER, MAGIC, IndexedDataset, token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.errors import DataError

# Written by Megatron-LM for the documents [[a, b, c], [d, e]] in u16.
GOLDEN = bytes.fromhex(
    "4d4d4944494458000001000000000000000802000000000000000300000000000000030000000200000000000000000000000600000000"
    "000000000000000000000001000000000000000200000000000000"
)


def write(prefix, documents, dtype="u2"):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return IndexedDataset(prefix)


def test_golden_bytes(tmp_path):
    write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5H", 1, 2, 3, 4, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    documents=st.lists(
        st.lists(st.integers(0, 127), min_size=1, max_size=9), min_size=1, max_size=12
    ),
    dtype=st.sampled_from(sorted(DTYPES.values(), key=str)),
)
def test_round_trip(tmp_path, documents, dtype):
    dataset = write(tmp_path / "x", documents, dtype)
    assert dataset.dtype == dtype
    assert [dataset[i].tolist() for i in range(len(dataset))] == documents
    assert dataset.tokens.tolist() == [token for document in documents for token in document]
    starts = [dataset.document_start(d) for d in range(dataset.num_documents + 1)]
    assert starts == [sum(map(len, documents[:d])) for d in range(len(documents) + 1)]
    assert dataset.num_tokens == starts[-1] == sum(map(len, documents))


def test_two_that_write_the_same(tmp_path, monkeypatch):
    """Such as a job and the one that a cluster has started in its place: the first one's files are
    what it wrote."""

    def second():
        with pytest.raises(DataError, match=r"x\.bin\.tmp is being written by another process"):
            IndexedWriter(tmp_path / "x", "u2")

    real, moments = os.replace, []

    def replace(temporary, final):
        moments.append(final)
        if len(moments) == 1:
            second()
        real(temporary, final)

    monkeypatch.setattr(os, "replace", replace)
    with IndexedWriter(tmp_path / "x", "u2") as writer:
        writer.add_document([1, 2, 3])
        second()
        writer.add_document([4, 5])
    assert len(moments) == 2
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<5H", 1, 2, 3, 4, 5)


def test_one_that_opens_the_file_just_before_it_gets_its_name(tmp_path, monkeypatch):
    first, real = IndexedWriter(tmp_path / "x", "u2"), fcntl.flock
    first.add_document([1, 2, 3])

    def flock(file, how):
        monkeypatch.undo()
        first.finish()
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = IndexedWriter(tmp_path / "x", "u2")
    first.abort()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [1, 2, 3]
    second.add_document([7])
    second.finish()
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refused)
    assert write(tmp_path / "x", [[1, 2, 3]])[0].tolist() == [1, 2, 3]


def test_index_longer_than_one_chunk(tmp_path, monkeypatch):
    lengths = np.arange(1, 1001)

    def index():
        with IndexedWriter(tmp_path / "x", "i4") as writer:
            writer.add_documents(np.arange(lengths.sum()), lengths)
        return (tmp_path / "x.idx").read_bytes()

    whole = index()
    monkeypatch.setattr("megalite.data.indexed_writer.CHUNK_DOCUMENTS", 7)
    assert index() == whole
    dataset = IndexedDataset(tmp_path / "x")
    assert [dataset.document_start(d) for d in range(1001)] == [0, *lengths.cumsum().tolist()]


def test_documents_of_several_sequences_and_modes(tmp_path):
    """Megatron's multimodal files: two documents of 2 and 1 sequences, and a mode byte a sequence
    at the end."""
    parts = [
        np.array([2, 1, 3], "<i4"),
        np.array([0, 4, 6], "<i8"),
        np.array([0, 2, 3], "<i8"),
        np.zeros(3, "i1"),
    ]
    (tmp_path / "x.idx").write_bytes(
        HEADER.pack(MAGIC, 1, 8, 3, 3) + b"".join(part.tobytes() for part in parts)
    )
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "x")
    assert (len(dataset), dataset.num_documents, dataset.num_tokens) == (3, 2, 6)
    assert [dataset.document_start(d) for d in range(3)] == [0, 3, 6]
    assert dataset[1].tolist() == [2]


def header(**changed):
    values = {"magic": MAGIC, "version": 1, "code": 8, "num": 2, "indices": 3, **changed}
    return HEADER.pack(*values.values())


@pytest.mark.parametrize(
    ("idx", "bin_bytes", "message"),
    [
        (None, bytes(10), r"x\.idx does not exist"),
        (GOLDEN, None, r"x\.bin does not exist"),
        (b"", bytes(10), "shorter than its 34-byte header"),
        (header(magic=b"MMIDIDX\1\0") + GOLDEN[34:], bytes(10), "not an index"),
        (header(version=2) + GOLDEN[34:], bytes(10), "version 2"),
        (header(code=9) + GOLDEN[34:], bytes(10), "dtype code 9"),
        (header(code=0) + GOLDEN[34:], bytes(10), "dtype code 0"),
        (header(num=3) + GOLDEN[34:], bytes(10), "82 bytes long where its header asks for 94"),
        (header(num=2**60) + GOLDEN[34:], bytes(10), "82 bytes long"),
        (header(indices=0) + GOLDEN[34:58], bytes(10), "0 document indices"),
        (header(num=0, indices=1) + bytes(8), b"", r"x\.idx is of an empty token file"),
        (header(num=0, indices=2) + bytes(16), b"", "0 sequences"),
        (GOLDEN[:-1], bytes(10), "81 bytes long where its header asks for 82"),
        (GOLDEN + b"\0", bytes(10), "83 bytes long"),
        (GOLDEN[:-8] + struct.pack("<q", 1), bytes(10), "from sequence 0 to 1, not from 0 to 2"),
        (GOLDEN[:-24] + struct.pack("<3q", 1, 1, 2), bytes(10), "from sequence 1 to 2"),
        (GOLDEN, bytes(8), r"ends at byte 10 of a \.bin which is 8 bytes long"),
        (GOLDEN, bytes(12), "12 bytes long"),
        (GOLDEN[:50] + struct.pack("<q", 7) + GOLDEN[58:], bytes(11), "promises uint16 tokens"),
    ],
)
def test_refuses(tmp_path, idx, bin_bytes, message):
    for suffix, content in {".idx": idx, ".bin": bin_bytes}.items():
        if content is not None:
            (tmp_path / f"x{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=message):
        IndexedDataset(tmp_path / "x")


def test_indices_outside_raise(tmp_path):
    dataset = write(tmp_path / "x", [[1, 2, 3], [4, 5]])
    for call in (lambda: dataset[2], lambda: dataset[-1], lambda: dataset.document_start(3)):
        with pytest.raises(IndexError):
            call()


def test_pickle_carries_no_tokens(tmp_path):
    dataset = write(tmp_path / "x", [range(10_000)])
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 500
    assert pickle.loads(pickled)[0].tolist() == list(range(10_000))


def test_fingerprint_follows_the_content(tmp_path):
    one = write(tmp_path / "a", [[1, 2, 3], [4, 5]]).fingerprint()
    assert write(tmp_path / "b", [[1, 2, 3], [4, 5]]).fingerprint() == one
    assert write(tmp_path / "c", [[1, 2, 3], [4, 6]]).fingerprint() != one
    assert write(tmp_path / "d", [[1, 2], [3, 4, 5]]).fingerprint() != one


@pytest.mark.parametrize("becomes", ["deleted", "another"])
def test_fingerprint_is_of_what_is_mapped(tmp_path, becomes):
    """A run goes on with the files that it has opened; a checkpoint says which these were."""
    dataset = write(tmp_path / "a", [[1, 2, 3], [4, 5]])
    for path in tmp_path.iterdir():
        path.unlink()
    if becomes == "another":
        write(tmp_path / "a", [[6]])
    assert dataset.fingerprint() == write(tmp_path / "b", [[1, 2, 3], [4, 5]]).fingerprint()


def test_nothing_of_an_older_pair_stays_beside_a_new_one(tmp_path):
    """Not even the note of its tokenizer, where what writes the new one is killed before that."""
    kinds = ("mask", "removed", "src", "json")
    for kind in kinds:
        (tmp_path / f"x.{kind}").write_bytes(b"older")
    with pytest.raises(DataError), IndexedWriter(tmp_path / "x", "u2"):
        pass
    assert len(list(tmp_path.iterdir())) == len(kinds)
    write(tmp_path / "x", [[7]])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.bin", "x.idx"]


def test_token_dtype():
    assert (token_dtype(65499), token_dtype(65500)) == (np.dtype("<u2"), np.dtype("<i4"))


@pytest.mark.parametrize(
    ("document", "message"),
    [([1, 65536], "do not fit uint16"), ([-1], "do not fit uint16"), ([], "got lengths from 0")],
)
def test_writer_refuses_and_leaves_nothing(tmp_path, document, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "x", [[1, 2], document])
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "x.idx.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: .*x\.bin"):
        write(tmp_path / "x", [[1, 2]])
    assert list(tmp_path.iterdir()) == []


def test_writer_without_documents_keeps_what_was_there(tmp_path):
    write(tmp_path / "x", [[7]])
    with pytest.raises(DataError, match="no document"), IndexedWriter(tmp_path / "x", "u2"):
        pass
    assert IndexedDataset(tmp_path / "x")[0].tolist() == [7]
    assert len(list(tmp_path.iterdir())) == 2


def test_final_names_appear_only_at_the_end(tmp_path):
    with IndexedWriter(tmp_path / "x", "u2") as writer:
        writer.add_document([1])
        assert not (tmp_path / "x.bin").exists()
        assert not (tmp_path / "x.idx").exists()
    assert len(IndexedDataset(tmp_path / "x")) == 1


def resident_kb():
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("resident memory is read from /proc")
    return int(status.read_text().split("VmRSS:")[1].split()[0])


def test_ten_billion_tokens_open_at_once(tmp_path):
    """10 M documents of 1,000 tokens; .bin is one hole, .idx (200 MB) is written out."""
    num, length = 10_000_000, 1000
    with open(tmp_path / "x.bin", "wb") as file:
        file.truncate(2 * num * length)
    with open(tmp_path / "x.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, 8, num, num + 1))
        chunk = 1_000_000
        for _ in range(num // chunk):
            file.write(np.full(chunk, length, "<i4").tobytes())
        for step, count in ((2 * length, num), (1, num + 1)):
            for start in range(0, count, chunk):
                file.write(
                    (np.arange(start, min(start + chunk, count), dtype="<i8") * step).tobytes()
                )
    before = resident_kb()
    tracemalloc.start()
    start_time = time.process_time()  # others may have the processor
    dataset = IndexedDataset(tmp_path / "x")
    dataset.fingerprint()
    middle = dataset.document_start(num // 2)
    seconds = time.process_time() - start_time
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (middle, dataset.num_tokens, len(dataset[num - 1])) == (
        num // 2 * length,
        num * length,
        length,
    )
    assert seconds < 2
    # A list of the documents, or an array of their lengths, would need 40 MB or more.
    assert peak < 1 << 20
    # Pages of the mapping that were looked at count as resident, in units of what the kernel reads
    # ahead.
    assert resident_kb() - before < 16 << 10
    (tmp_path / "x.idx").unlink()


def test_one_of_the_two_files_in_place_of_their_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.bin").touch()
    with pytest.raises(DataError, match=rf"give {tmp_path}/a, without the ending"):
        IndexedDataset(tmp_path / "a.bin")
