"""The rows of which a model is least certain go to annotation tools, with what it says of them, and
come back as rows."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from encoders import write_words
from local_tasks import write_tokenizer
from megalite.cli import main
from megalite.data.annotation_tasks import spans_of
from megalite.data.annotations import read_annotations, tool_of
from megalite.data.rows import Row
from megalite.infer.classify import Classifier, Question
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.uncertainty import farthest_first, uncertainty_of
from tiny_models import BERT, LLAMA, randomize

transformers = pytest.importorskip("transformers")

TEXTS = [f"w{5 + n} w{n % 7 + 20} w{n % 3 + 60}" for n in range(24)]
LABELS = {
    "single_label": ["low", "middle", "high"], "multi_label": ["a & b", "c", "d"],
    "labels": ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Random models: encoders by their problem, and a decoder that answers."""
    root = tmp_path_factory.mktemp("models")

    def model(problem: str) -> Path:
        folder = root / problem
        if folder.exists():
            return folder
        torch.manual_seed(0)
        if problem == "answers":
            config = transformers.LlamaConfig(
                **LLAMA
                | {
                    "vocab_size": 290,
                    "bos_token_id": 1,
                    "eos_token_id": 0,
                    "initializer_range": 0.3,
                }
            )
            transformers.LlamaForCausalLM(config).save_pretrained(folder)
            return write_tokenizer(folder, begins=True)
        named = dict(enumerate(LABELS[problem]))
        config = transformers.BertConfig(
            **{key: x for key, x in BERT.items() if key != "model_type"}, id2label=named,
            label2id={name: number for number, name in named.items()},
        )  # fmt: skip
        kind = transformers.BertForTokenClassification
        if problem != "labels":
            config.problem_type = f"{problem}_classification"
            kind = transformers.BertForSequenceClassification
        made = kind(config)
        randomize(made)
        made.save_pretrained(folder)
        write_words(folder)
        return folder

    return model


def exported(model: Path, tool: str, folder: Path, rows: Sequence[Any], *more: str) -> Any:
    """What the command writes."""
    given, output = folder / "rows.jsonl", folder / "tasks.json"
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["--input", str(given), "--tool", tool, "--output", str(output), *more]
    assert main(["annotate", str(model), *asked]) == 0
    text = output.read_text()
    return [*map(json.loads, text.splitlines())] if tool == "doccano" else json.loads(text)


# --- what is uncertain -------------------------------------------------------------------------------


def test_measures_are_what_they_are_called() -> None:
    shares = [[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]]
    table = torch.tensor(shares)
    wanted = {
        "entropy": [-sum(p * math.log(p) for p in row if p) / math.log(3) for row in shares],
        "margin": [1 - (0.7 - 0.2), 1.0],
        "confidence": [(1 - 0.7) / (2 / 3), (1 - 0.5) / (2 / 3)],
    }
    for measure, values in wanted.items():
        for row, value in zip(table, values, strict=True):
            assert uncertainty_of(row[None], measure, True) == pytest.approx(value)
        assert uncertainty_of(table, measure, True) == pytest.approx(sum(values) / 2)
        for equal in (torch.full((1, 4), 0.25), torch.full((3, 2), 0.5)):
            assert uncertainty_of(equal, measure, True) == pytest.approx(1)
    # Classes that do not exclude each other: each is true or not.
    each = [-p * math.log2(p) - (1 - p) * math.log2(1 - p) for p in (0.9, 0.4)]
    assert uncertainty_of(torch.tensor([[0.9, 0.4]]), "entropy", False) == pytest.approx(
        sum(each) / 2
    )


def test_the_least_certain_rows_come_first(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = models("single_label")
    verdicts = Classifier.open(model).classify([Question(text) for text in TEXTS])
    best = {text: max(x.scores.values()) for text, x in zip(TEXTS, verdicts, strict=True)}
    rows = [{"text": text} for text in [*TEXTS, TEXTS[0]]]  # one of them twice
    tasks = exported(model, "label-studio", tmp_path, rows, "--by", "confidence", "--count", "5")
    assert [task["data"]["text"] for task in tasks] == sorted(TEXTS, key=lambda text: best[text])[
        :5
    ]
    assert [task["predictions"][0]["score"] for task in tasks] == pytest.approx(
        sorted(best.values())[:5]
    )
    first = TEXTS.index(tasks[0]["data"]["text"]) + 1
    assert tasks[0]["meta"]["origin"] == f"{tmp_path / 'rows.jsonl'}, line {first}"
    assert "5 of 24 rows" in capsys.readouterr().out
    diverse = exported(model, "doccano", tmp_path, rows, "--count", "3", "--diverse")
    usual = exported(model, "doccano", tmp_path, rows, "--count", "15")
    assert diverse[0]["text"] == usual[0]["text"]
    assert {row["text"] for row in diverse} <= {row["text"] for row in usual}
    assert [row["text"] for row in diverse] != [row["text"] for row in usual[:3]]


def test_padding_does_not_make_words_uncertain(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Each row by itself, and all in one batch."""
    model, rows = models("labels"), [{"tokens": ["w7"] * count} for count in (1, 9, 3, 30)]
    tasks = exported(model, "doccano", tmp_path, rows)
    together = {row["text"]: row["uncertainty"] for row in tasks}
    for row in rows:
        [alone] = exported(model, "doccano", tmp_path, [row])
        assert together[alone["text"]] == pytest.approx(alone["uncertainty"], abs=1e-5)
    classifier = Classifier.open(model)
    [(_, logits_TC)] = classifier.logits([classifier.row(Question("w7 w7 w7"))])
    entropies = torch.special.entr(logits_TC[1:4].softmax(-1)).sum(-1) / math.log(5)
    assert together["w7 w7 w7"] == pytest.approx(float(entropies.mean()), abs=1e-5)


def test_vectors_that_are_far_from_each_other_are_chosen() -> None:
    vectors = torch.tensor([[0.0, 0.0], [0.1, 0.0], [5.0, 0.0], [0.0, 9.0], [5.0, 0.1]])
    assert farthest_first(vectors, 3) == [0, 3, 4]
    assert sorted(farthest_first(torch.zeros(3, 2), 5)) == [0, 1, 2]


def test_answers_that_surprise_the_model_come_first(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    model = models("answers")
    prompts = [f"the {name} says" for name in ("cat", "dog", "hen", "cow", "fox")]
    generator = Generator.open(model)

    def surprisal(prompt: str) -> float:
        """The mean over the tokens of the likeliest answer, each from a pass of its own."""
        row, found = generator.prompt_ids(prompt), []
        for _ in range(6):
            logits = next(generator._logits([row]))[-1].log_softmax(-1)
            if int(logits.argmax()) in generator.ends:
                break
            found.append(-float(logits.max()))
            row = [*row, int(logits.argmax())]
        return sum(found) / len(found)

    rows = [{"prompt": prompt} for prompt in prompts]
    records = exported(model, "argilla", tmp_path, rows, "--max-tokens", "6", "--count", "4")
    wanted = sorted(prompts, key=surprisal, reverse=True)[: len(records)]
    assert [record["fields"]["prompt"] for record in records] == wanted
    assert [record["metadata"]["uncertainty"] for record in records] == pytest.approx(
        [surprisal(prompt) for prompt in wanted], abs=1e-4
    )


# --- there and back ----------------------------------------------------------------------------------


def labelled(tool: str, tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the tool exports when an annotator has taken over what the model said."""
    if tool == "label-studio":
        return [
            task | {"id": n, "annotations": [{"completed_by": 1, "result": task["predictions"][0]["result"]}]}
            for n, task in enumerate(tasks)
        ]  # fmt: skip
    if tool == "argilla":
        return [
            task | {"status": "completed", "responses": {
                name: [{"value": said["value"], "user_id": "u1", "status": "submitted"}]
                for name, said in task["suggestions"].items()
            }}
            for task in tasks
        ]  # fmt: skip
    return [task | {"id": n, "Comments": []} for n, task in enumerate(tasks)]


@pytest.mark.parametrize("tool", ["label-studio", "argilla", "doccano"])
@pytest.mark.parametrize("problem", ["single_label", "multi_label", "labels", "answers"])
def test_what_is_labelled_is_read_as_rows(
    models: Callable[[str], Path], tmp_path: Path, tool: str, problem: str
) -> None:
    rows: list[Any] = [{"text": text} for text in TEXTS]
    if problem == "labels":
        rows = [{"tokens": text.split()} for text in TEXTS]
    if problem == "answers":
        rows = [{"prompt": f"the {text} says"} for text in TEXTS[:6]]
    tasks = exported(models(problem), tool, tmp_path, rows, "--count", "6", "--max-tokens", "4")
    export = [Row("annotator.json", n, each) for n, each in enumerate(labelled(tool, tasks), 1)]
    reader = tool_of(export[0])
    assert reader is not None
    format = {"labels": "labels", "answers": "completion"}.get(problem, "classification")
    kind = "multi_label" if problem == "multi_label" else "single_label"
    found = read_annotations(export, reader, format, kind, "vote")
    assert [row.why for row in found.rows] == [""] * len(found.rows)
    if problem == "answers":
        answers = Generator.open(models(problem))
        for row in found.rows:
            request = answers.request(row.values["prompt"], 4, Sampling(temperature=0.0))
            [answer] = answers.answer([request])
            assert row.values["completion"] == answer.text
        assert found.rows
        return
    classifier = Classifier.open(models(problem))
    assert len(found.rows) == 6
    for row in found.rows:
        text = row.values.get("text") or " ".join(row.values["tokens"])
        [verdict] = classifier.classify([Question(text)])
        if problem == "labels":
            spans = spans_of(text.split(), verdict.labels)
            again = spans_of(row.values["tokens"], row.values["labels"])
            assert again == spans
        elif problem == "multi_label":
            assert sorted(row.values["label"]) == sorted(verdict.label)
        else:
            assert row.values["label"] == verdict.label


def test_spans_are_those_of_bio() -> None:
    words = ["Ada", "Lovelace", "met", "Bo", "in", "Rome"]
    labels = ["B-PER", "I-PER", "O", "B-PER", None, "I-LOC"]
    assert spans_of(words, labels) == [(0, 12, "PER"), (17, 19, "PER"), (23, 27, "LOC")]
    assert spans_of(words[:2], ["B-PER", "B-PER"]) == [(0, 3, "PER"), (4, 12, "PER")]
    assert spans_of(words[:2], ["NOUN", "NOUN"]) == [(0, 3, "NOUN"), (4, 12, "NOUN")]
    assert spans_of(words[:3], ["B-PER", "I-PER", "I-PER"]) == [(0, 16, "PER")]
    assert spans_of(words[:3], ["B-PER", "I-LOC", "I-LOC"]) == [(0, 3, "PER"), (4, 16, "LOC")]


def test_a_projects_config_fits_its_tasks(models: Callable[[str], Path], tmp_path: Path) -> None:
    """Label Studio refuses predictions that name what the config has not."""
    rows = [{"text": text, "text_pair": "w9"} for text in TEXTS]
    for problem, tag in (("multi_label", "Choice"), ("labels", "Label")):
        given = rows if problem != "labels" else [{"text": text} for text in TEXTS]
        tasks = exported(models(problem), "label-studio", tmp_path, given)
        config = ElementTree.parse(tmp_path / "tasks.config.xml").getroot()
        names = {each.get("name") for each in config}
        values = {each.get("value") for each in config.iter(tag)}
        shown = {each.get("value") for each in config.iter("Text")}
        for task in tasks:
            assert shown == {f"${name}" for name in task["data"]}
            for result in task["predictions"][0]["result"]:
                assert {result["from_name"], result["to_name"]} <= names
                assert {*result["value"].get("choices", result["value"].get("labels"))} <= values
    assert values == {"PER", "LOC"}


@pytest.mark.parametrize(
    ("problem", "more", "row", "why"),
    [
        ("single_label", ["--count", "0"], {"text": "w7"}, "--count 0 leaves nothing"),
        ("single_label", ["--chat"], {"text": "w7"}, "--chat goes with models that answer"),
        ("answers", ["--by", "margin"], {"prompt": "a"}, "--by and --diverse go with models of classes"),
        ("single_label", [], {"texts": "w7"}, "rows.jsonl, line 1: "),
        ("answers", [], {"text": "w7"}, "line 1: "),
        ("single_label", ["--tool", "doccano"], {"text": "w7", "text_pair": "w8"}, "doccano shows one text"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_refused(
    models: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    problem: str, more: list[str], row: Any, why: str,
) -> None:  # fmt: skip
    given, output = tmp_path / "rows.jsonl", tmp_path / "out.json"
    given.write_text(json.dumps(row) + "\n")
    asked = ["--input", str(given), "--tool", "argilla", "--output", str(output), *more]
    assert main(["annotate", str(models(problem)), *asked]) == 2
    assert why in capsys.readouterr().err
    assert not output.exists()
