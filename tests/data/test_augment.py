"""Augmented rows: a function of seed, row and epoch, whose labels stay what they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import write_tokenizer
from encoder_decoders import rows_config
from encoders import MODEL, write_words
from megalite.cli import main
from megalite.config import AugmentConfig, Config
from megalite.config_file import load_config, parse_config
from megalite.data.augment import Augmentation, Room, misspelt, read_synonyms
from megalite.data.formats import Settings
from megalite.data.loader import Loader
from megalite.data.mixture import IGNORE, Mixture, build_mixtures
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.tokenizer import Tokenizer, load_tokenizer
from megalite.errors import ConfigError, DataError
from megalite.lineage.places import NONE, places_of
from megalite.lineage.run import TracedRun
from megalite.lineage.trace import Tracer

ROWS = 24
ALL = {"share": 1.0, "swap": 0.3, "delete": 0.2}


def text_of(row: int, second: bool = False) -> str:
    """Words of its own for each half of the vocabulary; their numbers say which row it is of."""
    first = 10 + 2 * (row % 10) + 30 * second
    return " ".join(f"w{first + k % 2}" for k in range(4 + row % 5)) + f" w{35 + row + 25 * second}"


def write(folder: Path, format: str) -> Path:
    """Rows of a class, with a second text in every third of them, or pairs."""
    if (folder / "rows.idx").exists():
        return folder / "rows"
    rows: list[dict[str, Any]] = []
    for row in range(ROWS):
        if format == "pairs":
            rows.append({"anchor": text_of(row), "positive": text_of(row, True)})
        else:
            pair = {"text_pair": text_of(row, True)} if row % 3 == 0 else {}
            rows.append({"text": text_of(row), "label": "ab"[row % 2], **pair})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = Settings(format, str(write_words(folder / "words")))  # type: ignore[arg-type]
    preprocess_rows([str(folder / "rows.jsonl")], folder / "rows", settings)
    return folder / "rows"


def config_of(
    folder: Path, augment: dict[str, Any] | None = ALL, format: str = "classification", **data: Any
) -> Config:
    prefix = write(folder, format)
    model = {**MODEL, "max_positions": 512}
    model |= {"task": "classification", "labels": ["a", "b"]} if format == "classification" else {}
    objective = {"objective": {"name": "contrastive"}} if format == "pairs" else {}
    values = {
        "run": {"name": "augmented", "dir": str(folder / "runs")},
        "model": model,
        "data": {
            "train": [{"path": str(prefix)}], "seq_length": 40, "document_mask": True, "augment": augment,
            "tokenizer": str(folder / "words"), **data,
        },
        "train": {"steps": 12, "global_batch_size": 4, "seed": data.pop("seed", 0)},
        "optimizer": {"lr": 1e-3},
        **objective,
    }  # fmt: skip
    values["data"].pop("seed", None)
    return parse_config(values)


def mixtures(config: Config) -> tuple[dict[Any, Mixture | None], Tokenizer]:
    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    return build_mixtures(config, tokenizer), tokenizer


def train_of(config: Config) -> Mixture:
    found = mixtures(config)[0]["train"]
    assert found is not None
    return found


def texts_of(mixture: Mixture, epoch: int = 0) -> dict[int, list[list[int]]]:
    """The texts of each row in an epoch, as they are seen, without special tokens. The last word of
    a text says which row it is of; where it was left out, the words that rows of ten share do."""
    index = np.arange(mixture.num_samples) + epoch * mixture.num_samples
    samples = mixture.read(index)
    assert samples.documents is not None
    found: dict[int, list[list[int]]] = {}
    for sample, number in enumerate(mixture.order.locate(index)[1]):
        rows = mixture.sources[0].rows_of(number[None])[1]  # type: ignore[attr-defined]
        for document, row in enumerate(rows.tolist()):
            tokens = samples.tokens[sample][samples.documents[sample] == document].tolist()
            parts = [
                [int(x) for x in part.split()]
                for part in re.split(r" [23]\b", f" {' '.join(map(str, tokens))}")
            ]
            found[row] = [part for part in parts if part]
    return found


def test_what_is_done_follows_from_seed_row_and_epoch(tmp_path: Path) -> None:
    """Alone or in a batch, in one packing or another, with other rows or without."""
    mixture = train_of(config_of(tmp_path))
    plain = texts_of(train_of(config_of(tmp_path, None)))
    one, other = (texts_of(mixture, epoch) for epoch in (0, 1))
    assert one == texts_of(train_of(config_of(tmp_path)))
    # Other lengths of samples are another packing, and other numbers of samples.
    for length in (48, 200):
        assert one == texts_of(train_of(config_of(tmp_path, seq_length=length)))
    changed = [row for row in plain if one[row] != plain[row]]
    assert len(changed) > 0.8 * ROWS
    assert sum(one[row] != other[row] for row in plain) > 0.7 * ROWS
    assert one != texts_of(train_of(config_of(tmp_path, seed=1)))
    index = np.arange(2 * mixture.num_samples)
    together = mixture.read(index)
    for number in index[::-1].tolist():
        alone = mixture.read([number])
        assert (alone.tokens[0] == together.tokens[number]).all()
        assert (alone.labels[0] == together.labels[number]).all()


def test_every_layout_sees_the_same_rows(tmp_path: Path) -> None:
    mixture = train_of(config_of(tmp_path))
    seen: list[dict[int, list[int]]] = []
    for size in (1, 2, 4):
        found = {}
        for rank in range(size):
            with Loader(mixture, 4, 1, rank, size, start_sample=4) as loader:
                for _ in range(4):
                    for micro in next(loader):
                        found[int(micro.samples[0])] = micro.tokens[0].tolist()
        seen.append(found)
    assert sorted(seen[0]) == [*range(4, 20)]
    assert seen[0] == seen[1] == seen[2]


def test_a_share_of_the_texts_is_changed_and_none_that_is_not_trained_on(tmp_path: Path) -> None:
    config = config_of(tmp_path, {"share": 0.5, "swap": 0.9}, split=[60, 40, 0])
    found, _ = mixtures(config)
    plain, _ = mixtures(config_of(tmp_path, None, split=[60, 40, 0]))
    assert found["train"] is not None
    assert found["valid"] is not None
    assert plain["train"] is not None
    assert plain["valid"] is not None
    assert texts_of(found["valid"]) == texts_of(plain["valid"])
    assert found["valid"].fingerprint() == plain["valid"].fingerprint()
    assert found["train"].fingerprint() != plain["train"].fingerprint()
    was = texts_of(plain["train"])
    changed = [
        text != before
        for epoch in range(12)
        for row, texts in texts_of(found["train"], epoch).items()
        for text, before in zip(texts, was[row], strict=True)
    ]
    assert 0.35 < np.mean(changed) < 0.55


@pytest.mark.parametrize("format", ["classification", "pairs"])
def test_labels_stay_and_texts_keep_apart(format: str, tmp_path: Path) -> None:
    mixture = train_of(config_of(tmp_path, format=format))
    plain = texts_of(train_of(config_of(tmp_path, None, format)))
    for epoch in range(6):
        samples = mixture.read(np.arange(mixture.num_samples) + epoch * mixture.num_samples)
        if format == "classification":
            # One at each row, at its first token: [CLS], behind which are words of even rows or not.
            assert int((samples.labels != IGNORE).sum()) == ROWS
            assert (samples.tokens[samples.labels != IGNORE] == 2).all()
        found = texts_of(mixture, epoch)
        assert found.keys() == plain.keys()
        for row, texts in found.items():
            assert len(texts) == len(plain[row])
            for text, before in zip(texts, plain[row], strict=True):
                assert 0 < len(text) <= len(before)
                assert not Counter(text) - Counter(before)


def test_the_class_goes_with_its_row(tmp_path: Path) -> None:
    """Where much is left out, everything that follows moves."""
    mixture = train_of(config_of(tmp_path, {"share": 1.0, "delete": 0.6}))
    for epoch in range(4):
        index = np.arange(mixture.num_samples) + epoch * mixture.num_samples
        samples = mixture.read(index)
        for sample, number in enumerate(mixture.order.locate(index)[1]):
            rows = mixture.sources[0].rows_of(number[None])[1]  # type: ignore[attr-defined]
            labels = samples.labels[sample]
            assert labels[labels != IGNORE].tolist() == (rows % 2).tolist()


def test_only_sources_are_changed_and_both_sides_keep_their_room(tmp_path: Path) -> None:
    path = tmp_path / "synonyms"
    path.write_text("w7, w8 w9 w10\nw11, w12 w13\n")
    augment = f"data.augment={{share: 1.0, synonyms: 1.0, synonym_file: {path}, swap: 0.2}}"
    plain, found = (
        train_of(rows_config(tmp_path, *more, "data.order=sequential")) for more in ((), (augment,))
    )
    index = np.arange(plain.num_samples)
    was, now = plain.read(index), found.read(index)
    assert (was.labels == now.labels).all()
    assert was.source is not None
    assert now.source is not None
    assert was.source.shape == now.source.shape
    longer = (now.source != 0).sum(1) - (was.source != 0).sum(1)
    assert longer.max() > 0
    assert (was.source != now.source).any(1).mean() > 0.9
    # Each still ends with its end token, and no row loses its own.
    assert ((was.source == 1).sum(1) == (now.source == 1).sum(1)).all()


def augmentation(folder: Path, **settings: Any) -> Augmentation:
    tokenizer = load_tokenizer(write_tokenizer(folder))
    return Augmentation(AugmentConfig(share=1.0, **settings), tokenizer, Room(999), 0)


def changes(folder: Path, text: str, **settings: Any) -> list[str]:
    made = augmentation(folder, **settings)
    return [made.change(text, np.random.default_rng(seed)) for seed in range(60)]


TEXT = "  The quick brown\tfox, jumping over THE lazy dog (again)!  "


def test_each_kind_of_change(tmp_path: Path) -> None:
    words = TEXT.split()
    swapped = changes(tmp_path, TEXT, swap=0.3)
    assert all(sorted(text.split()) == sorted(words) for text in swapped)
    assert len({*swapped}) > 40
    assert all(re.sub(r"\S+", "x", text) == re.sub(r"\S+", "x", TEXT) for text in swapped)
    deleted = changes(tmp_path, TEXT, delete=0.3)
    for text in deleted:
        rest = iter(words)
        assert all(word in rest for word in text.split()), "in their order"
        assert text.startswith("  ")
        assert text.endswith("  ")
    share = np.mean([1 - len(text.split()) / len(words) for text in deleted])
    assert 0.2 < share < 0.4
    assert all(text.split() for text in changes(tmp_path, TEXT, delete=0.99))
    path = tmp_path / "synonyms.txt"
    path.write_text("# of mine\nquick, fast,swift\nthe, that\ndog, hound, big dog\n\n")
    replaced = changes(tmp_path, TEXT, synonyms=0.7, synonym_file=path)
    seen = [Counter(text.split()[at] for text in replaced) for at in (0, 1, 2, 6)]
    assert seen[0].keys() == {"The", "That"}
    assert seen[1].keys() == {"quick", "fast", "swift"}
    assert seen[2].keys() == {"brown"}
    assert seen[3].keys() == {"THE", "THAT"}
    assert 0.5 < 1 - seen[1]["quick"] / 60 < 0.9
    assert any("lazy big dog (again)!" in text for text in replaced)
    noisy = changes(tmp_path, TEXT, noise=1.0)
    assert all(len(text.split()) == len(words) for text in noisy)
    for text in noisy:
        for word, before in zip(text.split(), words, strict=True):
            assert abs(len(word) - len(before)) <= 1
            assert set(word) <= set(before)
            assert re.sub(r"\w", "", word) == re.sub(r"\w", "", before)


def test_signs_by_themselves_stay(tmp_path: Path) -> None:
    text = '" a b c , d . e f ! ( g h ) - i j'
    for made in changes(tmp_path, text, swap=0.5, noise=0.5):
        assert re.sub(r"\w", "x", made) == re.sub(r"\w", "x", text)
    for made in changes(tmp_path, text, delete=0.7):
        assert re.findall(r"[^\w\s]", made) == re.findall(r"[^\w\s]", text)
    assert {*changes(tmp_path, " — , .", swap=0.9, delete=0.9, noise=0.9)} == {" — , ."}


def test_ways_to_misspell() -> None:
    letters = (0.0, 0.99)
    found = {
        misspelt("(grüße),", np.array([kind, 0.5, letters[1]])) for kind in (0, 0.25, 0.5, 0.75)
    }
    assert found == {"(grßüe),", "(grße),", "(grüüße),", "(greße),"}
    assert misspelt("at", np.array([0.3, 0.5, 0.5])) == "at"


def test_tokens_are_those_of_the_new_text(tmp_path: Path) -> None:
    """Of a tokenizer whose tokens begin with spaces; what the sample has no room for is cut."""
    tokenizer = load_tokenizer(write_tokenizer(tmp_path))
    text = "the capital of France is Paris"
    ids = np.array(tokenizer.encode(text))
    from megalite.data.dataset import Windows

    def window(spare: int) -> Windows:
        width, count = len(ids) + spare, len(ids)
        tokens = np.zeros((1, width), np.int64)
        tokens[0, :count] = ids
        documents = (np.arange(width) >= count).astype(np.int64)[None]
        return Windows(tokens, np.array([count]), documents, np.ones((1, width), np.int64))

    for spare in (0, 40):
        room = Room(len(ids) + spare)
        config = AugmentConfig(share=1.0, noise=1.0, swap=0.5)
        made = Augmentation(config, tokenizer, room, 3)
        for epoch in range(5):
            rows, epochs = [np.array([7])], np.array([epoch])
            found, origin = made.apply(window(spare), rows, epochs)
            count = int(found.filled[0])
            told = tokenizer.decode(found.tokens[0, :count].tolist())
            again, _ = made.apply(window(spare), rows, epochs)
            assert (again.tokens == found.tokens).all()
            if spare:
                assert tokenizer.encode(told) == found.tokens[0, :count].tolist()
                assert len(told.split()) == 6
            else:
                assert count == len(ids)
            assert found.documents is not None
            assert (found.documents[0] == (np.arange(len(ids) + spare) >= count)).all()
            assert (found.tokens[0, count:] == 0).all()
            same = min(count, len(ids))
            assert origin[0, :same].tolist() == [*range(same)]
            assert (origin[0, same:] == -1).all()


def test_a_trace_finds_augmented_rows(tmp_path: Path) -> None:
    """Tokens of texts that stay are exact, and every row is found in every epoch."""
    config = config_of(tmp_path, {"share": 0.5, "delete": 0.5})
    found, tokenizer = mixtures(config)
    mixture = found["train"]
    assert mixture is not None
    index = np.arange(2 * mixture.num_samples)
    places, plain = places_of(mixture, index), texts_of(train_of(config_of(tmp_path, None)))
    dataset = mixture.sources[0].dataset
    numbers = [mixture.order.locate(index)[1]]
    exact = 0
    for sample, number in enumerate(numbers[0]):
        rows = mixture.sources[0].rows_of(number[None])[1]  # type: ignore[attr-defined]
        assert places.samples.documents is not None
        for document, row in enumerate(rows.tolist()):
            here = np.flatnonzero(places.samples.documents[sample] == document)
            at = places.tokens[sample, here]
            there = at[at != NONE]
            assert {dataset.document_of(int(x)) for x in there} == {row}
            tokens = places.samples.tokens[sample, here]
            if len(at) == sum(map(len, plain[row])) + len(plain[row]) + 1 and (at != NONE).all():
                exact += (tokens == [dataset.read(int(x), int(x) + 1)[0] for x in at]).all()
    assert exact > 0.2 * 2 * ROWS
    run = TracedRun(config, tokenizer, mixture, (), {}, frozenset(), config.train.steps)
    tracer = Tracer(run)
    plain_run = TracedRun(
        config,
        tokenizer,
        train_of(config_of(tmp_path, None)),
        (),
        {},
        frozenset(),
        config.train.steps,
    )
    for row in range(0, ROWS, 5):
        steps = [(use.step, use.number) for use in tracer.uses(0, row)]
        assert steps == [(use.step, use.number) for use in Tracer(plain_run).uses(0, row)]
        assert steps


def test_inspect_shows_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("w10, w77\nw11, w77\nw12, w77\n")
    config = config_of(tmp_path, {"share": 1.0, "synonyms": 1.0, "synonym_file": str(path)})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert main(["inspect", str(tmp_path / "config.yaml"), "--count", "9"]) == 0
    said = capsys.readouterr().out
    assert "w77 w77" in said
    assert "w10 w11" not in said
    assert "data.augment has changed words; other ones in each epoch." in said
    assert load_config(tmp_path / "config.yaml").data.augment == config.data.augment


MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "nothing": (
        {},
        {},
        "give `swap`, `delete`, `synonyms`, `noise` or `counterfactual` a share above 0",
    ),
    "no file": (
        {"synonyms": 0.5},
        {},
        "`synonyms`, a share above 0, and `synonym_file` go together",
    ),
    "no share": ({"swap": 0.5, "synonym_file": "a"}, {}, "`synonym_file` go together"),
    "too much": ({"swap": 1.5}, {}, "data.augment.swap = 1.5: should be less than or equal to 1"),
    "tokenizer": ({"swap": 0.5}, {"tokenizer": None}, "augment needs `tokenizer`"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_in_a_config(name: str, tmp_path: Path) -> None:
    augment, data, told = MISTAKES[name]
    with pytest.raises(ConfigError, match=re.escape(told)):
        config_of(tmp_path, augment, **data)


def test_other_tasks_are_refused(tmp_path: Path) -> None:
    values = config_of(tmp_path).model_dump(mode="json")
    values["model"] |= {"task": "labels"}
    with pytest.raises(ConfigError, match=r"labels stay true: .* not of model.task: labels"):
        parse_config(values)


@pytest.mark.parametrize(
    ("text", "told"),
    [("quick, fast\nslow\n", "line 2 has 'slow' alone"), ("# no\n\n", "has no words")],
)
def test_a_list_of_synonyms_that_is_none(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=told):
        read_synonyms(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"none.txt: No such file"):
        read_synonyms(tmp_path / "none.txt")


def test_other_synonyms_are_other_data(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    found = set()
    for text in ("w10, w11", "w10, w12", "w11,w10"):
        path.write_text(text)
        augment = {"synonyms": 0.5, "synonym_file": str(path)}
        found.add(train_of(config_of(tmp_path, augment)).fingerprint())
    assert len(found) == 2
