import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.packing import Packing, best_fit, pack, pack_reference

CORPORA = st.integers(1, 40).flatmap(
    lambda capacity: st.tuples(
        st.lists(st.integers(0, 3 * capacity + 1), max_size=60), st.just(capacity)
    )
)


def bins_of(packing: Packing) -> list[list[tuple[int, int, int]]]:
    pieces = list(
        zip(
            packing.document.tolist(), packing.offset.tolist(), packing.length.tolist(), strict=True
        ),
    )
    ends = packing.first_piece.tolist()
    return [pieces[first:end] for first, end in itertools.pairwise(ends)]


def in_strides(num_documents):
    return [number * 2654435761 % num_documents for number in range(num_documents)]


def slow_best_fit(lengths, capacity):
    """Best fit decreasing as one would say it; bins as sets, in no order."""
    strides = in_strides(len(lengths))
    finished, left = [], []
    for document, length in enumerate(lengths):
        whole, rest = divmod(length, capacity)
        finished += [{(document, part * capacity, capacity)} for part in range(whole)]
        if rest:
            left.append((rest, document, whole * capacity))
    left.sort(key=lambda item: (-item[0], strides.index(item[1])))
    open_bins = []  # [space, when it last changed, pieces]
    for now, (length, document, offset) in enumerate(left):
        fitting = [bin for bin in open_bins if bin[0] >= length]
        if not fitting:
            fitting = [[capacity, now, set()]]
            open_bins += fitting
        best = min(fitting, key=lambda bin: (bin[0], -bin[1]))
        best[0], best[1] = best[0] - length, now
        best[2].add((document, offset, length))
    return {frozenset(pieces) for pieces in finished + [bin[2] for bin in open_bins]}


@given(CORPORA)
@settings(max_examples=200, deadline=None)
def test_packing_is_best_fit_decreasing(corpus):
    lengths, capacity = corpus
    bins = bins_of(best_fit(np.array(lengths, np.int64), capacity))
    assert {frozenset(pieces) for pieces in bins} == slow_best_fit(lengths, capacity)
    assert len(bins) == len(slow_best_fit(lengths, capacity))


@given(CORPORA)
@settings(max_examples=200, deadline=None)
def test_packing_holds_every_token_once_and_cuts_only_what_is_too_long(corpus):
    lengths, capacity = corpus
    packing = best_fit(np.array(lengths, np.int32), capacity)
    bins = bins_of(packing)
    tokens = [
        (document, offset + i)
        for pieces in bins
        for document, offset, length in pieces
        for i in range(length)
    ]
    assert sorted(tokens) == [
        (document, i) for document, length in enumerate(lengths) for i in range(length)
    ]
    assert all(0 < sum(length for _, _, length in pieces) <= capacity for pieces in bins)
    cut = {
        document for pieces in bins for document, _, length in pieces if length < lengths[document]
    }
    assert cut == {document for document, length in enumerate(lengths) if length > capacity}
    assert packing.num_truncated == len(cut)
    assert all(pieces == sorted(pieces) for pieces in bins)
    strides = in_strides(len(lengths))
    first_placed = [
        min(pieces, key=lambda piece: (-piece[2], strides.index(piece[0]))) for pieces in bins
    ]
    assert first_placed == sorted(first_placed)


@given(CORPORA)
@settings(max_examples=100, deadline=None)
def test_native_packing_equals_the_reference(corpus):
    native = pytest.importorskip("megalite._data").pack
    lengths, capacity = np.array(corpus[0], np.int32), corpus[1]
    for fast, slow in zip(
        native(lengths, capacity), pack_reference(lengths, capacity), strict=True
    ):
        assert fast.dtype == slow.dtype
        assert fast.tolist() == slow.tolist()


def realistic_lengths(num_documents: int) -> np.ndarray:
    """Log-normal with a mean of 900 tokens, a document in 25 above 4,096."""
    return np.random.default_rng(0).lognormal(6.0, 1.3, num_documents).astype(np.int32) + 1


@pytest.mark.parametrize("capacity", [2049, 4097, 70_000])
def test_realistic_documents_fill_their_bins(capacity):
    """Capacities below and above the 4,096 spaces that two levels of bits can name."""
    lengths = realistic_lengths(60_000)
    packing = best_fit(lengths, capacity)
    fewest = -(-int(lengths.sum()) // capacity)
    assert len(packing.first_piece) - 1 <= 1.002 * fewest + 1
    assert int(packing.length.sum()) == int(lengths.sum())
    if pack is not pack_reference:
        for fast, slow in zip(packing[:4], pack_reference(lengths, capacity), strict=True):
            assert np.array_equal(fast, slow)


def test_bins_do_not_stand_in_order_of_length():
    packing = best_fit(realistic_lengths(60_000), 2049)
    num_pieces = np.diff(packing.first_piece)
    longest = np.maximum.reduceat(packing.length, packing.first_piece[:-1])
    for value in (num_pieces, longest):
        # Of independent values it has a standard deviation of 1/sqrt(bins); 5 of them is once in
        # two million.
        assert abs(np.corrcoef(np.arange(len(value)), value)[0, 1]) < 5 / len(value) ** 0.5


def test_packing_refuses_what_is_out_of_range():
    for capacity in (0, -1, 2**31):
        with pytest.raises(ValueError, match="capacity"):
            best_fit(np.array([1]), capacity)
    for lengths in ([3, -1], [2**31]):
        with pytest.raises(ValueError, match="not in 0"):
            best_fit(np.array(lengths), 4)
    for lengths in (np.array([[1]]), np.array([1.0])):
        with pytest.raises(ValueError, match="integers in a row"):
            best_fit(lengths, 4)
    native = pytest.importorskip("megalite._data").pack
    with pytest.raises(ValueError, match="negative"):
        native(np.array([-1], np.int32), 4)
    with pytest.raises(ValueError, match="capacity"):
        native(np.array([1], np.int32), 0)
