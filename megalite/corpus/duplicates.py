"""Finds exact and near duplicates over all shards.

Exact: by one digest a document; the first document in the order of the sources stays. Near: by
datatrove's MinHash, where only the clustering holds its findings in memory, and those are pairs of
duplicates, not documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.hashing import HashConfig
from datatrove.utils.text import TextNormConfig

from megalite.corpus.config import NearConfig
from megalite.corpus.files import whole_file
from megalite.corpus.tokenizing import Words

DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
PLACE = np.dtype([("shard", "<u4"), ("document", "<u4")])
EXACT_TASKS = 16
"""Number of tasks that look for exact duplicates. Each holds its share of the digests, a byte a
document, in memory."""
SHINGLES_AT_A_TIME = 1 << 14


class WriteDigests(PipelineStep):
    """Writes the digests of a shard's documents to `folder`/RANK.digests, 16 bytes each, and passes
    documents on."""

    type, name = "duplicates", "digests"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(
        self,
        data: Iterable[Document],
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Document]:
        with whole_file(self._folder / f"{rank:05d}.digests") as file:
            for document in data:
                digest = hashlib.blake2b(document.text.encode(), digest_size=DIGEST.itemsize)
                file.write(digest.digest())
                yield document


class FindExact(PipelineStep):
    """Writes to `output`/RANK.places which documents repeat an earlier text, by RANK's share of the
    digests."""

    type, name = "duplicates", "exact"

    def __init__(self, folder: Path, output: Path, num_shards: int) -> None:
        super().__init__()
        self._folder = folder
        self._output = output
        self._num_shards = num_shards

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        digests, places = [], []
        # Each task reads all digests and keeps its share: 16 reads of 16 bytes a document, where
        # tasks that hand them to each other would have to wait for one another.
        for shard in range(self._num_shards):
            shard_digests = np.fromfile(self._folder / f"{shard:05d}.digests", DIGEST)
            # Equal digests go to the same task.
            mine = np.flatnonzero(shard_digests["low"] % np.uint64(world_size) == rank)
            digests.append(shard_digests[mine])
            shards = np.full(len(mine), shard)
            places.append(np.rec.fromarrays([shards, mine], dtype=PLACE))
        # In the order of shards, and within a shard of its documents: the order of the corpus.
        all_digests = np.concatenate(digests)
        all_places = np.concatenate(places)
        # lexsort is stable: of equal digests the first remains the first, and is the one that
        # stays.
        order = np.lexsort((all_digests["low"], all_digests["high"]))
        ordered = all_digests[order]
        # Each digest that equals the one before it is of a later document.
        repeats = ordered[1:] == ordered[:-1]
        again = all_places[order[1:][repeats]]
        with whole_file(self._output / f"{rank:05d}.places") as file:
            file.write(np.sort(again, order=("shard", "document")).tobytes())


class ExactPlaces:
    """Reads what FindExact found in one shard: places of exact duplicates, sorted."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rank: int) -> npt.NDArray[np.uint32]:
        found = []
        for part in range(EXACT_TASKS):
            places = np.fromfile(self._folder / f"{part:05d}.places", PLACE)
            # Sorted by shard: those of one lie together.
            start, stop = np.searchsorted(places["shard"], [rank, rank + 1])
            found.append(places["document"][start:stop])
        return np.sort(np.concatenate(found))


class NearPlaces:
    """Reads what datatrove's clustering found in one shard: places among the documents without
    exact duplicates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rank: int) -> npt.NDArray[np.uint32]:
        path = self._folder / f"{rank:06d}.remove"
        if not path.exists():  # datatrove writes no file for a shard without duplicates
            return np.empty(0, np.uint32)
        return np.fromfile(path, "<u4")


class Signatures(MinhashDedupSignature):
    """Computes signatures in bounded memory: datatrove holds 8 bytes for each shingle and hash
    function at once."""

    def get_signature(self, shingles: npt.NDArray[np.uint64]) -> list[list[int]]:
        """Return the MinHash signature of a document's shingles."""
        parts = []
        for start in range(0, len(shingles), SHINGLES_AT_A_TIME):
            some = shingles[start : start + SHINGLES_AT_A_TIME]
            parts.append(super().get_signature(some))
        # A MinHash is a minimum, and so the minimum of the parts' minima.
        return np.minimum.reduce(np.array(parts, np.uint64)).tolist()


def minhash_config(config: NearConfig) -> MinhashConfig:
    """Translate the settings into datatrove's."""
    # datatrove's default hash, xxhash, fails with version 4 of that library.
    hashing = HashConfig(precision=64, hash_fc="sha1")
    norm = TextNormConfig(norm_numbers=config.same_numbers)
    return MinhashConfig(
        config.ngrams, config.buckets, config.hashes, norm_config=norm, hash_config=hashing
    )


def signatures(config: NearConfig, folder: Path) -> PipelineStep:
    """Make the step that writes MinHash signatures to `folder`."""
    # Existing ones are written anew, as is the default: those of a killed task may be a part that
    # happens to end between two documents.
    return Signatures(str(folder), minhash_config(config), language=Words())


def buckets(config: NearConfig, folder: Path, output: Path) -> PipelineStep:
    """Make the step that writes pairs of equal signatures in a bucket from `folder` to `output`,
    under `config`."""
    return MinhashDedupBuckets(
        str(folder), str(output), config=minhash_config(config), lines_to_buffer=1000
    )


def clusters(config: NearConfig, folder: Path, output: Path) -> PipelineStep:
    """Make the step that clusters the pairs in `folder`, and writes to `output` which documents
    `config` drops."""
    return MinhashDedupCluster(
        str(folder), str(output), minhash_config(config), lines_to_buffer=1000
    )
