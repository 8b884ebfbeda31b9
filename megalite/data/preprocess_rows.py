"""Convert rows of labelled data to token files: PREFIX.bin and .idx as for plain text, and
PREFIX.mask, which says what is learned from each token.

The parent reads rows, workers tokenize them, the parent writes, as in `preprocess`."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from megalite.config import NUM_LABELS
from megalite.data.annotations import Annotated, Disagreement, read_annotations, tool_of
from megalite.data.formats import CLASSES, LABEL_FIELDS, Encoder, Settings, labels_in
from megalite.data.indexed import MASKS, token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report
from megalite.data.metadata import Preprocessed, check_inputs
from megalite.data.origins import places_of, writing_origins
from megalite.data.preprocess import Meter, in_order, start_tokenizing
from megalite.data.rows import Row, class_names, excerpt, list_rows, read_rows
from megalite.data.tokenizer import Tokenizer
from megalite.errors import DataError
from megalite.runtime.processes import worker_pool

ROWS_PER_BLOCK = 256
SHOWN_ROWS = 5
MOST_BAD = 1000  # above what is tolerated: then the rest is no better
MOST_LABELS = 10_000


class EncodedRows(NamedTuple):
    """Holds the documents of a block of rows, and the rows that cannot be used."""

    tokens: np.ndarray  # documents end to end
    values: np.ndarray  # what the mask says of each
    lengths: list[int]
    text_bytes: int
    bad: list[tuple[Row, str]]
    seen: Counter[str]
    """What was ignored in rows that were accepted, and how often."""
    places: np.ndarray
    paths: list[str]
    """Where each document comes from: numbers of these files, and lines in them."""


@dataclass
class _Totals:
    """Sums up the blocks of rows that were written."""

    num_learned: int = 0
    text_bytes: int = 0
    bad: list[tuple[Row, str]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)

    def write(self, encoded: EncodedRows, writer: IndexedWriter) -> None:
        """Write a block's documents, and count them."""
        writer.add_documents(encoded.tokens, encoded.lengths, encoded.values)
        self.num_learned += int(np.count_nonzero(encoded.values))
        self.text_bytes += encoded.text_bytes
        self.bad += encoded.bad
        self.seen += encoded.seen


def preprocess_rows(
    inputs: Sequence[str],
    output_prefix: str | Path,
    settings: Settings,
    workers: int = 1,
    bad_rows: int = 0,
    console: Console | None = None,
    disagreement: Disagreement = "vote",
) -> Preprocessed:
    """Tokenize rows into OUTPUT_PREFIX.bin, .idx and .mask, .json which says what they were made
    from, and .src which says where each comes from.

    `inputs` are files, folders or globs; `settings` give format, tokenizer and labels; `workers` is
    the number of processes; `console` shows the progress. Up to `bad_rows` unusable rows are left
    out and reported. Of an export of an annotation tool `disagreement` says what becomes of items
    that annotators judge differently. Raise DataError, with nothing written, if there are more bad
    rows, if no row is left, or if the tokenizer lacks what the format needs."""
    report, start, prefix = Report(), time.monotonic(), str(output_prefix)
    files = list_rows(inputs, report)
    check_inputs(prefix, files)
    annotated = _annotated(files, settings, disagreement)
    settings = _with_labels(files, settings, annotated)
    tokenizer = _opened(settings).tokenizer
    writer = IndexedWriter(prefix, token_dtype(tokenizer.vocab_size), _mask_dtype(settings))
    blocks, totals = _blocks(files, report, annotated), _Totals()
    with (
        writing_origins(prefix, None) as origins,
        writer,
        Meter("tokenizing", sum(files.values()), console) as meter,
        worker_pool(workers, start_tokenizing) as pool,
        closing(in_order(blocks, partial(_encode, settings), pool, workers)) as results,
    ):
        for _, encoded in results:
            totals.write(encoded, writer)
            origins.add(encoded.places, [(path, files[path]) for path in encoded.paths])
            # Enough to say what is wrong: a file of another format need not be read to its end.
            if len(totals.bad) > bad_rows + MOST_BAD:
                break
            meter.update(report.bytes_read, writer.num_tokens)
        if len(totals.bad) > bad_rows:
            raise DataError(_complaint(totals.bad, bad_rows))
        if not writer.num_documents:
            nothing = f"no row came out of {', '.join(inputs)}; nothing was written\n{report}"
            raise DataError(nothing.rstrip())
    for row, why in totals.bad:
        report.bad(row.path, row.line, why)
    facts = {"dtype": writer.dtype.name, "inputs": list(inputs), **_facts_of(settings, tokenizer)}
    if annotated:
        totals.seen += annotated.counts
        facts["agreement"] = {name: round(x, 4) for name, x in annotated.agreement.items()}
    facts |= {"num_learned": totals.num_learned, "passed_over": dict(sorted(totals.seen.items()))}
    documents, tokens = writer.num_documents, writer.num_tokens
    result = Preprocessed(
        prefix, facts, "tokenizers", documents, tokens, totals.text_bytes, 0, report
    )
    result.write()
    result.seconds = time.monotonic() - start
    result.remark = "\n".join(_remarks(totals, tokens, annotated))
    return result


def _remarks(totals: _Totals, num_tokens: int, annotated: Annotated | None) -> Iterator[str]:
    """Yield a line for what is learned, each thing that was passed over, each measure of agreement."""
    yield f"learned from {totals.num_learned:,} of {num_tokens:,} tokens"
    for what, count in sorted(totals.seen.items()):
        yield f"passed over: {what} ({count:,})"
    for name, x in annotated.agreement.items() if annotated else ():
        yield f"agreement: {name} = {x:.3f}"


def _annotated(
    files: Mapping[str, int], settings: Settings, disagreement: Disagreement
) -> Annotated | None:
    """Return the rows of an export of an annotation tool, None for rows of another kind."""
    first = next(read_rows(files, Report()), None)
    tool = first and tool_of(first)
    if not tool:
        return None
    rows = read_rows(files, Report())
    return read_annotations(rows, tool, settings.format, settings.problem, disagreement)


def _with_labels(
    files: Mapping[str, int], settings: Settings, annotated: Annotated | None
) -> Settings:
    """Return the settings with the names of the classes, or of the number. Raise DataError for a
    problem that the format or the labels do not go with."""
    if settings.problem != "single_label" and settings.format != "classification":
        raise DataError(
            f"--problem {settings.problem} is for --format classification, not {settings.format}"
        )
    labels = settings.labels
    if twice := next((name for name in labels if labels.count(name) > 1), None):
        raise DataError(f"--labels names {twice!r} twice")
    if settings.problem == "regression":
        labels = labels or ("score",)
    elif settings.format in CLASSES and not labels:
        labels = _labels_of(files, settings, annotated)
    least, most = NUM_LABELS[settings.problem]
    if settings.problem != "single_label" and not least <= len(labels) <= most:
        raise DataError(
            f"--problem {settings.problem} takes {least} to {most} labels, not {len(labels)}"
        )
    return replace(settings, labels=labels)


def _mask_dtype(settings: Settings) -> np.dtype:
    """Return the dtype that holds the values of tokens."""
    count = len(settings.labels)
    highest = {"single_label": count, "multi_label": 2**count, "regression": 2**32}[
        settings.problem
    ]
    return next(dtype for dtype in map(np.dtype, MASKS) if highest <= np.iinfo(dtype).max)


def _facts_of(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a note beside token files says of how rows were encoded."""
    return {
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "tokenizer": settings.tokenizer,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "format": settings.format,
        "last_only": settings.last_only,
        "labels": list(settings.labels),
        "problem": settings.problem,
    }


def _blocks(
    files: Mapping[str, int], report: Report, annotated: Annotated | None
) -> Iterator[list[Row]]:
    """Yield the rows in blocks of ROWS_PER_BLOCK."""
    rows = iter(annotated.rows) if annotated else read_rows(files, report)
    while block := list(itertools.islice(rows, ROWS_PER_BLOCK)):
        yield block


def _encode(settings: Settings, rows: Sequence[Row]) -> EncodedRows:
    """Tokenize one block of rows in a worker."""
    sound = [row for row in rows if not row.why]
    bad = [(row, row.why) for row in rows if row.why]
    documents, encoder = [], _opened(settings)
    places, numbers = [], dict[str, int]()
    encoder.seen.clear()
    for row, found in zip(sound, encoder.encode([row.values for row in sound]), strict=True):
        if isinstance(found, str):
            bad.append((row, found))
        elif not all(len(document.ids) for document in found):
            bad.append((row, "the tokenizer makes no token of it"))
        elif not all(document.values.any() for document in found):
            bad.append((row, "nothing is learned from any of its tokens"))
        else:
            documents += found
            number = numbers.setdefault(row.path, len(numbers))
            places += [(number, row.line, row.num_bytes, row.start)] * len(found)
    bad.sort(key=lambda item: (item[0].path, item[0].line))
    ids = np.concatenate([np.empty(0, np.int64), *(document.ids for document in documents)])
    values = np.concatenate([np.empty(0, np.int64), *(document.values for document in documents)])
    num_bytes = sum(document.text_bytes for document in documents)
    return EncodedRows(
        ids,
        values,
        [len(document.ids) for document in documents],
        num_bytes,
        bad,
        encoder.seen.copy(),
        places_of(places),
        list(numbers),
    )


@cache
def _opened(settings: Settings) -> Encoder:
    """Open the encoder once per process."""
    return Encoder(settings)


def _labels_of(
    files: Mapping[str, int], settings: Settings, annotated: Annotated | None
) -> tuple[str, ...]:
    """Return the names of the classes, in the order of their numbers: those that the files name,
    else those that the rows use. Raise DataError if they are mixed or too many."""
    for path in files:
        named = class_names(path)
        if field := next((name for name in LABEL_FIELDS[settings.format] if name in named), None):
            return tuple(named[field])
    found: set[Any] = set()
    first = ""
    for row in annotated.rows if annotated else read_rows(files, Report()):
        try:
            found.update(labels_in(row.values, settings.format) if not row.why else ())
        except (ValueError, TypeError) as error:  # reported when the row is encoded
            first = first or f"; the first row: {row.path}:{row.line}: {error}"
            continue
        if len(found) > MOST_LABELS:
            raise DataError(
                f"{row.path}: more than {MOST_LABELS:,} different labels; name those that count by --labels"
            )
    numbers = {label for label in found if isinstance(label, int)}
    if numbers == found and found and max(numbers) < MOST_LABELS:
        return tuple(str(number) for number in range(max(numbers) + 1))
    if numbers or not found or not all(isinstance(label, str) for label in found):
        some = ", ".join(sorted(map(repr, found))[:8])
        if not found:
            raise DataError(f"no row has a label{first}")
        raise DataError(
            f"labels must be all words or all numbers; found: {some}; name them by --labels"
        )
    return tuple(sorted(found))


def _complaint(bad: Sequence[tuple[Row, str]], tolerated: int) -> str:
    """Return the error about rows that cannot be used, with the first of them."""
    reasons = Counter(why for _, why in bad)
    first = {why: row for row, why in reversed(bad)}
    lines, more = [], len(bad)
    for why, count in [*reasons.items()][:SHOWN_ROWS]:
        row, others = first[why], f" and {count - 1:,} more" * (count > 1)
        lines.append(f"{row.path}:{row.line}{others}: {why}\n    {excerpt(row.values)}")
        more -= count
    lines += [f"… and {more:,} more"] if more > 0 else []
    allowed = f"more than the {tolerated:,} of --bad-rows" if tolerated else "nothing was written"
    return "\n".join([f"{len(bad):,} rows cannot be used ({allowed}):", *lines])
