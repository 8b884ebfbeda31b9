"""Sentences of texts, and pairs that are made of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from encoders import write_words
from megalite.data.dataset import Windows, empty_windows
from megalite.data.indexed import IndexedDataset
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.preprocess import preprocess
from megalite.data.sentence_ends import split_sentences
from megalite.data.sentences import SentencePairs, Specials
from megalite.errors import DataError

CLS, SEP = 2, 3


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("One. Two! Three?", ["One.", " Two!", " Three?"]),
        ('He said "No." Then he went.', ['He said "No."', " Then he went."]),
        ("See No. 5 there. No. It is not.", ["See No. 5 there.", " No.", " It is not."]),
        ("Dr. Who met J. Smith. They left.", ["Dr. Who met J. Smith.", " They left."]),
        ("It costs 3.5 dollars. e.g. this is one.", ["It costs 3.5 dollars. e.g. this is one."]),
        ("A title\n\nA text\nof lines", ["A title", "\n\nA text", "\nof lines"]),
        ("Wait... what. Ok.  ", ["Wait... what.", " Ok.  "]),
        ("今日は。明日も！", ["今日は。", "明日も！"]),
        ("", [""]),
        ("  \n ", ["  \n "]),
    ],
)
def test_texts_are_cut_behind_sentences(text: str, pieces: list[str]) -> None:
    assert split_sentences(text) == pieces
    assert "".join(pieces) == text


def test_documents_keep_their_tokens_beside_the_borders(tmp_path: Path) -> None:
    tokenizer, texts = write_words(tmp_path / "tokenizer"), tmp_path / "texts.jsonl"
    documents = ["w5 w6 . W7\nw8 w9\nw10", "w11", "\n", "w12 w13\n \nw14 w15 w16", "[CLS] w20\nw21"]
    texts.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    found = {}
    for name, more in (("plain", {}), ("cut", {"by_sentence": True})):
        preprocess([str(texts)], tmp_path / name, tokenizer, **more)
        found[name] = IndexedDataset(tmp_path / f"{name}_text_document")
        found[name].check()
    plain, cut = found["plain"], found["cut"]
    assert cut.num_documents == plain.num_documents == 4
    assert np.array_equal(cut.tokens, plain.tokens)
    starts = [data.starts_of_documents(0, 4).tolist() for data in (plain, cut)]
    assert starts[0] == starts[1]
    rows = [[*map(int, cut[number])] for number in range(len(cut))]
    assert rows[:4] == [[CLS, 5, 6, 1], [1], [8, 9], [10, SEP]]
    assert rows[4:7] == [[CLS, 11, SEP], [CLS, 12, 13], [14, 15, 16, SEP]]
    assert rows[7:] == [[CLS, 20], [21, SEP]]


def test_shards_of_sentences_are_refused(tmp_path: Path) -> None:
    from megalite.data.blocks import Shard

    (tmp_path / "a.jsonl").write_text('{"text": "w5"}\n')
    tokenizer = write_words(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="--split-sentences and --shard do not go together"):
        preprocess(
            [str(tmp_path / "a.jsonl")],
            tmp_path / "x",
            tokenizer,
            by_sentence=True,
            shard=Shard(0, 2),
        )


def numbered(folder: Path) -> IndexedDataset:
    """Document d has d + 1 sentences; token 1000·d + 100·s + i is the i-th of its sentence s."""
    with IndexedWriter(folder / "numbered", np.int32) as writer:
        for document in range(9):
            lengths = [3 + (document + s) % 5 for s in range(document + 1)]
            tokens = [
                1000 * (document + 1) + 100 * s + i
                for s, length in enumerate(lengths)
                for i in range(length)
            ]
            writer.add_documents(
                [CLS, *tokens, SEP],
                [
                    lengths[0] + 1 + (document == 0),
                    *lengths[1:-1],
                    *([lengths[-1] + 1] if document else []),
                ],
                counts=[len(lengths)],
            )
    return IndexedDataset(folder / "numbered")


def read(source: SentencePairs, samples: list[int], epochs: list[int]) -> Windows:
    windows = empty_windows(len(samples), source.seq_length, True, masked=True)
    source.read(np.array(samples), np.array(epochs), windows, np.arange(len(samples)))
    return windows


def pairs_in(windows: Windows) -> list[tuple[list[int], list[int], int]]:
    """First text, second text, and what the mask says of each pair."""
    found = []
    for tokens, documents, mask, filled in zip(
        windows.tokens, windows.documents, windows.mask, windows.filled, strict=True
    ):
        assert (documents[filled:] == documents[:filled].max() + 1).all(), "padding is one more"
        for number in range(documents[:filled].max() + 1):
            pair = tokens[documents == number].tolist()
            told = mask[documents == number]
            assert pair[0] == CLS
            assert pair[-1] == SEP
            assert pair.count(SEP) == 2
            assert (told[1:] == 1).all()
            middle = pair.index(SEP)
            found.append((pair[1:middle], pair[middle + 1 : -1], int(told[0]) - 2))
    return found


@pytest.mark.parametrize("kind", ["sop", "nsp"])
def test_pairs_are_what_their_labels_say(kind: str, tmp_path: Path) -> None:
    source = SentencePairs(numbered(tmp_path), 0, 9, 24, kind, Specials(CLS, SEP), key=7)
    every = [*range(source.num_samples)]
    found = [
        pair for epoch in range(40) for pair in pairs_in(read(source, every, [epoch] * len(every)))
    ]
    labels = [label for _, _, label in found]
    # Four standard deviations of a fair coin.
    assert np.mean(labels) == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)
    for before, after, label in found:
        assert before
        assert after
        assert len(before) + len(after) + 3 <= 24
        same = before[0] // 1000 == after[0] // 1000
        if kind == "nsp":
            assert same == (label == 0)
        else:
            assert same
        if label == 0:
            # What follows is the very next token, or begins the next sentence.
            assert after[0] // 100 == before[-1] // 100 + 1
        elif kind == "sop":
            assert max(after) < min(before)
    assert len({tuple(before + after) for before, after, _ in found}) > 2 * len(every)
    again = read(source, [every[-1], 0], [3, 5])
    one = read(source, [0], [5])
    assert np.array_equal(again.tokens[1], one.tokens[0]), "whatever is read beside it"
    assert not np.array_equal(
        read(source, every, [0] * len(every)).tokens, read(source, every, [1] * len(every)).tokens
    )


def test_too_few_sentences_are_refused(tmp_path: Path) -> None:
    data = numbered(tmp_path)
    with pytest.raises(DataError, match="of 2 documents 1 have two sentences, which is too few"):
        SentencePairs(data, 0, 2, 24, "nsp", Specials(CLS, SEP), key=7)
    assert SentencePairs(data, 0, 2, 24, "sop", Specials(CLS, SEP), key=7).num_samples == 1
    with pytest.raises(DataError, match="seq_length 4 has no room for two sentences"):
        SentencePairs(data, 0, 9, 4, "sop", Specials(CLS, SEP), key=7)
