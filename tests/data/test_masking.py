"""What is masked of a sample, against plain statements of Devlin et al. 2019, section 3.1."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from rich.console import Console

from encoders import masked_config, write_words
from megalite.data.checks import open_data
from megalite.data.inspect import inspect_samples
from megalite.data.loader import Loader
from megalite.data.masking import Masking, Shares, Words
from megalite.data.mixture import IGNORE, Mixture
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import DataError
from small_runs import VOCAB

LENGTH, MASK = 64, 4


@pytest.fixture
def masking(tmp_path: Path) -> Masking:
    return Masking(Shares(0.15, 0.15), load_tokenizer(write_words(tmp_path)), 7)


def applied(masking: Masking, index: Any, low: int = 5) -> tuple[np.ndarray, ...]:
    """Tokens, inputs and labels of these samples."""
    index = np.asarray(index)
    tokens = np.random.default_rng(0).integers(low, VOCAB, (4000, LENGTH))[index]
    return (tokens, *masking.apply(tokens, np.ones(tokens.shape, bool), index))


def test_shares_are_those_of_bert(masking: Masking) -> None:
    tokens, inputs, labels = applied(masking, range(4000))
    chosen = labels != IGNORE
    assert np.array_equal(labels[chosen], tokens[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])
    before, after = tokens[chosen], inputs[chosen]
    random = (after != MASK) & (after != before)
    # Four standard deviations √(p·q/n) of each share; one of the 92 random tokens is the one that
    # stood there.
    for found, share in (
        (chosen, 0.15), (after == MASK, 0.8), (after == before, 0.1 + 0.1 / 92), (random, 0.1 * 91 / 92)
    ):  # fmt: skip
        assert found.mean() == pytest.approx(
            share, abs=4 * (share * (1 - share) / found.size) ** 0.5
        )
    counts = np.bincount(after[random], minlength=VOCAB)
    assert not counts[:5].any(), "no special token is drawn"
    expected = random.sum() / 92
    assert abs(counts[5:] - expected).max() < 5 * expected**0.5  # of Poisson counts, 92 of them


def test_a_share_goes_evenly_to_its_end(tmp_path: Path) -> None:
    shares = Shares(0.5, 0.1, 3001)
    _, _, labels = applied(Masking(shares, load_tokenizer(write_words(tmp_path)), 7), range(4000))
    for first, last, share in (
        (0, 100, 0.5 - 0.4 * 50 / 3000),
        (1450, 1550, 0.3),
        (3000, 3999, 0.1),
    ):
        found = labels[first:last] != IGNORE
        # Four standard deviations √(p·q/n), and half of what it changes by within such a piece.
        spread = 4 * (share * (1 - share) / found.size) ** 0.5
        assert found.mean() == pytest.approx(share, abs=spread)


def test_the_run_says_how_long_a_share_takes(tmp_path: Path) -> None:
    """Validation has the share of the end, and a longer run is the same run."""
    overrides = ["data.order=sequential", "objective.share=[0.9,0.1]", "train.steps=5"]
    mixture = train_of(tmp_path, *overrides)
    assert [round(float(x), 3) for x in mixture.view.corruption.shares.at(np.array([0, 19]))] == [
        0.9,
        0.1,
    ]
    valid = train_of(tmp_path, *overrides, split="valid")
    assert valid.view.corruption.shares[:2] == (0.1, 0.1)
    longer = train_of(tmp_path, *overrides, "train.steps=50")
    assert longer.fingerprint() == mixture.fingerprint()
    assert longer.fingerprint() != train_of(tmp_path, "data.order=sequential").fingerprint()


def test_special_tokens_and_those_not_learned_are_left_alone(masking: Masking) -> None:
    tokens, _, labels = applied(masking, range(500), low=0)
    assert not (tokens[labels != IGNORE] < 5).any()
    learned = np.zeros(tokens.shape, bool)
    learned[:, 3] = True
    inputs, labels = masking.apply(tokens, learned, np.arange(500))
    assert (labels[:, 3] != IGNORE).any()
    labels[:, 3] = IGNORE
    assert (labels == IGNORE).all()
    assert np.array_equal(np.delete(inputs, 3, 1), np.delete(tokens, 3, 1))


PIECES = {
    # Pieces, and which of them are one word.
    # It begins within a word, whose beginning another sample has.
    "wordpiece": (["##s", "un", "##mask", "##ing", "it", "."], [0, 1, 1, 1, 4, 5]),
    "byte-level": (
        ["un", "masked", "Ġit", "'s", "Ċ", "ĠĠ", "def", "Ġun"],
        [0, 0, 2, 2, 4, 5, 6, 7],
    ),
    "two texts": (["▁un", "mask", "[CLS]", "ing"], [0, 0, 2, 3]),
    "sentencepiece": (["▁un", "mask", "ed", "▁it", ".", "▁"], [0, 0, 0, 3, 3, 5]),
}


@pytest.mark.parametrize("kind", PIECES)
def test_all_tokens_of_a_word_are_masked_or_none(kind: str) -> None:
    pieces, words = PIECES[kind]
    names = [*dict.fromkeys(["[CLS]", "[MASK]", *pieces])]

    class Named:
        mask_id, special_ids = 1, frozenset((0, 1))

        def vocabulary(self) -> dict[str, int]:
            return {name: number for number, name in enumerate(names)}

    masking = Masking(Shares(0.4, 0.4), cast(Tokenizer, Named()), 7, whole_words=True)
    tokens = np.tile([0, *(names.index(piece) for piece in pieces)], (2000, 1))
    _, labels = masking.apply(tokens, np.ones(tokens.shape, bool), np.arange(2000))
    assert (labels[:, 0] == IGNORE).all(), "a special token, which no word goes on from"
    chosen = labels[:, 1:] != IGNORE
    assert np.array_equal(chosen, chosen[:, words]), "as the first token of its word"
    # Words are chosen by themselves: four standard deviations √(p·q/n) of each pair.
    spoken = {word for word, piece in zip(words, pieces, strict=True) if piece != "[CLS]"}
    for first, second in itertools.combinations(sorted(spoken), 2):
        both = (chosen[:, first] & chosen[:, second]).mean()
        assert both == pytest.approx(0.16, abs=4 * (0.16 * 0.84 / 2000) ** 0.5)


def test_a_hidden_token_that_the_model_does_not_have_is_refused(tmp_path: Path) -> None:
    mixture = train_of(tmp_path, "data.order=sequential")
    hidden = int(np.flatnonzero(mixture.read([0]).tokens[0] == MASK)[0])
    tokens = np.memmap(f"{mixture.sources[0].dataset.prefix}.bin", np.uint16, "r+")
    tokens[hidden] = VOCAB
    tokens.flush()
    with (
        Loader(mixture, 4, 4, 0, 1, vocab_size=VOCAB) as loader,
        pytest.raises(DataError, match=f"sample 0 holds token id {VOCAB}, but model.vocab_size"),
    ):
        next(loader)


def test_a_token_that_no_tokenizer_has_belongs_to_a_word() -> None:
    words = Words(cast(Tokenizer, SimpleNamespace(vocabulary=lambda: {"a": 0, "##b": 1})))
    tokens = np.array([[0, 2**40, 1, -1]])
    assert words.first_places(tokens, np.zeros((1, 4), bool)).tolist() == [[0, 0, 0, 3]]


def test_a_tokenizer_that_marks_no_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"whole_words: true needs a data\.tokenizer that marks"):
        Masking(Shares(0.15, 0.15), load_tokenizer(write_words(tmp_path)), 7, whole_words=True)


def test_a_sample_is_masked_alike_beside_any_others(masking: Masking) -> None:
    _, inputs, labels = applied(masking, range(40))
    _, few_inputs, few_labels = applied(masking, [39, 7])
    assert np.array_equal(few_inputs, inputs[[39, 7]])
    assert np.array_equal(few_labels, labels[[39, 7]])
    agree = (labels[:-1] != IGNORE) == (labels[1:] != IGNORE)
    assert agree.mean() == pytest.approx(0.15**2 + 0.85**2, abs=0.03), (
        "each sample is masked in places of its own"
    )


def train_of(folder: Path, *overrides: str, split: Any = "train") -> Mixture:
    mixture = open_data(masked_config(folder, *overrides))[2][split]
    assert mixture is not None
    return mixture


def test_an_epoch_masks_others_than_the_one_before_and_validation_the_same(tmp_path: Path) -> None:
    mixture = train_of(tmp_path, "data.order=sequential")
    size = mixture.num_samples
    first, again = mixture.read([0]), mixture.read([size])  # one sample, twice
    whole = [
        np.where(samples.labels != IGNORE, samples.labels, samples.tokens)
        for samples in (first, again)
    ]
    same = (first.labels == IGNORE) & (again.labels == IGNORE)
    assert np.array_equal(whole[0][same], whole[1][same])
    assert not np.array_equal(first.labels, again.labels)
    valid = train_of(tmp_path, "data.order=sequential", split="valid").read([0])
    assert not np.array_equal(valid.labels, first.labels), (
        "what is judged was not masked alike in training"
    )


@pytest.mark.parametrize("override", ["objective.share=0.3", "train.seed=4"])
def test_what_is_masked_is_part_of_the_fingerprint(override: str, tmp_path: Path) -> None:
    plain = train_of(tmp_path, "data.order=sequential").fingerprint()
    assert train_of(tmp_path, "data.order=sequential", override).fingerprint() != plain


def test_a_packed_sample_is_seen_to_its_last_token(tmp_path: Path) -> None:
    """A decoder's has one more, which is the last label."""
    mixture = train_of(tmp_path, "data.packing=best_fit")
    (source,) = mixture.sources
    lengths = source.pieces(np.arange(mixture.num_samples), False).length
    assert lengths.sum() == source.dataset.num_tokens
    assert lengths.max() == 16


def test_a_tokenizer_without_a_mask_token_is_refused(tmp_path: Path) -> None:
    config = masked_config(tmp_path)
    settings = tmp_path / "tokenizer" / "tokenizer_config.json"
    settings.write_text('{"sep_token": "[SEP]"}')
    with pytest.raises(
        DataError, match=r"needs a data\.tokenizer with a mask token: give tokenizer_config\.json a"
    ):
        open_data(config)


def test_inspect_shows_what_is_seen_and_what_is_to_be_told(tmp_path: Path) -> None:
    config, shown = masked_config(tmp_path, "data.document_mask=true"), Console(width=10_000)
    with shown.capture() as captured:
        inspect_samples(config, "train", 1, 0, shown)
    samples = train_of(tmp_path, "data.document_mask=true").read([0])
    words = {"[MASK]": 4, "[CLS]": 2, "[SEP]": 3, "[PAD]": 0, "[UNK]": 1} | {
        f"w{n}": n for n in range(5, VOCAB)
    }
    told = re.findall(r"⟦(\S+) → (\S+)⟧", captured.get())
    chosen = samples.labels[0] != IGNORE
    assert [(words[seen], words[label]) for seen, label in told] == [
        *zip(samples.tokens[0][chosen].tolist(), samples.labels[0][chosen].tolist(), strict=True)
    ]
    assert "A token attends to all of its own document." in captured.get()
