"""Every number of an index and of a mask is looked at before the first step, not their ends
alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from megalite.cli import main
from megalite.data import whole
from megalite.data.indexed import (
    HEADER,
    MAGIC,
    IndexedDataset,
    document_starts,
    document_starts_reference,
)
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import build_mixtures
from megalite.errors import DataError
from mixtures import config_of
from small_runs import make_config

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6]
FILES = [
    ("<i4", 0, len(LENGTHS)),
    ("<i8", 4 * len(LENGTHS), len(LENGTHS)),
    ("<i8", 12 * len(LENGTHS), 9),
]
"""Lengths, pointers and documents: dtype, place behind the header, and count."""


def write(prefix: Path) -> Path:
    with IndexedWriter(prefix, np.uint16, np.uint8) as writer:
        writer.add_documents(np.arange(sum(LENGTHS)), LENGTHS, np.ones(sum(LENGTHS)))
    return prefix


def change(prefix: Path, part: int, number: int, value: int) -> int:
    """Write `value` over a number of the index. Returns the one that was there."""
    dtype, place, count = FILES[part]
    numbers = np.memmap(f"{prefix}.idx", dtype, "r+", HEADER.size + place, (count,))
    before = int(numbers[number])
    numbers[number] = value
    return before


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
def test_no_number_of_an_index_can_be_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(whole, "CHUNK", chunk)
    prefix = write(tmp_path / "x")
    for part, (dtype, _, count) in enumerate(FILES):
        for number in range(count):
            for value in (
                0,
                1,
                -1,
                2,
                7,
                1000,
                2**31 - 1,
                -(2**31),
                2**62,
                -(2**62),
                2**63 - 1,
                -(2**63),
            ):
                if not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
                    continue
                before = change(prefix, part, number, value)
                # Borders of documents may lie elsewhere: nothing tells that they should not, if
                # they are in order.
                is_in_order = (
                    part == 2 and 0 < number < count - 1 and number - 1 <= value <= number + 1
                )
                if value == before or is_in_order:
                    IndexedDataset(prefix).check(1)
                else:
                    with pytest.raises(DataError, match=r"x\.idx .*write or copy both again"):
                        IndexedDataset(prefix).check(1)
                change(prefix, part, number, before)


@pytest.mark.parametrize("value", [0, 1, 2, 255, -1])
def test_no_value_of_a_mask_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: int
) -> None:
    monkeypatch.setattr(whole, "CHUNK", 4)
    prefix = write(tmp_path / "x")
    for place in range(sum(LENGTHS)):
        mask = np.ones(sum(LENGTHS), np.int64 if value < 0 else np.uint8)
        mask[place] = value
        mask.tofile(f"{prefix}.mask")
        if value in (0, 1):
            build_mixtures(config_of(train=[{"path": str(prefix)}], seq_length=9))
        else:
            with pytest.raises(
                DataError, match=rf"x\.mask has the value {value} at token {place}; .* 1 at most"
            ):
                build_mixtures(config_of(train=[{"path": str(prefix)}], seq_length=9))


@pytest.mark.parametrize("verb", ["train", "preflight", "inspect", "inspect PREFIX"])
def test_every_verb_says_it_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """A pointer that is far away moved borders of documents, and training went on with another
    loss."""
    config = make_config(tmp_path, "llama", "data.document_mask=true", "data.valid=[]")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    pointers = np.memmap(tmp_path / "corpus.idx", "<i8", "r+", HEADER.size + 4 * 7, (7,))
    pointers[3] = 2**62
    pointers.flush()
    words = (
        ["inspect", str(tmp_path / "corpus")]
        if " " in verb
        else [verb, str(tmp_path / "config.yaml")]
    )
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith(
        f"error: {tmp_path}/corpus.idx has sequence 3 begin at byte 4611686018427387904, where"
    )
    assert said.err.count("\n") == 1


def test_a_large_index_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(whole, "REMEMBERED_BYTES", 100)
    prefix, looks, find = write(tmp_path / "x"), [0], whole.find_in_index

    def counted(*arguments: object) -> str:
        looks[0] += 1
        return find(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(whole, "find_in_index", counted)
    for _ in range(3):
        IndexedDataset(prefix).check(1)
    assert looks[0] == 1
    IndexedDataset(prefix).check(2)  # classes are another question
    assert looks[0] == 2
    before = change(prefix, 1, 3, 2**62)
    for _ in range(2):
        with pytest.raises(DataError, match="sequence 3"):
            IndexedDataset(prefix).check(1)
    change(prefix, 1, 3, before)
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")  # a cache that cannot be written
    IndexedDataset(prefix).check(1)


def test_documents_without_a_sequence(tmp_path: Path) -> None:
    """Megatron-LM's tool writes such for empty texts, also as the last."""
    parts = [
        np.array([2, 1, 3], "<i4"),
        np.array([0, 4, 6], "<i8"),
        np.array([0, 0, 2, 2, 3, 3], "<i8"),
    ]
    (tmp_path / "x.idx").write_bytes(
        HEADER.pack(MAGIC, 1, 8, 3, 6) + b"".join(part.tobytes() for part in parts)
    )
    (tmp_path / "x.bin").write_bytes(np.arange(6, dtype="<u2").tobytes())
    dataset = IndexedDataset(tmp_path / "x")
    dataset.check()
    assert [dataset.document_start(d) for d in range(6)] == [0, 0, 3, 3, 6, 6]
    assert dataset.starts_of_documents(0, 5).tolist() == [0, 0, 3, 3, 6, 6]
    for function in (document_starts, document_starts_reference):
        counts, starts = function(parts[2], parts[1], 2, np.array([0, 1, 3]), np.array([6, 6, 4]))
        assert (counts.tolist(), starts.tolist()) == ([4, 2, 2], [0, 0, 3, 3, 3, 3, 3, 3])
    for data in ({"document_mask": True}, {"packing": "best_fit"}, {"order": "megatron"}):
        config = config_of(train=[{"path": str(tmp_path / "x")}], seq_length=5, steps=1, **data)
        mixture = build_mixtures(config)["train"]
        assert mixture is not None
        tokens = mixture.read([0]).tokens.tolist()
        assert data == {"order": "megatron"} or tokens == [[0, 1, 2, 3, 4]]
    assert main(["inspect", str(tmp_path / "x")]) == 0
