"""Tokenizing text found on this machine: by megalite, by gigatoken itself, and by Hugging Face's
tokenizers.

Each is a whole process, from its start to the written file, and they take turns, so that what else
the machine does hits all alike:

- gigatoken: its own way through a whole file (`encode_files` of JSON lines, on all cores), ids and
  lengths written.
- megalite: tools/preprocess_data.py, and that with --exact.
- batches: Hugging Face's tokenizers as they are fastest, `encode_batch_fast` on all cores.
- pool: a process a core, document by document, lists of ids sent back: the way of Megatron-LM's
  preprocess_data.py.

What Hugging Face's do is slow, and gets only some of the documents, from all over. Memory is
resident memory, summed over the processes. --unicode compares the ids of every code point instead,
and --endless the memory that ever more words which never recur need."""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from megalite.data.fast_bpe import DIFFERENT, FastBPE
from megalite.data.tokenizer import HuggingFaceTokenizer
from megalite.data.tokenizer_training import train_tokenizer

ROOT = Path(__file__).parents[2]
ENDINGS = (".py", ".pyi", ".md", ".rst", ".txt", ".html", ".gz", "copyright")
TOOL = ["tools/preprocess_data.py", "--append-eod"]
GIGATOKEN = """
import sys, gigatoken, numpy
text, tokenizer, out = sys.argv[1:]
rows = gigatoken.Tokenizer(tokenizer).encode_files(gigatoken.JsonlFileSource([text])).layout
numpy.asarray(rows.content.data).astype("<u2").tofile(out)
numpy.diff(rows.offsets.data).astype("<i4").tofile(out + ".lengths")
"""
OPENED = """
import itertools, json, multiprocessing, sys, numpy, tokenizers
text, tokenizer, out = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(tokenizer + "/tokenizer.json")
"""
BATCHES = f"""{OPENED}
with open(text, "rb") as lines, open(out, "wb") as file:
    while batch := [json.loads(line)["text"] for line in itertools.islice(lines, 500)]:
        for row in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            numpy.array(row.ids, "<u2").tofile(file)
"""
POOL = f"""{OPENED}
def encode(line):
    return tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
with open(text, "rb") as lines, open(out, "wb") as file, multiprocessing.get_context("fork").Pool() as pool:
    for ids in pool.imap(encode, lines, 32):
        numpy.array(ids, "<u2").tofile(file)
"""
SLOW = ("megalite --exact", "batches", "pool")


def texts_of_this_machine(max_bytes: int) -> Iterator[str]:
    """Manual pages and documents, up to a quarter each, and Python sources."""
    seen: set[str] = set()
    left = max_bytes
    for folder, most in [
        ("/usr/share/man", max_bytes // 4),
        ("/usr/share/doc", max_bytes // 4),
        *((p, left) for p in sys.path),
    ]:
        most = min(most, left)
        for root, names, files in os.walk(folder):
            names.sort()
            for path in (
                os.path.join(root, name) for name in sorted(files) if name.endswith(ENDINGS)
            ):
                if (
                    most <= 0
                    or path in seen
                    or os.path.islink(path)
                    or os.path.getsize(path) > 2_000_000
                ):
                    continue
                seen.add(path)
                try:
                    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                        data = file.read()
                        text = data.decode()
                except (OSError, EOFError, ValueError):
                    continue
                if text and "\0" not in text:
                    most, left = most - len(data), left - len(data)
                    yield text


def prepare(folder: Path, megabytes: int, slow_megabytes: int) -> dict[str, float]:
    """Writes all.jsonl, some.jsonl and the tokenizer's folder. MB of text in each."""
    sizes = {"all": 0.0, "some": 0.0}
    with open(folder / "all.jsonl", "w") as every, open(folder / "some.jsonl", "w") as some:
        for number, text in enumerate(texts_of_this_machine(megabytes * 10**6)):
            # Both ways of writing é.
            line = json.dumps({"text": text}, ensure_ascii=bool(number % 2)) + "\n"
            size = len(text.encode()) / 1e6
            every.write(line)
            sizes["all"] += size
            if sizes["some"] < sizes["all"] * slow_megabytes / megabytes:
                some.write(line)
                sizes["some"] += size
    if not (folder / "tokenizer").exists():
        train_tokenizer([str(folder / "some.jsonl")], folder / "tokenizer", 32_000)
    return sizes


def run(command: list[str]) -> tuple[float, float]:
    """Seconds, and the most MiB that the process and its children held."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAYON_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    most, start = 0, time.monotonic()
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                now = sum(p.memory_info().rss for p in [watched, *watched.children(recursive=True)])
                most = max(most, now)
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{command} failed")
    return time.monotonic() - start, most / 2**20


def measure(folder: Path, arguments: argparse.Namespace) -> None:
    sizes = prepare(folder, arguments.megabytes, arguments.slow_megabytes)
    every, some, tokenizer, out = (
        str(folder / name) for name in ("all.jsonl", "some.jsonl", "tokenizer", "out")
    )
    tool = [*TOOL, "--tokenizer", tokenizer, "--output-prefix", out, "--input"]
    commands = {
        "gigatoken": ["-c", GIGATOKEN, every, tokenizer, out],
        "megalite": [*tool, every],
        "megalite --exact": [*tool, some, "--exact"],
        "batches": ["-c", BATCHES, some, tokenizer, out],
        "pool": ["-c", POOL, some, tokenizer, out],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    peaks: dict[str, float] = dict.fromkeys(commands, 0.0)
    for number in range(arguments.rounds + 1):
        for name, command in commands.items():
            if name in SLOW and number > arguments.slow_rounds:
                continue
            seconds, peak = run(command)
            peaks[name] = max(peaks[name], peak)
            if number:  # the first round warms the page cache
                rates[name].append(sizes["some" if name in SLOW else "all"] / seconds)
    print(
        f"{sizes['all']:.0f} MB, and {sizes['some']:.0f} MB of it for the slow ones; medians of {arguments.rounds}"
    )
    for name, rate in rates.items():
        low, high = min(rate), max(rate)
        print(
            f"{name:18s} {statistics.median(rate):7.1f} MB/s ({low:.1f} to {high:.1f}), {peaks[name]:6.0f} MiB"
        )
    for name in ("gigatoken", "batches", "pool"):
        pairs = zip(rates["megalite"], itertools.cycle(rates[name]), strict=False)
        print(f"megalite is {statistics.median(one / two for one, two in pairs):.2f} x {name}")


def compare_all_of_unicode(folder: Path) -> None:
    prepare(folder, 20, 10)
    exact = HuggingFaceTokenizer(folder / "tokenizer" / "tokenizer.json")
    fast, start = FastBPE(exact), time.monotonic()
    points = [point for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    num_left = num_other = 0
    for first in range(0, len(points), 20_000):
        texts = [
            "x{0}y {0}{0}.{0}1{0} {0}A{0}\n'{0}".format(chr(point))
            for point in points[first : first + 20_000]
        ]
        flat, lengths, left = fast.encode([text.encode() for text in texts])
        rows = np.split(flat, lengths.cumsum()[:-1])
        num_left += left
        num_other += sum(
            row.tolist() != ids for row, ids in zip(rows, exact.encode_batch(texts), strict=True)
        )
    disagreed = int((fast._states == DIFFERENT).sum())
    print(
        f"{len(points):,} code points in {time.monotonic() - start:.0f} s: on {disagreed:,} the libraries disagree, "
        f"{num_left:,} texts were left to Hugging Face's; {num_other:,} texts have other ids than these give"
    )


def measure_endless_words(folder: Path, megabytes: int) -> None:
    prepare(folder, 20, 10)
    generator = np.random.default_rng(0)
    path = folder / "endless.jsonl"
    with open(path, "wb") as file:
        for _ in range(megabytes):
            words = generator.integers(97, 123, (10**6 // 7, 7), np.uint8)
            words[:, 0] = 32
            file.write(b'{"text": "' + words.tobytes() + b'"}\n')
    command = [
        *TOOL,
        "--tokenizer",
        str(folder / "tokenizer"),
        "--output-prefix",
        str(folder / "out"),
        "--input",
        str(path),
    ]
    seconds, peak = run(command)
    print(
        f"{megabytes} MB of words of which none recurs: {megabytes / seconds:.1f} MB/s, {peak:,.0f} MiB at most"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=400, help="of text (default: %(default)s)")
    parser.add_argument(
        "--slow-megabytes",
        type=int,
        default=8,
        help="of it for the slow ones (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--slow-rounds", type=int, default=3)
    parser.add_argument(
        "--unicode", action="store_true", help="compare ids of all code points instead"
    )
    parser.add_argument(
        "--endless", type=int, metavar="MB", help="measure memory on words that never recur instead"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.unicode:
            compare_all_of_unicode(Path(folder))
        elif arguments.endless:
            measure_endless_words(Path(folder), arguments.endless)
        else:
            measure(Path(folder), arguments)


if __name__ == "__main__":
    main()
