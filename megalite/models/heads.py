"""Classification heads on the final hidden states, as in transformers' …ForSequenceClassification,
…ForTokenClassification and …ForQuestionAnswering: a text is classified at its last token, by
encoders at its first; tokens each at its own, also as where an answer starts and ends. They take
the place of the head that predicts tokens. transformers applies dropout before some; here there is
none."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch.nn as nn

from megalite.config import ANSWER_LABELS, NUM_LABELS, ModelConfig
from megalite.errors import ConfigError
from megalite.models.hf import disagree, require
from megalite.models.layers import Decoder, SetLoss, SquaredLoss
from megalite.models.weights import Weight, head_rows
from megalite.registry import families
from megalite.utils.outside import shown


class HeadNames(NamedTuple):
    """What transformers calls a family's classification heads."""

    stem: str
    """Stem of the class names."""
    classification: str = "score"
    labels: str = "score"
    biased: tuple[str, ...] = ("labels",)
    """Tasks whose head has a bias."""
    answers: str = ""
    """Empty where the family has no such head."""


ALL = ("classification", "labels", "answers")
NAMES = {
    "bert": HeadNames("Bert", "classifier", "classifier", ALL, "qa_outputs"),
    "modernbert": HeadNames("ModernBert", "classifier", "classifier", ALL, "classifier"),
    "roberta": HeadNames("Roberta", "classifier.out_proj", "classifier", ALL, "qa_outputs"),
    "gpt2": HeadNames("GPT2", labels="classifier"),
    **{
        family: HeadNames(stem)
        for family, stem in {
            "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "smollm3": "SmolLM3",
        }.items()
    },
}  # fmt: skip
"""By family, those that can have such a head."""
KINDS = {
    "classification": "ForSequenceClassification", "labels": "ForTokenClassification",
    "answers": "ForQuestionAnswering",
}  # fmt: skip
SENTENCES = "sentences."
"""How rows of BERT's pooler and head for pairs of sentences begin."""
PROBLEMS = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""transformers' names of what a text's head tells."""
LOSSES = {"multi_label": SetLoss, "regression": SquaredLoss}


def check_head(config: ModelConfig) -> None:
    """Raise ConfigError where the task, the labels and the family do not go together."""
    if config.task == config.PREDICTS:
        if config.labels:
            raise ConfigError(
                f"model.labels = {list(config.labels)} need model.task: classification or labels"
            )
        if config.problem != "single_label":
            raise ConfigError(
                f"model.problem = {config.problem!r} needs model.task: classification"
            )
        return
    if not config.has_classes:
        raise ConfigError(
            f"model.task = {config.task!r} is not known for the {config.family} family, whose own task is "
            f"{config.PREDICTS}"
        )
    known = [name for name, names in NAMES.items() if getattr(names, config.task)]
    if config.family not in known:
        raise ConfigError(
            f"model.task = {config.task!r} is not known for the {config.family} family; it is for {', '.join(known)}"
        )
    if config.task == "answers" and config.labels != ANSWER_LABELS:
        raise ConfigError(
            f"model.labels = {list(config.labels)}: model.task: answers has {list(ANSWER_LABELS)}; leave it out"
        )
    if config.problem != "single_label" and config.task != "classification":
        raise ConfigError(
            f"model.problem = {config.problem!r} needs model.task: classification, not {config.task}"
        )
    least, most = NUM_LABELS[config.problem]
    if len(set(config.labels)) != len(config.labels) or not least <= len(config.labels) <= most:
        wanted = (
            "one name, that of the number"
            if most == 1
            else f"{least} to {most:,} different names of classes"
        )
        raise ConfigError(
            f"model.labels = {list(config.labels)}: model.problem: {config.problem} takes {wanted}"
        )


def with_head(config: ModelConfig, rows: Iterable[Weight]) -> tuple[Weight, ...]:
    """Return the table of a model with its head in place: `rows`, with those of a classification
    head instead of the usual."""
    if not config.has_classes:
        return tuple(rows)
    # The embedding is then not tied to the head.
    body = [
        replace(row, place="first", used=0.0) if row.place == "both" else row
        for row in rows
        # A tied embedding (place "both") loses its second end: the new head has rows of its own.
        if row.name != "head.weight"
    ]
    name = head_name(config)
    weight, bias = f"{name}.weight", f"{name}.bias" if has_bias(config) else None
    # Cut as a vocabulary is, of as many words as there are classes: the loss needs no other code.
    head = head_rows(len(config.labels), config.hidden_size, config.init_std, weight, bias)
    return (*body, *head)


def put_on(model: Decoder, config: ModelConfig) -> Decoder:
    """Give the model the head that its task needs."""
    if config.has_classes:
        model.head = nn.Linear(config.hidden_size, len(config.labels), bias=has_bias(config))
        if config.problem != "single_label":
            # A single label is a word of a small vocabulary, whose loss the family has.
            model.loss = LOSSES[config.problem](len(config.labels))
    return model


def own_table(config: ModelConfig) -> tuple[Weight, ...]:
    """Return the rows of the model with its family's own head, which predicts tokens."""
    own = config.model_copy(update={"task": config.PREDICTS, "labels": ()})
    return tuple(families.get(config.family).weights(own))


def names_of(rows: Iterable[Weight]) -> set[str]:
    """Return the names of the Hugging Face tensors of `rows`."""
    return {name for row in rows for name in row.hf}


def lacking_head(config: ModelConfig, rows: Sequence[Weight], files: Container[str]) -> set[str]:
    """Return the names of those `rows` of a head that files with the tensors `files` lack, and that
    a new head may stand for: one for classes, or an encoder's for masked tokens where nothing of it
    is there."""
    if config.has_classes:
        # A final norm, which every model of the family has, is no part of a head.
        own = names_of(own_table(config))
        head = [row for row in rows if row.place == "last" and not own & set(row.hf)]
    else:  # what is not below the prefix of transformers' model without a head
        prefix = rows[0].hf[0].partition(".")[0] + "."
        last = [row for row in rows if row.place == "last" and not row.name.startswith(SENTENCES)]
        head = [row for row in last if not row.hf[0].startswith(prefix)]
    lacking = {row.name for row in head if not any(name in files for name in row.hf)}
    of_sentences = _lacking_for_sentences(rows, files)
    # A head that is there in part is no missing one, but a damaged file.
    is_all = config.task == "masked" and len(lacking) == len(head)
    if config.has_classes or is_all:
        return lacking | of_sentences
    return of_sentences


def _lacking_for_sentences(rows: Sequence[Weight], files: Container[str]) -> set[str]:
    """Return the names of those rows for pairs of sentences whose whole module files lack."""
    modules: dict[str, list[Weight]] = {}
    for row in rows:
        if row.name.startswith(SENTENCES):
            modules.setdefault(row.name.rpartition(".")[0], []).append(row)
    lacking = [of for of in modules.values() if not any(row.hf[0] in files for row in of)]
    return {row.name for of in lacking for row in of}


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that describe the head."""
    if not config.has_classes:
        return {}
    if config.task == "answers":
        return {
            "architectures": [NAMES[config.family].stem + KINDS[config.task]],
            "classifier_dropout": 0.0,
        }
    return {
        "architectures": [NAMES[config.family].stem + KINDS[config.task]],
        "id2label": {str(number): name for number, name in enumerate(config.labels)},
        "label2id": {name: number for number, name in enumerate(config.labels)},
        "problem_type": PROBLEMS[config.problem] if config.task == "classification" else None,
        "classifier_dropout": 0.0,
    }


def from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of the `model:` section that describe the head."""
    architecture = str((hf.get("architectures") or [""])[0])
    for task, kind in KINDS.items():
        if architecture.endswith(kind):
            if task == "answers":
                if len(_labels(hf)) != len(ANSWER_LABELS):
                    disagree(f"architectures = [{architecture}]", f"id2label = {hf['id2label']}")
                # transformers gives both ends the names of any two classes, which say nothing.
                return {"task": task, "labels": ANSWER_LABELS}
            # The architecture's name alone says what a folder's head is for; id2label is in many
            # configs.
            if task == "labels":
                require(hf, str(hf.get("model_type")), {"problem_type": PROBLEMS["single_label"]})
                return {"task": task, "labels": _labels(hf)}
            labels = _labels(hf)
            # As transformers takes it where it is left out.
            stored = (
                hf.get("problem_type")
                or PROBLEMS["regression" if len(labels) == 1 else "single_label"]
            )
            problem = next((ours for ours, theirs in PROBLEMS.items() if theirs == stored), None)
            if problem is None:
                raise ConfigError(
                    f"config.json has problem_type = {shown(stored)}, none of {', '.join(PROBLEMS.values())}"
                )
            return {"task": task, "labels": labels, "problem": problem}
    return {}


def _labels(hf: dict[str, Any]) -> list[str]:
    """Return the names of the classes. Classes that config.json leaves out have no names, and by
    rule there are two."""
    count = hf.get("num_labels") or 2
    most = max(most for _, most in NUM_LABELS.values())
    if count > most:
        raise ConfigError(
            f"config.json has num_labels = {shown(count)}, more than the {most:,} that there can be"
        )
    given = hf.get("id2label") or {number: f"LABEL_{number}" for number in range(count)}
    # Keys of JSON are text, and text has another order: 10 stands before 2.
    names = {int(number): str(name) for number, name in given.items()}
    if hf.get("num_labels") not in (None, len(names)):
        disagree(f"id2label = {given}", f"num_labels = {hf['num_labels']}")
    numbers = hf.get("label2id")
    # Names that transformers filled in before the classes had any carry no information.
    unnamed = {f"LABEL_{number}": number for number in names}
    own = {name: number for number, name in names.items()}
    if numbers and numbers not in (unnamed, own):
        disagree(f"id2label = {given}", f"label2id = {numbers}")
    return [names[number] for number in sorted(names)]


def head_name(config: ModelConfig) -> str:
    """Return what Hugging Face's tensors of the head are called."""
    return str(getattr(NAMES[config.family], config.task))


def has_bias(config: ModelConfig) -> bool:
    """Return whether the classification head has a bias."""
    return config.task in NAMES[config.family].biased
