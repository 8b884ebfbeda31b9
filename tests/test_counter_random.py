"""Random numbers as a function of (key, index). All bounds are fixed numbers of standard
deviations; nothing here is random from run to run, so a test that passes once passes always."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megalite.models.weights import Weight
from megalite.utils.counter_random import normal, random_bits, uniform
from megalite.utils.keys import key_of

NUM = 1 << 18
KEY = key_of(1234, "a")


# Published first outputs of splitmix64 seeded with 0 (Vigna's splitmix64.c); its n-th is index n of
# key 0.
def test_is_splitmix64() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert [bits % 2**64 for bits in random_bits(0, torch.arange(1, 5)).tolist()] == published


def test_pinned_keys() -> None:
    assert key_of(0, "x") == 13049546365635420476
    assert key_of(1234, "embedding.weight") == 12247011075640928013


def test_pinned_initial_weights() -> None:
    """Whoever changes these makes every run start from other weights than the release before."""
    weight = Weight("embedding.weight", (8, 2), ("e",), init=0.5)
    found = weight.initial_rows(1234, 0, 2, None)
    wanted = [0.21397683024406433, -0.8848334550857544, -2.9010772705078125, 0.20935599505901337]
    # The C library's log and cos may differ in the last bit of a double: one rounding of fp32 at
    # most.
    assert found.tolist() == pytest.approx([0.5 * x for x in wanted], rel=2e-7)
    assert uniform(KEY, torch.arange(3)).tolist() == [
        0.3411927819252014,
        0.9235959649085999,
        0.5341400504112244,
    ]


def test_keys_differ_whenever_their_parts_do() -> None:
    lists: list[tuple[int | str, ...]] = [
        (1, 23), (12, 3), (123,), ("123",), ("1", "23"), (1, "23"), (), (0,), (-1,), ("1, 23",), ("",), (2**64,),
    ]  # fmt: skip
    assert len({key_of(*parts) for parts in lists}) == len(lists)
    assert key_of(np.int64(7), "a") == key_of(7, "a"), "a numpy integer is the integer it holds"
    assert all(0 <= key_of(i) < 2**64 for i in range(100))


@given(start=st.integers(0, 2**50), length=st.integers(0, 200), cut=st.integers(0, 200))
@settings(max_examples=50, deadline=None)
def test_slices_equal_the_whole(start: int, length: int, cut: int) -> None:
    cut = min(cut, length)
    whole = normal(KEY, start, start + length)
    pieces = normal(KEY, start, start + cut), normal(KEY, start + cut, start + length)
    assert torch.equal(whole, torch.cat(pieces))
    index = torch.arange(start, start + length)
    assert torch.equal(uniform(KEY, index)[cut:], uniform(KEY, index[cut:]))


def test_slices_equal_the_whole_across_internal_blocks() -> None:
    block = 1 << 22
    assert torch.equal(normal(KEY, 5, block + 8)[-13:], normal(KEY, block - 5, block + 8))


def test_keys_as_tensors_and_as_numbers_agree() -> None:
    keys = torch.tensor([[3], [-5]])
    index = torch.arange(7)
    together = random_bits(keys, index)
    assert torch.equal(
        together, torch.stack([random_bits(3, index), random_bits(2**64 - 5, index)])
    )


def ks_distance(values: Tensor, cdf: Tensor) -> float:
    """Largest distance between the empirical distribution and `cdf`, given at the sorted values."""
    steps = torch.arange(len(values) + 1, dtype=torch.float64) / len(values)
    return max((cdf - steps[:-1]).max().item(), (steps[1:] - cdf).max().item())


# Kolmogorov: the distance exceeds 1.95/√n in one of a thousand samples of the right distribution.
KS_BOUND = 1.95 / math.sqrt(NUM)


@pytest.mark.parametrize("key", [0, KEY, key_of(0, "layers.0.attention.qkv.weight")])
def test_uniform_distribution(key: int) -> None:
    values = uniform(key, torch.arange(NUM))
    assert values.dtype == torch.float32
    assert values.min() >= 0
    assert values.max() < 1
    assert torch.equal(values * 2**24, (values * 2**24).round()), "24 bits each"
    ordered = values.double().sort().values
    assert ks_distance(ordered, ordered) < KS_BOUND


@pytest.mark.parametrize("key", [0, KEY, key_of(0, "layers.0.attention.qkv.weight")])
def test_normal_distribution(key: int) -> None:
    values = normal(key, 0, NUM)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    ordered = values.double().sort().values
    assert ks_distance(ordered, torch.special.ndtr(ordered)) < KS_BOUND
    # Four standard deviations of the sample moments: √(1/n), √(2/n), √(15/n), √(96/n).
    for power, moment, variance in [(1, 0.0, 1), (2, 1.0, 2), (3, 0.0, 15), (4, 3.0, 96)]:
        assert abs((ordered**power).mean().item() - moment) < 4 * math.sqrt(variance / NUM), (
            f"moment {power}"
        )
    assert 4.0 < ordered[-1] < 6.8, "tails are there: 2^-32 reaches 6.7"


def test_every_bit_is_fair() -> None:
    bits = random_bits(KEY, torch.arange(NUM))
    share = torch.stack([(bits >> i & 1).double().mean() for i in range(64)])
    # Five standard deviations, 64 bits.
    assert ((share - 0.5).abs() < 5 * 0.5 / math.sqrt(NUM)).all()


def pairs() -> dict[str, tuple[Tensor, Tensor]]:
    index = torch.arange(NUM)
    first = uniform(KEY, index)
    found = {
        f"indices {lag} apart": (first, uniform(KEY, index + lag))
        for lag in (1, 2, 64, 4096, 1 << 30)
    }
    found |= {f"keys {lag} apart": (first, uniform(KEY + lag, index)) for lag in (1, 2, 1 << 32)}
    sites = [key_of(1234, f"layers.{i}.mlp.up.weight") for i in (0, 1)]
    found["layers"] = uniform(sites[0], index), uniform(sites[1], index)
    found["seeds"] = uniform(key_of(0, "a"), index), uniform(key_of(1, "a"), index)
    samples = random_bits(key_of(0, "dropout"), torch.arange(NUM))  # as Dropout keys its samples
    found["samples"] = uniform(samples, torch.tensor(0)), uniform(samples, torch.tensor(1))
    return found


@pytest.mark.parametrize("name", pairs())
def test_neighbours_are_independent(name: str) -> None:
    x, y = pairs()[name]
    correlation = torch.corrcoef(torch.stack((x, y)))[0, 1].item()
    assert abs(correlation) < 4 / math.sqrt(NUM)  # four standard deviations
    cells = torch.bincount((x * 16).long() * 16 + (y * 16).long(), minlength=256).double()
    expected = NUM / 256
    chi_squared = ((cells - expected) ** 2 / expected).sum().item()
    # Mean and five standard deviations at 255 degrees of freedom.
    assert chi_squared < 255 + 5 * math.sqrt(2 * 255)
