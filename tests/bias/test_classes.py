"""Bias of classifiers: what a group's word changes, and how far groups' rows fare alike; and that
training on counterfactual rows heals it."""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import write_tokenizer
from megalite.bias.classes import difference, flip_results, group_results
from megalite.bias.forms import Filled, Labelled, read_tests
from megalite.cli import main
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import DataError
from megalite.infer.classify import Question
from megalite.train import train


def test_the_interval_of_a_difference_is_that_of_the_books() -> None:
    # Newcombe (1998b), table II, method 10: (a), (b), (d) and (g).
    for p, m, q, n, low, high in (
        (56, 70, 48, 80, 0.0524, 0.3339), (9, 10, 3, 10, 0.1705, 0.8090), (5, 56, 0, 29, -0.0381, 0.1926),
        (10, 10, 0, 10, 0.6075, 1.0000),
    ):  # fmt: skip
        values = [1.0] * p + [0.0] * (m - p) + [1.0] * q + [0.0] * (n - q)
        found = difference(values, [True] * m + [False] * n)
        assert found.value == pytest.approx(p / m - q / n)
        assert found[1:3] == pytest.approx((low, high), abs=6e-5)
    assert difference([1.0], [True]).items == 0


def test_changes_are_counted_pair_by_pair() -> None:
    dice = random.Random(0)
    groups, attributes = {"x": "ab", "y": "cde", "z": "f"}, "gh"
    filled, rows = [], []
    for template, (group, words), attribute in product(range(5), groups.items(), attributes):
        for word in words:
            filled.append(Filled("", "c", str(template), group, "q", "", word, attribute))
            one = dice.random()
            rows.append([one * 0.6, one * 0.4, 1 - one])
    shares = np.array(rows)
    found = {
        (x.measure, x.category): x.found.value
        for x in flip_results(filled, shares, ["p", "q", "r"])
    }
    across, within, gaps = [], [], []
    for template, attribute in product(range(5), attributes):
        here = [
            (item.group, int(share.argmax()), share)
            for item, share in zip(filled, shares, strict=True)
            if (item.cluster, item.rest) == (str(template), attribute)
        ]
        pairs = [(a, b) for n, a in enumerate(here) for b in here[n + 1 :]]
        across.append(np.mean([a[1] != b[1] for a, b in pairs if a[0] != b[0]]))
        within.append(np.mean([a[1] != b[1] for a, b in pairs if a[0] == b[0]]))
        mean = {g: np.mean([share[2] for group, _, share in here if group == g]) for g in groups}
        gaps.append(mean["x"] - (mean["y"] + mean["z"]) / 2)
    assert found["class changes with the group", "all"] == pytest.approx(np.mean(across))
    assert found["class changes within a group", "all"] == pytest.approx(np.mean(within))
    assert found["changes, across − within", "all"] == pytest.approx(
        np.mean(across) - np.mean(within)
    )
    assert found["probability, group − others", "r × x"] == pytest.approx(np.mean(gaps))
    # Of one word a group: what another word alone changes is not known, and is not 0.
    few = [number for number, item in enumerate(filled) if item.words in "acf"]
    alone = flip_results([filled[number] for number in few], shares[few], ["p", "q", "r"])
    assert {x.measure for x in alone} == {
        "class changes with the group", "probability, group − others"
    }  # fmt: skip


def test_groups_are_compared_by_shares_and_errors() -> None:
    dice = random.Random(1)
    rows = [Labelled("", Question(""), dice.choice("pq"), dice.choice("xyz")) for _ in range(300)]
    said = [row.label if dice.random() < 0.7 else "p" for row in rows]
    found = {(x.measure, x.category): x.found.value for x in group_results(rows, said, "pq")}

    def share(label: str, of_class: bool | None, group: str, of_group: bool) -> float:
        """Of rows of a class or not (None: of all), and of a group or not, those told the class."""
        counted = [
            told == label
            for row, told in zip(rows, said, strict=True)
            if of_class in (None, row.label == label) and (row.group == group) is of_group
        ]
        return sum(counted) / len(counted)

    measures = {"told": None, "told rightly": True, "told wrongly": False}
    for (name, of_class), label, group in product(measures.items(), "pq", "xyz"):
        wanted = share(label, of_class, group, True) - share(label, of_class, group, False)
        assert found[f"{name}, group − others", f"{label} × {group}"] == pytest.approx(wanted)
    some = [(row.label, told) for row, told in zip(rows, said, strict=True) if row.group == "x"]
    assert found["accuracy", "x"] == pytest.approx(sum(a == b for a, b in some) / len(some))


# --- what training does ------------------------------------------------------------------------------

GROUPS = {"women": ["she", "her aunt"], "men": ["he", "his uncle"]}
TEMPLATES = ["{group} is {attribute}", "is {group} {attribute}", "{attribute} is {group}"]
WORDS = {"good": ["kind", "calm"], "bad": ["rude", "loud"]}


def trained(folder: Path, augment: dict[str, Any] | None) -> Path:
    """A classifier of texts whose class nearly always goes with the group, and in three of four rows
    with what is said."""
    dice = random.Random(2)
    tokenizer, rows = write_tokenizer(folder / "tokenizer", vocab_size=300), []
    for _ in range(400):
        label = dice.choice([*WORDS])
        group = (
            ("women" if label == "good" else "men")
            if dice.random() < 0.94
            else dice.choice([*GROUPS])
        )
        words = WORDS[label] if dice.random() < 0.5 else [*WORDS["good"], *WORDS["bad"]]
        text = dice.choice(TEMPLATES).format(
            group=dice.choice(GROUPS[group]), attribute=dice.choice(words)
        )
        rows.append({"text": text, "label": label, "group": group})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess_rows(
        [str(folder / "rows.jsonl")], folder / "rows", Settings("classification", str(tokenizer))
    )
    (folder / "pairs.txt").write_text("she, he\nher, his\naunt, uncle\n")
    if augment:
        augment["pair_file"] = str(folder / "pairs.txt")
    config = parse_config({
        "run": {"name": "classes", "dir": str(folder)},
        "model": {
            "family": "llama", "vocab_size": 304, "hidden_size": 32, "intermediate_size": 48, "num_layers": 1,
            "num_attention_heads": 4, "max_positions": 64, "task": "classification", "labels": sorted(WORDS),
        },
        "data": {
            "train": [{"path": str(folder / "rows")}], "seq_length": 64, "document_mask": True, "augment": augment,
            "tokenizer": str(tokenizer),
        },
        "train": {"steps": 60, "global_batch_size": 8, "precision": "fp32"},
        "optimizer": {"lr": 1e-2, "schedule": {"warmup_steps": 5}},
        "checkpoint": {"every": 60},
    })  # fmt: skip
    train(config)
    return folder / "classes"


def test_counterfactual_rows_heal_what_was_learned_of_groups(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    templates = tmp_path / "templates.yaml"
    templates.write_text(
        json.dumps({
            "groups": GROUPS, "attributes": WORDS,             "templates": TEMPLATES,
        })
    )  # fmt: skip
    found: dict[bool, dict[tuple[str, str], Any]] = {}
    for is_healed in (False, True):
        folder = tmp_path / str(is_healed)
        folder.mkdir()
        model = trained(folder, {"counterfactual": 0.5} if is_healed else None)
        output = folder / "found.json"
        files = [str(templates), str(folder / "rows.jsonl")]
        assert main(["eval", str(model), "--bias", *files, "--output", str(output)]) == 0
        found[is_healed] = {
            (result["measure"], result["category"]): result
            for test in json.loads(output.read_text())["bias"]["tests"]
            for result in test["results"]
        }
        assert "told, group − others" in output.with_suffix(".html").read_text()
    gap = ("probability, group − others", "good × women")
    assert found[False][gap]["value"] > 0.4
    assert found[False][gap]["low"] > 0
    assert found[False]["changes, across − within", "all"]["value"] > 0.3
    assert found[True]["changes, across − within", "all"]["value"] == pytest.approx(0, abs=0.05)
    assert abs(found[True][gap]["value"]) < 0.1
    # Its rows still fare differently, for what is said of them does; but by half as much.
    told = ("told, group − others", "good × women")
    assert 0 < found[True][told]["value"] < 0.7 < found[False][told]["value"]
    # Of a model of classes nothing else is asked.
    other = tmp_path / "pairs.csv"
    other.write_text("sent_more,sent_less,stereo_antistereo,bias_type\na,b,stereo,x\n")
    capsys.readouterr()
    assert main(["eval", str(tmp_path / "True" / "classes"), "--bias", str(other)]) == 2
    assert "a model of classes does not tell" in capsys.readouterr().err


def test_rows_of_groups_are_read_and_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"text": "she is kind", "label": "good", "group": "women"}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"group": 3}) + "\n")
    [test] = read_tests([path])
    assert (test.form, [each.group for each in test.rows]) == ("rows of groups", ["women", "3"])
    for wrong, why in (
        ({"label": 1}, "needs a text, a label and a group"),
        ({"group": None}, "needs a text"),
    ):
        path.write_text(json.dumps(row) + "\n" + json.dumps(row | wrong) + "\n")
        with pytest.raises(DataError, match=f"line 2: no row with a group: .*{why}"):
            read_tests([path])
