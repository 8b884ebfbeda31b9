import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megalite.data.indexed_writer import IndexedWriter
from megalite.data.megatron_order import (
    MegatronOrder,
    blend,
    blend_greedily,
    blend_greedily_reference,
    sizes_of,
)
from megalite.data.mixture import build_mixtures
from megalite.errors import DataError
from mixtures import config_of, windows


class Plain:
    """GPTDataset's order as its three indices say it, element by element; `case`: which way the
    last epoch went."""

    def __init__(self, lengths, num_samples, seq_length, seed):
        self.lengths, self.seq_length = lengths, seq_length
        epoch, epochs = sum(lengths), 1
        while num_samples is not None and epochs * epoch < num_samples * seq_length + 1:
            epochs += 1
        separate, sans_last = False, 0
        if epochs > 1:
            sans_last = ((epochs - 1) * epoch - 1) // seq_length
            separate = num_samples - sans_last < int(0.80 * ((epoch - 1) // seq_length))
        self.case = "one epoch" if epochs == 1 else "separate" if separate else "together"
        random = np.random.RandomState(seed)
        if separate:
            head, last = list(range(len(lengths))) * (epochs - 1), list(range(len(lengths)))
            random.shuffle(head)
            random.shuffle(last)
            self.documents = head + last
        else:
            self.documents = list(range(len(lengths))) * epochs
            random.shuffle(self.documents)
        self.samples = self.sample_index((epochs * epoch - 1) // seq_length)
        total = len(self.samples) - 1
        if separate:
            head, last = list(range(sans_last)), list(range(sans_last, total))
            random.shuffle(head)
            random.shuffle(last)
            self.shuffle = head + last
        else:
            self.shuffle = list(range(total))
            random.shuffle(self.shuffle)

    def sample_index(self, num_samples):
        rows, position, offset = [(0, 0)], 0, 0
        while len(rows) <= num_samples:
            remaining = self.seq_length + 1
            while True:
                length = self.lengths[self.documents[position]] - offset
                remaining -= length
                if remaining <= 0:
                    offset += remaining + length - 1
                    break
                assert position < len(self.documents) - 1, "a sample must never run out of tokens"
                position, offset = position + 1, 0
            rows.append((position, offset))
        return rows

    def sample(self, number):
        """[(sequence, offset within it)] of the sample's tokens."""
        number = self.shuffle[number]
        (position, offset), (last, last_offset) = self.samples[number], self.samples[number + 1]
        tokens = []
        while position < last:
            tokens += [
                (self.documents[position], i)
                for i in range(offset, self.lengths[self.documents[position]])
            ]
            position, offset = position + 1, 0
        return tokens + [(self.documents[last], i) for i in range(offset, last_offset + 1)]


def tokens_of(order, samples):
    """[(sequence, offset within it)] of the tokens of each sample."""
    pieces = order.pieces(np.array(samples, np.int64))
    assert np.all(pieces.length > 0)
    assert np.all(np.diff(pieces.row) >= 0)
    rows = [[] for _ in samples]
    for row, sequence, offset, length in zip(*(array.tolist() for array in pieces), strict=True):
        rows[row] += [(sequence, i) for i in range(offset, offset + length)]
    return rows


SHORT, LONG, EMPTY = st.integers(1, 3), st.integers(30, 80), st.just(0)
CORPORA = st.tuples(
    st.lists(st.one_of(SHORT, st.integers(1, 20), LONG, EMPTY), min_size=1, max_size=50).filter(
        any
    ),
    st.one_of(st.none(), st.integers(0, 60)),
    st.integers(1, 12),
    st.integers(0, 2**32 - 1),
)


@given(CORPORA)
@example(([1], 5, 1, 0))  # one document of one token
@example(([500], 3, 4, 1))  # one document for many samples
@example(([1] * 40, 30, 4, 2))
@example(([10, 10], 6, 5, 3))  # an epoch of whole samples
@settings(max_examples=300, deadline=None)
def test_order_is_megatrons(corpus):
    lengths, num_samples, seq_length, seed = corpus
    if num_samples is None and sum(lengths) <= seq_length:
        with pytest.raises(DataError, match=f"at least {seq_length + 1} are needed"):
            MegatronOrder(np.array(lengths, np.int32), None, seq_length, seed)
        return
    plain = Plain(lengths, num_samples, seq_length, seed)
    order = MegatronOrder(np.array(lengths, np.int32), num_samples, seq_length, seed)
    assert order.num_samples == len(plain.shuffle) >= (num_samples or 0)
    everything = range(order.num_samples)
    expected = [plain.sample(number) for number in everything]
    assert all(len(tokens) == seq_length + 1 for tokens in expected)
    assert tokens_of(order, everything) == expected
    assert tokens_of(order, [*everything][::-3]) == expected[::-3]


@pytest.mark.parametrize(
    ("num_samples", "case"),
    # An epoch has 99 samples; the last is apart where it gives fewer than int(0.8 · 99) = 79 of
    # those wanted.
    [
        (99, "one epoch"),
        (100, "separate"),
        (177, "separate"),
        (178, "together"),
        (199, "together"),
        (1010, "separate"),
    ],
)
def test_both_ways_of_the_last_epoch(num_samples, case):
    lengths = (
        np.random.default_rng(5).multinomial(999, np.ones(30) / 30) + np.eye(1, 30, dtype=int)[0]
    )
    plain = Plain(lengths.tolist(), num_samples, 10, seed=num_samples)
    assert plain.case == case
    order = MegatronOrder(lengths.astype(np.int32), num_samples, 10, seed=num_samples)
    everything = range(order.num_samples)
    assert tokens_of(order, everything) == [plain.sample(number) for number in everything]


def test_order_of_more_sequences_than_are_looked_up_at_a_time():
    """Told from the stream's definition: sample i covers its tokens from i · L on."""
    lengths = np.random.default_rng(0).integers(0, 3, 1_500_000).astype(np.int32)
    order = MegatronOrder(lengths, None, 100, seed=9)
    random = np.random.RandomState(9)
    stream, shuffle = (
        np.arange(len(lengths), dtype=np.int32),
        np.arange(order.num_samples, dtype=np.uint32),
    )
    random.shuffle(stream)
    random.shuffle(shuffle)
    sequence = np.repeat(stream, lengths[stream])
    samples = np.array([0, 7, order.num_samples - 1, *range(0, order.num_samples, 977)])
    pieces = order.pieces(samples)
    expected = sequence[shuffle[samples].astype(np.int64)[:, None] * 100 + np.arange(101)]
    assert np.array_equal(np.repeat(pieces.sequence, pieces.length).reshape(-1, 101), expected)
    assert np.array_equal(np.bincount(pieces.row, pieces.length), np.full(len(samples), 101))


def test_order_keeps_no_more_than_it_says():
    lengths = np.full(400_000, 100, np.int32)
    tracemalloc.start()
    order = MegatronOrder(lengths, 1_000_000, 100, seed=0)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert order.num_samples == 1_199_999
    assert kept < 4.5 * 3 * len(lengths) + 4 * order.num_samples + 10_000


def test_order_reads_lengths_where_they_lie_in_an_index_file():
    lengths = np.array([5, 1, 9, 30, 2], "<i4")
    unaligned = np.frombuffer(b"xx" + lengths.tobytes(), "<i4", offset=2)
    assert tokens_of(MegatronOrder(unaligned, 20, 4, 1), range(20)) == tokens_of(
        MegatronOrder(lengths, 20, 4, 1), range(20)
    )


def test_order_refuses_what_cannot_be_ordered():
    for lengths, what in [
        ([], "0 sequences"),
        ([3, -1], "negative"),
        ([0, 0], "0 tokens are too few"),
    ]:
        with pytest.raises(DataError, match=what):
            MegatronOrder(np.array(lengths, np.int32), 5, 4, 0)
    with pytest.raises(ValueError, match="2\\*\\*32"):
        MegatronOrder(np.array([9], np.int32), 5, 4, seed=-1)
    order = MegatronOrder(np.array([9], np.int32), 2, 4, seed=0)
    assert order.num_samples == 2
    for outside in (-1, 2):
        with pytest.raises(IndexError, match=r"not in \[0, 2\)"):
            order.pieces(np.array([0, outside]))
    assert [len(array) for array in order.pieces(np.array([], np.int64))] == [0, 0, 0, 0]


def plain_blend(weights, size):
    weights = [weight / sum(weights) for weight in weights]
    taken, chosen = [0] * len(weights), []
    for i in range(size):
        best = 0
        for d in range(1, len(weights)):
            if weights[d] * max(i, 1) - taken[d] > weights[best] * max(i, 1) - taken[best]:
                best = d
        chosen.append((best, taken[best]))
        taken[best] += 1
    return chosen


@given(st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(0, 400))
@settings(max_examples=150, deadline=None)
def test_blend_is_megatrons(weights, size):
    """Small whole weights make ties; of fewer than 8 of them numpy's sum is the plain one."""
    expected = plain_blend([weight / sum(weights) for weight in weights], size)  # normalised twice
    source, sample = blend(weights, size)
    assert (source.dtype, sample.dtype) == (np.int16, np.int64)
    assert list(zip(source.tolist(), sample.tolist(), strict=True)) == expected


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(0, 300))
@settings(max_examples=100, deadline=None)
def test_both_blends_agree_and_ask_no_source_for_more_than_its_size(weights, size):
    source, sample = blend(weights, size)
    weights_D = np.array(weights) / np.sum(weights)
    for native, reference in zip(
        blend_greedily(weights_D, size), blend_greedily_reference(weights_D, size), strict=True
    ):
        assert np.array_equal(native, reference)
    counts = np.bincount(source, minlength=len(weights))
    assert np.all(counts <= sizes_of(weights, size))
    for d in range(len(weights)):
        assert sample[source == d].tolist() == list(range(counts[d]))


def test_the_first_samples_of_a_longer_blend_are_the_same():
    short, long = blend([0.3, 0.2, 0.5], 100), blend([0.3, 0.2, 0.5], 1000)
    assert all(np.array_equal(a, b[:100]) for a, b in zip(short, long, strict=True))


def test_sizes_are_megatrons():
    for weights, size, expected in [
        ([1.0, 2.0], 300, [101, 201]),
        ([0.3, 0.7], 1000, [302, 704]),
        ([1, 1, 1], 10, [5, 5, 5]),
        ([2.0], 400, [402]),
        ([7], 0, [0]),
    ]:
        assert sizes_of(weights, size).tolist() == expected


def test_blend_refuses_weights_that_are_none():
    for weights in ([], [1.0, 0.0], [1.0, -1.0], [math.inf], [math.nan, 1.0], [1.0] * 32_767):
        with pytest.raises(DataError, match="weights"):
            blend(weights, 10)
        with pytest.raises(DataError, match="weights"):
            sizes_of(weights, 10)
    native = pytest.importorskip("megalite._data").blend_greedily
    for size, weights in [
        (-1, np.ones(1)),
        (3, np.ones(0)),
        (3, np.ones((1, 1))),
        (3, np.ones(40_000)),
    ]:
        with pytest.raises(ValueError, match="shape"):
            native(weights, size)


@pytest.mark.parametrize("paths", [["a"], ["a", "b"]])
def test_a_run_in_megatrons_order_reads_these_tokens(tmp_path, paths):
    """From a config with a split to the batches: sequence numbers, splits, epochs and the blend all
    fit together."""
    lengths, flat, split = {"a": [9, 1, 30, 4, 12, 7, 20, 3], "b": [40, 2, 17, 15]}, {}, (3, 1, 0)
    for number, name in enumerate(paths):
        flat[name] = [
            [1000 * number + 100 * i + j for j in range(length)]
            for i, length in enumerate(lengths[name], 1)
        ]
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            for tokens in flat[name]:
                writer.add_document(tokens)
    weights = [0.3, 0.7][-len(paths) :]
    config = config_of(
        seed=7, steps=25, batch=4, order="megatron", seq_length=8, split=split,
        train=[{"path": tmp_path / name, "weight": weight} for name, weight in zip(paths, weights, strict=True)],
    )  # fmt: skip
    train, valid = (build_mixtures(config)[which] for which in ("train", "valid"))
    sizes = sizes_of(weights, 100).tolist() if len(paths) > 1 else [100]
    kept = {name: lengths[name][: len(lengths[name]) * 3 // 4] for name in paths}
    plains = {name: Plain(kept[name], size, 8, 7) for name, size in zip(paths, sizes, strict=True)}
    taken, expected = [0] * len(paths), []
    for i in range(100):
        of_source = max(
            range(len(paths)), key=lambda d: (weights[d] / sum(weights) * max(i, 1) - taken[d], -d)
        )
        sample = plains[paths[of_source]].sample(taken[of_source])
        expected.append([flat[paths[of_source]][sequence][offset] for sequence, offset in sample])
        taken[of_source] += 1
    assert windows(train, np.arange(100)).tolist() == expected
    assert list(train.consumed(100).values()) == taken
    assert (
        list(train.consumed(50).values())
        == np.bincount(train.order.locate(np.arange(50))[0]).tolist()
    )
    with pytest.raises(ValueError, match="not among the run's 100"):
        train.read([100])
    # Validation starts behind what is for training, and is read in a row.
    assert valid.read([0]).tokens[0, 0] == flat[paths[-1]][len(kept[paths[-1]])][0]
    other = build_mixtures(config_of(**config.data.model_dump(), seed=7, steps=26, batch=4))[
        "train"
    ]
    assert other.fingerprint() != train.fingerprint()  # another number of samples is another order
