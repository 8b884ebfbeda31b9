"""Synthetic rows: the same ones however often a run is killed, none of what they must not be, and
rows that finetuning opens."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("datatrove")
pytest.importorskip("httpx")

from chats import write_rows, write_tokenizer
from megalite.cli import main
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError, DataError, Unreachable
from megalite.synthesize import endpoint as requests
from megalite.synthesize import run
from megalite.synthesize.answers import Answer, Answers
from megalite.synthesize.config import RecipeConfig, load_recipe
from megalite.synthesize.run import synthesize
from megalite.utils.locks import alone_in
from megalite.utils.resources import configs_dir
from stub_endpoint import Body, Failing, draw, stub_endpoint, words

PATIENCE_S = 60.0


def asked(body: Body) -> str:
    return body["messages"][-1]["content"]


def sentence(number: int, count: int = 20) -> str:
    """Words that follow from a number."""
    return words({"number": number}, count)


def recipe(
    folder: Path, url: str, task: dict[str, Any], rows: int = 8, **more: Any
) -> RecipeConfig:
    values = {
        "output": str(folder / "out"),
        "rows": rows,
        "task": task,
        "endpoint": {"base_url": url, "model": "m"},
    }
    values["endpoint"] |= more.pop("endpoint", {})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values | more))
    return load_recipe(folder / "recipe.yaml")


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def killed(made: RecipeConfig, num_answers: int) -> None:
    """A process that makes the rows is killed once there are so many answers, while others are
    under way."""

    def work() -> None:
        before = Answers.add

        def add(self: Answers, key: str, answer: Any) -> None:
            before(self, key, answer)
            if (made.output / "answers.jsonl").read_bytes().count(b"\n") == num_answers:
                os.kill(os.getpid(), signal.SIGKILL)

        Answers.add = add  # type: ignore[method-assign]  # in this process alone
        synthesize(made)

    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    process.join(PATIENCE_S)
    assert process.exitcode == -signal.SIGKILL
    assert not (made.output / "rows.jsonl").exists()


def check_kills(folder: Path, url: str, task: dict[str, Any], rows: int, **more: Any) -> list[Any]:
    """Killed twice, one time within a line of the file of answers, and once with another number of
    requests at a time: the same files as those of a run that nobody has disturbed. Return the rows."""
    (folder / "one").mkdir()
    (folder / "other").mkdir()
    whole = recipe(folder / "one", url, task, rows, **more)
    synthesize(whole)
    broken = recipe(folder / "other", url, task, rows, **more)
    count = len(lines_of(whole.output / "answers.jsonl"))
    killed(broken, count // 3)
    with open(broken.output / "answers.jsonl", "ab") as file:
        file.write(b'{"key": "00')
    few = {"concurrency": 2, **more.pop("endpoint", {})}
    killed(recipe(folder / "other", url, task, rows, endpoint=few, **more), 2 * count // 3)
    synthesize(broken)
    for name in ("rows.jsonl", "rejected.jsonl"):
        assert (broken.output / name).read_bytes() == (whole.output / name).read_bytes()
    answers = [
        {line["key"]: line["text"] for line in lines_of(made.output / "answers.jsonl")}
        for made in (whole, broken)
    ]
    assert answers[0] == answers[1]
    assert not list(broken.output.glob(".*.tmp"))
    found = lines_of(whole.output / "rows.jsonl")
    assert len(found) == rows
    return found


def test_killed_twice_it_comes_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instructions depend on the rows before them, of which some are refused."""
    monkeypatch.setattr(run, "LOOK_BACK", 8)
    seeds = write_rows(tmp_path / "seeds.jsonl", [{"instruction": sentence(n)} for n in range(9)])
    task = {"name": "instructions", "seeds": [str(seeds)], "examples": 4}

    def answer(body: Body) -> str:
        kind = draw(body) % 8
        if not asked(body).startswith("Here are some tasks"):
            return "" if kind == 0 else words(body, 6)
        return f"1. {sentence(70, 12) if kind < 3 else words(body, 12)}"

    with stub_endpoint(answer, delay_s=0.001) as stub:
        rows = check_kills(tmp_path, stub.url, task, 40)
        assert stub.most_under_way <= 8
        told = json.loads((tmp_path / "other" / "out" / "report.json").read_text())
        # What was under way when it was killed is asked again, and nothing else.
        again = len(stub.bodies) - 2 * told["spent"]["endpoint"]["requests"]
        assert 0 <= again <= 8 + 2
    assert told["rejected"].keys() == {"no answer", "nearly a text of rows"}
    made = [row["messages"][0]["content"] for row in rows]
    shown = [asked(body) for body in stub.bodies if asked(body).startswith("Here are some tasks")]
    # Some prompts show what earlier rows have made, and the seeds come in ever new choices.
    assert any(text in prompt for text in made for prompt in shown)
    assert len(set(shown)) > 30


class Wandering:
    """A `Predictor` of words: what follows a token is drawn by it and by the place."""

    num_slots, capacity, turning_points, device = 4, 4096, range(0), torch.device("cpu")

    def __init__(self, speaking: list[int], vocab_size: int) -> None:
        self.speaking, self.vocab_size = speaking, vocab_size

    def predict(self, tokens_BT: torch.Tensor, places: Any, last_B: torch.Tensor) -> torch.Tensor:
        logits_BV = torch.full((len(tokens_BT), self.vocab_size), -1e9)
        for row, last in enumerate(last_B.tolist()):
            place, token = int(places.position_BT[row, last]), int(tokens_BT[row, last])
            random = torch.Generator().manual_seed(1000 * place + token)
            logits_BV[row, self.speaking] = 2 * torch.randn(len(self.speaking), generator=random)
        return logits_BV


def test_our_own_server_is_an_endpoint(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """--whole: 200 rows of a random Llama."""
    pytest.importorskip("fastapi")
    from local_server import serving

    from megalite.data.tokenizer import load_tokenizer
    from megalite.infer.cache import CachedModel
    from megalite.infer.generate import Generator, load_model
    from megalite.infer.sampling import Sampling

    whole = pytestconfig.getoption("--whole")
    folder = write_tokenizer(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    vocabulary, end = tokenizer.vocabulary(), tokenizer.eod_id
    assert end is not None
    plain = [i for name, i in vocabulary.items() if re.fullmatch("Ġ?[a-z]+", name)]
    model: Any = Wandering([*plain, end], len(vocabulary))
    if whole:
        from tiny_models import save_model

        sizes = {
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
        }
        llama = {"model_type": "llama", "vocab_size": 400, "max_position_embeddings": 4096, **sizes}
        model = CachedModel(load_model(save_model(folder, llama)), 8)
    texts = [{"text": sentence(n), "label": "ab"[n % 2]} for n in range(30)]
    data = write_rows(tmp_path / "rows.jsonl", texts)
    task = {"name": "paraphrases", "data": [str(data)], "variants": 40}
    speaker = Generator(model, tokenizer, frozenset({end}), Sampling(temperature=1), folder)
    with serving(speaker, tmp_path) as local:
        options = {
            "endpoint": {"max_tokens": 200 if whole else 60, "temperature": 1.0, "model": "tiny"}
        }
        rows = check_kills(tmp_path, f"{local.url}/v1", task, 200 if whole else 12, **options)
    assert {row["label"] for row in rows} == {"a", "b"}
    assert len({row["text"] for row in rows}) == len(rows)


def planted(body: Body) -> str:
    """A question about each passage, some of which repeat what they must not: the passage says
    what."""
    number = int(re.findall(r"Passage (\d+):", asked(body))[0])
    question, answer = sentence(1000 + number, 12), sentence(2000 + number, 6)
    if number < 20:
        question = (
            sentence(number).upper() + "!",  # a text of train
            sentence(number).replace(" ", "  ") + " indeed",  # nearly so
            sentence(100 + number),  # one of test
            "So tell me: " + sentence(200 + number) + ", please",  # an evaluation text in it
            question + " " + " ".join(sentence(300 + number, 14).split()[:13]),  # 13 words of one
        )[number % 5]
    elif number < 24:
        answer = sentence(400 + number, 7) + " and more"  # a short evaluation text, as a whole
    elif number < 28:
        question = sentence(24, 12) + " again" * (number - 24)  # a row that there is
    elif number < 30:
        answer = "word " * 100
    elif number < 32:
        return "No."
    elif number < 34:
        return json.dumps({"question": question})
    elif number < 36:
        return json.dumps({"question": question, "answer": answer}) + "\0"
    return f"Here you are:\n```json\n{json.dumps({'question': question, 'answer': answer})}\n```"


def test_planted_duplicates_and_contaminations_are_refused(tmp_path: Path) -> None:
    documents = write_rows(
        tmp_path / "documents.jsonl",
        [{"text": f"Passage {n}: {sentence(n, 30)}"} for n in range(60)],
    )
    train = [{"prompt": sentence(n), "completion": "It is so."} for n in range(50)]
    test = [{"messages": [{"role": "user", "content": sentence(100 + n)}]} for n in range(50)]
    rows = [{"text": sentence(200 + n)} for n in range(50)]
    rows += [{"text": sentence(300 + n, 14)} for n in range(50)]
    for n in range(50):
        prompt, completion = sentence(400 + n, 4), sentence(400 + n, 7)[len(sentence(400 + n, 4)) :]
        rows.append({"prompt": prompt, "completion": completion.strip()})
    checks = {
        "train": [str(write_rows(tmp_path / "train.jsonl", train))],
        "test": [str(write_rows(tmp_path / "test.jsonl", test))],
        "contamination": {"data": [str(write_rows(tmp_path / "evaluation.jsonl", rows))]},
        "length": {"max_chars": 300},
    }
    task = {"name": "questions", "documents": [str(documents)]}
    with stub_endpoint(planted) as stub:
        made = recipe(tmp_path, stub.url, task, rows=60, checks=checks)
        report = synthesize(made)
    assert report["stopped"] == "all inputs are used up"
    assert report["rejected"] == {
        "nearly a text of train": 8, "nearly a text of test": 4, "contaminated by an evaluation text": 12,
        "nearly a text of rows": 3, "over 300 characters": 2, "no JSON object": 2, "no answer": 2,
        "cut off at max_tokens": 2,
    }  # fmt: skip
    rejected = lines_of(made.output / "rejected.jsonl")
    found = {int(line["metadata"]["source"].rpartition(":")[2]) - 1: line for line in rejected}
    for number in range(20):
        file = ("train", "train", "test", "evaluation", "evaluation")[number % 5]
        assert file in found[number]["detail"]
    assert found[3]["detail"] == "evaluation 3"
    assert found[2]["detail"] == f"test {tmp_path}/test.jsonl:3"
    kept = lines_of(made.output / "rows.jsonl")
    numbers = {int(row["metadata"]["source"].rpartition(":")[2]) - 1 for row in kept}
    # One of the four that are alike, whichever comes first, and all behind the planted ones.
    assert numbers - {*range(24, 28)} == {*range(36, 60)}
    assert len(numbers) == 25


def test_rows_in_another_language_are_refused(tmp_path: Path) -> None:
    english = (
        "The weather was fine, and so we all went down to the river before the others had finished."
    )
    german = "Das Wetter war schön, und so gingen wir alle zum Fluss hinunter, bevor die anderen fertig waren."
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"Passage {n}"} for n in range(2)])
    with stub_endpoint(lambda body: german if "Passage 0" in asked(body) else english) as stub:
        task = {"name": "paraphrases", "data": [str(data)]}
        report = synthesize(
            recipe(tmp_path, stub.url, task, 2, checks={"language": {"keep": ["de"]}})
        )
    assert report["rejected"] == {"language en": 1}
    assert lines_of(tmp_path / "out" / "rows.jsonl")[0]["text"] == german


def speaking(body: Body) -> str:
    """Answers to the prompts of all tasks."""
    text = asked(body)
    if "Reply with A or B" in text:
        first, second = re.findall(r"Answer [AB]:\n(.*)\n", text)
        return "A" if first > second else "B\nA is shorter."
    if "Reply with nothing but a JSON object" in text:
        passage = text.split("\n\n")[1]
        answer = passage[10:24] if "copied exactly" in text else words(body, 4)
        return json.dumps({"question": words(body, 9), "answer": answer})
    return words(body, 12)


TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "instructions": ("chat", {}),
    "instructions completion": ("completion", {"format": "completion"}),
    "questions": ("chat", {"with_passage": True}),
    "questions completion": ("completion", {"format": "completion"}),
    "questions answers": ("answers", {"format": "answers"}),
    "questions pairs": ("pairs", {"format": "pairs"}),
    "paraphrases": ("classification", {}),
    "back_translation": ("seq2seq", {"field": "input"}),
    "preferences": ("preference", {}),
    "preferences texts": ("preference", {"messages": False}),
}


@pytest.mark.parametrize("name", TASKS)
def test_finetuning_opens_the_rows(name: str, tmp_path: Path) -> None:
    format, more = TASKS[name]
    texts = [
        {"text": sentence(n), "prompt": sentence(n), "input": sentence(n), "target": "yes", "label": "ab"[n % 2]}
        for n in range(6)
    ]  # fmt: skip
    if format == "seq2seq":
        texts = [{name: row[name] for name in ("input", "target")} for row in texts]
    data = str(write_rows(tmp_path / "data.jsonl", texts))
    kind = name.split()[0]
    where = {"instructions": "seeds", "questions": "documents"}.get(kind, "data")
    with stub_endpoint(speaking) as stub:
        made = recipe(tmp_path, stub.url, {"name": kind, where: [data], **more}, rows=4)
        report = synthesize(made)
    assert (report["rows"], report["stopped"]) == (4, "")
    rows = lines_of(made.output / "rows.jsonl")
    for slot, row in enumerate(rows):
        told = row["metadata"]
        assert (told["task"], told["model"], told["slot"]) == (kind, "m", slot)
        assert re.fullmatch(rf"{re.escape(data)}:[1-6]|", told["source"])
    assert len({row["metadata"]["template"] for row in rows}) == 1
    assert len({row["metadata"]["hash"] for row in rows}) == 4
    tokenizer = str(write_tokenizer(tmp_path / "model"))
    inputs = [str(made.output / "rows.jsonl")]
    settings = Settings(format, tokenizer)  # type: ignore[arg-type]
    result = preprocess_rows(inputs, tmp_path / "tokens", settings)
    assert result.num_documents == (8 if format in ("preference", "pairs") else 4)
    ignored = {"classification": {"field 'prompt'", "field 'input'", "field 'target'"}}
    assert result.settings["passed_over"].keys() == ignored.get(format, set())


def test_a_judge_is_asked_in_both_orders(tmp_path: Path) -> None:
    """Its own endpoint, which sees no temperature but its own."""
    data = write_rows(tmp_path / "data.jsonl", [{"prompt": f"Prompt {n}"} for n in range(12)])

    def verdict(body: Body) -> str:
        assert body["model"] == "judge"
        number = int(re.findall(r"Prompt (\d+)", asked(body))[0])
        return ("A", speaking(body), "Neither.")[number % 3]

    with stub_endpoint(speaking) as stub, stub_endpoint(verdict) as judge:
        task = {"name": "preferences", "data": [str(data)], "messages": False}
        of_judge = {
            "base_url": judge.url,
            "model": "judge",
            "temperature": 0.5,
            "concurrency": 1,
            "price": {"input": 1, "output": 1},
        }
        made = recipe(tmp_path, stub.url, task, rows=12, judge=of_judge)
        report = synthesize(made)
    assert report["rejected"] == {"the judge prefers a place, not an answer": 4, "no verdict": 4}
    for row in lines_of(made.output / "rows.jsonl"):
        assert row["chosen"] > row["rejected"]
        assert row["metadata"]["judge"] == "judge"
    assert {body["temperature"] for body in stub.bodies} == {0.8}
    assert {body["temperature"] for body in judge.bodies} == {0.5}
    assert judge.most_under_way == 1
    spent = report["spent"]
    assert (spent["endpoint"]["requests"], spent["judge"]["requests"]) == (24, 20)
    tokens = spent["judge"]["prompt_tokens"] + spent["judge"]["completion_tokens"]
    assert spent["judge"]["cost"] == pytest.approx(tokens / 1e6)


def test_what_fails_for_a_while_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the key is sent, and nowhere else."""
    monkeypatch.setattr(requests, "BACK_OFF_S", 0.001)
    monkeypatch.setenv("MY_KEY", "sk-very-secret-0123456789")
    seen: dict[str, int] = {}

    def answer(body: Body) -> str:
        tried = seen[asked(body)] = seen.get(asked(body), 0) + 1
        if tried == 1:
            raise Failing(503)
        if tried == 2:
            raise Failing(429, "slowly", Retry_After="0.01" if len(seen) % 2 else "nan")
        if tried == 3:
            raise Failing(200, "no gzip", Content_Encoding="gzip")
        return f"<think>\nwell, {words(body, 30)}</think>\n\n{words(body, 9)}"

    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(4)])
    task = {"name": "paraphrases", "data": [str(data)]}
    with stub_endpoint(answer) as stub:
        made = recipe(
            tmp_path, stub.url, task, rows=4,
            endpoint={"key_from": "MY_KEY", "top_p": 0.9, "stop": ["###"], "system": "Be brief."},
        )  # fmt: skip
        report = synthesize(made)
    assert (report["rows"], report["spent"]["endpoint"]["tries"]) == (4, 16)
    assert set(stub.authorization) == {"Bearer sk-very-secret-0123456789"}
    for body in stub.bodies:
        assert (body["top_p"], body["stop"], body["model"]) == (0.9, ["###"], "m")
        assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    # What it thought is no part of its answer.
    assert all(len(row["text"].split()) == 9 for row in lines_of(made.output / "rows.jsonl"))
    for path in made.output.iterdir():
        assert b"very-secret" not in path.read_bytes()


def test_rows_are_asked_for_side_by_side(tmp_path: Path) -> None:
    """Four requests wait for one another, and would do so for ever."""
    together = threading.Barrier(4, timeout=PATIENCE_S)

    def answer(body: Body) -> str:
        together.wait()
        return words(body, 9)

    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(4)])
    task = {"name": "paraphrases", "data": [str(data)]}
    with stub_endpoint(answer) as stub:
        made = recipe(tmp_path, stub.url, task, rows=4, endpoint={"concurrency": 4})
        assert synthesize(made)["rows"] == 4


def test_an_endpoint_that_is_gone_costs_nothing_that_it_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "BACK_OFF_S", 0.001)
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(9)])
    task = {"name": "paraphrases", "data": [str(data)]}
    answered: list[Body] = []

    def answer(body: Body) -> str:
        if len(answered) == 5:
            raise Failing(500, "on fire")
        answered.append(body)
        return words(body, 9)

    with stub_endpoint(answer) as stub:
        made = recipe(tmp_path, stub.url, task, rows=9, endpoint={"retries": 2, "concurrency": 1})
        with pytest.raises(
            Unreachable,
            match=r"endpoint.base_url = .*: no answer after 3 tries \(HTTP 500: on fire\)",
        ):
            synthesize(made)
        assert len(stub.bodies) == 5 + 3
    assert not (made.output / "rows.jsonl").exists()
    with stub_endpoint(speaking) as stub:
        # It may be at another address by now, and more rows may be wanted.
        report = synthesize(recipe(tmp_path, stub.url, task, rows=8, endpoint={"concurrency": 4}))
        assert (report["rows"], len(stub.bodies)) == (8, 3)


def test_what_the_endpoint_does_not_take(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(12)])
    task = {"name": "paraphrases", "data": [str(data)]}

    def answer(body: Body) -> str:
        if draw(body) % 3 == 0:
            raise Failing(400, "too long \ud800")
        return words(body, 9)

    with stub_endpoint(answer) as stub:
        report = synthesize(recipe(tmp_path, stub.url, task, rows=12))
        refused = report["rejected"]["refused by the endpoint"]
        assert 0 < refused == 12 - report["rows"]
        bodies = len(stub.bodies)
        synthesize(recipe(tmp_path, stub.url, task, rows=12))
        assert len(stub.bodies) == bodies
    more = tmp_path / "more"
    more.mkdir()

    def no(status: int, text: str) -> Any:
        def answer(body: Body) -> str:
            raise Failing(status, text)

        return answer

    with stub_endpoint(no(400, "unknown field top_k")) as stub:
        made = recipe(more, stub.url, task, rows=12, endpoint={"options": {"top_k": 5}})
        with pytest.raises(
            DataError, match=r"refuses every request: HTTP 400: unknown field top_k"
        ):
            synthesize(made)
        assert stub.bodies[0]["top_k"] == 5
    with stub_endpoint(no(401, "wrong key")) as stub:
        made = recipe(more, stub.url, task, rows=12, output=str(tmp_path / "other"))
        with pytest.raises(ConfigError, match=r"endpoint.base_url = .*: HTTP 401: wrong key"):
            synthesize(made)
        assert len(stub.bodies) <= 8


@pytest.mark.parametrize(("limit", "value"), [("requests", 5), ("tokens", 4000), ("cost", 0.004)])
def test_no_budget_is_exceeded(limit: str, value: float, tmp_path: Path) -> None:
    """Whatever is under way; and with a larger one the same rows come, and more."""
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(60)])
    task = {"name": "paraphrases", "data": [str(data)]}
    price = {"price": {"input": 1.0, "output": 2.0}, "max_tokens": 100}

    def answer(body: Body) -> str:
        return words(body, 99)  # nearly as many as it may be

    with stub_endpoint(answer) as stub:
        made = recipe(tmp_path, stub.url, task, 60, endpoint=price, budget={limit: value})
        report = synthesize(made)
        spent = report["spent"]["endpoint"]
        spent["tokens"] = spent["prompt_tokens"] + spent["completion_tokens"]
        assert report["stopped"] == "the budget is spent"
        assert 0.85 * value < spent[limit] <= value
        assert len(stub.bodies) == spent["requests"] == len(lines_of(made.output / "answers.jsonl"))
        rows = (made.output / "rows.jsonl").read_text()
        slower = recipe(
            tmp_path, stub.url, task, 60, endpoint={**price, "concurrency": 1}, budget={limit: 1.5 * value}
            if limit == "cost" else {limit: int(1.5 * value)},
        )  # fmt: skip
        more = synthesize(slower)
        assert more["rows"] > report["rows"]
        assert (made.output / "rows.jsonl").read_text().startswith(rows)


def test_a_budget_knows_how_often_a_prompt_says_its_text(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(2)])
    task = {"name": "paraphrases", "data": [str(data)], "prompt": "{text} " * 40}
    with stub_endpoint(speaking) as stub:
        made = recipe(tmp_path, stub.url, task, endpoint={"max_tokens": 10}, budget={"tokens": 700})
        report = synthesize(made)
    assert (len(stub.bodies), report["stopped"]) == (0, "the budget is spent")


def test_another_recipe_has_another_folder(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(4)])
    task = {"name": "paraphrases", "data": [str(data)]}
    with stub_endpoint(speaking) as stub:
        made = recipe(tmp_path, stub.url, task, rows=3)
        synthesize(made)
        with alone_in(made.output), pytest.raises(DataError, match="by another process"):
            synthesize(made)
        with pytest.raises(DataError, match=r"begun with another recipe; .*\(seed 0 → 5\)"):
            synthesize(recipe(tmp_path, stub.url, task, rows=3, seed=5))
        with pytest.raises(DataError, match=r"\(endpoint.temperature 0.8 → 0.1\)"):
            synthesize(recipe(tmp_path, stub.url, task, rows=3, endpoint={"temperature": 0.1}))
        write_rows(data, [{"text": sentence(n + 1)} for n in range(4)])
        with pytest.raises(
            DataError, match="the content of the task's files or of the checks' has changed"
        ):
            synthesize(made)
        write_rows(data, [{"text": sentence(n)} for n in range(4)])
        lines = (made.output / "answers.jsonl").read_bytes().splitlines(keepends=True)
        (made.output / "answers.jsonl").write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
        with pytest.raises(DataError, match=r"answers.jsonl:2 is no answer; delete the line"):
            synthesize(made)
        (made.output / "recipe.json").write_text("{")
        with pytest.raises(DataError, match=r"recipe\.json is not valid JSON"):
            synthesize(made)


def test_an_answer_for_which_the_disk_has_no_room_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may come behind it, when there is room again."""
    file, real = tmp_path / "answers.jsonl", os.write
    with Answers(file) as answers:
        answers.add("one", Answer("yes", "stop"))
        monkeypatch.setattr(os, "write", lambda file, line: real(file, line[:20]))
        with pytest.raises(OSError, match="No space left on device"):
            answers.add("two", Answer("no", "stop"))
        monkeypatch.undo()
        answers.add("three", Answer("maybe", "stop"))
    with Answers(file) as found:
        assert [found.get(key) is not None for key in ("one", "two", "three")] == [
            True,
            False,
            True,
        ]


def endpoint(**changed: Any) -> dict[str, Any]:
    return {"endpoint": {"base_url": "http://127.0.0.1:9/v1", "model": "m", **changed}}


def paraphrases(**changed: Any) -> dict[str, Any]:
    return {"task": {"name": "paraphrases", "data": ["rows.jsonl"], **changed}}


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "task": (
        {"task": {"name": "question"}},
        "task.name = 'question': is not known; did you mean 'questions'?",
    ),
    "key": (paraphrases(prompts=""), "unknown key task.prompts (value ''); did you mean 'prompt'?"),
    "number": ({"rows": 0}, "rows = 0: should be greater than 0"),
    "address": (
        endpoint(base_url="localhost:8"),
        "endpoint.base_url = 'localhost:8': must be an address",
    ),
    "password": (endpoint(base_url="http://me:secretive@h/v1"), "holds a password"),
    "prompt": (paraphrases(prompt="Say it."), "a prompt must have {text} in it"),
    "option": (endpoint(options={"seed": 1}), "seed is no option"),
    "price": ({"budget": {"cost": 1.0}}, "budget.cost = 1.0 needs endpoint.price"),
    "many": (
        {"task": {"name": "instructions", "seeds": ["a"]}, **endpoint(concurrency=65)},
        "endpoint.concurrency = 65: task instructions takes 64 at most",
    ),
    "secret": (
        endpoint(key_from="NO_SUCH"),
        "endpoint.key_from = 'NO_SUCH': the variable is not set",
    ),
    "field": (paraphrases(field="body"), "rows.jsonl:1: no text in 'body'; fields here: text"),
    "file": (paraphrases(data=["none.jsonl"]), "none.jsonl"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, told = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    write_rows(Path("rows.jsonl"), [{"text": sentence(1)}])
    values = {"output": "out", "rows": 1, **paraphrases(), **endpoint(), **changed}
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    assert main(["synthesize", "recipe.yaml"]) == 2
    said = capsys.readouterr()
    assert told in said.err
    assert len(said.err.splitlines()) == 1
    assert "secretive" not in said.err


def test_the_command_tells_what_it_came_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(4)])
    task = {"name": "paraphrases", "data": [str(data)]}

    def answer(body: Body) -> str:
        return sentence(99) if draw(body) % 2 else words(body, 9)

    with stub_endpoint(answer) as stub:
        recipe(tmp_path, stub.url, task, 4, endpoint={"price": {"input": 1, "output": 1}})
        assert main(["synthesize", str(tmp_path / "recipe.yaml"), "rows=9"]) == 0
    said = capsys.readouterr().out
    assert "of 9 rows from 4 slots" in said
    assert "all inputs are used up, before there were enough rows" in said
    assert re.search(
        r"endpoint: 4 requests, \d+ tokens of prompts, \d+ of answers, cost 0\.0", said
    )


@pytest.mark.parametrize(
    "path", sorted((configs_dir() / "synthesize").iterdir()), ids=lambda path: path.stem
)
def test_examples_are_recipes(path: Path) -> None:
    assert load_recipe(path).task.name in path.read_text()


def test_the_recipe_on_the_page_is_one(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "synthetic.md").read_text()
    (tmp_path / "recipe.yaml").write_text(re.findall("```yaml\n(.*?)```", page, re.DOTALL)[0])
    assert load_recipe(tmp_path / "recipe.yaml").task.name == "questions"


def test_what_is_no_answer_of_the_api_and_what_tells_no_tokens(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [{"text": sentence(n)} for n in range(4)])
    task = {"name": "paraphrases", "data": [str(data)]}

    def page(body: Body) -> str:
        raise Failing(200, "a page")

    told = r"does not answer as OpenAI's chat completions do: .*a page"
    with stub_endpoint(page) as stub, pytest.raises(ConfigError, match=told):
        synthesize(recipe(tmp_path, stub.url, task, 1))
    with stub_endpoint(speaking) as stub:
        stub.tells_usage = False
        more = {"endpoint": {"max_tokens": 50}, "budget": {"tokens": 1500}}
        report = synthesize(recipe(tmp_path, stub.url, task, 4, output=str(tmp_path / "2"), **more))
    spent = report["spent"]["endpoint"]
    # They count as the most that they can be.
    assert 1 < spent["requests"] == spent["unmetered"] == report["rows"] < 4
    assert spent["completion_tokens"] == 50 * spent["requests"]
    assert spent["prompt_tokens"] + spent["completion_tokens"] <= 1500
    assert report["stopped"] == "the budget is spent"


def test_evaluation_tasks_are_those_of_the_harness(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not request.config.getoption("--whole"):
        pytest.skip("it takes seconds to import the harness; --whole")
    from local_tasks import write_tasks

    texts = {
        "story": "Once more: " + "the hen met a owl! " * 4,
        "sounds": f"{sentence(3)}. What does the cat say on day 0? Wuff and wuff.",
        "": f"{sentence(4)}. What does the cat say on day 1? Wuff and wuff.",
    }
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"<{name}>"} for name in texts])
    checks = {
        "contamination": {
            "tasks": ["story", "sounds"],
            "include_path": str(write_tasks(tmp_path / "tasks")),
        }
    }

    def answer(body: Body) -> str:
        return texts[re.findall("<(.*)>", asked(body))[0]]

    with stub_endpoint(answer) as stub:
        task = {"name": "paraphrases", "data": [str(rows)]}
        made = recipe(tmp_path, stub.url, task, 3, checks=checks)
        assert synthesize(made)["rejected"] == {"contaminated by an evaluation text": 2}
    found = {line["detail"] for line in lines_of(made.output / "rejected.jsonl")}
    assert found == {"story 2", "sounds 0"}
