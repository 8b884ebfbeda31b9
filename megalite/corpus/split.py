"""Splits documents into train, valid and test by a hash of their letters and digits.

Case, punctuation and spaces do not count: documents that differ only in these are always in the
same split, even where duplicates are kept.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.corpus.config import SplitConfig
from megalite.corpus.files import Compression, line_of, packing, suffix_of, whole_file, write_json
from megalite.corpus.tally import Count, num_bytes_of

SPLITS = ("train", "valid", "test")
NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def split_of(text: str, config: SplitConfig) -> str:
    """Return the split of a text: train, valid or test."""
    # A hash, not a random number: the split of a text depends on nothing but the text.
    letters = NEITHER_LETTER_NOR_DIGIT.sub("", text.lower())
    digest = hashlib.blake2b(letters.encode("utf-8", "replace"), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64  # uniform in [0, 1]: 2^64 - 1 is rounded up
    # Test before valid: another share of valid moves no document into or out of test.
    if point < config.test:
        return "test"
    return "valid" if point < config.test + config.valid else "train"


class WriteSplits(PipelineStep):
    """Writes documents to `output`/train/RANK.jsonl.zst, valid/ and test/, and their counts to
    `counts`/RANK.json.

    A split without a document of the shard gets no file."""

    type, name = "writer", "splits"

    def __init__(
        self,
        output: Path,
        counts: Path,
        config: SplitConfig,
        compression: Compression,
        counting: list[Any],
    ) -> None:
        """Write to `output`. `counting` are the steps before this one whose counts are written
        beside its own."""
        super().__init__()
        self._output = output
        self._counts = counts
        self._config = config
        self._compression = compression
        self._counting = counting
        self.written: dict[str, dict[str, Count]] = {split: {} for split in SPLITS}
        """Counts of each split, by source."""

    def run(
        self,
        data: Iterable[Document],
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Document]:
        with ExitStack() as files:
            opened: dict[str, Any] = {}
            for document in data:
                split = split_of(document.text, self._config)
                if split not in opened:  # a split without a document gets no file
                    suffix = suffix_of(self._compression)
                    path = self._output / split / f"{rank:05d}{suffix}"
                    file = files.enter_context(whole_file(path))
                    opened[split] = files.enter_context(packing(file, self._compression))
                opened[split].write(line_of(document))
                size = num_bytes_of(document.text)
                counts = self.written[split].setdefault(document.metadata["source"], Count())
                counts.add(size)
                yield document
        # The loop has come to its end, so that the counts of the steps before are complete.
        splits = {}
        for split, sources in self.written.items():
            splits[split] = {source: vars(count) for source, count in sources.items()}
        stages = [step.counted() for step in self._counting]
        write_json(self._counts / f"{rank:05d}.json", {"stages": stages, "splits": splits})
