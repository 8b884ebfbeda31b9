import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.gather import gather_reference

DTYPES = ["uint8", "int8", "int16", "int32", "int64", "float64", "float32", "uint16"]


def int64s(*values):
    return np.array(values, np.int64)


@pytest.fixture(params=["reference", "native"])
def gather(request):
    return (
        gather_reference
        if request.param == "reference"
        else pytest.importorskip("megalite._data").gather
    )


@given(st.sampled_from(DTYPES), st.integers(1, 200), st.integers(1, 60), st.data())
@settings(max_examples=100, deadline=None)
def test_both_gathers_do_what_the_slices_say(dtype, size, room, data):
    native = pytest.importorskip("megalite._data").gather
    tokens = (
        np.random.default_rng(data.draw(st.integers(0, 1000)))
        .integers(-(2**62), 2**62, size)
        .astype(dtype)
    )
    lengths = int64s(*data.draw(st.lists(st.integers(0, min(size, room)), max_size=20)))
    starts = int64s(*(data.draw(st.integers(0, size - length)) for length in lengths.tolist()))
    places = int64s(*(data.draw(st.integers(0, room - length)) for length in lengths.tolist()))
    expected = [-7] * room  # what no piece covers stays
    # Where pieces overlap, the last one stays.
    for start, length, place in zip(starts, lengths, places, strict=True):
        expected[place : place + length] = [int(token) for token in tokens[start : start + length]]
    for gather in (gather_reference, native):
        out = np.full((room, 1), -7)
        gather(tokens, starts, lengths, places, out)
        assert out.ravel().tolist() == expected


@pytest.mark.parametrize("value", [-1, 8, 10, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("what", ["tokens", "places"])
def test_gather_refuses_pieces_outside_and_writes_nothing(gather, what, value):
    tokens, out, fine = np.arange(1, 11, dtype=np.uint16), np.full((2, 5), -7), int64s(0, 1)
    wrong = int64s(0, value)
    with pytest.raises(IndexError, match=f"{what} .* are outside the 10"):
        gather(
            tokens,
            *((wrong, int64s(3, 3), fine) if what == "tokens" else (fine, int64s(3, 3), wrong)),
            out,
        )
    assert (out == -7).all()
    gather(tokens, int64s(7), int64s(3), int64s(7), out)
    assert out.ravel().tolist() == [-7] * 7 + [8, 9, 10]


@pytest.mark.parametrize("length", [-1, 11, 2**63 - 1, -(2**63)])
def test_gather_refuses_lengths_that_cannot_be(gather, length):
    out = np.full(20, -7)
    with pytest.raises(IndexError, match=r"tokens .* are outside the 10"):
        gather(np.arange(10, dtype=np.uint16), int64s(0, 0), int64s(3, length), int64s(0, 5), out)
    assert (out == -7).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**63])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gather_refuses_floats_that_are_no_int64(gather, value, dtype):
    tokens = np.array([1.0, value, 3.0], dtype)
    out = np.zeros((1, 1), np.int64)
    gather(tokens, int64s(2), int64s(1), int64s(0), out)
    assert out[0, 0] == 3
    with pytest.raises(ValueError, match="no int64"):
        gather(tokens, int64s(1), int64s(1), int64s(0), out)


def test_gather_refuses_arguments_of_different_lengths(gather):
    tokens, out = np.arange(10, dtype=np.uint16), np.zeros(6, np.int64)
    for shorter in range(3):
        arguments = [int64s(0, 3)[: 1 if number == shorter else 2] for number in range(3)]
        with pytest.raises(ValueError, match="one shape"):
            gather(tokens, *arguments, out)


def test_native_gather_refuses_arrays_it_cannot_read_in_place():
    native = pytest.importorskip("megalite._data").gather
    tokens, pieces, out = np.arange(10, dtype=np.uint16), int64s(0, 1), np.zeros((2, 3), np.int64)
    read_only = out.copy()
    read_only.flags.writeable = False
    unaligned = np.frombuffer(b"x" + tokens.tobytes(), np.uint16, offset=1)
    for wrong, target in [
        (tokens[::2], out),
        (tokens.reshape(2, 5), out),
        (unaligned, out),
        (tokens, read_only),
    ]:
        with pytest.raises(ValueError, match=r"contiguous|aligned|writeable"):
            native(wrong, pieces, pieces, pieces, target)
    for wrong, starts, target in [
        (tokens, pieces, out.astype(np.int32)),
        (tokens, pieces, np.asfortranarray(out)),
        (tokens, pieces.astype(np.float64), out),
        (tokens.astype(np.uint32), pieces, out),
        (tokens.astype(">u2"), pieces, out),
    ]:
        with pytest.raises(TypeError):
            native(wrong, starts, pieces, pieces, target)
