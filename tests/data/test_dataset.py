import os
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from megalite.data.dataset import TokenSource, split_range
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import build_mixtures
from megalite.data.order import BLOCK
from megalite.errors import DataError
from mixtures import config_of, mixture_of, read, windows

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]


def write(prefix: Path, documents, dtype=np.uint16) -> IndexedDataset:
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(np.asarray(document))
    writer.finish()
    return IndexedDataset(prefix)


@pytest.fixture
def counting(tmp_path):
    """A hundred documents of ten tokens each; token i of the stream is i."""
    return write(tmp_path / "counting", np.arange(1000).reshape(100, 10))


def test_source_predicts_every_token_of_its_range_once(counting):
    source = TokenSource(counting, 100, 113, seq_length=4)
    assert source.num_samples == 3
    found = read(source, np.arange(3))
    assert found.tokens.tolist() == [
        [100, 101, 102, 103, 104],
        [104, 105, 106, 107, 108],
        [108, 109, 110, 111, 112],
    ]
    assert found.tokens.dtype == np.int64
    assert found.filled.tolist() == [5, 5, 5]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            read(source, [outside])


def test_source_says_how_many_tokens_it_needs(counting):
    assert TokenSource(counting, 0, 9, seq_length=8).num_samples == 1
    with pytest.raises(DataError, match=r"8 tokens are too few.*at least 9 are needed"):
        TokenSource(counting, 0, 8, seq_length=8)
    with pytest.raises(DataError, match="outside the 1000"):
        TokenSource(counting, 0, 1001, seq_length=8)


def test_one_source_gives_every_sample_once_an_epoch(counting):
    source = TokenSource(counting, 0, 1000, seq_length=7)
    mixture = mixture_of([source], [2.0], seed=3)
    size = source.num_samples
    found = windows(mixture, np.arange(2 * size))
    for epoch in (found[:size], found[size:]):
        assert sorted(epoch[:, 0].tolist()) == list(range(0, size * 7, 7))
        assert np.array_equal(epoch - epoch[:, :1], np.tile(np.arange(8), (size, 1)))
    assert not np.array_equal(found[:size], found[size:])
    assert np.array_equal(windows(mixture, [size + 1, 0]), found[[size + 1, 0]])


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_mixture_reads_the_sample_that_locate_names(tmp_path, order):
    first = write(tmp_path / "a", [np.arange(101)])
    second = write(tmp_path / "b", [np.arange(5000, 5000 + 3001)], np.int32)
    mixture = mixture_of(
        [TokenSource(first, 0, 101, 10), TokenSource(second, 0, 3001, 10)], [3.0, 1.0], order=order
    )
    index = np.arange(BLOCK)
    source, sample = mixture.order.locate(index)
    assert (
        np.bincount(source).tolist() == [49_152, 16_384] == list(mixture.consumed(BLOCK).values())
    )
    assert np.array_equal(
        mixture.read(index).tokens[:, 0], np.where(source == 0, 0, 5000) + 10 * sample
    )
    # 10 and 300 samples an epoch: all of them come, each as often as any other, give or take the
    # epoch under way.
    for number, size in enumerate([10, 300]):
        counts = np.bincount(sample[source == number], minlength=size)
        assert len(counts) == size
        assert counts.max() - counts.min() <= 1
    with pytest.raises(ValueError, match="negative"):
        mixture.read([-1])


def test_mixture_refuses_what_does_not_fit(counting):
    source = TokenSource(counting, 0, 1000, 8)
    for sources, weights in [([source], [1, 2]), ([source], [0])]:
        with pytest.raises(ValueError, match=r"weights|sources"):
            mixture_of(sources, weights)
    with pytest.raises(DataError, match=r"lengths of \[8, 9\]"):
        mixture_of([source, TokenSource(counting, 0, 1000, 9)], [1, 1])


def test_fingerprint_changes_with_whatever_changes_the_samples(tmp_path, counting):
    def mixture(
        dataset=counting, last=1000, weights=(1.0, 2.0), seq_length=8, seed=0, order="shuffle"
    ):
        sources = [
            TokenSource(dataset, 0, last, seq_length),
            TokenSource(counting, 0, 1000, seq_length),
        ]
        return mixture_of(sources, weights, seed, order).fingerprint()

    other = write(tmp_path / "other", np.arange(1, 1001).reshape(100, 10))
    again = write(tmp_path / "elsewhere" / "again", np.arange(1000).reshape(100, 10))
    assert mixture() == mixture(dataset=again)
    changed = [
        {"dataset": other},
        {"last": 999},
        {"weights": (2.0, 1.0)},
        {"seq_length": 9},
        {"seed": 1},
    ]
    prints = {mixture(**change) for change in [{}, *changed, {"order": "sequential"}]}
    assert len(prints) == 7


@pytest.mark.parametrize(
    ("num_documents", "shares", "documents"),
    [
        (1000, (969, 30, 1), (969, 999, 1000)),
        (100, (0.98, 0.01, 0.01), (98, 99, 100)),
        (5, (1, 1, 0), (2, 5, 5)),  # 2.5 rounds to the even number
        (7, (1, 1, 0), (4, 7, 7)),  # and so does 3.5
        (3, (1, 1, 1), (1, 2, 3)),
    ],
)
def test_split_range_is_megatrons(num_documents, shares, documents):
    first, second, third = documents
    assert split_range(num_documents, shares, "train") == (0, first)
    assert split_range(num_documents, shares, "valid") == (first, second)
    assert split_range(num_documents, shares, "test") == (second, third)


def test_build_mixtures_from_a_split(counting):
    data = {"train": [{"path": counting.prefix}], "split": (0.7, 0.3, 0.0), "seq_length": 9}
    mixtures = build_mixtures(config_of(seed=1, **data))
    train, valid = mixtures["train"], mixtures["valid"]
    assert mixtures["test"] is None
    assert (train.sources[0].first_token, train.sources[0].last_token) == (0, 700)
    assert valid.read(np.arange(2)).tokens[:, 0].tolist() == [700, 709]
    other_seed = build_mixtures(config_of(seed=2, **data))
    assert np.array_equal(
        windows(other_seed["valid"], np.arange(20)), windows(valid, np.arange(20))
    )
    assert not np.array_equal(
        windows(other_seed["train"], np.arange(20)), windows(train, np.arange(20))
    )


def test_build_mixtures_from_files_of_their_own(tmp_path, counting):
    write(tmp_path / "held_out", [np.arange(500, 540)])
    held_out = {"path": tmp_path / "held_out"}
    mixtures = build_mixtures(
        config_of(
            train=[{"path": counting.prefix, "weight": 3}, held_out],
            valid=[held_out],
            seq_length=9,
            order="sequential",
        )
    )
    assert mixtures["test"] is None
    assert mixtures["train"].consumed(BLOCK) == {"counting": 49_152, "held_out": 16_384}
    assert mixtures["valid"].read([0, 1, 3, 4]).tokens[:, 0].tolist() == [500, 509, 527, 500]


def test_build_mixtures_names_the_setting_that_is_wrong(tmp_path, counting):
    write(tmp_path / "tiny", [np.arange(5)])
    source, tiny = {"path": counting.prefix}, {"path": tmp_path / "tiny"}
    with pytest.raises(
        DataError, match=r"data\.valid\[1\] .*tiny: 5 tokens are too few.*at least 10"
    ):
        build_mixtures(config_of(train=[source], valid=[source, tiny], seq_length=9))
    with pytest.raises(DataError, match=r"data\.split.*test part of .*counting: 0 tokens"):
        build_mixtures(config_of(train=[source], split=(99, 1, 0.1), seq_length=9))
    with pytest.raises(DataError, match=r"missing\.bin does not exist"):
        build_mixtures(config_of(train=[{"path": tmp_path / "missing"}], seq_length=9))


def large_corpus(prefix: Path, num_documents: int, length: int) -> None:
    """Documents of `length` zeros, whose tokens are holes on the disk."""
    numbers = np.arange(num_documents + 1)
    with open(f"{prefix}.idx", "wb") as idx:
        idx.write(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 8, num_documents, num_documents + 1))
        for values in (np.full(num_documents, length, "<i4"), 2 * length * numbers[:-1], numbers):
            values.tofile(idx)
    Path(f"{prefix}.bin").touch()
    os.truncate(f"{prefix}.bin", 2 * length * num_documents)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads Linux's own account of memory"
)
def test_ten_billion_tokens_start_at_once_in_constant_memory(tmp_path, monkeypatch):
    """Once the index was found to be right, which is remembered."""
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "cache"))
    for num_documents in (10_000, 10_000_000):
        large_corpus(tmp_path / f"large-{num_documents}", num_documents, length=1000)

    def first_batch(num_documents: int) -> tuple[float, int, int]:
        prefix = tmp_path / f"large-{num_documents}"
        config = config_of(train=[{"path": prefix}], split=(98, 1, 1), seq_length=4096)
        resident, start = resident_bytes(), time.process_time()  # others may have the processor
        tracemalloc.start()
        train = build_mixtures(config)["train"]
        assert train is not None
        assert train.sources[0].last_token == num_documents * 980
        assert train.read(np.arange(32)).labels.shape == (32, 4096)
        assert len(train.fingerprint()) == 32
        seconds, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return seconds, peak, resident_bytes() - resident

    _, small_peak, _ = first_batch(10_000)
    first_batch(10_000_000)
    seconds, peak, resident = first_batch(10_000_000)
    assert seconds < 2
    assert peak < small_peak + 2**20  # one index of it would take 40 MB and more
    # Pages of the map that the kernel read around the samples, of 20 GB.
    assert resident < 64 * 2**20
