"""Files of what a teacher says of token files: the likeliest tokens behind each token that has a
label, for a distillation without the teacher in memory.

A folder has, for source S of the mixture it was made of:

    S.rows      i64 [samples + 1], the first record of each sample, and the number of all
    S.top       records end to end: K ids (u16, or i32 above 65,536 tokens), K log-probabilities, and
                the log-probability of all other tokens together (f16 or f32)
    teacher_logits.json   what all of it belongs to; written last, and missing until the rest is whole

What a teacher says depends on what it has read before: records are of samples as a run cuts them,
and belong to that cut. An epoch is enough: further ones have the same samples in another order.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from megalite.data.dataset import SampleSource
from megalite.data.mixture import IGNORE, Mixture
from megalite.data.order import Int64s
from megalite.errors import DataError
from megalite.utils.changes import spelled
from megalite.utils.files import replacing
from megalite.utils.outside import read_object, shown

ABOUT, UNFINISHED, VERSION = "teacher_logits.json", "unfinished.json", 1
KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int, "count": int, "vocab_size": int, "temperature": float, "precision": str,
    "tokenizer": (str, type(None)), "teacher": dict, "view": dict, "sources": list,
}  # fmt: skip
OF_SOURCES = {"tokens": str, "samples": str, "num_samples": int, "num_records": int}
PRECISIONS = {"fp16": "<f2", "fp32": "<f4"}
OFF_BY = 0.05
"""How far from 1 the probabilities of a record may add up: f16 has 11 bits, of log-probabilities
down to about -20."""
Array = npt.NDArray[Any]
Precision = Literal["fp16", "fp32"]


class TopRecords(NamedTuple):
    """Holds what the teacher says at T tokens of B samples; zeros where they have no label."""

    ids: Array  # [B,T,K]
    log_p: Array  # [B,T,K]
    rest: Array  # [B,T]


def record_dtype(count: int, vocab_size: int, precision: str) -> np.dtype[Any]:
    """Return the layout of a record of `count` tokens."""
    number = PRECISIONS[precision]
    token = "<u2" if vocab_size <= 65536 else "<i4"
    return np.dtype([("ids", token, (count,)), ("log_p", number, (count,)), ("rest", number)])


def view_of(mixture: Mixture) -> dict[str, bool]:
    """Return what decides, beside a source's samples, what a model sees and predicts of them."""
    return {
        "document_mask": mixture.view.document_mask,
        "border_loss": mixture.view.border_loss,
    }


def source_facts(source: SampleSource) -> dict[str, Any]:
    """Return what names the samples of a source, and how many they are."""
    return {
        "tokens": source.dataset.fingerprint(),
        "samples": source.fingerprint(),
        "num_samples": source.num_samples,
    }


def write_about(path: Path, about: Mapping[str, Any]) -> None:
    """Write the JSON of a folder; either all of it is new or nothing."""
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps(about, indent=1))


def read_about(folder: Path, setting: str) -> dict[str, Any]:
    """Return what the finished files in `folder`, named by `setting`, belong to. Raise DataError."""
    path = folder / ABOUT
    if not path.is_file():
        is_begun = (folder / UNFINISHED).is_file()
        state = "is not finished" if is_begun else f"has no {ABOUT}"
        raise DataError(f"{setting} {state}; `megalite teacher-logits CONFIG` makes it")
    about = read_object(path, DataError)
    if about.get("version") != VERSION:
        raise DataError(
            f"{path}: version = {shown(about.get('version'))}; only version {VERSION} is known"
        )
    _check_values(path, about, KEYS)
    for number, source in enumerate(about["sources"]):
        if not isinstance(source, dict):
            raise DataError(f"{path}: sources[{number}] is no object")
        _check_values(path, source, OF_SOURCES)
    if about["precision"] not in PRECISIONS or not 1 <= about["count"] <= about["vocab_size"]:
        raise DataError(f"{path}: precision, count or vocab_size is not what was written there")
    return about


def _check_values(path: Path, found: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
    for key in found.keys() | kinds.keys():
        if key not in kinds or not isinstance(found.get(key), kinds[key]):
            raise DataError(f"{path}: {key} = {shown(found.get(key))} is not what is written there")


class TeacherLogits:
    """Reads what a teacher says of the samples of a mixture."""

    def __init__(self, folder: Path, mixture: Mixture, setting: str):
        """Open the files in `folder`, which `setting` names in errors, for the sources of `mixture`.

        Raise DataError where they are of other tokens, samples or labels, or are not whole."""
        self.about = read_about(folder, setting)
        self.folder, self._mixture = folder, mixture
        self.count: int = self.about["count"]
        if (here := view_of(mixture)) != (there := self.about["view"]):
            key = next(key for key in here if here[key] != there.get(key))
            raise DataError(
                f"{setting} was made with data.{key} = {spelled(there.get(key))}, not {spelled(here[key])}; make it "
                "anew, or put the setting back"
            )
        numbers = [
            self._number_of(name, source, setting)
            for name, source in zip(mixture.names, mixture.sources, strict=True)
        ]
        self._files = [self._open(number) for number in numbers]

    def _number_of(self, name: str, source: SampleSource, setting: str) -> int:
        """Return the number that a source of the mixture has in the files."""
        facts, sources = source_facts(source), self.about["sources"]
        for number, there in enumerate(sources):
            if there["samples"] == facts["samples"]:
                return number
        if any(there["tokens"] == facts["tokens"] for there in sources):
            raise DataError(
                f"{setting} is of other samples of {name}: data.seq_length, packing, split or long_rows was another "
                "one; make it anew, or put the setting back"
            )
        raise DataError(
            f"{setting} is of other tokens than {source.dataset.prefix}, which have changed or are none that it was "
            "made of; make it anew"
        )

    def _open(self, number: int) -> tuple[Array, Array]:
        """Return the rows and the records of a source. Raise DataError where they are not whole."""
        facts = self.about["sources"][number]
        dtype = record_dtype(self.count, self.about["vocab_size"], self.about["precision"])
        sizes = {
            "rows": 8 * (facts["num_samples"] + 1),
            "top": dtype.itemsize * facts["num_records"],
        }
        for kind, size in sizes.items():
            path = self.folder / f"{number}.{kind}"
            there = path.stat().st_size if path.is_file() else 0
            if there != size:
                raise DataError(
                    f"{path} is {there:,} bytes long, not {size:,}: it was cut off; copy it again, or make it anew"
                )
        rows = np.fromfile(self.folder / f"{number}.rows", "<i8")
        if rows[0] != 0 or rows[-1] != facts["num_records"] or (np.diff(rows) < 0).any():
            raise DataError(f"{self.folder / f'{number}.rows'} is damaged; make it anew")
        return rows, np.memmap(self.folder / f"{number}.top", dtype, "r") if sizes["top"] else (
            np.empty(0, dtype)
        )

    def read(self, samples: Int64s, labels: Int64s) -> TopRecords:
        """Return what the teacher says of `samples` [B], which are numbers in the run, at the tokens
        that have `labels` [B,T]. Raise DataError for records that cannot be right."""
        number = self.about["precision"]
        shape = *labels.shape, self.count
        found = TopRecords(
            np.zeros(shape, np.int32),
            np.zeros(shape, PRECISIONS[number]),
            np.zeros(labels.shape, PRECISIONS[number]),
        )
        source, sample = self._mixture.order.locate(samples)
        for row, (which, at) in enumerate(zip(source.tolist(), sample.tolist(), strict=True)):
            rows, records = self._files[which]
            here = np.asarray(records[rows[at] : rows[at + 1]])
            places = np.flatnonzero(labels[row] != IGNORE)
            if len(places) != len(here):
                raise self._damaged(at, f"has {len(here)} records for {len(places)} labels")
            self._check(here, at)
            for name in found._fields:
                getattr(found, name)[row, places] = here[name]
        return found

    def _check(self, records: Array, sample: int) -> None:
        """Raise DataError unless every record is a distribution over the vocabulary."""
        ids = records["ids"]
        if ids.size and not 0 <= ids.min() <= ids.max() < self.about["vocab_size"]:
            raise self._damaged(sample, f"has token {ids.max()}, which the teacher does not know")
        with np.errstate(over="ignore"):
            sums = np.exp(records["log_p"].astype(np.float32)).sum(-1)
            sums += np.exp(records["rest"].astype(np.float32))
        # Written so that NaN is none.
        if not (abs(sums - 1) < OFF_BY).all():
            raise self._damaged(sample, "has probabilities that do not add up to 1")

    def _damaged(self, sample: int, why: str) -> DataError:
        return DataError(f"{self.folder}: sample {sample} {why}: it is damaged; make it anew")


def rows_of(source: Mixture, samples: int, step: int = 256) -> Int64s:
    """Return the first record of each of the first `samples` samples, and the number of all."""
    counts = [
        (source.read(np.arange(first, min(first + step, samples))).labels != IGNORE).sum(1)
        for first in range(0, samples, step)
    ]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])
