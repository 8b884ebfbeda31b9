"""Say which text a step of a run was trained on, and at which steps a text was: `megalite trace`.

Nothing is logged for it: which sample comes when is arithmetic, and so is what a sample is made
of."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from megalite.data.mixture import Samples
from megalite.data.order import Int64s
from megalite.data.origins import Origin
from megalite.errors import ConfigError
from megalite.lineage.documents import Documents
from megalite.lineage.places import NONE, Places, places_of
from megalite.lineage.run import TracedRun
from megalite.lineage.texts import SourceText, read_source

EXCERPT = 60
"""Characters of a text that a line shows."""
REMOVED = "it was taken out: fillers stand there, of which nothing is learned"
AT_ONCE = 64
"""Samples made in memory at a time."""


class Place(NamedTuple):
    """Says where a token stands."""

    prefix: str
    """Token file."""
    place: int
    """Token of that file."""
    document: int
    offset: int
    """Token of that document."""
    origin: Origin | None
    """What the document was made of; None where it was not noted."""


class Traced(NamedTuple):
    """Holds what one sample of a step was made of."""

    step: int
    number: int
    """Which of the step's samples, from 0."""
    sample: int
    """Which sample of the mixture."""
    source: str
    epoch: int | None
    """Of its source, from 0; None where epochs are shuffled together."""
    places: Places
    """Of this sample alone."""


class Use(NamedTuple):
    """Says where a document was trained on."""

    step: int
    number: int
    source: str
    epoch: int | None
    seen: Int64s
    """Tokens of the sample, of a decoder's where there are two stacks, at which the model sees
    some of it."""
    predicted: Int64s
    """Those at which it is to predict some of it."""
    of_source: Int64s
    """Those of an encoder at which it sees some of it."""


class Tracer:
    """Answers questions about a run."""

    def __init__(self, run: TracedRun) -> None:
        self.run, self.mixture = run, run.mixture
        self.documents = Documents([source.dataset for source in run.mixture.sources])
        """Those of the sources, in their order."""

    def samples(self, step: int, only: int | None = None) -> Iterator[Traced]:
        """Yield what the samples of a step, or `only` one of them, were made of. Raise
        ConfigError."""
        samples = self.run.samples_of(step)
        if only is not None and not 0 <= only < len(samples):
            raise ConfigError(
                f"--sample {only} is not in 0 … {len(samples) - 1}, those of the step"
            )
        numbers = np.arange(len(samples)) if only is None else np.array([only])
        epochs = self.mixture.order.epochs(samples)
        for first in range(0, len(numbers), AT_ONCE):
            some = numbers[first : first + AT_ONCE]
            found = places_of(self.mixture, samples[some])
            for row, number in enumerate(some.tolist()):
                source = self.mixture.names[int(found.of_source[row])]
                epoch = None if epochs is None else int(epochs[number])
                places = _row(found, row)
                yield Traced(step, number, int(samples[number]), source, epoch, places)

    def place(self, traced: Traced, place: int) -> Place:
        """Return where a token of the sample's token file stands."""
        number = int(traced.places.of_source[0])
        dataset, origins = self.documents.datasets[number], self.documents.origins(number)
        document = dataset.document_of(place)
        offset = place - dataset.document_start(document)
        origin = origins.of(document) if origins else None
        return Place(dataset.prefix, place, document, offset, origin)

    def text(self, number: int, place: Place) -> SourceText | str:
        """Return the text that a document of source `number` was made of, or why it is not
        known."""
        dataset, origins = self.documents.datasets[number], self.documents.origins(number)
        assert origins is not None
        assert place.origin is not None
        if self.is_removed(number, place.document):
            return REMOVED
        return read_source(dataset, place.document, place.origin, origins.key, self.run.tokenizer)

    def is_removed(self, number: int, document: int) -> bool:
        """Return whether a document of source `number` was taken out."""
        removed = self.documents.datasets[number].removed
        return removed is not None and document in removed

    def uses(self, source: int, document: int, count: int | None = None) -> Iterator[Use]:
        """Yield every use of a document of a source, in the order of the run, among its first
        `count` samples (default: all that it has made, or is to make)."""
        count = self.run.num_samples if count is None else count
        each = self.mixture.sources[source]
        start = each.dataset.document_start(document)
        stop = each.dataset.document_start(document + 1)
        # Samples that may have some of it, each once an epoch: whether one does, its places say.
        samples = [
            self.mixture.order.indices_of(source, sample, count)
            for sample in each.samples_with(start, stop).tolist()
        ]
        indices = np.sort(np.concatenate([np.empty(0, np.int64), *samples]))
        epochs = self.mixture.order.epochs(indices)
        for first in range(0, len(indices), AT_ONCE):
            some = indices[first : first + AT_ONCE]
            found = places_of(self.mixture, some)
            for row, index in enumerate(some.tolist()):
                at = self.run.step_of(index)
                if at is None:
                    continue  # passed over
                seen = _inside(found.tokens, row, start, stop)
                predicted = _inside(found.labels, row, start, stop)
                of_source = _inside(found.source, row, start, stop)
                if len(seen) or len(predicted) or len(of_source):
                    epoch = None if epochs is None else int(epochs[first + row])
                    name = self.mixture.names[source]
                    yield Use(*at, name, epoch, seen, predicted, of_source)


def _inside(places: Int64s | None, row: int, start: int, stop: int) -> Int64s:
    """Return the tokens of a row of `places` that stand in [start, stop) of the token file; none
    where there are no places."""
    if places is None:
        return np.empty(0, np.int64)
    return np.flatnonzero((places[row] >= start) & (places[row] < stop))


def _row(places: Places, row: int) -> Places:
    """Return the places of one of several samples."""

    # Every field has samples first, and stays an array of one: what is asked of a step's samples
    # can be asked of this.
    def only(x: Any) -> Any:
        return None if x is None else x[row : row + 1]

    return Places(Samples(*map(only, places.samples)), *map(only, places[1:]))


def print_step(
    what: Path, step: int, sample: int | None, token: int | None, console: Console
) -> None:
    """Print what a step of a run was made of: every document of its samples, or of one; with
    `token`, where that token of the sample stands. Raise ConfigError or DataError."""
    if token is not None and sample is None:
        raise ConfigError("--token is one of a sample: give --sample as well")
    tracer = Tracer(TracedRun.open(what))
    if step in tracer.run.refused:
        _say(console, f"step {step:,} updated nothing: its loss or gradient was bad")
    for traced in tracer.samples(step, sample):
        epoch = "" if traced.epoch is None else f", epoch {traced.epoch}"
        _say(
            console,
            f"step {step:,}, sample {traced.number} (the run's {traced.sample:,}): {traced.source}{epoch}",
        )
        lines = _parts(tracer, traced) if token is None else _token(tracer, traced, token)
        for line in lines:
            _say(console, line)


def _parts(tracer: Tracer, traced: Traced) -> Iterator[str]:
    """Yield a line for each stretch of a sample that is of one document in one piece."""
    places = traced.places
    # Of a decoder beside an encoder the labels: what it sees is those, one place later.
    stacks = {"": places.tokens[0]} if places.source is None else {
        "source ": places.source[0], "target ": places.labels[0]
    }  # fmt: skip
    number = int(places.of_source[0])
    dataset = tracer.documents.datasets[number]
    for name, row in stacks.items():
        # A stretch of the sample stands in one piece in the token file where places rise by one.
        borders = [0, *(np.flatnonzero(np.diff(row) != 1) + 1).tolist(), len(row)]
        for first, end in itertools.pairwise(borders):
            at = int(row[first])
            # It may be of several documents, which lie one behind another in the file.
            while at != NONE and first < end:
                found = tracer.place(traced, at)
                count = min(end - first, dataset.document_start(found.document + 1) - at)
                where = found.origin or f"{found.prefix}#{found.document}"
                if tracer.is_removed(number, found.document):
                    text = REMOVED
                else:
                    text = _excerpt(tracer, dataset.read(at, at + count).tolist())
                yield (
                    f"  {name}tokens {first}–{first + count - 1}: {where}, document {found.document:,}, its tokens "
                    f"{found.offset:,}–{found.offset + count - 1:,}: {text}"
                )
                first, at = first + count, at + count


def _token(tracer: Tracer, traced: Traced, token: int) -> Iterator[str]:
    """Yield lines about one token of a sample: what the model sees there, and what it is to
    predict."""
    places, samples = traced.places, traced.places.samples
    if not 0 <= token < samples.tokens.shape[1]:
        raise ConfigError(
            f"--token {token} is not in 0 … {samples.tokens.shape[1] - 1}, those of a sample"
        )
    seen, label = int(samples.tokens[0, token]), int(samples.labels[0, token])
    at, of_label = int(places.tokens[0, token]), int(places.labels[0, token])
    yield f"  token {token} is {seen} {_excerpt(tracer, [seen])}"
    yield from _about(tracer, traced, at)
    # Augmentation changes words in the samples, and not in the token file.
    if tracer.mixture.view.augment and at != NONE:
        dataset = tracer.documents.datasets[int(places.of_source[0])]
        if int(dataset.read(at, at + 1)[0]) != seen:
            yield "    data.augment has changed the words of the text that stands there"
    kind = tracer.mixture.view.labels
    # A negative label is none. That a text has no class, a message of its own says below.
    if label < 0 and kind != "document":
        yield "  nothing is predicted there"
    elif kind != "next":
        yield f"  its class is {label}" if label >= 0 else "  it has no class"
    else:
        yield f"  to be predicted there: {label} {_excerpt(tracer, [label])}"
        if of_label != at:  # a masked word is predicted where it stands
            yield from _about(tracer, traced, of_label)


def _about(tracer: Tracer, traced: Traced, place: int) -> Iterator[str]:
    """Yield lines about a place in a token file."""
    if place == NONE:
        yield "    of no text: padding, a mark or a sentinel"
        return
    found = tracer.place(traced, place)
    yield f"    {found.prefix}: document {found.document:,}, its token {found.offset:,}"
    if found.origin is None:
        yield f"    there is no {found.prefix}.src that says what the document was made of"
        return
    yield f"    {found.origin}"
    text = tracer.text(int(traced.places.of_source[0]), found)
    yield from [f"    {text}"] if isinstance(text, str) else _bytes(text, found.offset)


def _bytes(text: SourceText, offset: int) -> Iterator[str]:
    """Yield lines about a token of a text that is still where it was read."""
    if text.spans is not None and (span := text.spans.get(offset)):
        first, last = span
        yield f"    bytes {first:,} to {last:,} of its text: {text.text.encode()[first:last]!r}"
    if text.notes:
        yield "    " + ", ".join(f"{key}: {value}" for key, value in text.notes.items())


def print_document(what: Path, wanted: Sequence[str], console: Console) -> None:
    """Print every step and place at which documents were trained on. Raise ConfigError or
    DataError."""
    tracer = Tracer(TracedRun.open(what))
    planned = "" if tracer.run.done else "planned "
    for name, found in tracer.documents.find(wanted).items():
        for source, document in found:
            dataset = tracer.mixture.sources[source].dataset
            gone = f"; {REMOVED}" if tracer.is_removed(source, document) else ""
            _say(console, f"{name}: {dataset.prefix}#{document}{gone}")
            count = 0
            for use in tracer.uses(source, document):
                count += 1
                _say(console, _line_of(use, use.step in tracer.run.refused))
            _say(console, f"  {count:,} uses in the {tracer.run.num_steps:,} {planned}steps")


def _line_of(use: Use, is_refused: bool) -> str:
    """Return a line about a use of a document. `is_refused`: its step updated nothing."""
    places = [("seen at tokens", use.seen), ("predicted at", use.predicted)]
    if len(use.of_source):
        places[0] = ("seen in the source at", use.of_source)
    told = "; ".join(f"{words} {_ranges(x)}" for words, x in places if len(x))
    refused = ", which updated nothing" if is_refused else ""
    epoch = "" if use.epoch is None else f", epoch {use.epoch}"
    return f"  step {use.step:,}{refused}, sample {use.number}{epoch}: {told}"


def _ranges(numbers: Int64s) -> str:
    """Return ascending numbers as ranges."""
    ranges = []
    for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
        ranges.append(f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(ranges)


def _excerpt(tracer: Tracer, ids: Sequence[int]) -> str:
    """Return the text of ids, shortened; empty without a tokenizer."""
    if tracer.run.tokenizer is None:
        return ""
    # A token has half a character or more in nearly all texts: the rest would not be shown.
    text = tracer.run.tokenizer.decode(list(ids[: 2 * EXCERPT]))
    return repr(text) if len(text) <= EXCERPT else f"{text[:EXCERPT]!r}…"


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False)
