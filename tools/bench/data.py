"""What the data side costs a core: the loader and reading samples, Megatron's order, best-fit
packing and blending.

Documents are log-normal, with a mean of 940 tokens; samples have 4,096. Samples are read in batches
of 8, at random out of a file of uint16 tokens in the page cache: as one piece each, and as
Megatron's order has them, finding the pieces included. Rates are medians of a number of turns,
times of three.

    python tools/bench/data.py
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from megalite.config_file import parse_config
from megalite.data.gather import gather, gather_reference
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.loader import Loader
from megalite.data.megatron_order import MegatronOrder, blend
from megalite.data.mixture import build_mixtures
from megalite.data.order import Int64s
from megalite.data.packing import Packing, best_fit

SEQ_LENGTH, BATCH = 4096, 8
WEIGHTS = (5.0, 1.0, 3.0, 2.0, 0.5)


def document_lengths(num_documents: int) -> npt.NDArray[np.int32]:
    lengths = np.random.default_rng(0).lognormal(6.0, 1.3, num_documents).astype(np.int32) + 1
    return np.minimum(lengths, 2**20)


def seconds(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def report(what: str, took: str, more: str = "") -> None:
    print(f"{what:58}{took:>16}  {more}".rstrip())


def read_whole(tokens: npt.NDArray, batches: Int64s) -> None:
    """batches: [number, BATCH] first tokens of samples."""
    for starts in batches:
        out = np.empty((BATCH, SEQ_LENGTH + 1), np.int64)
        gather(tokens, starts, np.full(BATCH, out.shape[1]), np.arange(BATCH) * out.shape[1], out)


def read_pieces(
    tokens: npt.NDArray, order: MegatronOrder, first_token: Int64s, batches: Int64s
) -> None:
    """first_token: of each document; batches: [number, BATCH] numbers of samples."""
    for samples in batches:
        out = np.empty((BATCH, SEQ_LENGTH + 1), np.int64)
        pieces = order.pieces(samples)
        # Rows are full: each begins where the one before ends.
        places = np.cumsum(pieces.length) - pieces.length
        gather(tokens, first_token[pieces.sequence] + pieces.offset, pieces.length, places, out)


def measure_reading(num_documents: int, turns: int, batches: int) -> None:
    lengths = document_lengths(num_documents)
    ends = np.cumsum(lengths, dtype=np.int64)
    first_token, random = ends - lengths, np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "tokens.bin")
        path.write_bytes(random.integers(0, 50_000, int(ends[-1]), np.uint16).tobytes())
        tokens = np.memmap(path, np.uint16, "r")
        order = MegatronOrder(lengths, None, SEQ_LENGTH, seed=0)
        whole, pieces = [], []
        for _ in range(turns):
            starts = random.integers(0, len(tokens) - SEQ_LENGTH, (batches, BATCH))
            samples = random.integers(0, order.num_samples, (batches, BATCH))
            whole.append(seconds(partial(read_whole, tokens, starts)))
            pieces.append(seconds(partial(read_pieces, tokens, order, first_token, samples)))
    asked = batches * BATCH * SEQ_LENGTH / 1e6
    report("reading, a sample one piece", f"{asked / median(whole):,.0f} M tokens/s")
    report("reading in Megatron's order", f"{asked / median(pieces):,.0f} M tokens/s")


def measure_loader(num_documents: int, turns: int, steps: int) -> None:
    settings: dict[str, dict[str, object]] = {
        "concat": {},
        "concat, documents masked": {"document_mask": True},
        "best_fit": {"packing": "best_fit"},
        "best_fit, documents masked": {"packing": "best_fit", "document_mask": True},
        "order: megatron": {"order": "megatron"},
    }
    lengths = document_lengths(num_documents)
    with tempfile.TemporaryDirectory() as folder:
        with IndexedWriter(Path(folder, "tokens"), np.uint16) as writer:
            tokens = np.random.default_rng(1).integers(
                0, 50_000, int(lengths.sum(dtype=np.int64)), np.uint16
            )
            writer.add_documents(tokens, lengths)
        for name, setting in settings.items():
            data = {"train": [{"path": f"{folder}/tokens"}], "seq_length": SEQ_LENGTH, **setting}
            train = {"steps": turns * (steps + 1), "global_batch_size": 2 * BATCH}
            sections = {
                "run": {"name": "bench"},
                "model": {"preset": "llama-1b"},
                "optimizer": {"lr": 1e-4},
            }
            mixture = build_mixtures(parse_config({**sections, "data": data, "train": train}))[
                "train"
            ]
            assert mixture is not None
            took = []
            with Loader(mixture, 2 * BATCH, BATCH, 0, 1, vocab_size=50_000) as loader:
                next(loader)
                for _ in range(turns):
                    begin = time.process_time()
                    for _ in range(steps):
                        next(loader)
                    took.append(time.process_time() - begin)
            report(
                f"the loader, {name}",
                f"{steps * 2 * BATCH * SEQ_LENGTH / median(took) / 1e6:,.0f} M tokens/s",
            )


def measure_order(num_documents: int) -> None:
    lengths = document_lengths(num_documents)
    orders: list[MegatronOrder] = []
    took = median(
        seconds(lambda: orders.append(MegatronOrder(lengths, None, SEQ_LENGTH, seed=0)))
        for _ in range(3)
    )
    size = (
        f"{lengths.sum(dtype=np.int64) / 1e9:.1f} billion tokens, {orders[0].num_samples:,} samples"
    )
    report(f"Megatron's order of {num_documents:,} documents", f"{took:.2f} s", size)


def cut_by_position(lengths: npt.NDArray[np.int32], capacity: int) -> float:
    """Share of the documents that fit a row which rows of a stream cut."""
    ends = np.cumsum(lengths, dtype=np.int64)
    cut = (ends - lengths) // capacity != (ends - 1) // capacity
    return float(np.mean(cut[lengths <= capacity]))


def measure_packing(num_documents: int) -> None:
    lengths, capacity = document_lengths(num_documents), SEQ_LENGTH + 1
    packings: list[Packing] = []
    took = median(seconds(lambda: packings.append(best_fit(lengths, capacity))) for _ in range(3))
    bins, fewest = (
        len(packings[0].first_piece) - 1,
        -(-int(lengths.sum(dtype=np.int64)) // capacity),
    )
    report(
        f"packing {num_documents:,} documents",
        f"{took:.2f} s",
        f"{bins - fewest} bins above the {fewest:,} needed",
    )
    too_long = packings[0].num_truncated / num_documents
    report("  cut by it", f"{too_long:.2%}", "those longer than a row")
    report(
        "  cut by rows of a stream",
        f"{too_long + cut_by_position(lengths, capacity) * (1 - too_long):.2%}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=10_000_000, help="to order and to pack")
    parser.add_argument("--samples", type=int, default=10_000_000, help="to blend")
    parser.add_argument("--turns", type=int, default=9)
    arguments = parser.parse_args()
    compiled = "without the compiled helpers" if gather is gather_reference else "compiled"
    print(
        f"{os.cpu_count()} cores, numpy {np.__version__}, Python {platform.python_version()}, {compiled}\n"
    )
    measure_loader(100_000, arguments.turns, steps=20)
    measure_reading(300_000, arguments.turns, batches=500)
    measure_order(arguments.documents)
    measure_packing(arguments.documents)
    took = median(seconds(lambda: blend(WEIGHTS, arguments.samples)) for _ in range(3))
    report(f"blending {arguments.samples:,} samples of {len(WEIGHTS)} sources", f"{took:.2f} s")


if __name__ == "__main__":
    main()
