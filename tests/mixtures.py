"""Mixtures for tests, and what they hold in one array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.dataset import SampleSource, Windows, empty_windows, read_windows
from megalite.data.mixture import PLAIN, Mixture, View
from megalite.data.order import Int64s, Order, Phase, PhasedOrder


def mixture_of(
    sources: Sequence[SampleSource],
    weights: Sequence[float] = (1.0,),
    seed: int = 0,
    order: Order = "shuffle",
    view: View = PLAIN,
) -> Mixture:
    phases = [Phase(0, weights)]
    return Mixture(
        sources,
        [str(number) for number in range(len(sources))],
        PhasedOrder([source.num_samples for source in sources], phases, seed, order),
        view,
    )


def read(source: SampleSource, samples: npt.ArrayLike, by_document: bool = False) -> Windows:
    """[n] numbers of samples → their windows."""
    samples = np.asarray(samples)
    found = empty_windows(len(samples), source.seq_length, by_document)
    read_windows(source, samples, found, np.arange(len(samples)))
    return found


def windows(mixture: Mixture, indices: npt.ArrayLike) -> Int64s:
    """[n] → [n, L + 1]: tokens and the last label."""
    found = mixture.read(indices)
    assert (found.labels[:, :-1] == found.tokens[:, 1:]).all()
    return np.concatenate([found.tokens, found.labels[:, -1:]], 1)


def config_of(seed: int = 0, steps: int = 10, batch: int = 4, **data: Any) -> Config:
    """With this `data` section, for a model of no matter."""
    model = {"preset": "llama-1m", "max_positions": 4096}
    train = {"steps": steps, "global_batch_size": batch, "seed": seed}
    return parse_config(
        {
            "run": {"name": "test"},
            "model": model,
            "data": data,
            "train": train,
            "optimizer": {"lr": 1e-3},
        }
    )
