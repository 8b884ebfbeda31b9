"""Classes of texts and of words by encoders, which tell a text's class at its first token, on
several layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from encoders import write_words
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.infer.generate import find_model
from megalite.train import train
from ranks import run_ranks
from small_runs import metrics_of, train_on_rank
from tiny_models import CASES, STILL, auto_class, randomize

transformers = pytest.importorskip("transformers")

FAMILIES = ("bert-tanh", "roberta", "modernbert")
CLASSES = {"classification": ["many", "none"], "labels": ["big", "small"]}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder of each family, and rows that follow a rule."""
    root, draw = tmp_path_factory.mktemp("classes"), random.Random(0)
    tokenizer = write_words(root / "words")
    for case in FAMILIES:
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(**CASES[case])
        auto_class(config.model_type).from_config(config).save_pretrained(write_words(root / case))
    rows: dict[str, list[dict[str, Any]]] = {"classification": [], "labels": []}
    for _ in range(160):
        numbers = [draw.randint(5, 96) for _ in range(draw.randint(1, 5))]
        words = [f"w{number}" for number in numbers]
        rows["classification"].append(
            {"text": " ".join(words), "label": "many" if max(numbers) > 70 else "none"}
        )
        rows["labels"].append(
            {"tokens": words, "labels": ["big" if n > 50 else "small" for n in numbers]}
        )
    for kind, some in rows.items():
        (root / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        settings = Settings(kind, str(tokenizer), labels=tuple(CLASSES[kind]))  # type: ignore[arg-type]
        preprocess_rows([str(root / f"{kind}.jsonl")], root / kind, settings)
    return root


def config_of(root: Path, case: str, task: str, *overrides: str) -> Config:
    source = [{"path": str(root / task)}]
    return parse_config(
        {
            "run": {"name": f"{case}-{task}", "dir": str(root / "runs")},
            "model": {"hf": str(root / case), "task": task, "labels": CLASSES[task]},
            "data": {
                "train": source, "valid": source, "seq_length": 32, "document_mask": True,
                "tokenizer": str(root / case),
            },
            "train": {"steps": 60, "global_batch_size": 8, "micro_batch_size": 4, "precision": "fp32"},
            "optimizer": {"lr": 5e-3, "schedule": {"name": "constant", "warmup_steps": 5}},
            "checkpoint": {"every": 0},
            "observe": {"eval_every": 60},
        },
        overrides,
    )  # fmt: skip


PROBLEMS: dict[str, dict[str, Any]] = {
    "multi_label": {"labels": ["low", "middle", "high"]},
    "regression": {"labels": ["mean"]},
}


@pytest.fixture(scope="module")
def problems(root: Path) -> Path:
    """Texts with the thirds that their numbers lie in, and with the mean of these."""
    draw = random.Random(1)
    rows: dict[str, list[dict[str, Any]]] = {"multi_label": [], "regression": []}
    for number in range(160):
        numbers = [draw.randint(5, 96) for _ in range(draw.randint(1, 4))]
        text = " ".join(f"w{each}" for each in numbers)
        thirds = sorted({["low", "middle", "high"][min((each - 5) // 31, 2)] for each in numbers})
        # Row 7 has no class, which is a set of classes, too.
        rows["multi_label"].append({"text": text, "labels": thirds if number != 7 else []})
        rows["regression"].append({"text": text, "score": sum(numbers) / len(numbers) / 25 - 2})
    for problem, some in rows.items():
        (root / f"{problem}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        settings = Settings(
            "classification",
            str(root / "words"),
            labels=tuple(PROBLEMS[problem]["labels"]),
            problem=problem,
        )  # type: ignore[arg-type]
        preprocess_rows([str(root / f"{problem}.jsonl")], root / problem, settings)
    return root


def problem_config(root: Path, problem: str, *overrides: str) -> Config:
    labels = ",".join(PROBLEMS[problem]["labels"])
    source = f"[{{path: {root / problem}}}]"
    return config_of(
        root, "modernbert", "classification", f"run.name={problem}", f"model.problem={problem}",
        f"model.labels=[{labels}]", f"data.train={source}", f"data.valid={source}", *overrides,
    )  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_sets_of_classes_and_numbers_are_learned_and_transformers_tells_the_same(
    problem: str, problems: Path
) -> None:
    metrics, stats = pytest.importorskip("sklearn.metrics"), pytest.importorskip("scipy.stats")
    config = problem_config(problems, problem)
    train(config)
    last = metrics_of(config)[-1]
    folder = find_model(config.run.folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in (problems / f"{problem}.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = torch.cat(
            [theirs(**tokenizer(row["text"], return_tensors="pt")).logits for row in rows]
        )
        if problem == "regression":
            there = torch.tensor([row["score"] for row in rows])
            # transformers' own loss of them all.
            loss = F.mse_loss(logits[:, 0], there).item()
            wanted = {
                "pearson": stats.pearsonr(there, logits[:, 0])[0],
                "spearman": stats.spearmanr(there, logits[:, 0])[0],
            }
        else:
            names = PROBLEMS[problem]["labels"]
            there = torch.tensor([[float(name in row["labels"]) for name in names] for row in rows])
            loss = F.binary_cross_entropy_with_logits(logits, there).item()
            told = (logits > 0).float()
            wanted = {
                "accuracy": (told == there).all(1).double().mean().item(),
                "f1_micro": metrics.f1_score(there, told, average="micro"),
                "f1": metrics.f1_score(there, told, average="macro"),
                "precision": metrics.precision_score(there, told, average="macro"),
            }
    assert theirs.config.problem_type == {"regression": "regression"}.get(
        problem, "multi_label_classification"
    )
    # The same weights; sums of fp32 in another order, of texts that lie beside others here.
    assert last["valid_loss"] == pytest.approx(loss, rel=1e-4)
    assert {name: last[f"valid_{name}"] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    assert last["valid_loss"] < 0.5 * metrics_of(config)[0]["loss"], "it learns"


def test_problems_are_told_alike_on_every_layout(problems: Path) -> None:
    short = ("train.steps=3", "observe.eval_every=3")
    layouts = {
        "tensor": ("parallel.tensor=2", "parallel.sequence=true"), "pipeline": ("parallel.pipeline=2",),
        "context": ("parallel.context=2",), "data": ("train.micro_batch_size=2",),
    }  # fmt: skip
    alone = {
        problem: problem_config(problems, problem, *short, f"run.name=alone-{problem}")
        for problem in PROBLEMS
    }
    for config in alone.values():
        train(config)
    others = {
        (name, problem): problem_config(
            problems, problem, *short, f"run.name={name}-{problem}", *more
        )
        for name, more in layouts.items()
        for problem in PROBLEMS
    }
    run_ranks(2, train_on_rank, [*others.values()])
    for (_, problem), config in others.items():
        for mine, wanted in zip(metrics_of(config), metrics_of(alone[problem]), strict=True):
            same = [name for name in wanted if name.startswith(("loss", "grad_norm", "valid"))]
            # fp32 sums in another order; 1e-5 is the project's bound for every layout.
            assert [mine[name] for name in same] == pytest.approx(
                [wanted[name] for name in same], rel=1e-5
            )


def test_pairs_of_texts_are_what_transformers_makes_of_them(root: Path) -> None:
    """A second text has tokens of type 1, in rows of several documents and on every layout."""
    folder = write_words(root / "bert")
    torch.manual_seed(0)
    encoder = auto_class("bert").from_config(
        transformers.AutoConfig.for_model(**CASES["bert"] | STILL)
    )
    randomize(encoder)
    encoder.save_pretrained(folder)
    draw, rows = random.Random(2), []
    for _ in range(32):
        first, second = ([draw.randint(5, 96) for _ in range(draw.randint(1, 4))] for _ in range(2))
        texts = {
            key: " ".join(f"w{n}" for n in some)
            for key, some in (("sentence1", first), ("sentence2", second))
        }
        rows.append({**texts, "label": "none" if set(first).isdisjoint(second) else "many"})
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess_rows(
        [str(root / "pairs.jsonl")],
        root / "pairs",
        Settings("classification", str(folder), labels=("many", "none")),
    )
    source = f"[{{path: {root / 'pairs'}}}]"
    alone, *others = [
        config_of(
            root, "bert", "classification", f"run.name=pairs{number}", f"data.train={source}", f"data.valid={source}",
            "train.steps=2", "observe.eval_every=2", *more,
        )
        for number, more in enumerate(((), ("parallel.context=2",), ("parallel.tensor=2", "parallel.sequence=true")))
    ]  # fmt: skip
    train(alone)
    run_ranks(2, train_on_rank, others)
    found = find_model(alone.run.folder)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(found).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    losses = []
    for row in rows:
        inputs = tokenizer(row["sentence1"], row["sentence2"], return_tensors="pt")
        inputs["token_type_ids"] = torch.tensor(
            [tokenizer.backend_tokenizer.encode(row["sentence1"], row["sentence2"]).type_ids]
        )
        with torch.no_grad():
            logits = theirs(**inputs).logits
        losses.append(
            F.cross_entropy(logits, torch.tensor([alone.model.labels.index(row["label"])])).item()
        )
    last = metrics_of(alone)[-1]
    assert last["valid_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    for config in others:
        for mine, wanted in zip(metrics_of(config), metrics_of(alone), strict=True):
            same = [name for name in wanted if name.startswith(("loss", "grad_norm", "valid"))]
            # As above.
            assert [mine[name] for name in same] == pytest.approx(
                [wanted[name] for name in same], rel=1e-5
            )


@pytest.mark.parametrize(
    ("case", "task"), [*((case, "classification") for case in FAMILIES), ("roberta", "labels")]
)
def test_classes_are_learned_and_transformers_tells_the_same(
    case: str, task: str, root: Path
) -> None:
    config = config_of(root, case, task)
    train(config)
    last = metrics_of(config)[-1]
    assert last["valid_accuracy"] > 0.9
    folder = find_model(config.run.folder)
    auto = {
        "classification": transformers.AutoModelForSequenceClassification,
        "labels": transformers.AutoModelForTokenClassification,
    }[task]
    theirs, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    right = []
    for line in (root / f"{task}.jsonl").read_text().splitlines():
        row = json.loads(line)
        words, wanted = (row["text"], [row["label"]]) if task == "classification" else (
            " ".join(row["tokens"]), row["labels"])  # fmt: skip
        with torch.no_grad():
            told = theirs.eval()(tokenizer(words, return_tensors="pt")["input_ids"]).logits.argmax(
                -1
            )[0]
        told = told.view(-1) if task == "classification" else told[1:-1]
        right += [
            theirs.config.id2label[n] == name for n, name in zip(told.tolist(), wanted, strict=True)
        ]
    # Validation has seen as many samples as there are whole batches of them.
    assert sum(right) / len(right) == pytest.approx(last["valid_accuracy"], abs=0.05)


def test_layouts_tell_alike(root: Path) -> None:
    layouts = {
        "alone": (), "tensor": ("parallel.tensor=2",), "pipeline": ("parallel.pipeline=2",),
        "context": ("parallel.context=2",),
    }  # fmt: skip
    short = ("train.steps=3", "observe.eval_every=3")
    configs = {
        name: [
            config_of(root, case, "classification", f"run.name={name}-{case}", *short, *more)
            for case in FAMILIES[:2]
        ]
        for name, more in layouts.items()
    }
    for config in configs["alone"]:
        train(config)
    others = [config for name, some in configs.items() if name != "alone" for config in some]
    run_ranks(2, train_on_rank, others)
    for config in others:
        case = config.run.name.partition("-")[2]
        alone = next(each for each in configs["alone"] if each.run.name == f"alone-{case}")
        for mine, wanted in zip(metrics_of(config), metrics_of(alone), strict=True):
            same = [name for name in wanted if name.startswith(("loss", "grad_norm", "valid"))]
            # fp32 sums in another order; 1e-5 is the project's bound for every layout.
            assert [mine[name] for name in same] == pytest.approx(
                [wanted[name] for name in same], rel=1e-5
            )
