"""`megalite._data` is given what nobody should give it: it raises, and neither crashes nor goes on
for ever.

The calls are made in a process of their own, which a crash ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

pytest.importorskip("megalite._data")

CALLS = """
import faulthandler, random, sys
import numpy as np
from megalite import _data

faulthandler.enable()
rng = random.Random(int(sys.argv[1]))
HOSTILE = [0, 1, 2, 3, 7, 2**15, 2**16, 2**31 - 1, 2**31, 2**32, 2**60, 2**61, 2**62, 2**63 - 1, 2**64 - 1]
DTYPES = ["i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f4", "<f8", ">i8"]

def number():
    return rng.choice(HOSTILE) * rng.choice([1, 1, -1]) + rng.choice([0, 0, 1, -1])

def array(dtype=None, hostile=0.5):
    dtype = np.dtype(dtype if dtype and rng.random() < 0.95 else rng.choice(DTYPES))
    size = rng.choice([0, 1, 2, 3, 8, 16])
    wild = rng.random() < hostile
    values = [number() if wild and rng.random() < 0.5 else rng.randrange(4) for _ in range(size)]
    if dtype.kind in "iu":
        low, high = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
        values = [min(max(value, low), high) for value in values]
    found = np.array(values, dtype)
    kind = rng.random()
    if kind < 0.05:
        return found[::-1]
    if kind < 0.1:
        return np.frombuffer(b"x" + found.tobytes(), dtype, offset=1)
    if kind < 0.15:
        return found.reshape(-1, 1)
    return found

def text():
    return bytes(rng.choice(b'{}"\\\\\\n:,[]text 0\\xff\\xc3\\xa9') for _ in range(rng.choice([0, 1, 9, 60])))

def small():
    return rng.choice([number(), 1, 2, 4])

FUNCTIONS = {
    "gather": lambda: (array(), array("<i8"), array("<i8"), array("<i8"), array("<i8")),
    # Of more samples than this the answer itself is too large.
    "blend_greedily": lambda: (array("<f8"), rng.choice([number() % 1000, -1, 2**62])),
    # Its memory follows from the capacity, or from the sum of lengths where that is less.
    "pack": lambda: (array("<i4", 0.0) - rng.choice([0, 0, 1]), rng.choice([1, 5, 2**30, 2**31 - 1, 0, -1, 2**40])),
    "permute_in_place": lambda: (array("<u8"), array("<u8"), small(), rng.choice([0, 1, 2, 15, 31, 32, -1, small()])),
    "document_starts": lambda: (array("<i8"), array("<i8"), small(), array("<i8"), array("<i8")),
    "json_texts": lambda: (text(), rng.choice(["text", "", "t" * 99]), rng.choice([0, 9, 2**40])),
    "character_states": lambda: (
        [text() for _ in range(3)] + rng.choice([[], ["x"], [None]]),
        np.zeros(rng.choice([0x110000, 7]), np.uint8),
    ),
    "join_documents": lambda: (
        array("<u4"), array("<i8"), small(), small(), array(rng.choice(["<u2", "<i4"]))
    ),
}
assert set(FUNCTIONS) == {name for name in dir(_data) if name[0] != "_"}
# Lengths whose sum is that of the tokens but for 2^64.
for sizes in ([2**60] * 16, [2**62] * 4, [2**63 - 1, 2**63 - 1, 2]):
    for out in ("<u2", "<i4"):
        try:
            _data.join_documents(np.zeros(0, "u4"), np.array(sizes), -1, 1, np.zeros(2 * len(sizes), out))
        except ValueError:
            continue
        raise AssertionError(sizes)
for name, arguments in list(FUNCTIONS.items()) * int(sys.argv[2]):
    try:
        getattr(_data, name)(*arguments())
    except (ValueError, IndexError, TypeError, MemoryError, OverflowError):
        pass
print("whole")
"""


@pytest.mark.parametrize("seed", range(2))
def test_no_arguments_crash_it_or_keep_it_busy(pytestconfig: pytest.Config, seed: int) -> None:
    count = 50_000 if pytestconfig.getoption("--whole") else 400
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(seed), str(count)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1800 if pytestconfig.getoption("--whole") else 120,
    )
    assert done.stdout == "whole\n", done.stdout[-3000:]
    assert done.returncode == 0


def test_tokens_that_do_not_fit_are_not_cut_short() -> None:
    import numpy as np

    from megalite._data import join_documents

    for dtype, last in ((np.uint16, 2**16 - 1), (np.int32, 2**31 - 1)):
        out = np.zeros(3, dtype)
        join_documents(np.array([last], np.uint32), np.array([1]), -1, 5, out)
        assert out.tolist() == [last, 5, 0]
        with pytest.raises(ValueError, match="does not fit"):
            join_documents(np.array([last + 1], np.uint32), np.array([1]), -1, 5, out)
        with pytest.raises(ValueError, match="does not fit"):
            join_documents(np.array([1], np.uint32), np.array([1]), last + 1, 5, out)


def test_numbers_at_odd_addresses_are_refused() -> None:
    """As those of a file may lie: to read them as they are is undefined."""
    import numpy as np

    from megalite import _data

    def odd(dtype: str) -> np.ndarray:
        return np.frombuffer(bytearray(1 + 4 * np.dtype(dtype).itemsize), dtype, offset=1)

    zeros, out = np.zeros(4, np.int64), np.zeros(8, np.int64)
    calls: dict[str, Callable[[], object]] = {
        "gather": lambda: _data.gather(np.zeros(4, np.int32), odd("<i8"), zeros, zeros, out),
        "gather of tokens": lambda: _data.gather(odd("<i4"), zeros, zeros, zeros, out),
        "blend": lambda: _data.blend_greedily(odd("<f8"), 3),
        "pack": lambda: _data.pack(odd("<i4"), 3),
        "permute": lambda: _data.permute_in_place(odd("<u8"), np.zeros(4, np.uint64), 3, 1),
        "join": lambda: _data.join_documents(
            np.ones(4, np.uint32), odd("<i8"), -1, -1, np.zeros(12, np.uint16)
        ),
        "starts": lambda: _data.document_starts(zeros, zeros, 2, odd("<i8"), zeros),
    }
    for call in calls.values():
        with pytest.raises(ValueError, match="an array is not aligned"):
            call()
