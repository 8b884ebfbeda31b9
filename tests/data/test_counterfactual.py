"""Counterfactual texts: every word of a group becomes its counterpart, and nothing else changes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chats import write_tokenizer
from megalite.config import AugmentConfig
from megalite.config_file import parse_config
from megalite.data.augment import Augmentation, Room
from megalite.data.counterfactual import counterfactual, drawn_for, read_word_pairs
from megalite.data.formats import Settings
from megalite.data.mixture import Mixture, build_mixtures
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.utils.resources import configs_dir

PAIRS = {
    "she": ("he",),
    "he": ("she",),
    "her": ("him", "his"),
    "aunt": ("uncle",),
    "uncle": ("aunt",),
}


def test_words_become_their_counterparts_as_they_are_written() -> None:
    text = "She said:\n\t“HE is no sheep, he's my Aunt” -- the aunt’s heir, SHE!"
    wanted = "He said:\n\t“SHE is no sheep, she's my Uncle” -- the uncle’s heir, HE!"
    assert counterfactual(text, PAIRS, 0) == wanted
    assert counterfactual(wanted, PAIRS, 1) == text  # and back: each has one counterpart


def test_which_of_several_counterparts_it_is_the_seed_tells() -> None:
    text = "her and her and her and her and her"
    found = [counterfactual(text, PAIRS, seed) for seed in range(50)]
    assert found == [counterfactual(text, PAIRS, seed) for seed in range(50)]
    words = [word for each in found for word in each.split(" and ")]
    assert {*words} == {"him", "his"}
    # Of 250 fair draws: four standard deviations are 32.
    assert abs(words.count("him") - 125) < 32
    assert len(set(found)) > 20  # each place by itself


def test_our_list_is_read_and_goes_both_ways() -> None:
    pairs = read_word_pairs(configs_dir() / "counterfactual" / "gender.txt")
    assert pairs["her"] == ("him", "his")
    assert all(word in pairs[other] for word, others in pairs.items() for other in others)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("she, he\nwoman\n", "line 2: 'woman' is no pair"),
        ("she, he, they\n", "line 1: 'she, he, they' is no pair"),
        ("she, She\n", "is no pair"),
        ("her mother, his father\n", "is no pair"),
        ("# nothing\n", "has no pairs"),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=why):
        read_word_pairs(path)


# --- as augmentation of rows -------------------------------------------------------------------------

ROWS = 40
AUGMENT = {"counterfactual": 0.5}


def config_of(folder: Path, augment: dict[str, Any] | None, seed: int = 0, length: int = 96) -> Any:
    """Rows of two texts, which speak of the same person, and a class."""
    if not (folder / "rows.idx").exists():
        write_tokenizer(folder / "tokenizer", vocab_size=300)
        rows = [
            {"text": f"she likes {n}", "text_pair": f"her aunt is {n}", "label": "ab"[n % 2]}
            for n in range(ROWS)
        ]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "pairs.txt").write_text("she, he\nher, his\naunt, uncle\n")
        settings = Settings("classification", str(folder / "tokenizer"))
        preprocess_rows([str(folder / "rows.jsonl")], folder / "rows", settings)
    if augment:
        augment = {"pair_file": str(folder / "pairs.txt")} | augment
    return parse_config({
        "run": {"name": "swapped", "dir": str(folder / "runs")},
        "model": {
            "family": "llama", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1,
            "num_attention_heads": 4, "max_positions": 512, "task": "classification", "labels": ["a", "b"],
        },
        "data": {
            "train": [{"path": str(folder / "rows")}], "valid": [{"path": str(folder / "rows")}], "seq_length": length,
            "document_mask": True, "augment": augment, "tokenizer": str(folder / "tokenizer"),
        },
        "train": {"steps": 12, "global_batch_size": 4, "seed": seed},
        "optimizer": {"lr": 1e-3},
    })  # fmt: skip


def texts_of(config: Any, epoch: int = 0, which: Any = "train") -> dict[int, str]:
    """The texts of each row in an epoch, by the number that they tell."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    mixture = build_mixtures(config, tokenizer)[which]
    assert isinstance(mixture, Mixture)
    found = {}
    samples = mixture.read([n + epoch * mixture.num_samples for n in range(mixture.num_samples)])
    assert samples.documents is not None
    for tokens, documents in zip(samples.tokens, samples.documents, strict=True):
        for document in range(int(documents.max()) + 1):
            text = tokenizer.decode(tokens[documents == document].tolist())
            if number := re.search(r"\d+", text):  # what is left of a sample has none
                found[int(number[0])] = text
    return found


def test_both_texts_of_a_row_are_swapped_or_neither(tmp_path: Path) -> None:
    found = texts_of(config_of(tmp_path, AUGMENT))
    assert found.keys() == set(range(ROWS))
    swapped = {row for row, text in found.items() if "uncle" in text}
    for row, text in found.items():
        words = ("he", "his", "uncle") if row in swapped else ("she", "her", "aunt")
        assert text.startswith(f"{words[0]} likes {row}")
        assert f"{words[1]} {words[2]} is {row}" in text
    # Of forty fair draws: three standard deviations are 9.5.
    assert abs(len(swapped) - ROWS / 2) < 9.5
    assert swapped == {row for row in range(ROWS) if drawn_for(0.5, 0, row, 0) is not None}


def test_which_rows_follows_from_seed_row_and_epoch(tmp_path: Path) -> None:
    one = texts_of(config_of(tmp_path, AUGMENT))
    assert one == texts_of(config_of(tmp_path, AUGMENT, length=200))  # in another packing
    assert one != texts_of(config_of(tmp_path, AUGMENT, seed=1))
    assert one != texts_of(config_of(tmp_path, AUGMENT), epoch=1)
    plain = texts_of(config_of(tmp_path, None))
    assert all("she" in text and "aunt" in text for text in plain.values())
    assert plain == texts_of(config_of(tmp_path, AUGMENT), which="valid")
    # Other changes are drawn as without it, and come on top.
    both = texts_of(config_of(tmp_path, AUGMENT | {"swap": 0.5, "share": 0.5}))
    assert {row for row, text in both.items() if "uncle" in text} == {
        row for row, text in one.items() if "uncle" in text
    }
    assert both != one
    every = texts_of(config_of(tmp_path, {"counterfactual": 1.0}))
    assert all("uncle" in text and "she" not in text for text in every.values())


def test_other_pairs_are_other_data(tmp_path: Path) -> None:
    config_of(tmp_path, None)
    tokenizer, room = load_tokenizer(tmp_path / "tokenizer"), Room(64)
    identities = []
    for name, text in (("a", "she, he\n"), ("b", "she, he\n"), ("c", "she, they\n")):
        (tmp_path / name).write_text(text)
        config = AugmentConfig(counterfactual=0.5, pair_file=tmp_path / name)
        identities.append(Augmentation(config, tokenizer, room, 0).identity())
    assert identities[0] == identities[1] != identities[2]


def test_a_share_and_a_list_go_together(tmp_path: Path) -> None:
    for augment in ({"counterfactual": 0.5, "pair_file": None}, {"swap": 0.1}):
        with pytest.raises(ConfigError, match=r"`counterfactual`.*and `pair_file` go together"):
            config_of(tmp_path, augment)
