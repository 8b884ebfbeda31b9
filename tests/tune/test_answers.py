"""Answers to questions in texts: learned on several layouts as transformers states the loss, and
found as SQuAD judges them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from encoders import write_words
from megalite.cli import main
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.checks import open_data
from megalite.data.formats import Encoder, Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError, DataError
from megalite.infer.generate import find_model
from megalite.infer.reading import Asked, Reader, read_asked
from megalite.models.layers import IGNORE
from megalite.train import train
from ranks import run_ranks
from small_runs import metrics_of, train_on_rank
from tiny_models import CASES, STILL, auto_class, randomize

transformers = pytest.importorskip("transformers")

FAMILIES = ("bert", "roberta", "modernbert")
LAYOUTS = {
    "tensor": ("parallel={tensor: 2, sequence: true}",), "pipeline": ("parallel.pipeline=2",),
    "context": ("parallel.context=2",), "data": ("train.micro_batch_size=2", "parallel.zero_stage=1"),
}  # fmt: skip


def rows_of(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of small words among which a run of large ones is the answer; a few have none."""
    draw, rows = random.Random(seed), []
    for number in range(count):
        run = [f"w{draw.randint(70, 96)}" for _ in range(draw.randint(1, 3))]
        before, behind = (
            [f"w{draw.randint(5, 60)}" for _ in range(draw.randint(0, 3))] for _ in "ab"
        )
        context = " ".join([*before, *run, *behind]) if number % 8 else " ".join([*before, "w9"])
        start = len(" ".join([*before, ""]))
        found = (
            {"text": [" ".join(run)], "answer_start": [start]}
            if number % 8
            else {"text": [], "answer_start": []}
        )
        rows.append({"question": f"w{draw.randint(60, 69)}", "context": context, "answers": found})
    return rows


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("answers")
    for case in FAMILIES:
        torch.manual_seed(0)
        still = STILL if case == "bert" else {}
        encoder = auto_class(case).from_config(
            transformers.AutoConfig.for_model(**CASES[case] | still)
        )
        if case == "bert":
            randomize(encoder)
        encoder.save_pretrained(write_words(root / case))
    for name, seed in (("rows", 0), ("held-out", 1)):
        lines = [json.dumps(row) + "\n" for row in rows_of(160 if name == "rows" else 40, seed)]
        (root / f"{name}.jsonl").write_text("".join(lines))
        settings = Settings("answers", str(root / "bert"))
        preprocess_rows([str(root / f"{name}.jsonl")], root / name, settings)
    return root


def config_of(root: Path, case: str, *overrides: str) -> Config:
    return parse_config(
        {
            "run": {"name": case, "dir": str(root / "runs")},
            "model": {"hf": str(root / case), "task": "answers"},
            "objective": {"name": "answers"},
            "data": {
                "train": [{"path": str(root / "rows")}], "valid": [{"path": str(root / "held-out")}],
                "seq_length": 32, "document_mask": True, "tokenizer": str(root / case),
            },
            "train": {"steps": 80, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
            "optimizer": {"lr": 5e-3, "schedule": {"name": "constant", "warmup_steps": 5}},
            "checkpoint": {"every": 0},
            "observe": {"eval_every": 0, "eval_batches": 1},
        },
        overrides,
    )  # fmt: skip


def test_rows_are_tokens_with_ends(root: Path) -> None:
    encoder = Encoder(Settings("answers", str(root / "bert")))
    context = "w5 w70 w71 w6"
    two, one, none = encoder.encode([
        {"question": "w8", "context": context, "answers": {"text": ["w70 w71"], "answer_start": [3]}},
        {"question": "w8", "context": context, "answers": [{"text": "w70", "answer_start": 3}]},
        {"question": "w8", "context": context, "answers": {"text": [], "answer_start": []}},
    ])  # fmt: skip
    assert not isinstance(two[0], str)
    assert [*two[0].ids] == [2, 8, 3, 5, 70, 71, 6, 3]
    values = [[*each[0].values] for each in (two, one, none) if not isinstance(each[0], str)]
    assert values == [[0, 0, 0, 0, 1, 2, 0, 0], [0, 0, 0, 0, 3, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0]]
    for answers, words in (
        ({"text": ["w70"], "answer_start": [4]}, "the answer 'w70' is not at character 4"),
        ({"text": ["w70"], "answer_start": []}, "as many 'answer_start' as 'text'"),
        ("w70", "is no answer with a 'text' and an 'answer_start'"),
    ):
        [why] = encoder.encode([{"question": "w8", "context": context, "answers": answers}])
        assert words in why


@pytest.mark.parametrize("case", FAMILIES)
def test_answers_are_learned_and_transformers_finds_the_same(case: str, root: Path) -> None:
    config = config_of(root, case)
    train(config)
    last, folder = metrics_of(config)[-1], find_model(config.run.folder)
    theirs, info = transformers.AutoModelForQuestionAnswering.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs).__name__.endswith("ForQuestionAnswering")
    valid = open_data(config)[2]["valid"]
    assert valid is not None
    losses, exact = [], []
    for number in range(8):  # one batch
        samples = valid.read([number])
        assert samples.documents is not None
        for document in np.unique(samples.documents[0]):
            here = samples.documents[0] == document
            ids, labels = (torch.from_numpy(x[0][here]) for x in (samples.tokens, samples.labels))
            if not (labels != IGNORE).any():  # what is filled up
                continue
            wanted = [int(((labels == end) | (labels == 2)).nonzero()) for end in (0, 1)]
            types = {"token_type_ids": ((ids == 3).cumsum(0) - (ids == 3).long() > 0).long()[None]}
            with torch.no_grad():
                out = theirs.eval()(
                    ids[None], start_positions=torch.tensor(wanted[:1]),
                    end_positions=torch.tensor(wanted[1:]), **(types if case == "bert" else {}),
                )  # fmt: skip
            losses.append(out.loss.item())
            exact.append([x.argmax().item() for x in (out.start_logits, out.end_logits)] == wanted)
    assert last["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert last["valid_exact"] == pytest.approx(sum(exact) / len(exact))
    assert last["valid_f1"] >= last["valid_exact"] > 0.5, "a guess is right once in fifty"
    asked = read_asked([root / "held-out.jsonl"])
    found = Reader.open(folder).answer(asked, may_be_none=True)
    said = [
        answer.text == (each.wanted or ("",))[0] for answer, each in zip(found, asked, strict=True)
    ]
    assert sum(said) / len(said) > 0.5


def test_layouts_learn_and_judge_alike(root: Path) -> None:
    short = ("train.steps=3",)
    alone = config_of(root, "bert", *short, "run.name=alone")
    others = [
        config_of(root, "bert", *short, *more, f"run.name={name}") for name, more in LAYOUTS.items()
    ]
    train(alone)
    run_ranks(2, train_on_rank, others)
    for other in others:
        for mine, wanted in zip(metrics_of(other), metrics_of(alone), strict=True):
            same = [name for name in wanted if name.startswith(("loss", "grad_norm", "valid"))]
            # fp32 sums in another order; 1e-5 is the project's bound for every layout.
            assert [mine[name] for name in same] == pytest.approx(
                [wanted[name] for name in same], rel=1e-5
            )


def test_long_texts_are_read_in_windows(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_of(root, "modernbert", "run.name=windows")
    train(config)
    reader = Reader.open(config.run.folder)
    capsys.readouterr()
    long = " ".join([*["w9"] * 100, "w80 w81", *["w9"] * 100])
    [found] = reader.answer([Asked("w60", long)])
    assert (found.text, found.start) == ("w80 w81", 300)
    assert (
        main(["answer", str(config.run.folder), "--question", "w60", "--context", long, "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["answer"] == "w80 w81"
    rows = str(root / "held-out.jsonl")
    assert main(["answer", str(config.run.folder), "--input", rows, "--may-be-none"]) == 0
    assert "of 40 questions with known answers" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="leaves no room for a text"):
        reader.answer([Asked("w60 " * 70, "w5")])
    (root / "bad.jsonl").write_text('{"question": "w5"}\n')
    with pytest.raises(
        DataError, match=r"bad\.jsonl, line 1: .* has no 'question' with a 'context'"
    ):
        read_asked([root / "bad.jsonl"])


def test_task_and_objective_go_together(root: Path) -> None:
    for override, words in (
        (
            "objective.name=next_token",
            "model.task: answers and objective.name: answers go together",
        ),
        ("model.labels=[a, b]", r"model\.task: answers has \['start', 'end'\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of(root, "bert", override)
