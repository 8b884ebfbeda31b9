import gc
import threading
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.dataset import TokenSource
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader, MicroBatch
from megalite.data.mixture import PLAIN, Mixture, View
from megalite.errors import DataError
from mixtures import mixture_of, windows

SEQ_LENGTH = 4


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> IndexedDataset:
    """150 samples of 4 tokens: three global batches of 48 and a bit."""
    prefix: Path = tmp_path_factory.mktemp("data") / "tokens"
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.arange(601))
    return IndexedDataset(prefix)


@pytest.fixture(scope="module")
def mixture(dataset) -> Mixture:
    return make_mixture(dataset, seed=7)


def make_mixture(dataset: IndexedDataset, seed: int, view: View = PLAIN) -> Mixture:
    # Two sources, 100 and 50 samples an epoch, whose epochs end at different times.
    sources = [TokenSource(dataset, 0, 401, SEQ_LENGTH), TokenSource(dataset, 400, 601, SEQ_LENGTH)]
    return mixture_of(sources, [1.0, 1.0], seed, view=view)


def steps(mixture: Mixture, num_steps: int, *args: int, **more: int) -> list[list[MicroBatch]]:
    with Loader(mixture, *args, **more) as loader:
        return list(islice(loader, num_steps))


def global_step(ranks: list[list[list[MicroBatch]]], step: int) -> dict[int, list[int]]:
    """Sample index → its tokens, of one step over all data ranks; no sample may come twice."""
    rows = [
        (int(sample), tokens.tolist())
        for rank in ranks
        for batch in rank[step]
        for sample, tokens in zip(batch.samples, batch.tokens, strict=True)
    ]
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def wait_for(condition) -> None:
    end = time.monotonic() + 120  # far beyond what a thread needs to be scheduled
    while not condition():
        assert time.monotonic() < end, "waited 120 s in vain"
        time.sleep(0.005)


def test_micro_batches_have_the_next_token_as_label(mixture):
    [[batch, *rest]] = steps(mixture, 1, 6, 3, 0, 1)
    assert len(rest) == 1
    assert batch.samples.tolist() == [0, 1, 2]
    assert batch.tokens.shape == batch.labels.shape == (3, SEQ_LENGTH)
    assert batch.tokens.dtype == batch.labels.dtype == batch.samples.dtype == torch.int64
    assert all(tensor.is_contiguous() for tensor in (batch.tokens, batch.labels))
    found = torch.from_numpy(windows(mixture, np.arange(3)))
    assert torch.equal(batch.tokens, found[:, :-1])
    assert torch.equal(batch.labels, found[:, 1:])


def test_layout_of_a_step_over_ranks(mixture):
    # G = 12, B = 2, 3 data ranks: micro-batch m of rank d starts at 10 + (3m + d)·2.
    found = [
        [batch.samples.tolist() for batch in steps(mixture, 2, 12, 2, rank, 3, 10)[1]]
        for rank in range(3)
    ]
    assert found == [[[22, 23], [28, 29]], [[24, 25], [30, 31]], [[26, 27], [32, 33]]]


@given(
    layout=st.sampled_from(
        [(m, d) for m in (1, 2, 3, 4, 6) for d in (1, 2, 3, 4, 8) if 48 % (m * d) == 0]
    ),
    start=st.integers(0, 500),
)
@settings(max_examples=25, deadline=None)
def test_every_layout_trains_on_the_same_samples(mixture, layout, start):
    micro_batch_size, data_size = layout
    ranks = [
        steps(mixture, 4, 48, micro_batch_size, rank, data_size, start) for rank in range(data_size)
    ]
    for step in range(4):
        index = np.arange(start + 48 * step, start + 48 * (step + 1))
        expected = dict(zip(index.tolist(), mixture.read(index).tokens.tolist(), strict=True))
        assert global_step(ranks, step) == expected


@given(stopped_after=st.integers(0, 6), data_size=st.sampled_from([1, 2, 4]))
@settings(max_examples=15, deadline=None)
def test_resumed_equals_uninterrupted_also_on_other_ranks(mixture, stopped_after, data_size):
    # 100 samples of one source and 50 of the other: both epochs end within these 7 steps of 48, in
    # mid-step.
    whole = [steps(mixture, 7, 48, 4, 0, 1)]
    with Loader(mixture, 48, 3, 1, 2) as loader:
        list(islice(loader, stopped_after))
        state = loader.state()
    resumed = []
    for rank in range(data_size):
        with Loader(mixture, 48, 2, rank, data_size, start_sample=state["samples"]) as loader:
            mixture.check_state(state)
            resumed.append(list(islice(loader, 7 - stopped_after)))
            assert loader.state()["samples"] == 7 * 48
    for step in range(7 - stopped_after):
        assert global_step(resumed, step) == global_step(whole, stopped_after + step)


def test_state_leaves_out_what_was_only_read_ahead(mixture):
    with Loader(mixture, 8, 2, 0, 2, start_sample=100, prefetch=3) as loader:
        consumed = mixture.consumed(100)
        assert sum(consumed.values()) == 100
        assert loader.state() == {
            "fingerprint": mixture.fingerprint(),
            "sources": mixture.contents(),
            "samples": 100,
            "consumed": consumed,
            "skipped": [],
        }
        next(loader)
        wait_for(lambda: loader._steps.qsize() == 3)
        assert loader.state()["samples"] == 108
        assert next(loader)[0].samples.tolist() == [108, 109]


def test_state_of_other_data_is_refused(dataset, mixture):
    with (
        Loader(make_mixture(dataset, seed=8), 8, 2, 0, 1) as other,
        Loader(mixture, 8, 2, 0, 1) as loader,
    ):
        mixture.check_state(loader.state())
        with pytest.raises(DataError, match=r"other data.* train\.seed 8 → 7\."):
            mixture.check_state(other.state(), ["train.seed 8 → 7"])


class Failing(Mixture):
    def read(self, indices):
        if np.max(indices) >= 16:
            raise OSError("the disk is gone")
        return super().read(indices)


def test_an_error_of_the_thread_is_raised_in_its_turn_and_again(dataset):
    source = TokenSource(dataset, 0, 601, SEQ_LENGTH)
    failing = Failing([source], ["0"], mixture_of([source]).order)
    with Loader(failing, 8, 8, 0, 1) as loader:
        assert len(list(islice(loader, 2))) == 2
        for _ in range(2):
            with pytest.raises(OSError, match="the disk is gone"):
                next(loader)
        assert loader.state()["samples"] == 16
        wait_for(lambda: not loader._thread.is_alive())


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_close_ends_the_thread(mixture, taken):
    loader = Loader(mixture, 8, 8, 0, 1)
    list(islice(loader, taken))
    loader.close()
    loader.close()
    assert not loader._thread.is_alive()
    assert loader.state()["samples"] == 8 * taken
    with pytest.raises(DataError, match="closed"):
        next(loader)


def test_a_loader_dropped_unclosed_ends_its_thread(mixture):
    loader = Loader(mixture, 8, 8, 0, 1)
    next(loader)
    thread, ahead = loader._thread, loader._steps
    wait_for(ahead.full)
    del loader
    gc.collect()
    wait_for(lambda: not thread.is_alive())
    assert thread not in threading.enumerate()


def test_reading_ahead_is_bounded(mixture):
    with Loader(mixture, 8, 8, 0, 1, prefetch=2) as loader:
        next(loader)
        wait_for(loader._steps.full)
        time.sleep(0.05)
        assert loader._steps.qsize() == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 4, 0, 1), "global_batch_size 10 must be a multiple of micro_batch_size 4"),
        ((12, 2, 0, 4), r"2 \* 4 data ranks = 8"),
        ((8, 2, 2, 2), "data_rank 2"),
        ((8, 2, -1, 2), "data_rank -1"),
        ((0, 1, 0, 1), "at least 1"),
        ((8, 2, 0, 1, -1), "start_sample at least 0"),
    ],
)
def test_impossible_sizes_are_refused(mixture, arguments, message):
    with pytest.raises(DataError, match=message):
        Loader(mixture, *arguments)


def test_batches_for_a_gpu_are_pinned_and_the_same(dataset, monkeypatch) -> None:
    mixture = make_mixture(dataset, 7, View(document_mask=True))
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x.clone())
    plain = steps(mixture, 2, 4, 2, 0, 1)
    assert not pinned
    found = steps(mixture, 2, 4, 2, 0, 1, pin=True)
    for mine, theirs in zip(found[0] + found[1], plain[0] + plain[1], strict=True):
        for name in ("tokens", "labels", "samples", "documents"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
            # What is handed out is the pinned copy.
            assert not any(getattr(mine, name) is x for x in pinned)


def test_nothing_is_copied_on_the_cpu(dataset) -> None:
    mixture = make_mixture(dataset, 7, View(document_mask=True))
    ((micro,),) = steps(mixture, 1, 4, 4, 0, 1)
    moved = micro.to(torch.device("cpu"))
    assert all(getattr(moved, name) is x for name, x in vars(micro).items())
