"""Evaluation texts are found in training data exactly where a plain search finds them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lineage_runs import config_of, write_bytes_tokenizer
from local_tasks import write_tasks
from megalite.cli import main
from megalite.data.preprocess import preprocess
from megalite.lineage import contamination, ngrams
from megalite.lineage.contamination import judge
from megalite.lineage.ngrams import Grams, texts_of_rows
from megalite.lineage.run import TracedRun


def test_n_grams_are_those_of_a_plain_search(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 4, 3000)
    rows = [draw.integers(0, 4, 30) for _ in range(20)] + [tokens[77:120], tokens[:3]]
    for bits in (2, 28):  # with a table that hardly sorts anything out, too
        monkeypatch.setattr(ngrams, "BITS", bits)
        for length in (2, 5, 9):
            grams = Grams(rows, length)
            at, number = grams.find(tokens)
            wanted = {
                tuple(row[i : i + length]) for row in rows for i in range(len(row) - length + 1)
            }
            windows = [tuple(tokens[i : i + length]) for i in range(len(tokens) - length + 1)]
            assert at.tolist() == [i for i, window in enumerate(windows) if window in wanted]
            assert [tuple(n) for n in grams.tokens(number)] == [windows[i] for i in at]
    assert [len(x) for x in Grams([], 5).find(tokens)] == [0, 0]


LEAKED = "the answer to question seven is the seventeenth of March"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run to come whose data holds an evaluation text: whole, and across two documents."""
    config = config_of(tmp_path)
    texts = ["nothing of it", f"he said that {LEAKED}, as we know", LEAKED[:25], LEAKED[25:]]
    (tmp_path / "leaks.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts)
    )
    preprocess(
        [str(tmp_path / "leaks.jsonl")],
        tmp_path / "leaks",
        write_bytes_tokenizer(tmp_path / "tokenizer"),
    )
    values = config.model_dump(mode="json")
    values["data"]["train"].append({"path": str(tmp_path / "leaks_text_document"), "name": "leaks"})
    (tmp_path / "planned.yaml").write_text(json.dumps(values))
    return tmp_path


def test_a_planted_text_is_found_where_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": LEAKED},
        {"prompt": LEAKED[:25], "completion": ["what else", LEAKED[26:]]},
        {"text": f"{LEAKED[:20]} but not the rest of it at all"},
        {"prompt": [{"role": "user", "content": "something quite different"}], "completion": "yes, it is"},
        {"text": "short"},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = folder / "found.jsonl"
    arguments = ["--data", str(folder / "rows.jsonl"), "--ngram", "12", "--output", str(out)]
    assert main(["contamination", str(folder / "planned.yaml"), *arguments]) == 0
    told = capsys.readouterr().out
    assert ["rows", "5", "4", "3", "1"] in [line.split() for line in told.splitlines()]
    found = [json.loads(line) for line in out.read_text().splitlines()]
    # A token is a byte here: the text itself, and the space before it.
    assert (found[0]["found"], found[0]["ngrams"], found[0]["longest"]) == (
        len(LEAKED) - 10, len(LEAKED) - 10, len(LEAKED) + 1
    )  # fmt: skip
    assert found[0]["where"].startswith(f"{folder / 'leaks.jsonl'}:2, bytes")
    assert found[0]["training_document"] == 1
    assert found[0]["first_step"] in range(1, 21)
    assert found[1]["longest"] >= 25
    assert found[2]["found"] == 20 + 1 - 12 + 1
    assert found[3] == {
        "task": "rows",
        "document": 3,
        "ngrams": found[3]["ngrams"],
        "found": 0,
        "longest": 0,
    }
    assert found[4]["ngrams"] == 0
    assert f"{len(LEAKED) - 10} of {len(LEAKED) - 10} n-grams" in told


def test_what_lies_across_two_documents_is_no_match(folder: Path) -> None:
    values = json.loads((folder / "planned.yaml").read_text())
    (folder / "leaks.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in (LEAKED[:25], LEAKED[25:]))
    )
    preprocess([str(folder / "leaks.jsonl")], folder / "leaks", folder / "tokenizer")
    (folder / "planned.yaml").write_text(json.dumps(values))
    (folder / "rows.jsonl").write_text(json.dumps({"text": LEAKED}))
    for chunk in (1 << 21, 16):
        contamination.CHUNK, before = chunk, contamination.CHUNK
        try:
            (judged,) = judge(
                TracedRun.open(folder / "planned.yaml"),
                texts_of_rows([str(folder / "rows.jsonl")]),
                12,
            )
        finally:
            contamination.CHUNK = before
        assert (judged.found, judged.longest) == (len(LEAKED) - 2 * 11, len(LEAKED) - 25)


def test_tasks_of_the_harness(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    tasks = write_tasks(folder / "tasks")
    (folder / "leaks.jsonl").write_text(
        json.dumps({"text": "What does the owl say on day 5? nothing at all"})
    )
    preprocess([str(folder / "leaks.jsonl")], folder / "leaks", folder / "tokenizer")
    out = folder / "found.jsonl"
    arguments = [
        "--tasks",
        "sounds,next_word",
        "--include-path",
        str(tasks),
        "--ngram",
        "20",
        "--output",
        str(out),
    ]
    assert main(["contamination", str(folder / "planned.yaml"), *arguments]) == 0
    found = [json.loads(line) for line in out.read_text().splitlines()]
    of_owl = next(each for each in found if each["task"] == "sounds" and each["document"] == 5)
    assert of_owl["found"] == of_owl["ngrams"] > 0
    assert [each["found"] for each in found if each["task"] == "next_word"] == [0] * 9
    capsys.readouterr()


def test_mistakes_are_explained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "rows.jsonl").write_text('{"text": "fine"}\n{"question": "?"}')
    (folder / "fine.jsonl").write_text('{"text": "fine"}')
    for arguments, told in (
        ([], "say what to look for"),
        (["--data", str(folder / "rows.jsonl")], "rows.jsonl:2: no text, or prompt and completion"),
        (
            ["--data", str(folder / "fine.jsonl"), "--output", str(folder / "nowhere" / "x.jsonl")],
            "create it first",
        ),
        (
            ["--data", str(folder / "fine.jsonl"), "--output", str(folder / "fine.jsonl")],
            "name another output",
        ),
    ):
        assert main(["contamination", str(folder / "planned.yaml"), *arguments]) == 2
        assert told in capsys.readouterr().err
