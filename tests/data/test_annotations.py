"""Exports of annotation tools become rows, and their annotators' agreement is told."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chats import write_tokenizer
from megalite.data.agreement import cohen, describe, fleiss, krippendorff
from megalite.data.annotations import read_annotations, tool_of
from megalite.data.formats import Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess_rows import preprocess_rows
from megalite.data.rows import Row
from megalite.errors import DataError


def rows_of(
    exported: Sequence[dict[str, Any]],
    format: str,
    rule: Any = "vote",
    problem: str = "single_label",
    paths: Sequence[str] = (),
) -> tuple[list[Any], Any]:
    """Rows of an export, the reason instead of what cannot be read; and all that came of it."""
    rows = [
        Row(paths[number] if paths else "export.json", number + 1, values)
        for number, values in enumerate(exported)
    ]
    tool = tool_of(rows[0])
    assert tool is not None
    found = read_annotations(rows, tool, format, problem, rule)
    return [row.why or row.values for row in found.rows], found


def task(number: int, data: dict[str, Any], *said: Any, **more: Any) -> dict[str, Any]:
    """A task of Label Studio's JSON, with the results of annotators 1, 2, …"""
    annotations = [
        {
            "id": 100 + by,
            "completed_by": by,
            "was_cancelled": False,
            "result": [result] if result else [],
        }
        for by, result in enumerate(said, 1)
    ]
    return {"id": number, "data": data, "annotations": annotations, "predictions": [], **more}


def choices(*names: str) -> dict[str, Any]:
    return {
        "type": "choices",
        "from_name": "kind",
        "to_name": "text",
        "value": {"choices": [*names]},
    }


def test_classes_are_voted_on_and_ties_are_left_out() -> None:
    good, bad = choices("good"), choices("bad")
    exported = [
        task(1, {"text": "a"}, good, good, bad),
        task(2, {"text": "b"}, good, bad),
        task(3, {"text": "c"}, bad),
        task(4, {"text": "d"}, None),
    ]
    exported[2]["annotations"].append({"completed_by": 2, "was_cancelled": True, "result": [good]})
    rows, found = rows_of(exported, "classification")
    assert rows == [{"text": "a", "label": "good"}, {"text": "c", "label": "bad"}]
    assert found.counts == {
        "items on which annotators disagree": 1, "items that an annotator has not judged": 1
    }  # fmt: skip
    rows, found = rows_of(exported, "classification", "drop")
    assert rows == [{"text": "c", "label": "bad"}]
    assert found.agreement["cohen_kappa 1, 2"] == cohen(["good", "good"], ["good", "bad"])


def test_items_of_two_projects_that_count_alike_stay_apart() -> None:
    good, bad = choices("good"), choices("bad")
    exported = [
        task(1, {"text": "a"}, good),
        task(1, {"text": "b"}, bad),
        task(1, {"text": "a"}, bad, good),
    ]
    rows, _ = rows_of(exported, "classification", paths=["one.json", "two.json", "one.json"])
    assert [row["text"] for row in rows] == ["b"], "of a, two say different things"
    records = [
        {"fields": {"text": text}, "responses": {"label": [{"value": "x", "user_id": "u"}]}}
        for text in "ab"
    ]
    rows, _ = rows_of(records, "classification", paths=["one.json", "two.json"])
    assert rows == [{"text": text, "label": "x"} for text in "ab"]


def test_other_problems_than_one_class() -> None:
    several = [task(1, {"text": "a"}, choices("x", "y"), choices("y", "x"))]
    assert rows_of(several, "classification", problem="multi_label")[0] == [
        {"text": "a", "label": ["x", "y"]}
    ]
    assert "several classes" in rows_of(several, "classification")[0][0]
    rated = [
        task(1, {"text": "a"}, *({"type": "rating", "value": {"rating": x}} for x in (2, 3))),
        task(2, {"text": "b"}, *({"type": "rating", "value": {"rating": x}} for x in (5, 5))),
    ]
    rows, found = rows_of(rated, "classification", problem="regression")
    assert [row["label"] for row in rows] == [2.5, 5.0]
    # Of labels 2, 3, 5, 5: observed (1 + 1) / 4, expected (1·2 + 9·4 + 4·4) / 12.
    assert found.agreement == {"krippendorff_alpha": pytest.approx(1 - 0.5 / (54 / 12))}


SPANS = {"text": "Ada Lovelace wrote to Babbage.", "label": [[0, 12, "PER"], [22, 29, "PER"]]}
WORDS = ["Ada", "Lovelace", "wrote", "to", "Babbage", "."]
TAGS = ["B-PER", "I-PER", "O", "O", "B-PER", "O"]


def spans_of(tool: str) -> list[dict[str, Any]]:
    """The same spans as each tool spells them."""
    named = [{"start": a, "end": b, "label": name} for a, b, name in SPANS["label"]]  # type: ignore[misc]
    if tool == "label studio":
        found = task(1, {"text": SPANS["text"]}, None)
        found["annotations"][0]["result"] = [
            {
                "type": "labels",
                "value": {**{k: x[k] for k in ("start", "end")}, "labels": [x["label"]]},
            }
            for x in named
        ]
        return [found]
    if tool == "label studio min":
        labels = [{**{k: x[k] for k in ("start", "end")}, "labels": [x["label"]]} for x in named]
        return [
            {"id": 1, "text": SPANS["text"], "label": labels, "annotator": 1, "annotation_id": 3}
        ]
    if tool == "argilla":
        responses = {"who": [{"value": named, "user_id": "u1", "status": "submitted"}]}
        return [
            {
                "id": "r",
                "fields": {"text": SPANS["text"]},
                "responses": responses,
                "suggestions": {},
            }
        ]
    if tool == "argilla flat":
        flat = {
            "who.responses": [named],
            "who.responses.users": ["u1"],
            "who.responses.status": ["submitted"],
        }
        return [
            {"id": "r", "status": "completed", "_server_id": "s", "text": SPANS["text"], **flat}
        ]
    if tool == "doccano":
        return [{"id": 4, **SPANS, "Comments": []}]
    entities = [
        {"id": n, "start_offset": a, "end_offset": b, "label": name}
        for n, (a, b, name) in enumerate(SPANS["label"])  # type: ignore[misc]
    ]
    return [{"id": 4, "text": SPANS["text"], "entities": entities, "relations": [], "Comments": []}]


@pytest.mark.parametrize(
    "tool",
    ["label studio", "label studio min", "argilla", "argilla flat", "doccano", "doccano relations"],
)
def test_spans_by_characters_become_labels_of_words(tool: str) -> None:
    assert rows_of(spans_of(tool), "labels")[0] == [{"tokens": WORDS, "labels": TAGS}]


def test_doccano_has_a_file_for_each_annotator() -> None:
    paths = ["out/ada.jsonl", "out/bob.jsonl", "out/cid.jsonl"]
    exported = [{"id": 4, **SPANS, "Comments": []} for _ in paths]
    exported[2] = exported[2] | {"label": [[0, 12, "PER"], [22, 29, "LOC"]]}
    rows, found = rows_of(exported, "labels", paths=paths)
    assert rows == [{"tokens": WORDS, "labels": TAGS}]
    assert found.agreement["cohen_kappa ada, bob"] == 1.0
    assert found.agreement["cohen_kappa ada, cid"] < 1.0
    # Without a majority for the whole, spans that most have marked stay.
    exported[1] = exported[1] | {"label": [[0, 12, "PER"]]}
    rows, _ = rows_of(exported, "labels", paths=paths)
    assert rows == [{"tokens": WORDS, "labels": ["B-PER", "I-PER", "O", "O", "O", "O"]}]
    overlapping = [{"id": 1, "text": "abc", "label": [[0, 2, "X"], [1, 3, "Y"]], "Comments": []}]
    assert "overlaps another" in rows_of(overlapping, "labels")[0][0]


ASKED = {"prompt": "say it", "answer1": "no", "answer2": "yes"}
PREFERRED = {"prompt": "say it", "chosen": "yes", "rejected": "no"}


def test_rankings_and_corrections() -> None:
    right = {"type": "pairwise", "to_name": ["answer1", "answer2"], "value": {"selected": "right"}}
    assert rows_of([task(1, ASKED, right)], "preference")[0] == [PREFERRED]
    unnamed = [task(1, ASKED, right | {"to_name": ["txt-1", "txt-2"]})]
    assert rows_of(unnamed, "preference")[0] == [PREFERRED]
    items = [{"id": "i1", "body": "no"}, {"id": "i2", "body": "yes"}]
    ranker = {"type": "ranker", "value": {"ranker": {"rank": ["i2", "i1"]}}}
    ranked = [task(1, {"prompt": "say it", "items": items}, ranker)]
    assert rows_of(ranked, "preference")[0] == [PREFERRED]
    for answer in (
        [{"value": "answer2", "rank": 1}, {"value": "answer1", "rank": 2}],
        [{"value": "answer1", "rank": 2}, {"value": "answer2", "rank": 1}],
    ):
        responses = {"best": [{"value": answer, "user_id": "u", "status": "submitted"}]}
        exported = [{"id": 1, "fields": ASKED, "responses": responses}]
        assert rows_of(exported, "preference")[0] == [PREFERRED]
    tied = {
        "best": [
            {"value": [{"value": n, "rank": 1} for n in ("answer1", "answer2")], "user_id": "u"}
        ]
    }
    assert rows_of([{"id": 1, "fields": ASKED, "responses": tied}], "preference")[0] == []
    better = {"type": "textarea", "value": {"text": ["better"]}}
    assert rows_of([task(1, ASKED, better)], "completion")[0] == [
        {"prompt": "say it", "completion": "better"}
    ]
    assert rows_of([{"id": 1, "text": "ja", "label": ["yes"], "Comments": []}], "seq2seq")[0] == [
        {"source": "ja", "target": "yes"}
    ]
    draft = {"fix": [{"value": "x", "user_id": "u", "status": "draft"}]}
    assert rows_of([{"id": 1, "fields": ASKED, "responses": draft}], "completion")[0] == []


def test_an_export_becomes_token_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    kinds = [("good", "good"), ("bad", "bad"), ("good", "bad"), ("bad", "bad")]
    exported = [task(n, {"text": f"text {n}"}, *map(choices, said)) for n, said in enumerate(kinds)]
    (tmp_path / "export.json").write_text(json.dumps(exported, indent=1))
    result = preprocess_rows(
        [str(tmp_path / "export.json")],
        tmp_path / "rows",
        Settings("classification", str(tokenizer)),
    )
    assert (result.num_documents, result.settings["labels"]) == (3, ["bad", "good"])
    assert "passed over: items on which annotators disagree (1)" in str(result)
    assert "agreement: cohen_kappa 1, 2 = 0.500" in str(result)
    note = json.loads((tmp_path / "rows.json").read_text())
    assert note["agreement"]["cohen_kappa 1, 2"] == 0.5
    dataset = IndexedDataset(tmp_path / "rows")
    assert dataset.mask is not None
    assert [int(dataset.mask[dataset.document_start(d)]) for d in range(3)] == [2, 1, 1]
    exported[0]["annotations"] = [{"completed_by": 1}]
    (tmp_path / "export.json").write_text(json.dumps(exported))
    with pytest.raises(DataError, match="not what Label Studio exports: 'result'"):
        preprocess_rows(
            [str(tmp_path / "export.json")],
            tmp_path / "rows",
            Settings("classification", str(tokenizer)),
        )


# The example of Krippendorff 2011, section C: four observers of twelve units, 0 for none.
OBSERVED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, 0, 0, 0], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, 0, 3], [0, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, 0],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, 0],
])  # fmt: skip


def test_measures_are_those_of_the_papers() -> None:
    units = [[int(x) for x in unit if x] for unit in OBSERVED.T]
    assert krippendorff(units) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(units, interval=True) == pytest.approx(0.849, abs=5e-4)
    # Fleiss 1971's kind of table, ten items of fourteen annotators.
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1], [7, 7, 0, 0, 0],
        [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    assert fleiss(table) == pytest.approx(0.210, abs=5e-4)
    # 20 and 15 agreed of 50; by chance half of them would.
    one, other = ["y"] * 25 + ["n"] * 25, ["y"] * 20 + ["n"] * 5 + ["y"] * 10 + ["n"] * 15
    assert cohen(one, other) == pytest.approx(0.4)
    with pytest.raises(ValueError, match="the same number of annotators"):
        fleiss([[2, 0], [1, 0]])


def test_measures_of_random_labels() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.integers(0, 4, (2, 300)).tolist()
    mixed = [a if draw.random() < 0.5 else b for a, b in zip(one, other, strict=True)]
    metrics = pytest.importorskip("sklearn.metrics")
    for pair in ((one, other), (one, mixed), (one, one)):
        assert cohen(*pair) == pytest.approx(metrics.cohen_kappa_score(*pair))
    # Of two annotators and many items all measures come to nearly the same.
    found = describe([{"a": a, "b": b} for a, b in zip(one, mixed, strict=True)])
    assert [*found] == ["krippendorff_alpha", "fleiss_kappa_of_2", "cohen_kappa a, b"]
    assert max(found.values()) - min(found.values()) < 0.005
    assert math.isnan(cohen(["y"] * 3, ["y"] * 3))
    assert describe([{"a": 1}]) == {}
