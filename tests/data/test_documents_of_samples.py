"""Which document each token of a sample is in: read from the index, for intra-document attention."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from megalite.data.dataset import Mixture, TokenSource
from megalite.data.indexed import IndexedDataset, IndexedWriter
from megalite.data.loader import Loader
from megalite.parallel.stage import positions_of

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


def runs_of(documents: np.ndarray) -> list[int]:
    return numbered(documents)


def test_documents_change_exactly_where_the_index_says(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 0, dataset.num_tokens, 8)
    samples = np.arange(source.num_samples)
    tokens, documents = source.read(samples), source.documents(samples)
    assert documents.shape == (len(samples), 8)
    assert (documents[:, 0] == 0).all()
    for row in samples:
        assert runs_of(documents[row]) == numbered(tokens[row, :8])


def test_a_range_that_begins_inside_the_file(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 7, dataset.num_tokens, 16)
    tokens, documents = source.read(np.array([0, 2])), source.documents(np.array([0, 2]))
    assert [runs_of(row) for row in documents] == [numbered(row[:16]) for row in tokens]


def test_the_loader_brings_them_only_when_asked(dataset: IndexedDataset) -> None:
    mixture = Mixture([TokenSource(dataset, 0, dataset.num_tokens, 8)], [1.0], 8, 0, "shuffle")
    with Loader(mixture, 4, 2, 0, 1) as loader:
        assert all(micro.documents is None for micro in next(loader))
    with Loader(mixture, 4, 2, 0, 1, document_mask=True) as loader:
        for micro in next(loader):
            assert micro.documents is not None
            for tokens, documents in zip(micro.tokens, micro.documents, strict=True):
                assert runs_of(documents.numpy()) == numbered(tokens.numpy())


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
    documents = source.documents(np.arange(0, source.num_samples, source.num_samples // 200))
    # 200 samples of 40 probes each take about 30 ms; copying the index for each would take seconds.
    assert time.process_time() - begin < 1.0
    assert documents[1].max() in (12, 13)
