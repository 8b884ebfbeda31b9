import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.order import (
    BLOCK,
    Blend,
    permute,
    permute_in_place_reference,
    quotas,
    sample_in_epoch,
)
from megalite.utils.keys import key_of

KEYS = st.integers(0, 2**64 - 1)


def test_permute_is_a_bijection_of_every_small_size_and_of_large_ones():
    for size in [*range(1, 300), 1023, 1024, 1025, 65_535, 65_536, 65_537, 262_145]:
        image = permute(np.arange(size), size, key_of("size", size))
        assert np.array_equal(np.sort(image), np.arange(size)), size


@given(size=st.integers(1, 2**40), key=KEYS, data=st.data())
@settings(deadline=None)
def test_permute_stays_in_range_and_keeps_indices_apart(size, key, data):
    index = data.draw(st.lists(st.integers(0, size - 1), unique=True, max_size=50))
    image = permute(np.array(index, np.int64), size, key)
    assert image.dtype == np.int64
    assert len(set(image.tolist())) == len(index)
    assert all(0 <= value < size for value in image.tolist())


def test_order_never_changes_between_versions():
    # A run is resumed by counting samples: another permutation, however good, would repeat some and
    # drop others.
    assert key_of(1234, "epoch", 0, 7) == 0xD27B6D0E71567F69
    assert permute(np.arange(10), 10, 2024).tolist() == [5, 1, 9, 4, 8, 3, 0, 7, 6, 2]
    assert permute(np.arange(3), 2**40, 2**64 - 1).tolist() == [
        713615072000,
        277984673367,
        247055026180,
    ]
    source, position = Blend([1.0, 2.0], seed=5, order="shuffle").locate(
        np.arange(BLOCK, BLOCK + 4)
    )
    assert (source.tolist(), position.tolist()) == ([0, 0, 1, 0], [21845, 21846, 43691, 21847])


def test_permute_has_no_serial_correlation():
    for size in (50_000, 65_536, 100_003):
        image = permute(np.arange(size), size, key_of(size)).astype(float)
        for lag in (1, 2, 256):
            # Of independent values it has a standard deviation of 1/sqrt(size); 5 of them is once
            # in two million.
            assert abs(np.corrcoef(image[:-lag], image[lag:])[0, 1]) < 5 / size**0.5
        assert abs(np.corrcoef(image, np.arange(size))[0, 1]) < 5 / size**0.5


@pytest.mark.parametrize("size", [2, 3, 5, 7, 12, 16, 37])
def test_permute_sends_each_index_everywhere_alike(size):
    num_keys = 20_000
    keys = np.array([key_of(number) for number in range(num_keys)], np.uint64)
    image = permute(
        np.tile(np.arange(size), (num_keys, 1)), size, np.repeat(keys[:, None], size, 1)
    )
    counts = np.array([np.bincount(image[:, index], minlength=size) for index in range(size)])
    chi_squared = ((counts - num_keys / size) ** 2 / (num_keys / size)).sum()
    freedom = (size - 1) ** 2
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5  # mean + 5 standard deviations


@given(first=KEYS, second=KEYS)
@settings(max_examples=30, deadline=None)
def test_different_keys_give_unrelated_permutations(first, second):
    index = np.arange(1000)
    equal = int((permute(index, 1000, first) == permute(index, 1000, second)).sum())
    # Poisson with mean 1: above 11 once in a billion.
    assert equal == 1000 if first == second else equal < 12


def test_permute_takes_a_key_for_each_index_and_keeps_shapes():
    keys = np.array([[3, 2**63], [5, 3]], np.uint64)
    index = np.array([[0, 1], [2, 2]])
    each = [
        [int(permute(i, 11, int(k))) for i, k in zip(*rows, strict=True)]
        for rows in zip(index, keys, strict=True)
    ]
    assert permute(index, 11, keys).tolist() == each
    assert permute(np.empty(0, np.int64), 11, 3).shape == (0,)


@pytest.mark.parametrize(("index", "size"), [(5, 5), (-1, 5), (0, 0), (0, 2**61)])
def test_permute_refuses_what_is_out_of_range(index, size):
    with pytest.raises(ValueError, match="not in"):
        permute(np.array([index]), size, 1)


def test_key_of_tells_every_list_of_parts_apart():
    lists = [
        (),
        (1,),
        ("1",),
        (1, 2),
        (12,),
        (2, 1),
        ("1, 2",),
        ("a", "b"),
        ("a', 'b",),
        (-1,),
        (2**70,),
    ]
    assert len({key_of(*parts) for parts in lists}) == len(lists)
    assert key_of(np.int64(3), "x") == key_of(3, "x")


@given(st.lists(st.floats(1e-12, 1e12), min_size=1, max_size=40))
@settings(deadline=None)
def test_quotas_fill_the_block_and_are_within_one_of_the_share(weights):
    quota = quotas(weights)
    exact = np.array(weights) / sum(weights) * BLOCK
    assert quota.sum() == BLOCK
    assert quota.min() >= 1
    # Sources raised to 1 take what they lack from the others: at most one each.
    raised = int((exact < 1).sum())
    assert np.all(np.abs(quota - exact) < 1 + raised + 1e-6)


def test_quotas_by_hand():
    assert quotas([1, 1, 1]).tolist() == [21846, 21845, 21845]
    assert quotas([3, 1]).tolist() == [49152, 16384]
    assert quotas([1e-300, 1e300]).tolist() == [1, BLOCK - 1]
    for bad in ([], [0.0, 1.0], [-1.0], [float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match=r"sources|weights"):
            quotas(bad)


@pytest.mark.parametrize("order", ["shuffle", "sequential"])
def test_every_block_has_the_exact_quota_and_each_position_once(order):
    blend = Blend([0.5, 3.0, 1e-9, 1.7], seed=1, order=order)
    for block in (0, 1, 123_456_789):
        source, position = blend.locate(np.arange(block * BLOCK, (block + 1) * BLOCK))
        for number, quota in enumerate(blend.quota):
            expected = np.arange(block * quota, (block + 1) * quota)
            assert np.array_equal(np.sort(position[source == number]), expected)


def test_blocks_are_ordered_differently_and_by_the_seed():
    index = np.arange(BLOCK)
    sources = [
        Blend([1, 1], seed, "shuffle").locate(index + block * BLOCK)[0]
        for seed, block in [(1, 0), (1, 1), (2, 0)]
    ]
    for one, other in [(0, 1), (0, 2), (1, 2)]:
        # Two fair coins agree half of the time, with a standard deviation of 1/512; 5 of them.
        assert abs((sources[one] == sources[other]).mean() - 0.5) < 5 / 512


def test_sequential_blend_interleaves_evenly_and_keeps_each_sources_order():
    blend = Blend([5.0, 2.0, 1.0], seed=0, order="sequential")
    source, position = blend.locate(np.arange(2 * BLOCK))
    for number, quota in enumerate(blend.quota):
        assert np.array_equal(position[source == number], np.arange(2 * quota))
        taken = np.cumsum(source == number)
        share = np.arange(1, 2 * BLOCK + 1) * quota / BLOCK
        # Never more than two samples ahead of its share or behind.
        assert np.abs(taken - share).max() < 2


def test_a_source_alone_keeps_its_order():
    index = np.array([0, 7, BLOCK, 10**15])
    source, position = Blend([0.3], seed=1, order="shuffle").locate(index)
    assert np.array_equal(position, index)
    assert not source.any()


@given(
    weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    blocks=st.sampled_from([0, 1, 10**7]),
    rest=st.integers(0, BLOCK - 1),
)
@settings(max_examples=20, deadline=None)
def test_consumed_counts_what_locate_says(weights, blocks, rest):
    blend = Blend(weights, seed=9, order="shuffle")
    last_block, _ = blend.locate(np.arange(blocks * BLOCK, blocks * BLOCK + rest))
    expected = blocks * blend.quota + np.bincount(last_block, minlength=len(weights))
    assert blend.consumed(blocks * BLOCK + rest).tolist() == expected.tolist()


@given(size=st.integers(1, 400), seed=st.integers(0, 2**31), source=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_each_epoch_has_every_sample_exactly_once(size, seed, source):
    epochs = sample_in_epoch(np.arange(4 * size), size, seed, source, "shuffle").reshape(4, size)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(size), (4, 1)))


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    orders = [
        tuple(sample_in_epoch(np.arange(100) + 100 * epoch, 100, seed, source, "shuffle").tolist())
        for epoch in (0, 1)
        for seed in (0, 1)
        for source in (0, 1)
    ]
    assert len(set(orders)) == 8
    assert sample_in_epoch([0, 99, 100, 250], 100, 0, 0, "sequential").tolist() == [0, 99, 0, 50]


@given(size=st.integers(1, 2**60), data=st.data())
@settings(max_examples=50, deadline=None)
def test_both_permutations_are_one(size, data):
    native = pytest.importorskip("megalite._data").permute_in_place
    values = np.array(data.draw(st.lists(st.integers(0, size - 1), max_size=20)), np.uint64)
    keys = np.array(
        data.draw(st.lists(KEYS, min_size=len(values), max_size=len(values))), np.uint64
    )
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    expected, found = values.copy(), values.copy()
    permute_in_place_reference(expected, keys, size, half_bits)
    native(found, keys, size, half_bits)
    assert np.array_equal(found, expected)
    with pytest.raises(ValueError, match="not below size"):
        native(np.array([size], np.uint64), np.array([1], np.uint64), size, half_bits)
