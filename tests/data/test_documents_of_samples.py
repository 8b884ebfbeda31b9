"""Which document each token of a sample is in: read from the index, for intra-document
attention."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.dataset import TokenSource
from megalite.data.indexed import IndexedDataset, document_starts_reference
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader
from megalite.data.mixture import View
from megalite.parallel.stage import positions_of
from mixtures import mixture_of, read

LENGTHS = [5, 1, 1, 12, 3, 30, 2, 40, 7]


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add_document(np.full(length, number))  # a token says which document it is of
    return IndexedDataset(tmp_path / "corpus")


def numbered(tokens: np.ndarray) -> list[int]:
    """0, 1, 2, … for the runs of equal tokens."""
    return [0, *np.cumsum(np.diff(tokens) != 0).tolist()]


def test_documents_change_exactly_where_the_index_says(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 0, dataset.num_tokens, 8)
    samples = np.arange(source.num_samples)
    found = read(source, samples, by_document=True)
    tokens, documents = found.tokens, found.documents
    assert documents is not None
    assert documents.shape == (len(samples), 9)
    for row in samples:
        assert documents[row].tolist() == numbered(tokens[row])


def test_a_range_that_begins_inside_the_file(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 7, dataset.num_tokens, 16)
    found = read(source, [0, 2], by_document=True)
    tokens, documents = found.tokens, found.documents
    assert documents is not None
    assert documents.tolist() == [numbered(row) for row in tokens]


def test_the_loader_brings_them_only_when_asked(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 0, dataset.num_tokens, 8)
    with Loader(mixture_of([source]), 4, 2, 0, 1) as loader:
        assert all(micro.documents is None for micro in next(loader))
    with Loader(mixture_of([source], view=View(document_mask=True)), 4, 2, 0, 1) as loader:
        for micro in next(loader):
            assert micro.documents is not None
            for tokens, documents in zip(micro.tokens, micro.documents, strict=True):
                assert documents.tolist() == numbered(tokens.numpy())


def test_positions_begin_anew_in_every_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [0, 1, 1, 1, 1, 4]])
    assert positions_of(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 0, 1, 2, 3, 0]]


def test_finding_documents_reads_little_of_a_large_index(tmp_path: Path) -> None:
    """A million documents: found by bisection, in well under a millisecond a sample."""
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        writer.add_documents(np.zeros(5_000_000, np.uint16), np.full(1_000_000, 5))
    dataset = IndexedDataset(tmp_path / "many")
    source = TokenSource(dataset, 0, dataset.num_tokens, 64)
    begin = time.process_time()
    documents = read(
        source, np.arange(0, source.num_samples, source.num_samples // 200), True
    ).documents
    # 200 samples of 40 probes each take about 30 ms; copying the index for each would take seconds.
    assert time.process_time() - begin < 1.0
    assert documents is not None
    assert documents[1].max() in (12, 13)


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=30),
    ranges=st.lists(st.tuples(st.integers(-5, 120), st.integers(-5, 120)), max_size=10),
)
@settings(max_examples=100, deadline=None)
def test_both_searches_find_what_a_look_at_every_document_does(lengths, ranges) -> None:
    native = pytest.importorskip("megalite._data").document_starts
    pointers = np.frombuffer(
        b"x" + (2 * np.cumsum([0, *lengths[:-1]])).astype("<i8").tobytes(), "<i8", offset=1
    )
    documents = np.frombuffer(
        b"x" + np.arange(len(lengths) + 1, dtype="<i8").tobytes(), "<i8", offset=1
    )
    first, last = (np.array([pair[side] for pair in ranges], np.int64) for side in (0, 1))
    for function in (native, document_starts_reference):
        counts, found = function(documents, pointers, 2, first, last)
        expected = [[p // 2 for p in pointers.tolist() if a <= p // 2 < b] for a, b in ranges]
        assert counts.tolist() == [len(row) for row in expected]
        assert found.tolist() == [start for row in expected for start in row]
    with pytest.raises(IndexError, match="not there"):
        native(documents + 1000, pointers, 2, np.array([0]), np.array([1]))
