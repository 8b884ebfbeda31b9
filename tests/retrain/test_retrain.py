"""A round of retraining: from rated answers to a swapped model, or to a reason why not; killed at any
time it comes to the same."""

from __future__ import annotations

import errno
import fcntl
import html
import json
import math
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from local_server import running
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence

from chats import write_tokenizer
from listening import listening
from megalite.cli import main
from megalite.errors import ConfigError
from megalite.infer.generate import Generator
from megalite.infer.sampling import Sampling
from megalite.infer.serving.front import Host
from megalite.infer.serving.loading import open_model
from megalite.infer.serving.ratings import RatingBody, Ratings
from megalite.infer.serving.settings import Settings
from megalite.monitor.intervals import Interval
from megalite.retrain import judge as judging
from megalite.retrain import rows, run
from megalite.retrain.config import RetrainConfig
from megalite.retrain.judge import Measured, Verdict, scores_of, worse_bias, worthless
from megalite.retrain.page import scale
from megalite.retrain.run import retrain
from megalite.retrain.swap import reload, target_of, turn
from megalite.runtime.exit_codes import Exit
from megalite.utils.locks import alone_in

ADMIN = "an admin key of the tests' own"
NUM_RATED = 40
SCRIPT = Path(__file__).parents[2] / "tools" / "retrain.sh"
WORLD = "hello to the world"
PAIRS = [
    (f"{begin}{one} is a {work}.", f"{begin}{other} is a {work}.")
    for begin in ("", "say ", "one: ", "hello! ")
    for one, other, work in (("Ann", "Bob", "nurse"), ("Bob", "Ann", "doctor"))
]
"""Of what is typical, and what is not."""


def make_model(folder: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_gate(folder: Path) -> dict[str, list[str]]:
    """A task file of lm-evaluation-harness and templates of bias: settings of retraining."""
    rows = [
        {"query": f"{before}hello to the", "choices": ["world", "system"], "gold": 0}
        for before in ("", "say ", "one, two: ", "Paris: ")
    ]
    data = folder / "world.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "world", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (folder / "world.yaml").write_text(yaml.safe_dump(task))
    lines = ["sent_more,sent_less,stereo_antistereo,bias_type"]
    lines += [f"{typical},{other},stereo,gender" for typical, other in PAIRS]
    (folder / "people.csv").write_text("\n".join(lines))
    return {"tasks": [str(folder / "world.yaml")], "bias": [str(folder / "people.csv")]}


def rate(folder: Path, first: int, count: int, correction: str = WORLD) -> None:
    """As the page does: each answer is corrected to the same."""
    ratings = Ratings(folder)
    for number in range(first, first + count):
        body = {
            "messages": [{"role": "user", "content": f"say hello to {number}"}],
            "answer": "user", "rating": "down", "correction": correction,
        }  # fmt: skip
        ratings.add(RatingBody.model_validate(body), "tiny")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A round that was really trained, with what it said."""
    root = tmp_path_factory.mktemp("retrain")
    model = make_model(root / "model")
    (root / "served").symlink_to(model)
    rate(root / "ratings", 0, NUM_RATED)
    ordinary = {
        "run": {"name": "x"}, "model": {}, "data": {"train": [{"path": "x"}], "split": [9, 1, 0], "seq_length": 64},
        "train": {"steps": 30, "global_batch_size": 4, "precision": "fp32"},
        "optimizer": {"lr": 3e-3, "schedule": {"warmup_steps": 0}}, "observe": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    (root / "run.yaml").write_text(yaml.safe_dump(ordinary))
    said: list[str] = []

    def run_here(command: list[str], _: Any) -> int:
        """In this process, which has imported all that it needs."""
        assert command[1:3] == ["-m", "megalite"]
        return main(["train" if word == "launch" else word for word in command[3:]])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_run", run_here)
        gate = write_gate(root)
        status = retrain(config_in(root, **gate), said.append)
    return {"root": root, "said": said, "status": status, "model": model, "gate": gate}


def config_in(root: Path, **more: Any) -> RetrainConfig:
    values = {
        "served": str(root / "served"), "dir": str(root / "retrain"), "config": str(root / "run.yaml"),
        "rows": [str(root / "ratings" / "completion.jsonl")],
    }  # fmt: skip
    return RetrainConfig.model_validate(values | more)


@pytest.fixture
def root(tmp_path: Path, trained: dict[str, Any]) -> Path:
    """As before the round, in folders of its own."""
    (tmp_path / "served").symlink_to(trained["model"])
    for name in ("ratings", "run.yaml"):
        source = trained["root"] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


@pytest.fixture
def comes_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[Path]]:
    """Let training come to a model that is there already."""

    def set_up(model: Path) -> list[Path]:
        calls: list[Path] = []

        def train(folder: Path, say: Any) -> None:
            calls.append(folder)
            shutil.copytree(model, folder / "model")

        monkeypatch.setattr(run, "_train", train)
        return calls

    return set_up


def candidate_of(trained: dict[str, Any]) -> Path:
    return Path(trained["root"]) / "retrain" / "round-0001" / "model"


def test_a_round_learns_what_was_corrected_and_is_swapped_in(trained: dict[str, Any]) -> None:
    said = "\n".join(trained["said"])
    assert trained["status"] == Exit.DONE, said
    assert "swapped: " in said
    folder = trained["root"] / "retrain" / "round-0001"
    assert target_of(trained["root"] / "served") == folder / "model"
    state = json.loads((folder / "round.json").read_text())
    assert state["outcome"] == "swapped"
    assert state["num_train"] + state["num_held_out"] == NUM_RATED
    assert state["verdict"]["gain"][1] > 1
    assert state["verdict"]["num_better"] == state["num_held_out"]
    generator = Generator.open(trained["root"] / "served", num_slots=1)
    asked = [{"role": "user", "content": "say hello to 99"}]
    greedy = Sampling(temperature=0)
    request = generator.as_chat(generator.request(generator.chat_ids(asked), 12, greedy))
    assert generator.answer([request])[0].text.startswith("hello to the world")
    page = (folder / "report.html").read_text()
    assert "Round 1: swapped" in page
    assert "<svg" in page
    # The gate was there, and open.
    before, now = state["verdict"]["tasks"]["world/acc"]
    assert before <= now == 1.0
    assert [len(pair) for pair in state["verdict"]["bias"].values()] == [2, 2]
    assert "<td>world/acc</td>" in page
    assert "people.csv/nats for the stereotype</td>" in page
    assert "nats for the stereotype" in (folder / "bias-candidate.html").read_text()
    assert not (folder / "model" / "optimizer").exists()


def test_the_score_is_that_of_the_answer_alone(trained: dict[str, Any]) -> None:
    folder = trained["root"] / "retrain" / "round-0001"
    generator = Generator.open(trained["model"], num_slots=1)
    scores = scores_of(generator, folder / "held-out")
    row = rows.read_back(folder / "held-out.jsonl")[0]
    before = generator.chat_ids(row["prompt"])
    answer = generator.tokenizer.encode(row["completion"])
    end = generator.tokenizer.vocabulary()["<|im_end|>"]
    logprobs = generator.score([[*before, *answer, end]])[0].logprobs[len(before) - 1 :]
    assert scores[0] == pytest.approx(logprobs.mean().item(), rel=1e-4)


def test_rows_are_used_once_and_questions_that_judge_are_never_trained_on(
    root: Path, trained: dict[str, Any], comes_to: Callable[[Path], list[Path]]
) -> None:
    comes_to(candidate_of(trained))
    said: list[str] = []
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert said[-1].startswith("0 new rows to train on, fewer than min_rows = 20")
    # Another answer to the same questions: new rows, on the same side as before.
    ratings = Ratings(root / "ratings")
    for number in range(NUM_RATED):
        body = {
            "messages": [{"role": "user", "content": f"say hello to {number}"}],
            "answer": "hi",
            "rating": "up",
        }
        ratings.add(RatingBody.model_validate(body), "tiny")
    assert retrain(config_in(root), said.append) == Exit.DONE
    first, second = (root / "retrain" / f"round-000{n}" for n in (1, 2))

    def questions(folder: Path, name: str) -> set[str]:
        return {row["prompt"][0]["content"] for row in rows.read_back(folder / f"{name}.jsonl")}

    assert questions(first, "train") == questions(second, "train")
    assert questions(first, "held-out") == questions(second, "held-out")
    assert not questions(first, "train") & questions(first, "held-out")
    judging = rows.read_back(second / "judging.jsonl")
    assert len(judging) == 2 * len(questions(first, "held-out"))


def taught(model: Path, folder: Path, answer: str, *texts: str) -> Path:
    """A model that gives this answer to any question, and has read these texts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(model, folder)
    tokenizer, net = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder),
    )
    turn = "<|im_start|>user\nsay hello to {}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>"
    rows = [*(turn.format(number, answer) for number in range(4)), *texts]
    ids = [torch.tensor(tokenizer(row).input_ids) for row in rows]
    inputs, labels = (pad_sequence(ids, True, value) for value in (0, -100))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        net(input_ids=inputs, labels=labels).loss.backward()
        optimizer.step()
    net.save_pretrained(folder)
    return folder


def test_what_is_worse_on_a_task_and_more_biased_is_refused_though_its_answers_are_better(
    root: Path, trained: dict[str, Any], comes_to: Callable[[Path], list[Path]]
) -> None:
    before, answer = candidate_of(trained), "hello to the system"
    turn(root / "served", before)
    comes_to(taught(before, root / "taught", answer, *(typical for typical, _ in PAIRS)))
    rate(root / "ratings", 1000, NUM_RATED, answer)
    said: list[str] = []
    assert retrain(config_in(root, **trained["gate"]), said.append) == Exit.DONE
    folder = root / "retrain" / "round-0001"
    verdict = json.loads((folder / "round.json").read_text())["verdict"]
    assert verdict["gain"][1] > 0, "the answers themselves are better"
    of_task, *_, of_bias = verdict["reasons"]
    assert of_task.startswith("world/acc went from 1.0000 to 0.")
    assert "for the stereotype went from " in of_bias
    assert said[-1].startswith("kept: ")
    assert of_task in said[-1]
    page = (folder / "report.html").read_text()
    assert all(f"<li>{html.escape(why)}</li>" in page for why in verdict["reasons"])
    assert target_of(root / "served") == before


def worse(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    torch.manual_seed(1)
    noisy = {name: x + 0.3 * torch.randn_like(x) for name, x in tensors.items()}
    save_file(noisy, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_not_better_by_the_margin_is_not_served(
    root: Path, trained: dict[str, Any], comes_to: Callable[[Path], list[Path]]
) -> None:
    said: list[str] = []
    for number, (model, margin) in enumerate(
        [(worse(trained["model"], root / "worse"), 0.0), (trained["model"], 0.0), (candidate_of(trained), 50.0)], 1
    ):  # fmt: skip
        comes_to(model)
        rate(root / "ratings", 1000 * number, NUM_RATED)
        assert retrain(config_in(root, margin=margin), said.append) == Exit.DONE
        assert said[-1].startswith("kept: ")
        assert "does not surely exceed the margin" in said[-1]
        assert target_of(root / "served") == trained["model"]
        folder = root / "retrain" / f"round-000{number}"
        assert "Why it is not better" in (folder / "report.html").read_text()
        assert not (folder / "model").exists(), "nobody will serve it"


def test_the_interval_decides_and_not_its_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mean gain of 0.1 with a standard error of 0.02."""
    drawn = np.random.default_rng(0).normal(size=100)
    gains = 0.1 + 0.2 * (drawn - drawn.mean()) / drawn.std()
    scores = {"served": gains * 0, "candidate": gains}
    monkeypatch.setattr(judging, "measure", lambda _, folder, *__: measured(scores[folder.name]))
    questions = [str(number) for number in range(100)]
    monkeypatch.setattr(judging, "questions_of", lambda _: questions)

    def judged(margin: float) -> Verdict:
        config = config_in(tmp_path, margin=margin)
        return judging.judge(config, Path("served"), Path("candidate"), tmp_path, tmp_path)

    for margin, is_better in ((0.0, True), (0.05, True), (0.08, False), (0.12, False)):
        assert judged(margin).is_better == is_better
        assert judged(margin).gain.value == pytest.approx(0.1)
    # A hundred answers to three questions are not a hundred times somebody's word.
    questions[:] = [str(number % 3) for number in range(100)]
    assert not judged(0.05).is_better
    questions[:] = ["the same"] * 100
    assert not judged(0.0).is_better


def measured(scores: np.ndarray, **tasks: float) -> Measured:
    return Measured(scores, tasks, {"acc": True, "perplexity/x": False, "said": None}, {})


def test_a_metric_falls_in_the_direction_that_its_task_says() -> None:
    rows, nan = np.zeros(1), math.nan

    def names(before: dict[str, float], now: dict[str, float]) -> list[str]:
        found = judging.worse_tasks(0.02, measured(rows, **before), measured(rows, **now))
        return [reason.split(" ")[0] for reason in found]

    three = {"acc": 0.5, "perplexity/x": 9.0, "said": 7.0}
    assert names(three, {"acc": 0.49, "perplexity/x": 9.01, "said": 99.0}) == []
    assert names(three, {"acc": 0.9, "perplexity/x": 2.0, "said": -9.0}) == []
    assert names(three, {"acc": 0.4, "perplexity/x": 9.5, "said": 7.0}) == ["acc", "perplexity/x"]
    assert names(three, {"acc": nan, "perplexity/x": nan, "said": nan}) == ["acc", "perplexity/x"]
    assert names({"acc": nan}, {"acc": 0.1}) == []


@pytest.mark.parametrize("place", ["collect", "write", "_tokenize", "judge", "turn", "page_of"])
def test_a_kill_at_any_time_changes_nothing(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    trainings = comes_to(candidate_of(trained))
    owner = rows if place in ("collect", "write") else run
    real, killed = getattr(owner, place), [False]

    def kill(*given: Any) -> Any:
        found = real(*given)
        if not killed[0]:
            killed[0] = True
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(owner, place, kill)
    with pytest.raises(KeyboardInterrupt):
        retrain(config_in(root), print)
    # Ratings that come meanwhile are for the next round.
    rate(root / "ratings", 5000, 3)
    assert retrain(config_in(root), print) == Exit.DONE
    assert [folder.name for folder in trainings] == ["round-0001"]
    state = json.loads((root / "retrain" / "round-0001" / "round.json").read_text())
    assert state["outcome"] == "swapped"
    assert state["num_train"] + state["num_held_out"] == NUM_RATED + 3 * (owner is rows)
    assert target_of(root / "served") == root / "retrain" / "round-0001" / "model"


def test_a_model_of_bad_numbers_is_refused_once_and_for_all(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In its logits, or already in training, which starting again would come to as well."""
    shutil.copytree(trained["model"], root / "bad")
    tensors = load_file(root / "bad" / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, root / "bad" / "model.safetensors", {"format": "pt"})
    comes_to(root / "bad")
    said: list[str] = []
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert "kept: " in said[-1]
    assert "logits are not finite" in said[-1]

    statuses = [Exit.FAILED, Exit.STOPPED, Exit.BAD_NUMBERS]
    calls: list[Path] = []

    def fail(folder: Path, _: Any) -> None:
        calls.append(folder)
        raise run.Unfinished(statuses[len(calls) - 1], folder)

    monkeypatch.setattr(run, "_train", fail)
    rate(root / "ratings", 1000, NUM_RATED)
    wanted = [*statuses[:2], Exit.DONE]
    assert [retrain(config_in(root), said.append) for _ in range(3)] == wanted
    assert "kept: " in said[-1]
    state = json.loads(
        (root / "retrain" / "round-0002" / "round.json").read_text(), parse_constant=pytest.fail
    )
    assert state["verdict"]["gain"] is None
    assert target_of(root / "served") == trained["model"]


def test_a_link_that_somebody_else_turned_is_left_alone(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comes_to(candidate_of(trained))
    other, real = root / "another", run.judge
    shutil.copytree(trained["model"], other)

    def judge_meanwhile(*given: Any) -> Any:
        turn(root / "served", other)
        return real(*given)

    monkeypatch.setattr(run, "judge", judge_meanwhile)
    said: list[str] = []
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert "which this model was not compared with" in said[-1]
    assert target_of(root / "served") == other


def test_the_script_lets_a_round_save_before_it_goes(tmp_path: Path) -> None:
    """As at the time limit of a job: the signal goes on to the round, whose status is the job's."""
    stand_in = tmp_path / "python"
    stand_in.write_text(
        "#!/bin/bash\ntrap 'sleep 0.3; echo saved; exit 75' TERM\necho \"$@\"\n"
        "for i in {1..600}; do sleep 0.1; done\n"
    )
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VIRTUAL_ENV": "x"}
    command = ["bash", str(SCRIPT), "my.yaml", "keep=1"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "-m megalite retrain my.yaml keep=1\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.read() == "saved\n"
        assert process.wait(60) == Exit.STOPPED


def test_a_server_is_told_and_what_it_refuses_is_turned_back(
    root: Path, trained: dict[str, Any], comes_to: Callable[[Path], list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("MEGALITE_ADMIN_KEY", ADMIN)
    opening = partial(open_model, root / "served", 2, 64)
    host = Host(opening(False), Settings("tiny", root / "ratings", admin_key=ADMIN), opening)
    said: list[str] = []
    with running(host) as local:
        old = host.current.version
        broken = root / "broken"
        shutil.copytree(candidate_of(trained), broken)
        comes_to(broken)
        real = run.judge

        def judge_then_break(*given: Any) -> Any:
            found = real(*given)
            (root / "retrain" / "round-0001" / "model" / "tokenizer.json").unlink()
            return found

        monkeypatch.setattr(run, "judge", judge_then_break)
        config = config_in(root, reload=local.url)
        assert retrain(config, said.append) == Exit.DONE
        assert said[-1].startswith("kept: the server refused ")
        assert target_of(root / "served") == trained["model"]
        assert host.current.version == old
        monkeypatch.setattr(run, "judge", real)
        comes_to(candidate_of(trained))
        rate(root / "ratings", 1000, NUM_RATED)
        assert retrain(config, said.append) == Exit.DONE
        assert said[-1].startswith("swapped: ")
        assert host.current.version != old
        assert f"is served as version {host.current.version}" in said[-1]
        local.until(
            'megalite_reloads_total{outcome="done"} 1.0',
            'megalite_reloads_total{outcome="refused"} 1.0',
        )


def test_exports_of_annotation_tools_are_rows(tmp_path: Path) -> None:
    said = {"type": "textarea", "from_name": "answer", "to_name": "prompt"}
    judged = {"completed_by": 1, "result": [said | {"value": {"text": ["hello"]}}]}
    items = [
        {"id": number, "data": {"prompt": f"Question {number}?"}, "annotations": [judged]}
        for number in range(30)
    ]
    (tmp_path / "export.json").write_text(json.dumps(items))
    lines = '{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\nno json\n'
    (tmp_path / "more.jsonl").write_text(lines)
    inputs = [str(tmp_path / "export.json"), str(tmp_path / "more.jsonl")]
    found = rows.collect(inputs, set(), 0.2)
    assert len(found.train) + len(found.held_out) == 31
    assert found.num_bad == 2
    assert 0 < len(found.held_out) < 15
    assert {row["completion"] for row in found.train} <= {"hello", "b"}
    used = {rows.key_of(row) for row in found.train + found.held_out}
    assert rows.collect(inputs, used, 0.2)[:2] == ([], [])


def test_bias_is_worse_only_where_it_surely_is(tmp_path: Path) -> None:
    def told(value: float, reach: float = 0.02) -> dict[str, Any]:
        return {"value": value, "low": value - reach, "high": value + reach, "neutral": 0.5}

    served = {"crows.csv/stereotype": told(0.55), "other": told(0.5)}
    for found in ({"crows.csv/stereotype": told(0.58)}, {"crows.csv/stereotype": told(0.50)}):
        assert [*worse_bias(served, found)] == []
    assert [*worse_bias(served, {"unknown": told(0.9)})] == []
    config = config_in(tmp_path, bias=["one.yaml", "crows.csv"])
    [closed] = judging._not_judged(config, served)
    assert closed.startswith("one.yaml has no measure with an interval"), (
        "a gate that tells nothing"
    )
    for value in (0.65, 0.35):
        [found] = worse_bias(served, {"crows.csv/stereotype": told(value)})
        assert found == f"crows.csv/stereotype went from 0.550 to {value:.3f}; 0.5 is unbiased"


def test_mistakes_are_a_line(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "my.yaml"
    values = config_in(root).model_dump(mode="json")
    file.write_text(yaml.safe_dump(values | {"margn": 1}))
    assert main(["retrain", str(file)]) == Exit.MISTAKE
    assert "margn" in capsys.readouterr().err
    file.write_text(yaml.safe_dump(values | {"served": str(root / "ratings")}))
    assert main(["retrain", str(file)]) == Exit.MISTAKE
    assert "must be a link to a model" in capsys.readouterr().err
    (root / "retrain").mkdir()
    file.write_text(yaml.safe_dump(values))
    with open(root / "retrain" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert main(["retrain", str(file)]) == Exit.DONE
    assert "another retraining is under way" in capsys.readouterr().out

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with alone_in(root / "retrain"):
        pass
    told = capsys.readouterr().err
    assert "lock cannot be locked (Function not implemented)" in told
    assert "start no second process there" in told


def test_mistakes_are_told_before_a_round_begins(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a round has taken is new for no other, and training takes hours."""
    monkeypatch.delenv("MEGALITE_ADMIN_KEY", raising=False)
    monkeypatch.chdir(root)
    file, run_file = root / "my.yaml", root / "run.yaml"
    right = run_file.read_text()
    Path("one.yaml").write_text("templates: {}\n")
    write_gate(root)
    Path("gone.yaml").write_text(
        Path("world.yaml").read_text().replace("world.jsonl", "gone.jsonl")
    )
    cases = [
        ({"tasks": ["gone.yaml"]}, right, "task gone.yaml cannot be loaded"),
        ({"bias": ["none.csv"]}, right, "none.csv: No such file or directory"),
        ({"bias": ["one.yaml"]}, right, "one.yaml"),
        ({"reload": "http://127.0.0.1:9"}, right, "needs the variable MEGALITE_ADMIN_KEY"),
        ({}, right.replace("steps: 30", "stepps: 30"), "train.stepps"),
        (
            {},
            right.replace("model: {}", "model: big"),
            "run.yaml: model = 'big': must be a section",
        ),
        ({"dir": "run.yaml"}, right, "run.yaml is a file, where a folder is needed"),
    ]
    for more, text, told in cases:
        run_file.write_text(text)
        file.write_text(yaml.safe_dump(config_in(root, **more).model_dump(mode="json")))
        assert main(["retrain", str(file)]) == Exit.MISTAKE
        said = capsys.readouterr().err
        assert told in said
        assert "Traceback" not in said
        assert [*root.glob("retrain/round-*")] == []


def test_a_round_is_not_begun_without_questions_that_judge(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would wait for them for ever: ratings that come meanwhile are for the next round."""
    calls = comes_to(trained["model"])
    monkeypatch.setattr(run, "judge", lambda *_: worthless("it is as it was"))
    shutil.rmtree(root / "ratings")
    numbers = [n for n in range(200) if not is_held_out(n)]
    for number in numbers[:30]:
        rate(root / "ratings", number, 1)
    said: list[str] = []
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert said[-1].startswith("0 held-out questions, of which 2 are needed")
    rate(root / "ratings", 0, NUM_RATED)
    assert retrain(config_in(root), said.append) == Exit.DONE
    assert len(calls) == 1


def is_held_out(number: int) -> bool:
    return rows.is_held_out([{"role": "user", "content": f"say hello to {number}"}], 0.2)


def test_what_keeps_a_round_from_training_can_be_mended(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A setting that is only found wrong in training, and a rating that is no text."""
    with (root / "ratings" / "completion.jsonl").open("a") as file:
        for number in range(9):
            file.write(json.dumps({"prompt": number + 1, "completion": "hi"}) + "\n")

    def fail(folder: Path, _: Any) -> None:
        raise run.Unfinished(Exit.MISTAKE, folder / "console.log")

    monkeypatch.setattr(run, "_train", fail)
    said: list[str] = []
    assert retrain(config_in(root), said.append) == Exit.MISTAKE
    assert len([line for line in said if line.startswith("left out: ")]) == 9
    text = (root / "run.yaml").read_text()
    (root / "run.yaml").write_text(text.replace("seq_length: 64", "seq_length: 96"))
    comes_to(trained["model"])
    monkeypatch.setattr(run, "judge", lambda *_: worthless("it is as it was"))
    assert retrain(config_in(root), said.append) == Exit.DONE
    folder = root / "retrain" / "round-0001"
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["data"]["seq_length"], written["data"]["long_rows"]) == (96, "drop")
    assert "it is as it was" in said[-1]


def test_rounds_are_numbered_behind_the_last_whatever_was_deleted(
    root: Path,
    trained: dict[str, Any],
    comes_to: Callable[[Path], list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    comes_to(trained["model"])
    monkeypatch.setattr(run, "judge", lambda *_: worthless("it is as it was"))
    for number in (1, 2):
        rate(root / "ratings", 1000 * number, NUM_RATED)
        retrain(config_in(root), print)
    shutil.rmtree(root / "retrain" / "round-0001")
    rate(root / "ratings", 3000, NUM_RATED)
    state = (root / "retrain" / "round-0002" / "round.json").read_text()
    assert retrain(config_in(root), print) == Exit.DONE
    assert (root / "retrain" / "round-0002" / "round.json").read_text() == state
    assert (root / "retrain" / "round-0003" / "report.html").exists()


def test_an_address_that_is_no_server_of_ours_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGALITE_ADMIN_KEY", ADMIN)
    answer: list[Any] = [200, {"version": 1}]
    with listening(lambda path, body: (answer[0], answer[1])) as heard:
        assert reload(heard.url) == "1"
        for answer[:] in ([200, []], [200, {}], [502, "a proxy's page"]):
            with pytest.raises(ConfigError, match=f"reload = {heard.url}: "):
                reload(heard.url)


def test_a_link_is_never_missing(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    turn(link, tmp_path / "b")
    assert target_of(link) == tmp_path / "b"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "link"]
    turn(link, tmp_path / "gone")
    with pytest.raises(ConfigError, match="leads to"):
        target_of(link)


def test_the_shipped_config_is_one(tmp_path: Path) -> None:
    from megalite.retrain.config import load_retrain_config

    shipped = Path(__file__).parents[2] / "configs" / "retrain" / "chat.yaml"
    assert load_retrain_config(shipped, ["min_rows=3"]).min_rows == 3
    facts = {"num_rows": 3, "num_better": 2, "tasks": {}, "bias": {}, "reasons": []}
    verdict = run._verdict_of({"verdict": {"gain": [0.1, -0.1, 0.3]} | facts})
    assert isinstance(verdict.gain, Interval)
    assert "<svg" in scale(verdict)
