"""Samples of labelled data: rows stay whole, labels are where the mask says, and other sources mix
with them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import write_words
from megalite.config import Config, ModelConfig
from megalite.data.formats import Encoder, Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import IGNORE, Mixture, _types, build_mixtures
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import DataError
from megalite.models.layers import numbers_of
from megalite.training.objectives import DPOConfig
from mixtures import config_of

LENGTHS = [5, 9, 3, 7, 4, 4, 12, 3]


def write_rows_of(
    prefix: Path, lengths: list[int] = LENGTHS, values: int = 1, learned: int = 2
) -> Path:
    """Token k of row r is 100 (r + 1) + k; the last two (`learned`) of each are learned, with
    values 1 … `values` by row."""
    with IndexedWriter(prefix, np.uint16, np.uint8) as writer:
        for row, length in enumerate(lengths):
            mask = np.zeros(length, np.int64)
            mask[-learned:] = 1 + row % values
            writer.add_documents(100 * (row + 1) + np.arange(length), [length], mask)
    return prefix


def mixture(config: Config) -> Mixture:
    found = build_mixtures(config)["train"]
    assert found is not None
    return found


def make(tmp_path: Path, **data: Any) -> Mixture:
    prefix = write_rows_of(tmp_path / "rows")
    values: dict[str, Any] = {
        "train": [{"path": str(prefix)}],
        "seq_length": 11,
        "order": "sequential",
    }
    return mixture(config_of(**(values | data)))


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_rows_stay_whole_and_only_the_mask_is_learned(tmp_path: Path, packing: str) -> None:
    found = make(tmp_path, document_mask=True, packing=packing)
    samples = found.read(np.arange(found.sources[0].num_samples))
    assert samples.documents is not None
    rows: dict[int, list[int]] = {}
    for tokens, labels, documents in zip(*samples[:3], strict=True):
        for row in np.unique(tokens[tokens > 0] // 100):
            here = tokens // 100 == row
            assert len(np.unique(documents[here])) == 1
            rows.setdefault(int(row), []).extend((tokens[here] % 100).tolist())
        is_label = labels != IGNORE
        assert (labels[is_label] == tokens[is_label] + 1).all()
    for row, length in enumerate(LENGTHS):
        # A row that fills its sample has its last token as a label alone.
        assert rows[row + 1] in (list(range(length)), list(range(length - 1)))
    assert int((samples.labels != IGNORE).sum()) == 2 * len(LENGTHS)


PROBLEMS: list[tuple[str, int, list[Any], list[int]]] = [
    ("multi_label", 3, [["a", "c"], [2], []], [0b101, 0b100, 0]),
    ("multi_label", 9, [["a"], list("abcdefghi"), []], [1, 511, 0]),
    ("multi_label", 40, [[39], [0, 0], []], [1 << 39, 1, 0]),
    ("regression", 1, [-1.5, 3, 0.1], [0xBFC00000, 0x40400000, 0x3DCCCCCD]),
]


@pytest.mark.parametrize(("problem", "count", "labels", "wanted"), PROBLEMS)
def test_sets_and_numbers_are_stored_and_read(
    problem: Any, count: int, labels: list[Any], wanted: list[int], tmp_path: Path
) -> None:
    tokenizer = write_words(tmp_path / "words")
    rows = [{"text": f"w{7 + n}", "label": label} for n, label in enumerate(labels)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = tuple("abcdefghi"[:count] if count < 10 else map(str, range(count)))
    settings = Settings("classification", str(tokenizer), labels=names, problem=problem)
    preprocess_rows([str(tmp_path / "rows.jsonl")], tmp_path / "rows", settings)
    dataset = IndexedDataset(str(tmp_path / "rows"))
    model = ModelConfig(
        family="bert", vocab_size=9, hidden_size=8, num_layers=1, num_attention_heads=1, max_positions=9,
        labels=names, problem=problem,
    )  # fmt: skip
    dataset.check(model.highest_label)
    assert dataset.mask is not None
    assert dataset.mask.reshape(3, -1).tolist() == [[1 + value] * 3 for value in wanted]
    if problem == "multi_label":
        with pytest.raises(DataError, match="has the value"):
            dataset.check(model.highest_label - 1 - (2**count - 1 - max(wanted)))
    else:
        found = torch.tensor([*wanted, IGNORE])
        assert numbers_of(found[:-1]).tolist() == pytest.approx([-1.5, 3.0, 0.1])


@pytest.mark.parametrize(
    ("problem", "label", "words"),
    [
        ("multi_label", "a", "'a' is no list of labels"),
        ("multi_label", ["a", "z"], "label 'z' is none of the 2"),
        ("regression", "5", "'5' is no number"),
        ("regression", True, "True is no number"),
        ("regression", 1e39, r"1e\+39 is no number"),
        ("regression", float("nan"), "no field 'label' or 'labels' or 'score'"),
        ("single_label", ["a"], r"\['a'\] is a list of labels"),
    ],
)
def test_labels_of_another_problem_are_refused(
    problem: Any, label: Any, words: str, tmp_path: Path
) -> None:
    labels = ("score",) if problem == "regression" else ("a", "b")
    encoder = Encoder(
        Settings("classification", str(write_words(tmp_path)), labels=labels, problem=problem)
    )
    [found] = encoder.encode([{"text": "w7", "label": label}])
    assert isinstance(found, str)
    assert re.search(words, found)


def test_two_texts_are_put_together_as_by_the_tokenizer(tmp_path: Path) -> None:
    encoder = Encoder(Settings("classification", str(write_words(tmp_path)), labels=("a", "b")))
    for first, second in (
        ("sentence1", "sentence2"),
        ("text", "text_pair"),
        ("premise", "hypothesis"),
    ):
        [[found]] = encoder.encode([{first: "w7 w8", second: "w9", "label": 1}])  # type: ignore[misc]
        assert [*found.ids] == [2, 7, 8, 3, 9, 3]  # type: ignore[union-attr]
        assert found.values.tolist() == [2] * 6  # type: ignore[union-attr]
    [found] = encoder.encode([{"text": "w7", "sentence2": " ", "label": 1}])
    assert found == "'sentence2' must be text that is not empty, not ' '"


def test_types_begin_anew_in_each_document() -> None:
    tokens = np.array([[2, 7, 3, 8, 3, 2, 9, 3, 2, 3, 3], [7, 3, 8, 8, 3, 3, 9, 2, 9, 9, 9]])
    documents = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]])
    assert _types(tokens, documents, 3).tolist() == [
        [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 1],
        [0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 0],
    ]


def test_long_rows_are_refused_or_dealt_with_as_chosen(tmp_path: Path) -> None:
    with pytest.raises(
        DataError,
        match=r"train\[0\] .*rows: 2 of 8 rows are longer than the 8 .*, the longest 12; raise",
    ):
        make(tmp_path, seq_length=7)
    dropped = make(tmp_path, seq_length=7, long_rows="drop")
    tokens = dropped.read(np.arange(dropped.sources[0].num_samples)).tokens
    assert set(np.unique(tokens // 100)) == {0, 1, 3, 4, 5, 6, 8}  # 0 fills up
    assert dropped.remarks() == [
        f"{tmp_path / 'rows'}: 2 of 8 rows are longer than the 8 tokens of a sample, and are left out"
    ]
    cut = make(tmp_path, seq_length=7, long_rows="cut")
    windows = cut.read(np.arange(cut.sources[0].num_samples))
    assert {201, 202, 206} <= set(windows.tokens.ravel().tolist())
    assert not np.isin([207, 208], windows.tokens).any()
    # What is learned of the longest one is behind the cut: it would be computed for nothing.
    assert not (windows.tokens // 100 == 7).any()
    assert cut.remarks()[0].endswith(
        "cut at the end; 1 of them have nothing to learn before the cut, and are left out"
    )
    with pytest.raises(
        DataError, match=r"none is left with something to learn; raise data.seq_length"
    ):
        make(
            tmp_path,
            train=[{"path": str(write_rows_of(tmp_path / "long", [12, 15]))}],
            seq_length=7,
            long_rows="cut",
        )
    assert (
        len(
            {make(tmp_path, long_rows=choice).fingerprint() for choice in ("refuse", "drop", "cut")}
        )
        == 3
    )


def test_labelled_and_plain_data_mix(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "plain", np.uint16) as writer:
        writer.add_document(np.arange(2000, 3000))
    sources = [{"path": str(tmp_path / "rows")}, {"path": str(tmp_path / "plain")}]
    found = make(tmp_path, train=sources)
    samples = found.read(np.arange(20))
    is_plain = samples.tokens[:, 0] >= 2000
    assert 0 < is_plain.sum() < 20
    assert (samples.labels[is_plain] != IGNORE).all()
    assert 0 < (samples.labels[~is_plain] != IGNORE).sum() < samples.labels[~is_plain].size / 2


def pairs_of(prefix: Path, **data: Any) -> Mixture:
    config = config_of(train=[{"path": str(prefix)}], document_mask=True, **data)
    return mixture(config.model_copy(update={"objective": DPOConfig()}))


def test_each_row_of_a_pair_that_is_cut_may_take_half_of_a_sample(tmp_path: Path) -> None:
    prefix = write_rows_of(tmp_path / "long", [6, 5, 4, 4])
    found = pairs_of(prefix, seq_length=9, long_rows="cut")
    tokens = found.read(np.arange(found.sources[0].num_samples)).tokens
    assert {100, 104, 200, 203, 300, 400} <= set(tokens.ravel().tolist())
    assert 105 not in tokens


def test_pairs_stay_together(tmp_path: Path) -> None:
    found = pairs_of(write_rows_of(tmp_path / "rows"), seq_length=20)
    samples = found.read(np.arange(found.sources[0].num_samples))
    assert samples.documents is not None
    pairs = []
    for tokens, labels, documents in zip(*samples[:3], strict=True):
        rows = [
            int(tokens[documents == n][0]) // 100 - 1
            for n in np.unique(documents)
            if (labels[documents == n] > 0).any()
        ]
        assert all(
            second == first + 1 and first % 2 == 0
            for first, second in zip(rows[::2], rows[1::2], strict=True)
        )
        pairs += rows[::2]
    assert sorted(pairs) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("task", "at"), [("classification", "last"), ("classification", "first"), ("labels", "last")]
)
def test_classes_are_told_at_the_tokens_themselves(
    tmp_path: Path, task: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = write_rows_of(tmp_path / "rows", values=3, learned=2 if at == "last" else 99)
    config = config_of(train=[{"path": str(prefix)}], seq_length=12, document_mask=True)
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"task": task, "labels": ("a", "b", "c")})}
    )
    monkeypatch.setattr(type(config.model), "CLASS_AT", at)  # an encoder's is the first
    found = mixture(config)
    tokens, labels, *_ = found.read(np.arange(found.sources[0].num_samples))
    has = labels != IGNORE
    assert (labels[has] == (tokens[has] // 100 - 1) % 3).all()
    last = {100 * (row + 1) + (length - 1) * (at == "last") for row, length in enumerate(LENGTHS)}
    before = {place - 1 for place in last} if task == "labels" else set()
    assert set(tokens[has].tolist()) == last | before


def test_a_mask_that_does_not_belong_to_its_tokens_is_refused(tmp_path: Path) -> None:
    prefix = write_rows_of(tmp_path / "rows")
    (tmp_path / "rows.mask").write_bytes(b"\1" * 45)
    with pytest.raises(
        DataError, match=r"rows.mask is 45 bytes long, which is not 1, 2 or 8 for each of 47 tokens"
    ):
        IndexedDataset(prefix)
    with IndexedWriter(prefix, np.uint16) as writer:  # plain text written over it
        writer.add_document(np.arange(9))
    assert IndexedDataset(prefix).mask is None


def test_another_mask_is_other_data(tmp_path: Path) -> None:
    first = IndexedDataset(write_rows_of(tmp_path / "rows")).fingerprint()
    mask = bytearray((tmp_path / "rows.mask").read_bytes())
    mask[0] = 1
    (tmp_path / "rows.mask").write_bytes(mask)
    assert IndexedDataset(tmp_path / "rows").fingerprint() != first


def test_megatrons_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"megatron cuts documents anywhere"):
        make(tmp_path, order="megatron")


def test_a_mask_is_read_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    monkeypatch.setenv("MEGALITE_CACHE", str(tmp_path / "cache"))
    prefix, store = write_rows_of(tmp_path / "rows"), fsspec.filesystem("memory")
    for kind in ("bin", "idx", "mask"):
        store.pipe(f"/labelled/rows.{kind}", prefix.with_suffix(f".{kind}").read_bytes())
    there, here = IndexedDataset("memory://labelled/rows"), IndexedDataset(prefix)
    assert there.mask is not None
    assert here.mask is not None
    assert not there.mask.any(), "nothing is fetched before it is asked for"
    there.fetch(0, there.num_tokens)
    assert np.array_equal(there.mask, here.mask)
    assert there.fingerprint() == here.fingerprint()
    store.rm("/labelled/rows.mask")
    assert IndexedDataset("memory://labelled/rows").mask is None
