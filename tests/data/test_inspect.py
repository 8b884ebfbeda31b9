"""What `megalite inspect` tells of token files and of a config."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import yaml

from megalite.cli import main
from megalite.data.indexed_writer import IndexedWriter
from megalite.data.inspect import _marked
from megalite.data.preprocess import preprocess
from megalite.data.tokenizer import Tokenizer
from megalite.data.tokenizer_training import train_tokenizer
from mixtures import config_of

LENGTHS = [40, 3, 21, 8]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    with IndexedWriter(tmp_path / "corpus", np.uint16) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add_document(100 * number + np.arange(length))
    return tmp_path / "corpus"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_file_is_described(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = said(capsys, corpus, "--start", "1", "--count", "2")
    for words in (
        "documents      4",
        "tokens         72 of uint16",
        "0 to 307, 72 in 72 tokens",
        "mean 18.0",
    ):
        assert words in found
    assert "shortest 3, median 8, 90% 21, 99% 21, longest 40" in found
    shares = [float(share) for share in re.findall(r"([0-9.]+)% of the tokens", found)]
    assert shares == [4.2, 0.0, 11.1, 29.2, 55.6]  # 3, 8 to 15, 16 to 31, 32 to 63
    assert "document 1, 3 tokens\n100 101 102 \n" in found
    assert "document 2, 21 tokens\n200 201" in found
    assert "document 3" not in found


def test_samples_are_shown_as_the_model_sees_them(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(train=[{"path": str(corpus)}], seq_length=31, order="sequential")
    file = corpus.with_name("config.yaml")
    file.write_text(
        yaml.safe_dump({**config.model_dump(mode="json"), "model": {"preset": "llama-1m"}})
    )
    found = said(capsys, file, "--start", "1", "--count", "1")
    assert re.search(r"corpus +2 +62 +100\.00% +20\.00\n", found)
    # The second sample holds what is left of document 0, all of 1 and most of 2.
    assert "sample 1: corpus's 1, 31 of 31 tokens are predicted" in found
    borders = re.findall(r"document (\d), tokens (\d+) to (\d+) \n(.*?)\s*\n", found)
    assert [border[:3] for border in borders] == [
        ("0", "0", "8"),
        ("1", "9", "11"),
        ("2", "12", "30"),
    ]
    assert borders[0][3].startswith("⟦31 ⟧32 33")
    assert borders[1][3] == "100 101 102"
    masked = said(capsys, file, "data.border_loss=false", "--start", "1", "--count", "1")
    assert "29 of 31 tokens are predicted" in masked
    assert "⟦100 ⟧101 102" in masked
    assert "⟦200 ⟧201" in masked
    packed = said(capsys, file, "data.packing=best_fit", "--count", "3")
    assert "0 to 30 \n" in packed
    assert "best_fit, order sequential" in packed


def test_what_cannot_be_opened_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "nothing")]) == 2
    assert "nothing.bin does not exist" in capsys.readouterr().err


def test_what_is_not_there_to_be_shown_is_an_error(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["inspect", str(corpus), "--start", "-1"])
    assert "-1 is not between 0 and" in capsys.readouterr().err
    assert main(["inspect", str(corpus), "--start", "4"]) == 2
    assert "corpus has 4 documents, counted from 0; there is no number 4" in capsys.readouterr().err
    config = config_of(train=[{"path": str(corpus)}], seq_length=31, order="megatron")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["inspect", str(tmp_path / "run.yaml"), "--start", "1000000"]) == 2
    assert "error: data.train: samples 1000000 …" in capsys.readouterr().err


def test_numbers_that_no_tokenizer_has_are_shown_as_numbers() -> None:
    class Refusing:
        def decode(self, ids: list[int]) -> str:
            raise OverflowError(ids)

    refusing = cast(Tokenizer, Refusing())
    text = _marked(np.array([7, -1, 2**40]), np.ones(3, bool), refusing)
    assert text.plain == "7 -1 1099511627776 "


def test_documents_are_told_by_the_tokenizer_that_made_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"text number {number}, and no other" for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, size in (("tokenizer", 300), ("other", 262)):
        train_tokenizer([str(tmp_path / "a.jsonl")], tmp_path / name, size)
    prefix = preprocess(
        [str(tmp_path / "a.jsonl")], tmp_path / "a", tmp_path / "tokenizer", append_eod=False
    ).prefix
    capsys.readouterr()
    assert f"\n{texts[7]}\n" in said(capsys, prefix, "--start", 7, "--count", 1)
    assert main(["inspect", prefix, "--tokenizer", str(tmp_path / "other")]) == 2
    assert "another tokenizer" in capsys.readouterr().err
    (tmp_path / "tokenizer").rename(tmp_path / "moved")
    assert texts[7] not in said(capsys, prefix, "--start", 7, "--count", 1)
    assert texts[7] in said(
        capsys, prefix, "--start", 7, "--count", 1, "--tokenizer", tmp_path / "moved"
    )


NOTES = {
    "more ids than the model has": (
        {"vocab_size": 60_000},
        "has 60000 token ids, but model.vocab_size",
    ),
    "rows for another objective": ({"format": "preference"}, "go with objective.name: dpo"),
    "a mask that is gone": (
        {"format": "chat"},
        ".mask is missing, which says what is learned of rows of format 'chat'",
    ),
    "an unknown format": ({"format": "poem"}, ".json: format = 'poem' is none of chat, completion"),
    "a number that is text": (
        {"vocab_size": "big"},
        ".json: vocab_size = 'big' is not what preprocessing writes there",
    ),
    "classes that are no texts": ({"labels": ["a", 5]}, ".json: labels = ['a', 5] is not what"),
    "no object": ([], ".json is not a JSON object"),
    "classes for a model without": (
        {"format": "classification", "labels": ["a"]},
        "model.task: classification",
    ),
}


@pytest.mark.parametrize("mistake", NOTES)
def test_what_training_refuses_inspect_refuses_in_the_same_words(
    corpus: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    note, words = NOTES[mistake]
    corpus.with_suffix(".json").write_text(json.dumps(note))
    values = config_of(train=[{"path": str(corpus)}], seq_length=31).model_dump(mode="json")
    values["run"]["dir"] = str(corpus.parent / "runs")
    file = corpus.with_name("config.yaml")
    file.write_text(yaml.safe_dump({**values, "model": {"preset": "llama-1m"}}))
    told = []
    for verb in ("train", "inspect"):
        assert main([verb, str(file)]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert words in told[0]
