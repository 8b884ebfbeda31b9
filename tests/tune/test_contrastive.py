"""Vectors of texts that belong together: loss and gradients of a step on each layout, against a
plain statement of them on transformers' model, which sees each text alone; and runs."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from encoders import write_words
from megalite.checkpoint.convert import open_source, write_model
from megalite.checkpoint.export import write_extras
from megalite.checkpoint.load import from_hf
from megalite.comm.mesh import make_mesh
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.formats import Settings
from megalite.data.indexed import IndexedDataset
from megalite.data.mixture import build_mixtures
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError
from megalite.infer.encode import Encoder, read_pooling
from megalite.infer.generate import find_model
from megalite.models import weight_table
from megalite.plan import make_plan
from megalite.train import train
from megalite.training.parts import build, forward_backward
from megalite.training.run import Run, make_loader
from ranks import cases_asked_for, run_ranks
from small_runs import curve_of, metrics_of, train_on_rank
from tiny_models import CASES, STILL, auto_class, randomize

transformers = pytest.importorskip("transformers")

SCALE = 7.0
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {}),
    "tensor 2": (2, {"tensor": 2}),
    "tensor 2, sequence": (2, {"tensor": 2, "sequence": True}),
    "pipeline 2": (2, {"pipeline": 2}),
    "data 2": (2, {"zero_stage": 2}),
    "context 2": (2, {"context": 2}),
}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bert": (CASES["bert"] | STILL, {}),
    "modernbert": (CASES["modernbert"], {"pooling": "first", "symmetric": True}),
    "llama": (CASES["llama-grouped-queries"], {"pooling": "last"}),
}
"""transformers' config, and settings of the objective."""
RUNS = [
    (model, layout)
    for model in MODELS
    for layout in LAYOUTS
    if model == "bert" or layout in ("alone", "context 2")
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of each family, and pairs of texts that share a word."""
    root, draw = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for name, (values, _) in MODELS.items():
        torch.manual_seed(0)
        model = auto_class(values["model_type"]).from_config(
            transformers.AutoConfig.for_model(**values)
        )
        randomize(model)
        model.save_pretrained(write_words(root / name))
    rows = []
    for _ in range(48):
        topic = draw.randint(5, 50)
        texts = [
            [topic, *(draw.randint(51, 96) for _ in range(draw.randint(0, 3)))] for _ in range(2)
        ]
        rows.append(
            {
                name: " ".join(f"w{n}" for n in text)
                for name, text in zip(("query", "positive"), texts, strict=True)
            }
        )
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess_rows(
        [str(root / "rows.jsonl")], root / "rows", Settings("pairs", str(root / "bert"))
    )
    return root


def config_of(root: Path, model: str, layout: str, *overrides: str) -> Config:
    source = [{"path": str(root / "rows")}]
    return parse_config(
        {
            "run": {"name": f"{model} {layout}".replace(" ", "-").replace(",", ""), "dir": str(root / "runs")},
            "model": {"hf": str(root / model)},
            "data": {
                "train": source, "valid": source, "seq_length": 32, "document_mask": True,
                "tokenizer": str(root / model),
            },
            "objective": {"name": "contrastive", "scale": SCALE, **MODELS[model][1]},
            "parallel": {"bucket_mb": 0.01, **LAYOUTS[layout][1]},
            "train": {"steps": 2, "global_batch_size": 4, "micro_batch_size": 1, "precision": "fp32"},
            "optimizer": {"lr": 1e-3},
        },
        overrides,
    )  # fmt: skip


def step(
    rank: int, world_size: int, root: Path, runs: list[tuple[str, str]]
) -> list[dict[str, Any]]:
    found = []
    for model, layout in runs:
        config = config_of(root, model, layout)
        table = weight_table(config.model)
        plan = make_plan(config, table, world_size)
        mesh = make_mesh(plan, torch.device("cpu"))
        parts = build(config, plan, mesh)
        parts.engine.load(from_hf(root / model, table, config.model, mesh))
        with make_loader(build_mixtures(config)["train"], Run(config, plan, mesh, None)) as loader:
            told = forward_backward(parts, next(loader), mesh, seed=0)
        owners = {
            weight.name: plan.rank_at(
                next(s.index for s in plan.stages if s.holds(weight.place)) % plan.pipeline, 0, 0
            )
            for weight in table
        }
        grads = parts.engine.gather("grad", owners)
        by_hf = {
            hf: x for w in table if w.name in grads for hf, x in w.to_hf(grads[w.name]).items()
        }
        found.append({"told": {name: x.item() for name, x in told.items()}, "grads": by_hf})
    return found


@pytest.fixture(scope="module")
def results(root: Path, request: pytest.FixtureRequest) -> dict[tuple[str, str], dict[str, Any]]:
    cases = cases_asked_for(request, test_a_step_is_that_of_the_plain_statement)
    asked = [(each["model"], each["layout"]) for each in cases]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for ranks, runner in ((1, lambda n, f, *rest: [f(0, n, *rest)]), (2, run_ranks)):
        runs = [run for run in asked if LAYOUTS[run[1]][0] == ranks]
        of_ranks = runner(ranks, step, root, runs) if runs else []
        for number, run in enumerate(runs):
            parts = [results[number] for results in of_ranks]
            grads = {name: x for part in parts for name, x in part["grads"].items()}
            found[run] = {"told": parts[0]["told"], "grads": grads}
    return found


@cache
def plain(root: Path, name: str) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Loss, accuracy and gradients of the texts of the first batch."""
    config = config_of(root, name, "alone")
    mixture = build_mixtures(config)["train"]
    assert mixture is not None
    theirs = transformers.AutoModel.from_pretrained(root / name, attn_implementation="eager").eval()
    vectors = []
    samples = mixture.read(np.arange(4))
    assert samples.documents is not None
    for tokens, documents, labels in zip(
        samples.tokens, samples.documents, samples.labels, strict=True
    ):
        for document in range(documents[labels >= 0].max() + 1):
            states = theirs(
                torch.from_numpy(tokens[documents == document])[None]
            ).last_hidden_state[0]
            pooling = MODELS[name][1].get("pooling", "mean")
            vectors.append(
                {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
            )
    one, other = F.normalize(torch.stack(vectors), dim=1).unflatten(0, (-1, 2)).unbind(1)
    assert len(one) > 8, "several pairs in a sample"
    scores, number = SCALE * one @ other.T, torch.arange(len(one))
    loss = F.cross_entropy(scores, number)
    if MODELS[name][1].get("symmetric"):
        loss = (loss + F.cross_entropy(scores.T, number)) / 2
    loss.backward()
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return loss.item(), (scores.argmax(1) == number).double().mean().item(), grads


@pytest.mark.parametrize(("model", "layout"), RUNS)
def test_a_step_is_that_of_the_plain_statement(
    model: str, layout: str, root: Path, results: dict[tuple[str, str], dict[str, Any]]
) -> None:
    """Pairs of all micro-batches and replicas are each other's negatives, on every layout."""
    loss, accuracy, grads = plain(root, model)
    found = results[model, layout]
    assert found["told"] == pytest.approx({"loss": loss, "accuracy": accuracy}, rel=1e-5)
    prefix = next(iter(found["grads"])).partition(".")[0]
    compared = 0
    for name, grad in grads.items():
        mine = found["grads"][f"{prefix}.{name}"]
        # 0 but for rounding: a softmax does not see what all scores have in common.
        if name.endswith("key.bias"):
            continue
        # The project's bound for every layout.
        assert ((mine - grad).norm() / grad.norm()).item() <= 1e-5, name
        compared += 1
    assert compared > 8
    heads = [name for name in found["grads"] if not name.startswith(prefix)]
    assert all(not found["grads"][name].any() for name in heads), "no head is trained"


def test_pairs_are_learned_and_the_folder_says_how_to_pool(root: Path) -> None:
    more = (
        "train.steps=40",
        "observe.eval_every=40",
        "optimizer.lr=3e-3",
        "optimizer.schedule.name=constant",
    )
    config = config_of(root, "bert", "alone", "run.name=learned", *more, "train.micro_batch_size=2")
    train(config)
    first, last = metrics_of(config)[0], metrics_of(config)[-1]
    assert last["valid_accuracy"] > max(0.9, first["accuracy"])
    folder = find_model(config.run.folder)
    assert read_pooling(folder) == ("mean", True, None)
    write_model(open_source(folder), root / "converted")
    assert read_pooling(root / "converted") == ("mean", True, None)
    (root / "adapter").mkdir()
    write_extras(root / "adapter", config_of(root, "bert", "alone", "lora.rank=2"), None)
    assert read_pooling(root / "adapter") == ("mean", True, None)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    queries, others = (
        Encoder.open(folder).embed([row[key] for row in rows]) for key in ("query", "positive")
    )
    assert np.mean((queries @ others.T).argmax(1) == np.arange(len(rows))) > 0.6
    assert IndexedDataset(str(root / "rows")).num_documents == 96


def test_layouts_drop_and_judge_alike(root: Path) -> None:
    short = ("train.steps=3", "observe.eval_every=3", "model.hidden_dropout=0.1")
    alone, *others = (
        config_of(root, "bert", layout, f"run.name=short{number}", *short)
        for number, layout in enumerate(("alone", "data 2", "pipeline 2", "context 2"))
    )
    train(alone)
    run_ranks(2, train_on_rank, others)
    for config in others:
        np.testing.assert_allclose(curve_of(config), curve_of(alone), rtol=1e-5)  # as above
        judged = [
            [x[f"valid_{name}"] for name in ("loss", "accuracy")]
            for x in (metrics_of(config)[-1], metrics_of(alone)[-1])
        ]
        assert judged[0] == pytest.approx(judged[1], rel=1e-5)


@pytest.mark.parametrize(
    ("model", "override", "words"),
    [
        ("bert", "data.document_mask=false", "contrastive needs data.document_mask: true"),
        ("llama", "objective.pooling=first", "pooling: first is for encoders"),
        (
            "bert",
            "model={hf: HF, task: classification, labels: [a, b]}",
            "contrastive trains no head of model.task",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    model: str, override: str, words: str, root: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(root, model, "alone", override.replace("HF", str(root / model)))
