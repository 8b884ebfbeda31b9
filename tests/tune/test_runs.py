"""Whole finetuning runs: what they learn, resume, write and refuse."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chats import write_rows, write_tokenizer
from megalite.checkpoint.folder import step_folder
from megalite.config import Config
from megalite.config_file import parse_config
from megalite.data.formats import Format, Settings
from megalite.data.preprocess_rows import preprocess_rows
from megalite.errors import ConfigError, DataError
from megalite.train import train
from megalite.training.objectives import Classes
from ranks import run_ranks
from small_runs import curve_of, metrics_of, train_on_rank

WORDS = ["hello", "world", "Paris", "France", "two"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as transformers saves it, with its tokenizer, and rows that follow a rule."""
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("runs")
    tokenizer = write_tokenizer(root / "start")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(root / "start")
    rng = random.Random(0)

    def some() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))

    pairs = [
        {"prompt": some(), "chosen": " hello " + some(), "rejected": " world " + some()}
        for _ in range(40)
    ]
    texts = [
        {"text": text, "label": "place" if "a" in text else "none"}
        for text in (some() for _ in range(120))
    ]
    chats = [
        {
            "messages": [
                {"role": "user", "content": some()},
                {"role": "assistant", "content": "hello"},
            ]
        }
    ] * 4
    kinds: dict[Format, list[dict[str, Any]]] = {
        "preference": pairs,
        "classification": texts,
        "chat": chats,
    }
    for kind, rows in kinds.items():
        preprocess_rows(
            [str(write_rows(root / f"{kind}.jsonl", rows))],
            root / kind,
            Settings(kind, str(tokenizer)),
        )
    return root


def config_of(
    root: Path, folder: Path, name: str, data: str, *overrides: str, **sections: Any
) -> Config:
    source = [{"path": str(root / data)}]
    return parse_config(
        {
            "run": {"name": name, "dir": str(folder)},
            "model": {"hf": str(root / "start")} | sections.pop("model", {}),
            "data": {
                "train": source, "valid": source, "seq_length": 48, "document_mask": True,
                "tokenizer": str(root / "start"),
            },
            "train": {"steps": 8, "global_batch_size": 4, "micro_batch_size": 2, "precision": "fp32"},
            "optimizer": {"lr": 3e-3},
            "checkpoint": {"every": 0},
            "observe": {"eval_every": 4},
            **sections,
        },
        overrides,
    )  # fmt: skip


DPO = {"objective": {"name": "dpo", "beta": 0.5}}


def test_dpo_raises_the_margin_and_resumes_bitwise(root: Path, tmp_path: Path) -> None:
    unbroken = config_of(root, tmp_path, "unbroken", "preference", **DPO)
    train(unbroken)
    steps = [line for line in metrics_of(unbroken) if "loss" in line]
    assert steps[0]["loss"] == pytest.approx(0.6931, abs=1e-4), (
        "nothing is preferred before the first step"
    )
    assert steps[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    evaluations = [line for line in metrics_of(unbroken) if "valid_loss" in line]
    assert evaluations[-1]["valid_reward_margin"] > evaluations[0]["valid_reward_margin"] > 0.1
    assert evaluations[-1]["valid_reward_accuracy"] > 0.9
    assert "valid_perplexity" not in evaluations[-1]
    first = config_of(root, tmp_path, "broken", "preference", "train.stop_at=3", **DPO)
    train(first)
    kept = first.run.folder / "reference.safetensors"
    wanted = load_file(kept)
    assert wanted.keys() == {"train.0", "valid.0"}
    for missing in (False, True):  # it is computed again, with the model that the run started from
        if missing:
            kept.unlink()
        rest = config_of(
            root, tmp_path, "broken", "preference", f"train.stop_at={5 + 3 * missing}", **DPO
        )
        train(rest)
        assert all(torch.equal(load_file(kept)[name], table) for name, table in wanted.items())
    assert curve_of(rest) == curve_of(unbroken)
    found = [
        load_file(step_folder(c.run.folder / "checkpoints", 8) / "model.safetensors")
        for c in (unbroken, rest)
    ]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_quantised_model_is_its_own_reference(root: Path, tmp_path: Path) -> None:
    """And not the model as it is stored, whose log-probabilities an earlier start has kept; likewise
    one whose products are in fp8."""
    few, fp8 = {"lora": {"rank": 4, "quantize_base": "int8"}}, {"recipe": "rowwise"}
    shorter = {
        "steps": 8,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "precision": "fp32",
        "stop_at": 1,
    }
    configs = [
        config_of(root, tmp_path, "few", "preference", **DPO, **more, train=shorter | train_more)
        for more, train_more in (
            ({"lora": {"rank": 4}}, {}), (few, {}), ({}, {}), ({}, {"fp8": fp8 | {"first_last_bf16": [0, 0]}}),
        )
    ]  # fmt: skip
    for config in configs:
        train(config)
        shutil.rmtree(config.run.folder / "checkpoints")
        first = next(line for line in metrics_of(config) if "loss" in line)
        assert first["reward_margin"] == pytest.approx(0, abs=1e-6)
        (config.run.folder / "metrics.jsonl").unlink()


HEAD = {"model": {"task": "classification", "labels": ["none", "place"]}}


def test_layouts_validate_alike(root: Path, tmp_path: Path) -> None:
    kinds: dict[str, tuple[str, dict[str, Any]]] = {
        "parallel.pipeline=2": ("preference", DPO), "parallel.tensor=2": ("classification", HEAD)
    }  # fmt: skip
    pairs = [
        [
            config_of(
                root, tmp_path, f"{data}-{ranks}", data, "train.steps=2", *overrides, **sections
            )
            for ranks, overrides in ((1, ()), (2, (layout,)))
        ]
        for layout, (data, sections) in kinds.items()
    ]
    for one, _ in pairs:
        train(one)
    run_ranks(2, train_on_rank, [two for _, two in pairs])
    for one, two in pairs:
        for mine, theirs in zip(metrics_of(two), metrics_of(one), strict=True):
            same = [name for name in theirs if name.startswith(("loss", "reward", "valid"))]
            assert len(same) >= 1 + 4 * ("valid_loss" in theirs)
            assert [mine[name] for name in same] == pytest.approx(
                [theirs[name] for name in same], rel=1e-4, abs=1e-6
            )


def test_a_classifier_learns_and_transformers_opens_it(root: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    config = config_of(
        root,
        tmp_path,
        "classes",
        "classification",
        "train.steps=40",
        "observe.eval_every=40",
        **HEAD,
    )
    train(config)
    last = metrics_of(config)[-1]
    assert last["valid_accuracy"] > 0.95
    assert {"valid_f1", "valid_precision", "valid_recall"} <= last.keys()
    folder = step_folder(config.run.folder / "checkpoints", 40)
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert theirs.config.id2label == {0: "none", 1: "place"}
    rows = [json.loads(line) for line in (root / "classification.jsonl").read_text().splitlines()]
    inputs = AutoTokenizer.from_pretrained(folder, pad_token="<|endoftext|>")(
        [row["text"] for row in rows],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    with torch.no_grad():
        told = theirs.eval()(**inputs).logits.argmax(-1).tolist()
    right = sum(
        theirs.config.id2label[n] == row["label"] for n, row in zip(told, rows, strict=True)
    )
    # Validation has seen as many samples as there are whole batches of them.
    assert right / len(rows) == pytest.approx(last["valid_accuracy"], abs=0.05)


def test_averages_are_those_of_the_definitions() -> None:
    """2 classes that occur, one that is only told, one that is neither."""
    there, told, right = torch.tensor([[4, 6, 0, 0], [5, 4, 1, 0], [3, 3, 0, 0]])
    found = Classes.summary(None, 0.0, 10.0, torch.cat((there, told, right)))  # type: ignore[arg-type]
    assert found == pytest.approx(
        {
            "accuracy": 0.6, "precision": (3 / 5 + 3 / 4 + 0) / 3, "recall": (3 / 4 + 3 / 6 + 0) / 3,
            "f1": (6 / 9 + 6 / 10 + 0) / 3, "matthews": (6 * 10 - 44) / (58 * 48) ** 0.5,
        }
    )  # fmt: skip


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("preference", {}, "holds rows of format 'preference', which go with objective.name: dpo"),
    ("chat", DPO, "holds rows of format 'chat', which go with objective.name: next_token"),
    ("chat", {"model": {"task": "labels", "labels": ["a", "b"]}}, "this run has model.task: labels"),
    ("classification", {"model": {"task": "classification", "labels": ["a", "b"]}},
     r"has the classes \['none', 'place'\], but model.labels = \['a', 'b'\]"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "sections", "why"), REFUSED)
def test_data_of_another_kind_is_refused(
    root: Path, tmp_path: Path, data: str, sections: dict[str, Any], why: str
) -> None:
    with pytest.raises(DataError, match=why):
        train(config_of(root, tmp_path, "refused", data, **sections))


IMPOSSIBLE: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    (DPO, ("data.document_mask=false",), "objective.name: dpo needs data.document_mask: true"),
    (DPO, ("data.long_rows=cut",), "long_rows must be refuse or drop"),
    ({"model": {"task": "labels"}}, (), "model.labels = .*different names of classes"),
    ({"model": {"labels": ["a", "b"]}}, (), "need model.task: classification or labels"),
    ({"model": {"task": "labels", "labels": ["a", "a"]}}, (), "different names of classes"),
    (
        {"model": {"task": "labels", "labels": ["a", "b"]}},
        ("train.loss_chunk=8",),
        "needs train.loss_chunk: null",
    ),
]


@pytest.mark.parametrize(("sections", "overrides", "why"), IMPOSSIBLE)
def test_what_cannot_be_is_refused(
    root: Path, tmp_path: Path, sections: dict[str, Any], overrides: tuple[str, ...], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        config_of(root, tmp_path, "refused", "chat", *overrides, **sections)


def test_a_family_without_such_a_head_is_named() -> None:
    model = {
        "family": "gpt_neox",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
    }
    with pytest.raises(
        ConfigError, match="not known for the gpt_neox family; it is for bert, modernbert"
    ):
        parse_config(
            {
                "model": {
                    **model,
                    "intermediate_size": 64,
                    "max_positions": 64,
                    "task": "labels",
                    "labels": ["a", "b"],
                }
            }
        )
