"""What a mixture makes of its settings: weights, phases, packing, masks, filling in the middle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.data.dataset import PackedSource, TokenSource
from megalite.data.fim import SHORTEST, FillInTheMiddle
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.mixture import IGNORE, View, build_mixtures
from megalite.data.order import BLOCK, Phase, PhasedOrder
from megalite.errors import ConfigError, DataError
from mixtures import config_of, mixture_of

LENGTHS = [5, 1, 12, 3, 30, 2, 9, 40, 7, 17]
END = 60_000


def write(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Token i of the file is i, but documents end with END."""
    ends, first = np.cumsum(lengths), 0
    with IndexedWriter(prefix, np.uint16) as writer:
        for end in ends.tolist():
            writer.add_document(np.append(np.arange(first, end - 1), END))
            first = end
    return IndexedDataset(prefix)


@pytest.fixture
def dataset(tmp_path: Path) -> IndexedDataset:
    return write(tmp_path / "corpus", LENGTHS)


def test_packed_samples_hold_every_document_once_and_whole(dataset: IndexedDataset) -> None:
    source = PackedSource(dataset, 1, len(LENGTHS), seq_length=16, capacity=17)
    mixture = mixture_of(
        [source], order="sequential", view=View(document_mask=True, border_loss=False)
    )
    tokens, labels, documents, *_ = mixture.read(np.arange(source.num_samples))
    assert documents is not None
    cut_in = set()
    predicted = []
    for row in range(source.num_samples):
        is_label = labels[row] != IGNORE
        # Wherever a label stands, it is the next token of the file, in the same document.
        follows = np.append(tokens[row, 1:], labels[row, -1])
        assert (labels[row][is_label] == follows[is_label]).all()
        predicted += [
            (int(t), int(n)) for t, n in zip(tokens[row][is_label], follows[is_label], strict=True)
        ]
        borders = np.flatnonzero(np.diff(documents[row])) + 1
        for part in np.split(tokens[row], borders):
            numbers = part[part != END]
            if numbers.any():  # neither an END alone nor what fills up
                assert numbers.tolist() == list(range(numbers[0], numbers[0] + len(numbers)))
                cut_in.add(int(np.searchsorted(np.cumsum(LENGTHS), numbers[0], side="right")))
    assert len(predicted) == len(set(predicted))
    # A pair of neighbours within a document is predicted, but for one at each cut of a document
    # longer than a sample.
    cuts = sum((length - 1) // 17 for length in LENGTHS[1:])
    assert len(predicted) == sum(length - 1 for length in LENGTHS[1:]) - cuts
    assert cut_in == {2, 3, 4, 5, 6, 7, 8, 9}  # document 1 is an END alone


def test_packing_cuts_only_what_is_longer_than_a_sample(tmp_path: Path) -> None:
    lengths = np.random.default_rng(0).integers(2, 18, 300).tolist()
    dataset = write(tmp_path / "short", lengths)
    source = PackedSource(dataset, 0, 300, seq_length=16, capacity=17)
    pieces = source.pieces(np.arange(source.num_samples), by_document=True)
    assert sorted(pieces.start.tolist()) == [0, *np.cumsum(lengths)[:-1].tolist()]
    assert source.num_samples <= np.ceil(sum(lengths) / 17) * 1.05


def test_padding_is_not_predicted_and_is_no_documents(tmp_path: Path) -> None:
    mixture = mixture_of(
        [PackedSource(write(tmp_path / "one", [6]), 0, 1, 16, 17)], view=View(document_mask=True)
    )
    tokens, labels, documents, *_ = mixture.read([0])
    assert documents is not None
    assert tokens[0].tolist() == [0, 1, 2, 3, 4, END, *[0] * 10]
    assert labels[0].tolist() == [1, 2, 3, 4, END, *[IGNORE] * 11]
    assert documents[0].tolist() == [0] * 6 + [1] * 10


def test_a_sample_filled_to_the_last_label(tmp_path: Path) -> None:
    mixture = mixture_of([PackedSource(write(tmp_path / "one", [17]), 0, 1, 16, 17)])
    tokens, labels, documents, *_ = mixture.read([0])
    assert documents is None
    assert tokens[0].tolist() == list(range(16))
    assert labels[0].tolist() == [*range(1, 16), END]


def test_no_loss_at_borders_when_asked(dataset: IndexedDataset) -> None:
    source = TokenSource(dataset, 0, dataset.num_tokens, 16)
    rows = np.arange(source.num_samples)
    plain = mixture_of([source]).read(rows)
    masked = mixture_of([source], view=View(border_loss=False)).read(rows)
    assert (masked.tokens == plain.tokens).all()
    assert masked.documents is None
    after_end = plain.tokens == END
    assert after_end.any()
    assert (masked.labels == np.where(after_end, IGNORE, plain.labels)).all()


@pytest.fixture
def corpora(tmp_path: Path) -> list[dict]:
    """`small` has 10 samples of 10 tokens, `large` 90."""
    write(tmp_path / "small", [101])
    write(tmp_path / "large", [901])
    return [{"path": tmp_path / "small"}, {"path": tmp_path / "large"}]


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 1 / 2),
        ({"weights": "epochs"}, 1 / 10),
        ({"weights": "epochs", "temperature": 2}, 1 / 4),
        ({"temperature": 100}, 1 / 2),
    ],
)
def test_shares(corpora: list[dict], settings: dict, share: float) -> None:
    train = build_mixtures(config_of(train=corpora, seq_length=10, **settings))["train"]
    assert train is not None
    consumed = train.consumed(BLOCK)
    assert sum(consumed.values()) == BLOCK
    assert consumed["small"] == pytest.approx(share * BLOCK, abs=1)


def test_epochs_as_weights(corpora: list[dict]) -> None:
    sources = [corpora[0] | {"weight": 3.0}, corpora[1]]
    train = build_mixtures(config_of(train=sources, seq_length=10, weights="epochs"))["train"]
    assert train is not None
    consumed = train.consumed(BLOCK)
    assert consumed["small"] / 10 == pytest.approx(3 * consumed["large"] / 90, rel=1e-3)


def test_phases_change_the_shares_and_go_on_in_each_source(corpora: list[dict]) -> None:
    phases = [
        {"after_step": 20, "weights": {"small": 1.0}},
        {"after_step": 30, "weights": {"small": 3, "large": 1}},
    ]
    train = build_mixtures(config_of(batch=4, train=corpora, seq_length=10, phases=phases))["train"]
    assert train is not None
    source, sample = train.order.locate(np.arange(80 + 40 + BLOCK))
    assert (source[80:120] == 0).all()
    first = np.bincount(source[:80], minlength=2)
    assert train.consumed(80) == dict(zip(["small", "large"], first.tolist(), strict=True))
    assert train.consumed(120)["large"] == first[1]
    assert train.consumed(120 + BLOCK)["large"] == first[1] + BLOCK // 4
    # Every source goes through all of its samples before it begins again, phases or not.
    for number, size in enumerate([10, 90]):
        own = sample[source == number]
        for epoch in np.split(own[: len(own) // size * size], len(own) // size):
            assert sorted(epoch.tolist()) == list(range(size))


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 100_000), max_size=3),
    count=st.integers(0, 150_000),
    data=st.data(),
)
@settings(max_examples=15, deadline=None)
def test_consumed_counts_what_locate_says_in_any_phase(sizes, lengths, count, data) -> None:
    begins = [0, *np.cumsum(np.array(lengths, np.int64)).tolist()]
    weight = st.integers(0, 3)
    phases = [
        Phase(
            begin, data.draw(st.lists(weight, min_size=len(sizes), max_size=len(sizes)).filter(any))
        )
        for begin in begins
    ]
    order = PhasedOrder(sizes, phases, 0, "shuffle")
    source, sample = order.locate(np.arange(count))
    assert order.consumed(count).tolist() == np.bincount(source, minlength=len(sizes)).tolist()
    for number, size in enumerate(sizes):
        counts = np.bincount(sample[source == number], minlength=size)
        assert len(counts) == size
        assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"phases": [{"after_step": 5, "weights": {"smal": 1}}]},
            "source 'smal'; those of train are small, large",
        ),
        ({"phases": [{"after_step": 5, "weights": {"small": 0}}]}, "above 0"),
        (
            {"phases": [{"after_step": s, "weights": {"small": 1}} for s in (5, 5)]},
            r"begin after \[5, 5\]",
        ),
        ({"order": "megatron", "packing": "best_fit"}, "no `packing`; leave it at 'concat'"),
        ({"order": "megatron", "weights": "epochs"}, "no `weights`; leave it at 'tokens'"),
        ({"order": "megatron", "temperature": 2.0}, "no `temperature`; leave it at 1.0"),
        ({"fim": {}}, "fim needs `tokenizer`"),
    ],
)
def test_mistakes_are_explained(corpora: list[dict], settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(train=corpora, seq_length=10, **settings)


@pytest.mark.parametrize("order", ["shuffle", "sequential", "megatron"])
@pytest.mark.parametrize("where", ["train", "valid", "test"])
def test_no_two_sources_have_one_name(corpora: list[dict], order: str, where: str) -> None:
    """Metrics, phases and what was consumed are dictionaries by the names."""
    first, second = corpora
    same = [
        [first, first],
        [first, second, first],
        [first | {"name": "x"}, second | {"name": "x"}],
        [first, first, second | {"name": str(first["path"])}],
    ]
    for sources in same:
        with pytest.raises(
            ConfigError, match=r"sources \d and \d are both named .*; give each a `name` of its own"
        ):
            config_of(seq_length=10, order=order, **{"train": corpora, where: sources})
    config = config_of(
        seq_length=10, order=order, train=[first | {"name": "x"}, first | {"name": "y"}]
    )
    train = build_mixtures(config)["train"]
    assert train is not None
    consumed = train.consumed(40)
    assert (set(consumed), sum(consumed.values())) == ({"x", "y"}, 40), "one file as two sources"


PREFIX, MIDDLE, SUFFIX = 61_000, 61_001, 61_002


def parts_of(turned: list[int]) -> list[int]:
    """The document that was turned, put together again."""
    assert turned.count(PREFIX) == turned.count(SUFFIX) == turned.count(MIDDLE) == 1
    assert turned[0] == PREFIX
    suffix_at, middle_at = turned.index(SUFFIX), turned.index(MIDDLE)
    between, last = turned[suffix_at + 1 : middle_at], turned[middle_at + 1 :]
    return last + between if suffix_at == 1 else turned[1:suffix_at] + last + between


@pytest.mark.parametrize("spm_rate", [0.0, 1.0])
def test_turned_documents_are_the_same_documents(tmp_path: Path, spm_rate: float) -> None:
    dataset = write(tmp_path / "x", [40, 5, 64, 30, 200, SHORTEST + 1, SHORTEST, 100, 53])
    source = TokenSource(dataset, 0, dataset.num_tokens, 127)
    view = View(
        document_mask=True, fim=FillInTheMiddle(1.0, spm_rate, PREFIX, MIDDLE, SUFFIX, END, seed=1)
    )
    turned, plain = (
        mixture_of([source], order="sequential", view=v).read(np.arange(4))
        for v in (view, View(document_mask=True))
    )
    assert (turned.labels[:, :-1] == turned.tokens[:, 1:]).all()
    count, spm = 0, 0
    for row, before, documents in zip(turned.tokens, plain.tokens, plain.documents, strict=True):
        borders = np.flatnonzero(np.diff(documents)) + 1
        for part, original in zip(
            np.split(row, borders)[:-1], np.split(before, borders)[:-1], strict=True
        ):
            content = original[original != END].tolist()
            if len(content) < SHORTEST:
                assert (part == original).all()
                continue
            assert part[len(content) :].tolist() == original[len(content) :].tolist()
            assert parts_of(part[: len(content)].tolist()) == content[:-3]
            count += 1
            spm += part[1] == SUFFIX
    assert count >= 4
    if spm_rate:
        assert spm == count
    else:
        assert spm < count  # where the prefix is empty, both look alike


def test_what_is_turned_depends_on_the_sample_alone(tmp_path: Path) -> None:
    dataset = write(tmp_path / "x", [50] * 100)
    source = TokenSource(dataset, 0, dataset.num_tokens, 99)
    view = View(fim=FillInTheMiddle(0.5, 0.5, PREFIX, MIDDLE, SUFFIX, END, seed=1))
    mixture = mixture_of([source], view=view)
    whole = mixture.read(np.arange(200)).tokens  # several epochs
    assert (mixture.read([7, 150, 3]).tokens == whole[[7, 150, 3]]).all()
    share = (whole == PREFIX).sum() / 400  # of two documents a sample
    assert 0.4 < share < 0.6
    other = mixture_of([source], view=View(fim=view.fim._replace(seed=2)))
    assert (other.read(np.arange(200)).tokens != whole).any()
    assert mixture.fingerprint() != other.fingerprint()


def test_what_is_done_to_training_data_is_not_done_to_validation(tmp_path: Path) -> None:
    """Filling in the middle, shuffling, phases and Megatron's order: validation and test read
    documents as they are, one after another, so that their losses can be compared."""
    write(tmp_path / "a", [50] * 300)
    write(tmp_path / "b", [50] * 300)
    prefixes = [{"path": str(tmp_path / name), "name": name} for name in "ab"]
    tokens = {"<|fim_prefix|>": PREFIX, "<|fim_middle|>": MIDDLE, "<|fim_suffix|>": SUFFIX}

    class Tokens:
        eod_id = END

        def vocabulary(self) -> dict[str, int]:
            return tokens

    plain = {
        "train": prefixes,
        "valid": prefixes,
        "test": prefixes,
        "seq_length": 60,  # windows of documents that are long enough to be turned
        "order": "sequential",
        "tokenizer": "x",
    }
    phases = [{"after_step": 1, "weights": {"a": 1.0}}]
    changed = plain | {"order": "shuffle", "fim": {"rate": 1.0}, "phases": phases}
    wanted, found = (build_mixtures(config_of(**data), Tokens()) for data in (plain, changed))  # type: ignore[arg-type]
    index = np.arange(300)
    for split in ("valid", "test"):
        assert wanted[split] is not None
        assert found[split] is not None
        assert (found[split].read(index).tokens == wanted[split].read(index).tokens).all(), split
        assert found[split].consumed(300) == wanted[split].consumed(300)
    assert found["train"] is not None
    assert (found["train"].read(index).tokens == PREFIX).any()


def test_a_tokenizer_without_the_tokens_is_refused() -> None:
    from megalite.config import FillInTheMiddleConfig

    with pytest.raises(DataError, match=r"no token '<\|fim_prefix\|>'"):
        FillInTheMiddle.of(FillInTheMiddleConfig(), None, 0)
