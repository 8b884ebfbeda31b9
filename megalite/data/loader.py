"""Data loader: the micro-batches of one data rank, step after step, read ahead by a thread.

Legend: G = global_batch_size, B = micro_batch_size, T = seq_length."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from megalite.data.mixture import IGNORE, Mixture
from megalite.data.order import Int64s
from megalite.errors import DataError
from megalite.runtime.activity import NOW


@dataclass(frozen=True)
class MicroBatch:
    """Holds B samples of T tokens with their labels."""

    tokens: torch.Tensor
    """[B,T] int64."""
    labels: torch.Tensor
    """The token that follows each, [B,T] int64; IGNORE where none is to be predicted."""
    samples: torch.Tensor
    """Index of each sample in the whole run, over all ranks, [B] int64."""
    documents: torch.Tensor | None = None
    """Document of each token in its sample, [B,T] int64; None: not kept apart."""
    types: torch.Tensor | None = field(default=None, kw_only=True)
    """Type of each token, [B,T] int64; None: all are 0."""
    source: torch.Tensor | None = field(default=None, kw_only=True)
    """What an encoder reads beside them, [B,S] int64; None: there is no encoder."""
    source_documents: torch.Tensor | None = field(default=None, kw_only=True)
    """[B,S] int64."""
    sentences: torch.Tensor | None = field(default=None, kw_only=True)
    """At the first token of a pair of sentences whether it is out of order, 1 or 0, [B,T] int64; IGNORE
    elsewhere. None: there are no pairs."""

    def to(self, device: torch.device) -> MicroBatch:
        """Copy to `device`. The host does not wait for pinned tensors."""
        return self._each(partial(torch.Tensor.to, device=device, non_blocking=True))

    def pinned(self) -> MicroBatch:
        """Copy into pinned host memory, which a GPU copies from asynchronously."""
        return self._each(torch.Tensor.pin_memory)

    def cut(self, length: int) -> MicroBatch:
        """Return the same tokens as rows of `length`, which divides T; each row is a sequence of
        its own."""
        rows = self.tokens.shape[1] // length
        if rows == 1:
            return self
        documents, types = (
            None if x is None else x.reshape(-1, length) for x in (self.documents, self.types)
        )
        return MicroBatch(
            self.tokens.reshape(-1, length),
            self.labels.reshape(-1, length),
            # Rows of one batch have numbers of their own, by which their dropout differs.
            (self.samples[:, None] * rows + torch.arange(rows)).flatten(),
            None if documents is None else documents - documents[:, :1],
            types=types,
        )

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """Apply `change` to every tensor."""
        return replace(self, **{name: change(x) for name, x in vars(self).items() if x is not None})


Span = tuple[int, int]
"""Samples [first, last) of a run."""


def number_samples(places: Int64s, skipped: Sequence[Span]) -> Int64s:
    """Return the samples at positions `places` of a run that skips some spans, which are ascending
    and do not overlap."""
    for first, last in skipped:
        # In ascending order each span moves all that come behind it, later spans included.
        places = np.where(places >= first, places + (last - first), places)
    return places


def add_spans(skipped: Sequence[Span], samples: Int64s) -> tuple[Span, ...]:
    """Return `skipped` extended by these samples, which may come in any order."""
    # All skipped samples one by one, then cut into runs where a number is left out.
    spans = [np.arange(first, last) for first, last in skipped]
    numbers = np.unique(np.concatenate([samples, *spans]))
    begins = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = np.split(numbers, begins)
    return tuple((int(run[0]), int(run[-1]) + 1) for run in runs)


class Batches(Protocol):
    """A source of batches, as training takes them: `Loader` reads them, and others may be made of
    what it reads.

    All ranks ask for the same steps. What a source does not have in `state`, a resume must not
    need."""

    @property
    def mixture(self) -> Mixture:
        """Return the mixture whose samples the numbers in micro-batches are of."""

    @property
    def samples(self) -> int:
        """Return how many samples of the run all ranks together have received."""

    @property
    def skipped(self) -> tuple[Span, ...]:
        """Return the samples that the run passes over."""

    def __next__(self) -> list[MicroBatch]:
        """Return this data rank's micro-batches of the next global batch."""

    def samples_of_step(self, before: int) -> Int64s:
        """Return the samples of the global batch, [G], that follows the first `before` samples."""

    def consumed(self, samples: int | None = None) -> dict[str, int]:
        """Return how many samples of each source all ranks together received, among the first
        `samples` or all."""

    def state(self, samples: int | None = None) -> dict[str, Any]:
        """Return the data's part of a checkpoint, so far or after the first `samples`."""

    def close(self) -> None:
        """End what reads ahead."""


class MadeBatches:
    """Batches that are made of another source's, such as answers of the model to its prompts. Their
    place in the data is that of the source."""

    def __init__(self, source: Batches, make: Callable[[list[MicroBatch]], list[MicroBatch]]):
        """`make` returns what is trained on instead of a step's micro-batches: as many, of the same
        sizes."""
        self._source, self._make = source, make
        self.mixture, self.skipped = source.mixture, source.skipped
        self.samples_of_step, self.consumed, self.state, self.close = (
            source.samples_of_step, source.consumed, source.state, source.close,
        )  # fmt: skip

    @property
    def samples(self) -> int:
        """Return how many samples of the run all ranks together have received."""
        return self._source.samples

    def __next__(self) -> list[MicroBatch]:
        return self._make(next(self._source))


class Loader:
    """Iterates endlessly over steps; each item is the list of this data rank's micro-batches of one
    global batch.

    Step s is samples start_sample + [s·G, (s+1)·G) of the mixture without those in `skipped`,
    whatever the ranks: micro-batch m of data rank d is its samples (m·data_size + d)·B + [0, B). A
    thread reads `prefetch` steps ahead; an error in it is raised here.

    Close the loader, or use it in a `with`, to end the thread. Raises DataError for sizes that do
    not divide, and for a token id not below `vocab_size`, if that is given. `pin` copies batches to
    pinned memory for a GPU. `batch_size` gives G after so many samples; without it, it is
    `global_batch_size`."""

    def __init__(
        self,
        mixture: Mixture,
        global_batch_size: int,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        start_sample: int = 0,
        prefetch: int = 2,
        vocab_size: int | None = None,
        pin: bool = False,
        skipped: Sequence[Span] = (),
        batch_size: Callable[[int], int] | None = None,
    ) -> None:
        if min(global_batch_size, micro_batch_size, data_size, prefetch) < 1 or start_sample < 0:
            raise DataError(
                "batch sizes, data_size and prefetch must be at least 1, and start_sample at least 0"
            )
        if not 0 <= data_rank < data_size:
            raise DataError(f"data_rank {data_rank} is not in [0, {data_size})")
        if global_batch_size % (micro_batch_size * data_size):
            raise DataError(
                f"global_batch_size {global_batch_size} must be a multiple of micro_batch_size {micro_batch_size} "
                f"* {data_size} data ranks = {micro_batch_size * data_size}"
            )
        self.mixture, self.global_batch_size = mixture, global_batch_size
        self._batch_size = batch_size or (lambda samples: global_batch_size)
        self._samples, self.skipped = start_sample, tuple(skipped)

        def rows(size: int) -> Int64s:
            """Return the offsets of this rank's samples in a step of `size`: [micro-batches, B]."""
            # [micro-batches, data ranks, B]: the first micro-batches of all ranks are the first
            # samples, so that another number of data ranks still draws the same samples in a step.
            return np.arange(size).reshape(-1, data_size, micro_batch_size)[:, data_rank]

        self._steps: queue.Queue[list[MicroBatch] | BaseException] = queue.Queue(prefetch)
        self._stop = threading.Event()
        # The thread must not refer to the loader, or one dropped unclosed would never be
        # garbage-collected.
        self._thread = threading.Thread(
            target=_read_ahead,
            args=(
                self._steps,
                self._stop,
                mixture,
                self.skipped,
                rows,
                start_sample,
                self._batch_size,
                vocab_size,
                pin,
            ),
            name="megalite-loader",
            daemon=True,
        )
        self._failure: BaseException | None = None
        self._end = weakref.finalize(self, _end, self._steps, self._stop)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[MicroBatch]:
        """Return the next step's micro-batches. Raise what the reading thread raised."""
        if self._failure is not None:
            raise self._failure
        if self._stop.is_set():
            raise DataError("the loader is closed")
        if self._thread.ident is None:
            self._thread.start()
        NOW.do("waiting for the data loader")
        item = self._steps.get()
        NOW.do("")
        if isinstance(item, BaseException):
            self._failure = item
            raise item
        self._samples += self._batch_size(self._samples)
        return item

    @property
    def samples(self) -> int:
        """Return how many samples of the run all ranks together have received."""
        return self._samples

    def samples_of_step(self, before: int) -> Int64s:
        """Return the samples of the global batch, [G], that follows the first `before` samples."""
        return number_samples(np.arange(before, before + self._batch_size(before)), self.skipped)

    def consumed(self, samples: int | None = None) -> dict[str, int]:
        """Return how many samples of each source all ranks together received, among the first
        `samples` or all so far."""
        count = int(
            number_samples(np.array(self._samples if samples is None else samples), self.skipped)
        )
        found = self.mixture.consumed(count)
        for span in self.skipped:
            before, until = (self.mixture.consumed(min(end, count)) for end in span)
            # Skipped samples were never handed out: subtract what their spans hold of each source.
            found = {name: found[name] - until[name] + before[name] for name in found}
        return found

    def state(self, samples: int | None = None) -> dict[str, Any]:
        """Return the data's part of a checkpoint: which data, how many samples all ranks together
        received, in total and per source (so far or after the first `samples`), and which were
        skipped.

        Steps read ahead but not handed out do not count. A run continues with
        `start_sample=state["samples"]` and `skipped=state["skipped"]`, on any number of ranks and
        with any batch size."""
        return {
            "fingerprint": self.mixture.fingerprint(),
            "sources": self.mixture.contents(),
            "samples": self._samples if samples is None else samples,
            "consumed": self.consumed(samples),
            "skipped": [list(span) for span in self.skipped],
        }

    def close(self) -> None:
        """End the thread and drop what it read ahead. Closing twice is no error."""
        self._end()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _read_ahead(
    steps: queue.Queue,
    stop: threading.Event,
    mixture: Mixture,
    skipped: Sequence[Span],
    rows: Callable[[int], Int64s],
    first: int,
    batch_size: Callable[[int], int],
    vocab_size: int | None,
    pin: bool,
) -> None:
    """Read step after step into the queue until `stop` is set or an error occurs. `rows` gives the
    offsets of this rank's samples in a step of some size, `first` is the first sample, `batch_size`
    gives the size of each step."""
    while not stop.is_set():
        size = batch_size(first)
        try:
            step: Any = _read_step(mixture, number_samples(first + rows(size), skipped), vocab_size)
            step = [micro.pinned() for micro in step] if pin else step
        except BaseException as error:
            # Every error goes to the consumer, who would otherwise wait forever.
            step = error
        steps.put(step)
        if isinstance(step, BaseException):
            return
        first += size


def _read_step(mixture: Mixture, indices: Int64s, vocab_size: int | None) -> list[MicroBatch]:
    """Read the samples `indices`, [micro-batches, B], and return them as micro-batches."""
    found = mixture.read(indices.ravel())
    if vocab_size is not None:
        _check_ids(mixture, indices.ravel(), found.tokens, vocab_size)
        if mixture.view.labels == "next":
            # Labels are tokens shifted by one, of which only the last of each row is not checked
            # yet; or what a mask hides, which is not among the tokens at all.
            labels = found.labels if mixture.view.corruption else found.labels[:, -1:]
            _check_ids(mixture, indices.ravel(), np.where(labels == IGNORE, 0, labels), vocab_size)
        if found.source is not None:
            _check_ids(mixture, indices.ravel(), found.source, vocab_size)

    def by_micro_batch(x: Int64s | None) -> Sequence[torch.Tensor | None]:
        if x is None:
            return [None] * len(indices)
        return torch.from_numpy(x).view(*indices.shape, -1).unbind()

    columns = {
        "tokens": found.tokens,
        "labels": found.labels,
        "documents": found.documents,
        "types": mixture.types(found),
        "source": found.source,
        "source_documents": found.source_documents,
        "sentences": found.sentences,
    }
    steps = {name: by_micro_batch(x) for name, x in columns.items()}
    return [
        MicroBatch(samples=samples, **{name: x[number] for name, x in steps.items()})  # type: ignore[arg-type]
        for number, samples in enumerate(torch.from_numpy(indices))
    ]


def _check_ids(mixture: Mixture, indices: Int64s, tokens: Int64s, vocab_size: int) -> None:
    """Raise DataError for token ids outside the vocabulary. A vocabulary-parallel embedding would
    take such an id for another rank's, and training would silently go wrong."""
    if 0 <= tokens.min() <= tokens.max() < vocab_size:
        return
    is_bad = (tokens < 0) | (tokens >= vocab_size)
    row = int(np.argmax(is_bad.any(1)))
    source, sample = mixture.order.locate(indices[row : row + 1])
    raise DataError(
        f"{mixture.sources[int(source[0])].dataset.prefix}: sample {int(sample[0])} holds token id "
        f"{int(tokens[row][is_bad[row]][0])}, but model.vocab_size = {vocab_size}"
    )


def _end(steps: queue.Queue, stop: threading.Event) -> None:
    """Stop the thread; runs when the loader is closed or collected."""
    # The thread may be waiting to put one step: making room lets it see `stop`. It puts no second
    # one after that.
    stop.set()
    while True:
        try:
            steps.get_nowait()
        except queue.Empty:
            return
