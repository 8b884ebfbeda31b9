"""What an encoder and a decoder see of a sample, against plain statements of Raffel et al. 2020,
section 3.1.4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from encoder_decoders import SENTINELS, reversing_rows, rows_config, span_config, write_rows
from megalite.config import Lengths
from megalite.data.checks import open_data
from megalite.data.dataset import SourceTargetRows, Windows
from megalite.data.indexed import IndexedDataset
from megalite.data.inspect import inspect_samples
from megalite.data.mixture import IGNORE, Mixture
from megalite.data.stacks import SpanCorruption, Stacks, num_hidden, span_lengths
from megalite.errors import ConfigError, DataError
from small_runs import MODELS, make_config

START, END = 0, 1
MARKS = list(range(1000, 1100))


@pytest.mark.parametrize(
    ("source", "read", "target"),
    [(512, 568, 114), (1024, 1137, 229), (128, 141, 29), (16, 17, 5), (4, 3, 3)],
)
def test_lengths_are_those_of_t5(source: int, read: int, target: int) -> None:
    assert span_lengths(source, 0.15, 3.0) == Lengths(read, source, target)


def corrupted(
    lengths: Lengths, index: Any, density: float = 0.15, mean: float = 3.0
) -> tuple[np.ndarray, Stacks]:
    """Tokens of these samples, and what the stacks see of them."""
    index = np.asarray(index)
    tokens = np.random.default_rng(0).integers(2, 900, (4000, lengths.read + 1))[index]
    spans = SpanCorruption(lengths, density, mean, MARKS, START, END, key=7)
    return tokens[:, :-1], spans.apply(
        Windows(tokens, np.full(len(index), lengths.read + 1), None), index
    )


@pytest.mark.parametrize(
    ("source", "density", "mean"), [(128, 0.15, 3.0), (64, 0.5, 8.0), (20, 0.15, 1.0)]
)
def test_source_and_target_together_are_the_text(source: int, density: float, mean: float) -> None:
    lengths = span_lengths(source, density, mean)
    tokens, found = corrupted(lengths, range(200), density, mean)
    hidden, spans = num_hidden(lengths.read, density, mean)
    assert found.source.shape == (200, source)
    assert found.labels.shape == (200, lengths.target)
    for text, shown, labels in zip(
        tokens.tolist(), found.source.tolist(), found.labels.tolist(), strict=True
    ):
        assert shown[-1] == labels[-1] == END
        assert [token for token in shown if token >= 1000] == MARKS[:spans]
        assert shown[0] < 1000, "text comes first"
        assert labels[0] == MARKS[0]
        pieces = {}
        for token in labels[:-1]:
            if token >= 1000:
                pieces[token] = piece = []
            else:
                piece.append(token)
        assert [*pieces] == MARKS[:spans]
        assert all(pieces.values()), "no span is empty"
        assert sum(map(len, pieces.values())) == hidden
        whole = [token for mark in shown[:-1] for token in pieces.get(mark, [mark])]
        assert whole == text


def test_the_decoder_sees_what_came_before() -> None:
    _, found = corrupted(span_lengths(64, 0.15, 3.0), range(5))
    assert (found.tokens[:, 0] == START).all()
    assert np.array_equal(found.tokens[:, 1:], found.labels[:, :-1])


def test_a_prefix_is_told_with_what_follows(tmp_path: Path) -> None:
    config = span_config(tmp_path, "objective.mean_length=null", "objective.density=0.25")
    assert config.lengths == Lengths(41, 32, 11)
    plain = mixture_of(
        make_config(tmp_path, MODELS["llama"], "data.seq_length=41", "run.name=plain")
    )
    samples, texts = mixture_of(config).read([0, 1, 2]), plain.read([0, 1, 2]).tokens
    assert samples.source is not None
    for row in range(3):
        assert [*samples.source[row, :-1], *samples.labels[row, :-1]] == texts[row].tolist()
        assert samples.source[row, -1] == samples.labels[row, -1] == END


def test_each_sample_has_one_of_several_denoisers(tmp_path: Path) -> None:
    mixture = (
        "objective.mixture=[{density: 0.15, mean_length: 3, share: 2, mode: w7}, {density: 0.5, mean_length: 3}, "
        "{density: 0.25, mean_length: null, mode: w9}]"
    )
    config = span_config(tmp_path, mixture, "data.order=sequential")
    # The first leaves room for the least text, 31 tokens of the source and 1 for its mode.
    read, source, target = config.lengths
    assert (read, source, target) == (33, 32, 16 + 5 + 1)
    found = mixture_of(config)
    count = 400
    samples = found.read(range(count))
    assert samples.source is not None
    kinds = []
    for row in range(count):
        (shown, tokens, labels), *padding = sides_of(samples, row).values()
        assert all(set(rest[2]) == {IGNORE} for rest in padding)
        assert shown[-1] == labels[-1] == END
        assert tokens == [START, *labels[:-1]]
        # By how much is told: 5, 16 or 8 of the 33 tokens, with a sentinel for each span.
        kind, spans, mode = {8: ("r", 2, [7]), 22: ("x", 5, []), 9: ("s", 0, [9])}[len(labels)]
        assert shown[: len(mode)] == mode
        assert len(shown) + len(labels) == read + 2 * spans + 2 + len(mode)
        kinds.append(kind)
    shares = [kinds.count(kind) / count for kind in "rxs"]
    assert shares == pytest.approx([0.5, 0.25, 0.25], abs=3 / count**0.5)  # six deviations
    assert found.read([5]).source.tolist() == samples.source[[5]].tolist()  # type: ignore[union-attr]
    assert len(span_config(tmp_path, "objective.mixture=ul2").objective.denoisers) == 7
    with pytest.raises(DataError, match="mode '<r>' is no token of data"):
        mixture_of(span_config(tmp_path, mixture.replace("w9", "<r>")))
    with pytest.raises(ConfigError, match=r"leave objective\.density and \.mean_length out"):
        span_config(tmp_path, mixture, "objective.density=0.3")


def test_all_ways_to_cut_are_equally_likely() -> None:
    """Of 9 hidden tokens in 3 spans, as of a cake that is cut at 2 of 8 places."""
    lengths = Lengths(60, 60 - 9 + 3 + 1, 9 + 3 + 1)
    assert span_lengths(55, 0.15, 3.0) == lengths
    _, found = corrupted(lengths, range(4000))
    at = np.nonzero(found.labels >= 1000)[1].reshape(-1, 3)
    first, second = (at[:, 1] - 1, at[:, 2] - 2)  # tokens of the first span, and of the first two
    counts = np.bincount(first * 9 + second, minlength=81).reshape(9, 9)
    assert not np.tril(counts).any()
    expected = 4000 / 28
    assert (
        abs(counts[np.triu_indices(9, 1)][counts[np.triu_indices(9, 1)] > 0] - expected).max()
        < 5 * expected**0.5
    )
    assert np.count_nonzero(counts) == 28


def test_a_sample_is_cut_alike_beside_any_others() -> None:
    lengths = span_lengths(64, 0.15, 3.0)
    _, found = corrupted(lengths, range(40))
    _, few = corrupted(lengths, [39, 7])
    assert np.array_equal(few.source, found.source[[39, 7]])
    assert np.array_equal(few.labels, found.labels[[39, 7]])
    alike = (found.labels[:-1] >= 1000) == (found.labels[1:] >= 1000)
    assert alike.mean() < 0.8, "each sample is cut in places of its own"


def mixture_of(config: Any, split: Any = "train") -> Mixture:
    mixture = open_data(config)[2][split]
    assert mixture is not None
    return mixture


def test_another_epoch_hides_other_spans_and_validation_the_same(tmp_path: Path) -> None:
    train = mixture_of(span_config(tmp_path, "data.order=sequential"))
    first, again = (train.read([number]) for number in (0, train.num_samples))
    texts = [sorted([*samples.source[0], *samples.labels[0]]) for samples in (first, again)]
    assert texts[0] == texts[1]
    assert not np.array_equal(first.source, again.source)
    prints = [mixture_of(span_config(tmp_path, *more)).fingerprint() for more in (
        (), ("objective.density=0.2",), ("objective.mean_length=2",), ("train.seed=4",), ()
    )]  # fmt: skip
    assert prints[0] == prints[4]
    assert len(set(prints)) == 4


def sides_of(samples: Any, row: int) -> dict[int, tuple[list[int], list[int], list[int]]]:
    """By document of one sample: its source, what the decoder sees of it, and its labels."""
    found = {}
    for document in np.unique(samples.documents[row]):
        here, there = samples.documents[row] == document, samples.source_documents[row] == document
        found[int(document)] = (
            samples.source[row, there].tolist(), samples.tokens[row, here].tolist(), samples.labels[row, here].tolist()
        )  # fmt: skip
    return found


def test_rows_lie_side_by_side_in_both_stacks(tmp_path: Path) -> None:
    mixture = mixture_of(rows_config(tmp_path))
    rows = {(*source, 1): [*target, 1] for source, target in reversing_rows(200)}
    seen, num_rows = set(), 0
    samples = mixture.read(range(mixture.num_samples))
    for number in range(mixture.num_samples):
        for source, tokens, labels in sides_of(samples, number).values():
            if IGNORE in labels:  # padding
                assert set(labels) == {IGNORE}
                assert set(tokens) <= {START}
                continue
            assert labels == rows[tuple(source)]
            assert tokens == [START, *labels[:-1]]
            seen.add(tuple(source))
            num_rows += 1
    assert num_rows == 200
    assert seen == rows.keys()
    assert mixture.num_samples < 150, "several share a sample"


def test_each_side_has_room_of_its_own(tmp_path: Path) -> None:
    """Short sources with long targets, and the other way round, go together; two of a kind do
    not."""
    rows = [([2] * 2, [3] * 8), ([4] * 9, [5] * 2), ([6] * 9, [7] * 2), ([8] * 2, [9] * 8)]
    dataset = IndexedDataset(str(write_rows(tmp_path / "rows", rows)))
    source = SourceTargetRows(dataset, 0, 4, Lengths(26, 13, 13), "refuse")
    assert source.num_samples == 4, "a row takes the larger share of the two"
    source = SourceTargetRows(dataset, 0, 4, Lengths(40, 20, 20), "refuse")
    assert source.num_samples == 2
    with pytest.raises(
        DataError,
        match=r"2 of 4 rows are longer than a sample, which has 9 tokens of a source and 9 of",
    ):
        SourceTargetRows(dataset, 0, 4, Lengths(18, 9, 9), "refuse")
    assert SourceTargetRows(dataset, 0, 4, Lengths(18, 9, 9), "drop").num_rows == 2


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.packing=best_fit",), "takes samples of one length from the stream of texts"),
        (("data.document_mask=true",), "takes samples of one length from the stream of texts"),
        (("data.tokenizer=null",), "span_corruption needs data.tokenizer, which has the sentinels"),
        (
            ("data.order=megatron",),
            "span_corruption needs data.order: shuffle or sequential, not megatron",
        ),
        (("data.seq_length=3",), "needs a data.seq_length of at least 4, not 3"),
        (("data.seq_length=65",), r"data\.seq_length 65 is longer than model\.max_positions 64"),
        (
            ("objective.density=0.9", "data.seq_length=30"),
            r"the decoder's length \d+ is longer than model\.max_positions",
        ),
        (
            ("objective.name=next_token",),
            "next_token has no source for the encoder of model.task: seq2seq",
        ),
    ],
)
def test_what_does_not_go_with_spans_is_refused(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        span_config(tmp_path, *overrides)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("data.document_mask=false",), "seq2seq needs data.document_mask: true"),
        (
            ("data.long_rows=cut",),
            "seq2seq learns whole targets; data.long_rows must be refuse or drop",
        ),
    ],
)
def test_what_does_not_go_with_rows_is_refused(
    overrides: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        rows_config(tmp_path, *overrides)


def test_spans_for_which_there_are_no_sentinels_are_refused(tmp_path: Path) -> None:
    assert len(SENTINELS) == 8
    mixture_of(span_config(tmp_path, "data.seq_length=64", "objective.mean_length=2"))
    with pytest.raises(
        DataError, match=r"hides 9 spans of a sample, .* it has 8\. `megalite tokenizer train"
    ):
        mixture_of(span_config(tmp_path, "data.seq_length=64", "objective.mean_length=1"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (
            "rows",
            "holds rows of format 'seq2seq', which go with objective.name: seq2seq; this run has",
        ),
        ("texts", "corpus holds plain text|needs labelled data, but there is no .*corpus.mask"),
    ],
)
def test_data_of_the_other_kind_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    rows_config(tmp_path)
    if kind == "rows":
        config = span_config(tmp_path, f"data.train=[{{path: {tmp_path / 'rows'}}}]")
        (tmp_path / "rows.mask").rename(tmp_path / "mask")
    else:
        config = rows_config(tmp_path, f"data.train=[{{path: {tmp_path / 'corpus'}}}]")
    with pytest.raises(DataError, match=words):
        open_data(config)


def test_inspect_shows_both_sides(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    inspect_samples(span_config(tmp_path, "data.order=sequential"), "train", 1, 0, console)
    inspect_samples(rows_config(tmp_path), "train", 1, 0, console)
    shown = console.export_text()
    mixture = mixture_of(span_config(tmp_path, "data.order=sequential"))
    samples = mixture.read([0])
    for ids in (samples.source[0], samples.labels[0]):
        words = [
            f"w{token}" if token not in (START, END, *SENTINELS) else "" for token in ids.tolist()
        ]
        assert all(word in shown for word in words)
    assert "<extra_id_0>" in shown
    assert "source" in shown
    assert "target" in shown
    assert "document 1" in shown, "rows side by side"
