from typing import NamedTuple
import numpy as np


class Packing(NamedTuple):
    first_piece: np.ndarray
    document: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    num_truncated: int


def best_fit(lengths, capacity):
    items = [(d, o, min(capacity, n - o)) for d, n in enumerate(lengths.tolist()) for o in range(0, n, capacity)]
    bins = []
    for it in sorted(items, key=lambda x: -x[2]):
        fits = [b for b in bins if b[0] >= it[2]]
        if fits:
            b = min(fits, key=lambda b: b[0])
        else:
            b = [capacity, []]
            bins.append(b)
        b[0] -= it[2]
        b[1].append(it)
    fp = np.cumsum([0] + [len(b[1]) for b in bins])
    flat = [p for b in bins for p in sorted(b[1])]
    a = np.array(flat, np.int64).reshape(-1, 3)
    return Packing(fp, a[:, 0], a[:, 1], a[:, 2], 0)
