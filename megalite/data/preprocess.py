"""Convert text to token files: read, tokenize, write, in one pass and bounded memory.

The parent cuts the inputs into blocks; workers parse and tokenize a block each; the parent writes
the results in the order of the blocks, so that the files do not depend on the number of workers.
Only a few blocks per worker are in flight at any time, which bounds the memory whatever the size of
the input. Workers are threads for gigatoken, which releases Python's GIL, and processes for the
other libraries."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from megalite.data import shards
from megalite.data.blocks import (
    Block,
    LineNumbers,
    Shard,
    Texts,
    add_to,
    iter_blocks,
    shard_bytes,
    texts_of,
)
from megalite.data.fast_bpe import FastBPE, NotFast
from megalite.data.indexed import token_dtype
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inputs import Report, list_documents
from megalite.data.metadata import Preprocessed, check_inputs, other_settings
from megalite.data.origins import writing_origins
from megalite.data.sentence_ends import split_sentences
from megalite.data.tokenizer import (
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from megalite.errors import DataError
from megalite.runtime.processes import start_worker, worker_pool
from megalite.utils.progress import ProgressMeter

BLOCKS_PER_WORKER = 4
# Characters given to Hugging Face's tokenizers at a time: they need some 130 bytes for each. Longer
# texts are tokenized by one worker at a time, for which `_turn` is a lock between processes.
BITE = 1 << 19
_turn: AbstractContextManager[object] = nullcontext()

B = TypeVar("B")
E = TypeVar("E")


class Encoded(NamedTuple):
    """Holds the tokens of one block."""

    tokens: npt.NDArray[Any]  # documents end to end, [sum(lengths)]
    lengths: npt.NDArray[np.int32]  # documents that have tokens, [num_documents]
    text_bytes: int
    num_left: int
    read: Texts  # whose texts are left out
    num_empty: int
    # Sentences of each document, whose lengths then are those above; None: documents are not cut.
    counts: npt.NDArray[np.int32] | None = None


class Packing(NamedTuple):
    """Holds how a block's texts become documents of tokens."""

    json_key: str
    begin: int | None  # a token for every document that does not begin, or end, with it already
    end: int | None
    dtype: np.dtype[Any]
    by_sentence: bool = False


def preprocess(
    inputs: Sequence[str],
    output_prefix: str | Path,
    tokenizer: str | Path,
    json_key: str = "text",
    append_eod: bool | None = None,
    workers: int = 1,
    console: Console | None = None,
    exact: bool = False,
    shard: Shard | None = None,
    prepend_bos: bool | None = None,
    by_sentence: bool = False,
) -> Preprocessed:
    """Tokenize `inputs` into OUTPUT_PREFIX_KEY_document.bin and .idx, .json which says what they
    were made from, and .src which says where each document comes from.

    `tokenizer` is a path for `load_tokenizer`; `json_key` names the text in JSON lines, parquet and
    Arrow; `append_eod` ends each document with the end-of-document token; None: if the tokenizer
    names one. `prepend_bos` begins each with the BOS token; None: if the tokenizer begins every
    text with it, as those of models trained that way do.

    Byte-level BPE is left to gigatoken unless `exact`; should its ids differ anywhere in the
    compared samples of the inputs, everything is tokenized again by Hugging Face's tokenizers. With
    a `shard`, only that part is written, unless it is there already; the job that completes the
    last shard returns the whole.

    With `by_sentence` each sentence is a sequence of the index, of which documents are made, as by
    Megatron-LM's --split-sentences; Hugging Face's or sentencepiece then tokenize each by itself.

    With one of the `workers`, Hugging Face's or sentencepiece runs in this very process. `console`
    shows the progress. The files appear under their names only when complete. Raise DataError, with
    nothing written, if an input matches nothing, no document has tokens, or `append_eod` or
    `prepend_bos` meets a tokenizer without such a token."""
    if workers < 1:
        raise DataError(f"workers {workers}: at least 1 is needed")
    opened = load_tokenizer(tokenizer)
    begin, end = _ends_of_documents(tokenizer, opened, append_eod, prepend_bos)
    report = Report()
    files = list_documents(inputs, report)
    settings = {
        "dtype": token_dtype(opened.vocab_size).name,
        "vocab_size": opened.vocab_size,
        "eod_id": opened.eod_id,
        "append_eod": end is not None,
        "begin_id": begin,
        "tokenizer": str(tokenizer),
        "tokenizer_fingerprint": opened.fingerprint(),
        "inputs": list(inputs),
        "input_bytes": shard_bytes(files, Shard())[1],
    }
    if by_sentence:
        if shard is not None:
            raise DataError("--split-sentences and --shard do not go together: give one of them")
        settings["by_sentence"] = exact = True
    packing = Packing(json_key, begin, end, token_dtype(opened.vocab_size), by_sentence)
    job = _Job(str(tokenizer), opened, files, report, settings, packing, workers, exact, console)
    prefix = f"{output_prefix}_{json_key}_document"
    check_inputs(prefix, files)
    return job.run(prefix, Shard()) if shard is None else job.run_shard(prefix, shard)


def _ends_of_documents(
    path: str | Path, tokenizer: Tokenizer, append_eod: bool | None, prepend_bos: bool | None
) -> tuple[int | None, int | None]:
    """Return the ids of the tokens that begin and end each document; None: no such token.

    Raise DataError if one is asked for that the tokenizer, from `path`, does not name."""
    if append_eod and tokenizer.eod_id is None:
        raise DataError(
            f"{path} names no end-of-document token, which --append-eod needs: give tokenizer_config.json an "
            "eos_token, or leave --append-eod out"
        )
    if prepend_bos and tokenizer.begin_id is None:
        raise DataError(
            f"{path} names no token that begins a text, which --prepend-bos needs: give tokenizer_config.json a "
            "bos_token, or leave --prepend-bos out"
        )
    begin = tokenizer.begin_id
    if prepend_bos is None:
        # As the tokenizer itself begins a text.
        prepend_bos = begin is not None and tokenizer.begin_ids == [begin]
    end = None if append_eod is False else tokenizer.eod_id
    return begin if prepend_bos else None, end


class _NoDocument(DataError):
    """Raised inside `_write` so that the writer discards a file without documents."""

    pass


@dataclass(frozen=True)
class _Job:
    """Holds everything that one call of `preprocess` works with."""

    tokenizer: str
    opened: Tokenizer
    files: Mapping[str, int]
    listed: Report
    settings: dict[str, Any]
    packing: Packing
    workers: int
    exact: bool
    console: Console | None

    def run_shard(self, prefix: str, shard: Shard) -> Preprocessed:
        """Tokenize one shard, unless it is complete, and join all shards if this was the last."""
        name = shards.name_of(prefix, shard)
        # Before the whole is looked for: a part is removed only after the whole is complete.
        part = shards.read_complete(name, self.settings, self.exact)
        if whole := shards.read_complete(prefix, self.settings, self.exact):
            whole.remark = "complete already"
            shards.remove(name)  # which a join that was killed has left
            return whole
        if part is not None:
            part.remark = "complete already"
        else:
            for there in (name, prefix):
                if (differs := other_settings(there, self.settings)) and self.console is not None:
                    told = f"{there} was made with other settings and is made anew: {differs}"
                    self.console.print(
                        told, style="yellow", highlight=False, markup=False, soft_wrap=True
                    )
            shards.remove(name)
            part = self.run(name, shard)
        with Meter("joining shards", self.settings["input_bytes"], self.console) as meter:
            whole = shards.join(
                prefix, shard.count, self.settings, self.exact, self.packing.dtype, meter.update
            )
        return whole or part

    def run(self, prefix: str, shard: Shard) -> Preprocessed:
        """Tokenize one shard (the only one by default), and remark on the BOS token."""
        result = self._run(prefix, shard)
        if self.packing.begin is not None:
            begin = self.opened.decode([self.packing.begin])
            result.remark = f"{result.remark}\neach document begins with {begin}".strip()
        return result

    def _run(self, prefix: str, shard: Shard) -> Preprocessed:
        """Tokenize with the fastest library that gives exact ids."""
        if isinstance(self.opened, SentencePieceTokenizer) and (why := self.opened.why_alone):
            result = self._run_exactly(prefix, shard)
            result.remark = f"by sentencepiece; there is no tokenizer.json that is equal to this model, since {why}"
            return result
        if self.exact or not isinstance(self.opened, HuggingFaceTokenizer):
            return self._run_exactly(prefix, shard)
        try:
            fast = FastBPE(self.opened, self.workers)
            with ThreadPoolExecutor(self.workers) as pool:
                result = self._write(
                    prefix, shard, "gigatoken", pool, partial(_encode_fast, fast, self.packing)
                )
            result.remark = (
                f"by gigatoken: on {fast.num_compared:,} characters from all over the text its ids are those of "
                "Hugging Face's tokenizers"
            )
            if result.num_left:
                result.remark += (
                    f"; {result.num_left:,} documents were left to these, for characters or added tokens on which "
                    "the two may disagree"
                )
            return result
        except NotFast as why:
            remark = f"by Hugging Face's tokenizers, since gigatoken cannot stand in for them here: {why}"
        if self.console is not None:
            self.console.print(f"tokenizing {remark}", style="yellow", highlight=False)
        result = self._run_exactly(prefix, shard)
        result.remark = remark
        return result

    def _run_exactly(self, prefix: str, shard: Shard) -> Preprocessed:
        """Tokenize with Hugging Face's library or sentencepiece."""
        library = "tokenizers" if isinstance(self.opened, HuggingFaceTokenizer) else "sentencepiece"
        encode = partial(_encode_exactly, self.tokenizer, self.packing)
        # Only with several workers: creating the lock starts a process (multiprocessing's resource
        # tracker).
        turn = [multiprocessing.get_context("spawn").Lock()] if self.workers > 1 else []
        with worker_pool(self.workers, start_tokenizing, *turn) as pool:
            return self._write(prefix, shard, library, pool, encode)

    def _write(
        self,
        prefix: str,
        shard: Shard,
        library: str,
        pool: Executor | None,
        encode: Callable[[Block], Encoded],
    ) -> Preprocessed:
        """Tokenize the blocks of a shard in order and write them. A shard without documents writes
        only its .json."""
        start, report = time.monotonic(), Report()
        if not shard.index:
            add_to(report, self.listed)
        low, high = shard_bytes(self.files, shard)
        text_bytes = num_left = 0
        blocks, numbers = iter_blocks(self.files, self.packing.json_key, shard), LineNumbers(report)
        writer = IndexedWriter(prefix, self.packing.dtype)
        try:
            with (
                writing_origins(prefix, self.packing.json_key) as origins,
                writer,
                Meter("tokenizing", high - low, self.console) as meter,
                closing(in_order(blocks, encode, pool, self.workers)) as results,
            ):
                for block, encoded in results:
                    writer.add_documents(encoded.tokens, encoded.lengths, counts=encoded.counts)
                    places, paths = numbers.add(block, *encoded.read[1:]), encoded.read.paths
                    origins.add(places, [(path, self.files.get(path, 0)) for path in paths])
                    report.num_empty += encoded.num_empty
                    text_bytes += encoded.text_bytes
                    num_left += encoded.num_left
                    meter.update(report.bytes_read, writer.num_tokens)
                if not writer.num_documents:
                    inputs = ", ".join(self.settings["inputs"])
                    raise _NoDocument(
                        f"no document came out of {inputs}; nothing was written\n{report}".rstrip()
                    )
        except _NoDocument:
            # A shard may fall between two documents; only the whole must have one.
            if shard.count == 1:
                raise
        result = Preprocessed(
            prefix,
            self.settings,
            library,
            writer.num_documents,
            writer.num_tokens,
            text_bytes,
            num_left,
            report,
            numbers.of_last_file if shard.count > 1 else {},
        )
        result.write()
        result.seconds = time.monotonic() - start
        return result


def _encode_fast(fast: FastBPE, packing: Packing, block: Block) -> Encoded:
    """Tokenize one block with gigatoken. Raise NotFast if a sample's ids differ."""
    read = texts_of(block, packing.json_key)
    fast.compare_sample(read.texts)
    flat, lengths, num_left = fast.encode(read.texts)
    return _pack(read, flat, lengths, num_left, packing)


def _encode_exactly(tokenizer: str, packing: Packing, block: Block) -> Encoded:
    """Tokenize one block with the exact library."""
    read = texts_of(block, packing.json_key)
    rows: list[npt.NDArray[np.uint32]] = []
    texts_of_block = [text.decode() for text in read.texts]
    sentences = [split_sentences(text) for text in texts_of_block] if packing.by_sentence else None
    if sentences is not None:
        texts_of_block = [sentence for document in sentences for sentence in document]
    for texts in _bites(texts_of_block):
        with _turn if len(texts[0]) > BITE else nullcontext():
            rows += [np.array(ids, np.uint32) for ids in _opened(tokenizer).encode_documents(texts)]
    flat = np.concatenate([np.empty(0, np.uint32), *rows])
    lengths = np.array([len(row) for row in rows], np.int64)
    if sentences is None:
        return _pack(read, flat, lengths, 0, packing)
    return _pack_sentences(read, flat, lengths, [*map(len, sentences)], packing)


def _pack_sentences(
    read: Texts,
    flat: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    counts: Sequence[int],
    packing: Packing,
) -> Encoded:
    """Put sentences together to documents, of which each has some of the `counts`, as `_pack` does
    with whole ones. What is added at both ends belongs to the first sentence and the last."""
    of = np.repeat(np.arange(len(counts)), counts)
    whole = np.bincount(of, lengths, len(counts)).astype(np.int64)
    packed = _pack(read, flat, whole, 0, packing)
    # Sentences without tokens are none.
    of, lengths = of[lengths > 0], lengths[lengths > 0]
    found = np.bincount(of, minlength=len(counts))[whole > 0]
    last = np.cumsum(found) - 1
    first = last - found + 1
    whole, stops = whole[whole > 0], np.cumsum(packed.lengths, dtype=np.int64)
    added = packed.lengths - whole
    if packing.begin is not None:
        tokens, begins = flat, np.cumsum(whole) - whole
        no_begin = tokens[begins] != packing.begin
        lengths[first] += no_begin
        added = added - no_begin
    lengths[last] += added
    assert lengths.sum() == (stops[-1] if len(stops) else 0)
    return packed._replace(lengths=lengths.astype(np.int32), counts=found.astype(np.int32))


def _bites(texts: Sequence[str]) -> Iterator[list[str]]:
    """Yield a few texts together, and one longer than BITE alone."""
    bite: list[str] = []
    length = 0
    for text in texts:
        if bite and length + len(text) > BITE:
            yield bite
            bite, length = [], 0
        bite.append(text)
        length += len(text)
    if bite:
        yield bite


@cache
def _opened(tokenizer: str) -> Tokenizer:
    """Open the tokenizer once per process."""
    return load_tokenizer(tokenizer)


def _pack(
    read: Texts,
    flat: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    num_left: int,
    packing: Packing,
) -> Encoded:
    """Add begin and end tokens to the documents. A document without tokens is left out, and gets no
    end token either."""
    num_texts, places = len(lengths), read.places[lengths > 0]
    lengths = lengths[lengths > 0]
    if packing.begin is None and packing.end is None:
        tokens = flat.astype(packing.dtype)
    else:
        # Room for both tokens at every document, cut to size below: one pass without reallocation.
        tokens = np.empty(len(flat) + 2 * len(lengths), packing.dtype)
        borders = [-1 if token is None else token for token in (packing.begin, packing.end)]
        lengths = join_documents(flat, lengths, *borders, tokens)
        tokens = tokens[: lengths.sum()]
    num_empty = num_texts - len(lengths)
    text_bytes = sum(map(len, read.texts))
    return Encoded(
        tokens,
        lengths.astype(np.int32),
        text_bytes,
        num_left,
        read._replace(texts=[], places=places),
        num_empty,
    )


def join_documents_reference(
    tokens: npt.NDArray[np.uint32],
    lengths: npt.NDArray[np.int64],
    begin: int,
    end: int,
    out: npt.NDArray[Any],
) -> npt.NDArray[np.int64]:
    """Copy documents to `out` with the tokens `begin` and `end` added where they are missing (-1:
    none), and return the new lengths. This is `megalite._data.join_documents` in numpy; `tokens`
    are end to end, [sum(lengths)]."""
    stops = lengths.cumsum()
    no_begin = (tokens[stops - lengths] != begin) & (begin >= 0)
    no_end = (tokens[stops - 1] != end) & (end >= 0)
    places = np.stack([stops - lengths, stops], 1)[added := np.stack([no_begin, no_end], 1)]
    joined = np.insert(tokens.astype(out.dtype), places, np.where(added, [begin, end], 0)[added])
    out[: len(joined)] = joined
    return lengths + no_begin + no_end


try:
    from megalite._data import join_documents
except ImportError:  # installed without a compiler
    join_documents = join_documents_reference


def in_order(
    blocks: Iterator[B], encode: Callable[[B], E], pool: Executor | None, workers: int
) -> Generator[tuple[B, E], None, None]:
    """Yield every block with what `encode` makes of it, in order, with at most BLOCKS_PER_WORKER ×
    `workers` in flight in `pool`. Without a pool, encode here. Raise DataError if a worker was
    killed."""
    if pool is None:
        yield from ((block, encode(block)) for block in blocks)
        return
    pending: deque[tuple[B, Future[E]]] = deque()
    try:
        for block in blocks:
            pending.append((block, pool.submit(encode, block)))
            # Wait for the oldest block before taking another: this bounds the memory, and keeps the
            # order.
            if len(pending) >= BLOCKS_PER_WORKER * workers:
                done, future = pending.popleft()
                yield done, future.result()
        while pending:
            done, future = pending.popleft()
            yield done, future.result()
    except BrokenProcessPool:
        raise DataError(
            f"one of {workers} workers was killed, most likely for memory; use fewer workers"
        ) from None
    finally:
        # Waited for: a worker that is still starting needs what this process would take away.
        pool.shutdown(cancel_futures=True)


def start_tokenizing(turn: AbstractContextManager[object] | None = None) -> None:
    """Initialize a worker process. `turn` is the lock for long texts."""
    global _turn
    _turn = turn or _turn
    os.environ["RAYON_NUM_THREADS"] = "1"  # the processes are the parallelism
    start_worker()


class Meter(ProgressMeter):
    """Shows bytes read and tokens per second."""

    def __init__(self, name: str, total_bytes: int, console: Console | None) -> None:
        rate = TextColumn("{task.fields[rate]:,.0f} tokens/s")
        columns = (
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            rate,
            TimeRemainingColumn(),
        )
        super().__init__(name, total_bytes, columns, console, rate=0.0)

    def update(self, bytes_read: int, num_tokens: int) -> None:
        """Show the totals so far."""
        rate, speed = num_tokens / self.elapsed, decimal(int(bytes_read / self.elapsed))
        line = f"{decimal(bytes_read)} of {decimal(self.total)}, {speed}/s, {rate:,.0f} tokens/s"
        self.show(bytes_read, line, rate=rate)
