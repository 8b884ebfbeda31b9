"""Text to token files: read, tokenize over processes, write, in one pass and bounded memory.

The parent reads documents and groups them into batches; workers tokenize a batch each; the parent writes the results in
the order of the batches, so that the files do not depend on the number of workers. No more than a few batches a worker
are ever under way, which is what bounds the memory whatever the size of the input."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from megalite.data.documents import Document, Report, iter_documents
from megalite.data.indexed import DataError, IndexedWriter, token_dtype
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.resources import fsync
from megalite.workers import start_worker

BATCH_BYTES = 1 << 20
BATCHES_PER_WORKER = 4
SECONDS_PER_LINE = 5.0


class Batch(NamedTuple):
    texts: list[str]
    num_bytes: int  # of the texts in UTF-8
    bytes_read: int  # of the inputs, up to the end of this batch


class Encoded(NamedTuple):
    tokens: npt.NDArray[np.int32]  # documents end to end, [sum(lengths)]
    lengths: npt.NDArray[np.int32]  # documents that have tokens, [num_documents]


@dataclass
class Preprocessed:
    """What was written to `prefix`.bin, .idx and .json. `text_bytes` counts UTF-8, `num_empty` documents left out."""

    prefix: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    seconds: float
    report: Report

    def __str__(self) -> str:
        rate = f"{self.text_bytes / 1e6 / self.seconds:.1f} MB/s, {self.num_tokens / self.seconds:,.0f} tokens/s"
        summary = (
            f"{self.prefix}: {self.num_documents:,} documents, {self.num_tokens:,} tokens from "
            f"{self.text_bytes / 1e6:,.1f} MB of text in {self.seconds:.1f} s ({rate})"
        )
        return f"{summary}\n{self.report}".rstrip()


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer: str | Path,
    json_key: str = "text",
    append_eod: bool = False,
    workers: int = 1,
    console: Console | None = None,
) -> Preprocessed:
    """Tokenize `inputs` into OUTPUT_PREFIX_KEY_document.bin and .idx, and .json which says what they were made of.

    One worker is this very process. The files appear under their names only when complete. Raises DataError, with
    nothing written, if an input matches nothing, no document has tokens, or `append_eod` meets a tokenizer that has no
    end-of-document token."""
    if workers < 1:
        raise DataError(f"workers {workers}: at least 1 is needed")
    opened = load_tokenizer(tokenizer)
    if append_eod and opened.eod_id is None:
        raise DataError(
            f"{tokenizer} names no end-of-document token, which --append-eod needs: give tokenizer_config.json an "
            "eos_token, or leave --append-eod out"
        )
    report, start, text_bytes = Report(), time.monotonic(), 0
    batches = _batches(iter_documents(inputs, json_key, report), report)
    prefix = f"{output_prefix}_{json_key}_document"
    encode = partial(_encode, str(tokenizer), append_eod)
    with (
        IndexedWriter(prefix, token_dtype(opened.vocab_size)) as writer,
        _Meter(report.total_bytes, console) as meter,
        closing(_encoded(batches, encode, workers)) as results,
    ):
        for batch, encoded in results:
            writer.add_documents(*encoded)
            report.num_empty += len(batch.texts) - len(encoded.lengths)
            text_bytes += batch.num_bytes
            meter.update(batch.bytes_read, writer.num_tokens)
        if not writer.num_documents:
            raise DataError(f"no document came out of {', '.join(inputs)}; nothing was written\n{report}".rstrip())
    result = Preprocessed(prefix, writer.num_documents, writer.num_tokens, text_bytes, time.monotonic() - start, report)
    _write_metadata(result, opened, inputs, append_eod)
    return result


def _batches(documents: Iterator[Document], report: Report) -> Iterator[Batch]:
    texts: list[str] = []
    num_bytes = 0
    for document in documents:
        texts.append(document.text)
        num_bytes += document.num_bytes
        if num_bytes >= BATCH_BYTES:
            yield Batch(texts, num_bytes, report.bytes_read)
            texts, num_bytes = [], 0
    if texts:
        yield Batch(texts, num_bytes, report.bytes_read)


def _encode(tokenizer: str, append_eod: bool, texts: list[str]) -> Encoded:
    """A document without tokens is left out, and gets no end of document either."""
    opened = _opened(tokenizer)
    end = [opened.eod_id] if append_eod else []
    documents = [np.array([*ids, *end], np.int32) for ids in opened.encode_batch(texts) if ids]
    lengths = np.array([len(ids) for ids in documents], np.int32)
    return Encoded(np.concatenate([np.empty(0, np.int32), *documents]), lengths)


@cache
def _opened(tokenizer: str) -> Tokenizer:
    return load_tokenizer(tokenizer)


def _encoded(
    batches: Iterator[Batch], encode: Callable[[list[str]], Encoded], workers: int
) -> Generator[tuple[Batch, Encoded], None, None]:
    """Every batch with its tokens, in order, at most BATCHES_PER_WORKER × `workers` of them under way."""
    if workers == 1:
        yield from ((batch, encode(batch.texts)) for batch in batches)
        return
    pending: deque[tuple[Batch, Future[Encoded]]] = deque()
    # Spawned, since a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=start_worker) as pool:
        try:
            for batch in batches:
                pending.append((batch, pool.submit(encode, batch.texts)))
                if len(pending) >= BATCHES_PER_WORKER * workers:
                    done, future = pending.popleft()
                    yield done, future.result()
            for done, future in pending:
                yield done, future.result()
        except BrokenProcessPool:
            raise DataError(f"one of {workers} workers was killed, most likely for memory; use fewer workers") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_metadata(result: Preprocessed, tokenizer: Tokenizer, inputs: Sequence[str], append_eod: bool) -> None:
    report = result.report
    values: dict[str, Any] = {
        "num_documents": result.num_documents,
        "num_tokens": result.num_tokens,
        "dtype": token_dtype(tokenizer.vocab_size).name,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "append_eod": append_eod,
        "tokenizer_fingerprint": tokenizer.fingerprint(),
        "inputs": list(inputs),
        "text_bytes": result.text_bytes,
        "num_empty": report.num_empty,
        "num_bad": report.num_bad,
        "num_hidden": report.num_hidden,
        "num_binary": report.num_binary,
        "messages": report.messages,
    }
    final, temporary = Path(f"{result.prefix}.json"), Path(f"{result.prefix}.json.tmp")
    temporary.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, final)
    fsync(final.parent)


class _Meter:
    """A progress bar on a terminal; elsewhere, as in a job's log, a line every few seconds. Nothing without console."""

    def __init__(self, total_bytes: int, console: Console | None) -> None:
        self._total, self._console = total_bytes, console
        self._start = self._said = time.monotonic()
        self._bar: Progress | None = None
        if console is not None and console.is_terminal:
            rate = TextColumn("{task.fields[rate]:,.0f} tokens/s")
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), rate, TimeRemainingColumn())
            self._bar = Progress(TextColumn("tokenizing"), *columns, console=console)
            self._task = self._bar.add_task("", total=total_bytes, rate=0.0)

    def update(self, bytes_read: int, num_tokens: int) -> None:
        """Totals so far."""
        now = time.monotonic()
        elapsed = max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=bytes_read, rate=num_tokens / elapsed)
        elif self._console is not None and now - self._said >= SECONDS_PER_LINE:
            self._said = now
            self._console.print(
                f"{bytes_read / 1e6:,.0f} of {self._total / 1e6:,.0f} MB, {bytes_read / 1e6 / elapsed:.1f} MB/s, "
                f"{num_tokens / elapsed:,.0f} tokens/s",
                highlight=False,
            )

    def __enter__(self) -> _Meter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
