"""Classification heads on the final hidden states, as in transformers' …ForSequenceClassification and
…ForTokenClassification: a text is classified at its last token, tokens each at its own. They take the place of the
head for the next token. transformers applies dropout before the latter; here there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch.nn as nn

from megalite.config import ModelConfig
from megalite.errors import ConfigError
from megalite.models.hf import disagree, require
from megalite.models.layers import Decoder
from megalite.models.weights import Weight

MODELS = {
    "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3",
}  # fmt: skip
"""Families that can have such a head, with the stem of transformers' class names."""
KINDS = {"classification": "ForSequenceClassification", "labels": "ForTokenClassification"}


def check_head(config: ModelConfig) -> None:
    """Raise ConfigError where the task, the labels and the family do not go together."""
    if config.task == "causal":
        if config.labels:
            raise ConfigError(f"model.labels = {list(config.labels)} need model.task: classification or labels")
        return
    if config.family not in MODELS:
        raise ConfigError(
            f"model.task = {config.task!r} is not known for the {config.family} family; it is for {', '.join(MODELS)}"
        )
    if len(set(config.labels)) != len(config.labels) or len(config.labels) < 2:
        raise ConfigError(f"model.labels = {list(config.labels)}: give two or more different names of classes")


def head_rows(config: ModelConfig, rows: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the table of a model with its head in place: `rows`, with those of a classification head instead of the
    usual."""
    if config.task == "causal":
        return tuple(rows)
    # The embedding is then not tied to the head.
    body = [
        replace(row, place="first", used=0.0) if row.place == "both" else row
        for row in rows
        if row.name != "head.weight"
    ]
    count = len(config.labels)
    shape, name = (count, config.hidden_size), head_name(config)
    head = [Weight("head.weight", shape, (f"{name}.weight",), "vocab", init=config.init_std, place="last")]
    if config.task == "labels":
        head.append(Weight("head.bias", shape[:1], (f"{name}.bias",), "vocab", init="zeros", decay=False, place="last"))
    return (*body, *head)


def put_on(model: Decoder, config: ModelConfig) -> Decoder:
    """Give the model the head that its task needs."""
    if config.task != "causal":
        model.head = nn.Linear(config.hidden_size, len(config.labels), bias=config.task == "labels")
    return model


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that describe the head."""
    if config.task == "causal":
        return {}
    return {
        "architectures": [MODELS[config.family] + KINDS[config.task]],
        "id2label": {str(number): name for number, name in enumerate(config.labels)},
        "label2id": {name: number for number, name in enumerate(config.labels)},
        "problem_type": "single_label_classification" if config.task == "classification" else None,
        "classifier_dropout": 0.0,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the `model:` section that describe the head."""
    architecture = str((hf.get("architectures") or [""])[0])
    for task, kind in KINDS.items():
        if architecture.endswith(kind):
            require(hf, str(hf.get("model_type")), {"problem_type": "single_label_classification"})
            return {"task": task, "labels": _labels(hf)}
    return {}


def _labels(hf: dict[str, Any]) -> list[str]:
    """Return the names of the classes. Classes that config.json leaves out have no names, and by rule there are
    two."""
    given = hf.get("id2label") or {number: f"LABEL_{number}" for number in range(hf.get("num_labels") or 2)}
    names = {int(number): str(name) for number, name in given.items()}
    if hf.get("num_labels") not in (None, len(names)):
        disagree(f"id2label = {given}", f"num_labels = {hf['num_labels']}")
    numbers = hf.get("label2id")
    # Names that transformers filled in before the classes had any carry no information.
    unnamed = {f"LABEL_{number}": number for number in names}
    if numbers and numbers not in (unnamed, {name: number for number, name in names.items()}):
        disagree(f"id2label = {given}", f"label2id = {numbers}")
    return [names[number] for number in sorted(names)]


def head_name(config: ModelConfig) -> str:
    """Return what Hugging Face's tensors of the head are called."""
    return "classifier" if (config.family, config.task) == ("gpt2", "labels") else "score"
