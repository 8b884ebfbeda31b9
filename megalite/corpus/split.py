"""Train, valid and test by a hash of a document's letters and digits.

Case, punctuation and spaces do not count: also where duplicates are kept, none that differs in these alone lies on two
sides."""

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
from megalite.corpus.files import Compression, line_of, packing, replacing, suffix_of, write_json
from megalite.corpus.tally import Count, num_bytes_of

SPLITS = ("train", "valid", "test")
NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def split_of(text: str, config: SplitConfig) -> str:
    letters = NEITHER_LETTER_NOR_DIGIT.sub("", text.lower())
    digest = hashlib.blake2b(letters.encode("utf-8", "replace"), digest_size=8).digest()
    point = int.from_bytes(digest) / 2**64
    if point < config.test:
        return "test"
    return "valid" if point < config.test + config.valid else "train"


class WriteSplits(PipelineStep):
    """`output`/train/RANK.jsonl.zst, and so on for valid and test, and `counts`/RANK.json. A shard has no file where it
    has no document."""

    type, name = "writer", "splits"

    def __init__(
        self, output: Path, counts: Path, config: SplitConfig, compression: Compression, counting: list[Any]
    ) -> None:
        super().__init__()
        self._output, self._counts, self._config = output, counts, config
        self._compression, self._counting = compression, counting
        self.written: dict[str, dict[str, Count]] = {split: {} for split in SPLITS}  # by source

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with ExitStack() as files:
            opened: dict[str, Any] = {}
            for document in data:
                split = split_of(document.text, self._config)
                if split not in opened:
                    path = self._output / split / f"{rank:05d}{suffix_of(self._compression)}"
                    file = files.enter_context(replacing(path))
                    opened[split] = files.enter_context(packing(file, self._compression))
                opened[split].write(line_of(document))
                size = num_bytes_of(document.text)
                self.written[split].setdefault(document.metadata["source"], Count()).add(size)
                yield document
        write_json(
            self._counts / f"{rank:05d}.json",
            {
                "stages": [step.counted() for step in self._counting],
                "splits": {
                    split: {source: vars(count) for source, count in sources.items()}
                    for split, sources in self.written.items()
                },
            },
        )
