"""Where in its token file each token stands that the model sees: the samples of a mixture, made once
more of places instead of tokens.

Legend: n = samples asked for, T = tokens that the model (or its decoder) sees, S = those of an
encoder beside it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.dataset import Windows, places_in_file
from megalite.data.mixture import IGNORE, Mixture, Samples, View
from megalite.data.order import Int64s

NONE = -1
"""The place of what stands in no token file: padding, marks, sentinels."""
FROM = 1 << 40
"""Places are told from token ids by being this and above, while both are in one array."""


class Places(NamedTuple):
    """Holds the places of n samples, and the samples themselves."""

    samples: Samples
    of_source: Int64s  # [n], number of the source in its mixture
    tokens: Int64s  # [n, T]
    labels: Int64s  # [n, T], of what is predicted at each token; NONE where nothing of a text is
    source: Int64s | None  # [n, S]


def places_of(mixture: Mixture, indices: npt.ArrayLike) -> Places:
    """Return where what the model sees of the global sample `indices`, [n], stands in the token
    files of the samples' sources. Raise ValueError for an index outside the run."""
    # Every step below is that of `Mixture.read`, in the same order, with places in place of tokens:
    # what the mixture changes there must be changed here.
    index = np.asarray(indices, np.int64)
    number, sample = mixture.order.locate(index)
    places = np.empty((len(index), mixture.seq_length + 1), np.int64)
    for each in np.unique(number).tolist():
        rows = np.flatnonzero(number == each)
        places[rows] = places_in_file(mixture.sources[each], sample[rows])
    samples, view = mixture.read(index), mixture.view
    windows, columns = mixture.augmented(index)
    if columns is not None:
        # Of a changed row the first tokens stand for those that were there.
        places = np.where(columns >= 0, np.take_along_axis(places, np.maximum(columns, 0), 1), NONE)
    if view.stacks:
        marked = windows._replace(tokens=np.maximum(places, 0) + FROM)
        found = view.stacks.apply(marked, index)
        # What is below FROM are marks and sentinels that the stacks have put in.
        tokens, labels, source = (
            np.where(x >= FROM, x - FROM, NONE) for x in (found.tokens, found.labels, found.source)
        )
        labels = np.where(samples.labels != IGNORE, labels, NONE)
        return Places(samples, number, tokens, labels, source)
    is_next = view.labels == "next" and not view.corruption
    if is_next and view.fim:
        _turn(places, view, windows, index)
    # The label of a token is the next one, or what stood in its own place (masked words).
    of_labels = places[:, 1:] if is_next else places[:, :-1]
    labels = np.where(samples.labels != IGNORE, of_labels, NONE)
    return Places(samples, number, places[:, :-1], labels, None)


def _turn(places: Int64s, view: View, windows: Windows, index: Int64s) -> None:
    """Rearrange places as fill-in-the-middle does the tokens of `windows`."""
    tokens, filled, documents, *_ = windows
    assert view.fim is not None
    assert documents is not None
    marks = view.fim._replace(prefix=NONE, middle=NONE, suffix=NONE)
    for row, own, of_row, count, number in zip(
        tokens, places, documents, filled.tolist(), index.tolist(), strict=True
    ):
        for start, stop, cuts, is_spm in view.fim.turns(row, of_row, count, number):
            # Three marks come in, so that the last three tokens of the stretch fall out of it.
            own[start:stop] = marks.turned(own[start : stop - 3], cuts, is_spm)
