"""Classes of texts, of pairs and of words, held against transformers a text at a time, by the verb
and over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from local_server import PATIENCE_S, Local, serving

from encoders import write_words
from megalite.cli import main
from megalite.errors import ConfigError, DataError
from megalite.infer import encode
from megalite.infer.classify import Classifier, Question, TextVerdict, WordsVerdict, read_questions
from megalite.infer.encode import Encoder
from tiny_models import CASES, randomize

transformers = pytest.importorskip("transformers")

NAMES = ["low", "middle", "high"]
TEXTS = ["w7 w8 w9", "w20", "w5 w6 w7 w8 w9 w10 w11", "w30 w31"]
PAIRS = [Question(TEXTS[0], "w40 w41"), Question(TEXTS[1]), Question(TEXTS[2], "w9")]
FAMILIES = ("bert", "roberta", "modernbert", "llama")


def write_model(folder: Path, case: str, kind: str, labels: list[str], **settings: Any) -> Any:
    """A random model with a head of transformers' class `kind`."""
    torch.manual_seed(0)
    named = dict(enumerate(labels))
    config = transformers.AutoConfig.for_model(
        **CASES[case] | settings, id2label=named, label2id={name: n for n, name in named.items()}
    )
    if case == "llama":  # a decoder's text has no token before it, and none behind
        write_words(folder)
        written = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
        (folder / "tokenizer.json").write_text(json.dumps(written))
    else:
        write_words(folder)
    model = getattr(transformers, f"AutoModelFor{kind}").from_config(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    return model


@torch.no_grad()
def logits_of(model: Any, folder: Path, question: Question) -> torch.Tensor:
    """What transformers' model makes of one text, or two: [C], or of each token [T,C]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    encoded = tokenizer.encode(question.text, *filter(None, [question.pair]))
    types = {"token_type_ids": torch.tensor([encoded.type_ids])}
    return model(
        torch.tensor([encoded.ids]), **types if model.config.model_type == "bert" else {}
    ).logits[0]


@pytest.mark.parametrize("case", FAMILIES)
def test_a_texts_class_is_that_of_transformers(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path, case, "SequenceClassification", NAMES)
    monkeypatch.setattr(encode, "BATCH_TOKENS", 20)  # several batches, with padding in some
    questions = [*map(Question, TEXTS), *(PAIRS if case != "llama" else [])]
    for question, found in zip(
        questions, Classifier.open(tmp_path).classify(questions), strict=True
    ):
        shares = logits_of(model, tmp_path, question).softmax(0)
        assert isinstance(found, TextVerdict)
        assert found.label == NAMES[int(shares.argmax())]
        assert [*found.scores] == [NAMES[n] for n in shares.argsort(descending=True)]
        # The project's bound of logits.
        assert [found.scores[name] for name in NAMES] == pytest.approx(shares.tolist(), abs=1e-4)


def test_classes_and_numbers_are_those_of_transformers(tmp_path: Path) -> None:
    for problem, labels in (("multi_label_classification", NAMES), ("regression", ["mean"])):
        folder = tmp_path / problem
        model = write_model(folder, "bert", "SequenceClassification", labels, problem_type=problem)
        for text, found in zip(
            TEXTS, Classifier.open(folder).classify([*map(Question, TEXTS)]), strict=True
        ):
            logits = logits_of(model, folder, Question(text))
            assert isinstance(found, TextVerdict)
            if problem == "regression":
                assert found.label == pytest.approx(logits.item(), abs=1e-4)
                continue
            assert found.label == [name for name, x in zip(NAMES, logits, strict=True) if x > 0]
            assert [found.scores[name] for name in NAMES] == pytest.approx(
                logits.sigmoid().tolist(), abs=1e-4
            )


def test_labels_of_words_are_those_of_their_first_tokens(tmp_path: Path) -> None:
    model = write_model(tmp_path, "roberta", "TokenClassification", NAMES)
    # "w7w8" is two tokens; a word of white space alone would be none, and stands in no text.
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    split = {
        "type": "Split",
        "pattern": {"Regex": "w\\d+"},
        "behavior": "Isolated",
        "invert": False,
    }
    parts = [tokenizer["pre_tokenizer"], split]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": parts}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    questions = [Question("w7w8 w9  w10"), Question("", words=("w5", "w6 w7"))]
    first, second = Classifier.open(tmp_path).classify(questions)
    assert isinstance(first, WordsVerdict)
    assert isinstance(second, WordsVerdict)
    for found, words, at in (
        (first, ["w7w8", "w9", "w10"], [1, 3, 4]), (second, ["w5", "w6 w7"], [1, 2])
    ):  # fmt: skip
        assert found.tokens == words
        shares = logits_of(model, tmp_path, Question(" ".join(words))).softmax(1)[at]
        assert found.labels == [NAMES[n] for n in shares.argmax(1)]
        assert found.scores == pytest.approx(shares.amax(1).tolist(), abs=1e-4)


def test_long_texts_are_cut_and_long_words_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "text", "bert", "SequenceClassification", NAMES)
    classifier = Classifier.open(tmp_path / "text")
    words = " ".join(["w7"] * 62)
    long, whole = classifier.classify([Question(f"{words} w8"), Question(words)])
    # The head's product of two rows may sum up each in another order.
    assert (long.label, long.scores) == (whole.label, pytest.approx(whole.scores, rel=1e-6))
    row = classifier.row(Question(words[: 3 * 30], words), 64)
    assert (len(row.ids), row.second, row.ids[-1]) == (64, 32, 3)
    write_model(tmp_path / "words", "bert", "TokenClassification", NAMES)
    with pytest.raises(ConfigError, match="has 65 tokens, but the model's max_positions = 64"):
        [*Classifier.open(tmp_path / "words").classify([Question(f"{words} w8")])]


def test_the_verb_reads_rows_and_writes_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    write_model(folder, "bert", "SequenceClassification", NAMES)
    (tmp_path / "a.txt").write_text("w7 w8\n")
    rows = [{"text": "w9\u2028w10", "label": "low"}, {"sentence1": "w7 w8 w9", "sentence2": "w40"}]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    (tmp_path / "b.jsonl").write_text("".join(lines))
    inputs = ["--input", str(tmp_path / "a.txt"), "--input", str(tmp_path / "b.jsonl")]
    assert main(["classify", str(folder), "w5", "--pair", "w6", *inputs, "--json"]) == 0
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    texts = [(row["text"], row.get("text_pair")) for row in told]
    assert texts == [
        ("w5", "w6"), ("w7 w8", None), ("w9\u2028w10", None), ("w7 w8 w9", "w40")
    ]  # fmt: skip
    assert all(row["label"] == max(row["scores"], key=row["scores"].get) for row in told)
    assert main(["classify", str(folder), "w5", "--top-k", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "w5"
    for bad in ('{"text": 3}', "[]", '{"tokens": ["w5", ""]}', '{"other": "x"}'):
        (tmp_path / "b.jsonl").write_text(f'{{"text": "w5"}}\n{bad}\n')
        with pytest.raises(DataError, match=r"b\.jsonl, line 2: .* has neither a 'text' nor"):
            read_questions([tmp_path / "b.jsonl"])
    for arguments, words in (
        (["w5", "w6", "--pair", "w7"], "--pair goes with one TEXT"), ([], "give a TEXT, or --input FILE"),
    ):  # fmt: skip
        assert main(["classify", str(folder), *arguments]) == 2
        assert words in capsys.readouterr().err
    config = transformers.AutoConfig.for_model(**CASES["bert"])
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "masked")
    assert main(["classify", str(tmp_path / "masked"), "w5"]) == 2
    assert "model.task: masked, which tells no classes" in capsys.readouterr().err


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Local]:
    folder = tmp_path_factory.mktemp("served")
    write_model(folder, "bert", "SequenceClassification", NAMES)
    with serving(Encoder.open(folder), folder) as local:
        local.folder = folder  # type: ignore[attr-defined]
        yield local


def post(local: Local, **body: Any) -> httpx.Response:
    return httpx.post(f"{local.url}/v1/classify", json=body, verify=False, timeout=PATIENCE_S)


def test_classes_are_served(local: Local) -> None:
    wanted = [*Classifier.open(local.folder).classify(PAIRS)]  # type: ignore[attr-defined]
    inputs: list[Any] = [{"text": q.text, "text_pair": q.pair} for q in PAIRS]
    answer = post(local, model="tiny", input=[*inputs[:1], TEXTS[1], *inputs[2:]]).json()
    assert answer["classes"] == NAMES
    assert [each["label"] for each in answer["data"]] == [verdict.label for verdict in wanted]
    for each, verdict in zip(answer["data"], wanted, strict=True):
        assert isinstance(verdict, TextVerdict)
        assert each["probs"] == pytest.approx([verdict.scores[name] for name in NAMES], abs=1e-6)
    assert answer["usage"]["total_tokens"] == 8 + 3 + 11
    long = "w7 " * 100
    assert post(local, input=long, truncate_prompt_tokens=9).json()["usage"]["total_tokens"] == 9
    for body, status, words in (
        ({"input": long}, 400, "has 102 tokens, but the model's max_positions = 64"),
        ({"input": []}, 400, "input: must be a text, or a list of texts"),
        ({"input": [{"text": "w7", "tokens": ["w7"]}]}, 400, "input"),
        ({"input": "w7", "model": "other"}, 404, "does not exist"),
    ):
        refused = post(local, **body)
        assert (refused.status_code, words in refused.json()["error"]["message"]) == (status, True)


def test_a_decoder_and_words_are_served(tmp_path: Path) -> None:
    write_model(tmp_path / "llama", "llama", "SequenceClassification", NAMES)
    with serving(Classifier.open(tmp_path / "llama"), tmp_path) as local:
        [told] = Classifier.open(tmp_path / "llama").classify([Question(TEXTS[0])])
        assert post(local, input=TEXTS[0]).json()["data"][0]["label"] == told[0]
    write_model(tmp_path / "words", "bert", "TokenClassification", NAMES)
    with serving(Encoder.open(tmp_path / "words"), tmp_path) as local:
        [words] = Classifier.open(tmp_path / "words").classify([Question("w7 w8")])
        found = post(local, input=[{"tokens": ["w7", "w8"]}]).json()["data"][0]
    assert (found["tokens"], found["labels"]) == (["w7", "w8"], words[1])
