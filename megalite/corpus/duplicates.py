"""Exact and near duplicates, over all shards.

Exact: a digest a document; the first in the order of the sources stays. Near: datatrove's MinHash, of which the
clustering alone holds in memory what it found (pairs of duplicates, not documents)."""

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
from megalite.corpus.files import replacing
from megalite.corpus.tokenizing import Words

DIGEST = np.dtype([("high", ">u8"), ("low", ">u8")])
PLACE = np.dtype([("shard", "<u4"), ("document", "<u4")])
# Tasks that each look for duplicates among a part of the digests: a 16th of 16 bytes a document at a time in memory.
EXACT_TASKS = 16
SHINGLES_AT_A_TIME = 1 << 14


class WriteDigests(PipelineStep):
    """`folder`/RANK.digests: 16 bytes a document, in order. Documents go on."""

    type, name = "duplicates", "digests"

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        with replacing(self._folder / f"{rank:05d}.digests") as file:
            for document in data:
                file.write(hashlib.blake2b(document.text.encode(), digest_size=DIGEST.itemsize).digest())
                yield document


class FindExact(PipelineStep):
    """`output`/RANK.places: where documents stand whose text stands further in front, among digests of RANK's part."""

    type, name = "duplicates", "exact"

    def __init__(self, folder: Path, output: Path, num_shards: int) -> None:
        super().__init__()
        self._folder, self._output, self._num_shards = folder, output, num_shards

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        digests, places = [], []
        for shard in range(self._num_shards):
            shard_digests = np.fromfile(self._folder / f"{shard:05d}.digests", DIGEST)
            mine = np.flatnonzero(shard_digests["low"] % np.uint64(world_size) == rank)
            digests.append(shard_digests[mine])
            places.append(np.rec.fromarrays([np.full(len(mine), shard), mine], dtype=PLACE))
        all_digests, all_places = np.concatenate(digests), np.concatenate(places)
        # Stable: of equal digests the first remains the first.
        order = np.lexsort((all_digests["low"], all_digests["high"]))
        ordered = all_digests[order]
        again = order[1:][ordered[1:] == ordered[:-1]]
        with replacing(self._output / f"{rank:05d}.places") as file:
            file.write(np.sort(all_places[again], order=("shard", "document")).tobytes())


class ExactPlaces:
    """What FindExact found of one shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rank: int) -> npt.NDArray[np.uint32]:
        found = []
        for part in range(EXACT_TASKS):
            places = np.fromfile(self._folder / f"{part:05d}.places", PLACE)
            start, stop = np.searchsorted(places["shard"], [rank, rank + 1])
            found.append(places["document"][start:stop])
        return np.sort(np.concatenate(found))


class NearPlaces:
    """What datatrove's clustering left of one shard: places among the documents without exact duplicates."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, rank: int) -> npt.NDArray[np.uint32]:
        path = self._folder / f"{rank:06d}.remove"
        return np.fromfile(path, "<u4") if path.exists() else np.empty(0, np.uint32)


class Signatures(MinhashDedupSignature):
    """With memory that does not grow with the document: 8 bytes a shingle and hash function are many for a long one."""

    def get_signature(self, shingles: npt.NDArray[np.uint64]) -> list[list[int]]:
        parts = [
            super(Signatures, self).get_signature(shingles[start : start + SHINGLES_AT_A_TIME])
            for start in range(0, len(shingles), SHINGLES_AT_A_TIME)
        ]
        return np.minimum.reduce(np.array(parts, np.uint64)).tolist()


def minhash_config(config: NearConfig) -> MinhashConfig:
    # datatrove's default hash, xxhash, fails with version 4 of that library.
    hashing = HashConfig(precision=64, hash_fc="sha1")
    norm = TextNormConfig(norm_numbers=config.same_numbers)
    return MinhashConfig(config.ngrams, config.buckets, config.hashes, norm_config=norm, hash_config=hashing)


def signatures(config: NearConfig, folder: Path) -> PipelineStep:
    return Signatures(str(folder), minhash_config(config), language=Words())


def buckets(config: NearConfig, folder: Path, output: Path) -> PipelineStep:
    return MinhashDedupBuckets(str(folder), str(output), config=minhash_config(config), lines_to_buffer=1000)


def clusters(config: NearConfig, folder: Path, output: Path) -> PipelineStep:
    return MinhashDedupCluster(str(folder), str(output), minhash_config(config), lines_to_buffer=1000)
