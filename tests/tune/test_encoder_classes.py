"""Classes of texts and of words by encoders, which tell a text's class at its first token, on several layouts."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from encoders import write_words
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.infer.generate import find_model
from megalite.train import train
from ranks import run_ranks
from small_runs import metrics_of, train_on_rank
from tiny_models import CASES, auto_class

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
        rows["classification"].append({"text": " ".join(words), "label": "many" if max(numbers) > 70 else "none"})
        rows["labels"].append({"tokens": words, "labels": ["big" if n > 50 else "small" for n in numbers]})
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


@pytest.mark.parametrize(("case", "task"), [*((case, "classification") for case in FAMILIES), ("roberta", "labels")])
def test_classes_are_learned_and_transformers_tells_the_same(case: str, task: str, root: Path) -> None:
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
            told = theirs.eval()(tokenizer(words, return_tensors="pt")["input_ids"]).logits.argmax(-1)[0]
        told = told.view(-1) if task == "classification" else told[1:-1]
        right += [theirs.config.id2label[n] == name for n, name in zip(told.tolist(), wanted, strict=True)]
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
            config_of(root, case, "classification", f"run.name={name}-{case}", *short, *more) for case in FAMILIES[:2]
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
            assert [mine[name] for name in same] == pytest.approx([wanted[name] for name in same], rel=1e-5)
