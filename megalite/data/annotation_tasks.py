"""Write rows for annotation tools to import, with what a model says of each as what annotators begin
with: Label Studio (JSON), Argilla (records as JSON) and doccano (JSONL). What they export again is
read by `annotations.py`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from xml.sax.saxutils import quoteattr

from megalite.data.annotations import OUTSIDE, as_list
from megalite.errors import ConfigError

Kind = Literal["classification", "classes", "labels", "completion"]
"""What is asked of annotators: a class of a text, classes, labels of spans, or an answer."""
Span = tuple[int, int, str]
TAGS = {
    "classification": "Choices",
    "classes": "Choices",
    "labels": "Labels",
    "completion": "TextArea",
}
QUESTIONS = {
    "classification": "label",
    "classes": "label",
    "labels": "label",
    "completion": "answer",
}
"""Name of the question in the tool, which the import refers to."""
PAIR = "text_pair"


class Task(NamedTuple):
    """A row to be labelled."""

    shown: Mapping[str, str]
    """What annotators see, by name: text or prompt first, text_pair."""
    said: Any
    """What the model says: a class, classes, spans, or a text."""
    probability: float | None
    uncertainty: float
    origin: str
    """Where the row is from."""


def spans_of(words: Sequence[str], labels: Sequence[str | None]) -> list[Span]:
    """Return the spans (start, stop, label) of the labels of words, in the words joined by spaces:
    of BIO labels a span from each B to the last I behind it, of others one for each word."""
    spans: list[Span] = []
    place, before = 0, OUTSIDE
    for word, label in zip(words, labels, strict=True):
        label, stop = label or OUTSIDE, place + len(word)
        part, dash, name = label.partition("-")
        if dash and part in ("B", "I"):
            # An I behind another label begins a span, as readers of BIO have it.
            if part == "I" and before in (f"B-{name}", label):
                spans[-1] = (spans[-1][0], stop, name)
            else:
                spans.append((place, stop, name))
        elif label != OUTSIDE:
            spans.append((place, stop, label))
        place, before = stop + 1, label  # one more, for the space between two words
    return spans


def label_studio(tasks: Sequence[Task], kind: Kind, model: str) -> str:
    """Return the JSON that Label Studio imports, with predictions. The project is to have the
    labelling config that `label_studio_config` gives."""
    found = []
    for task in tasks:
        first = next(iter(task.shown))
        prediction: dict[str, Any] = {"model_version": model, "result": _results(task, kind, first)}
        if task.probability is not None:
            prediction["score"] = task.probability
        meta = {"origin": task.origin, "uncertainty": task.uncertainty}
        found.append({"data": dict(task.shown), "meta": meta, "predictions": [prediction]})
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


def _results(task: Task, kind: Kind, first: str) -> list[dict[str, Any]]:
    tag = {"from_name": QUESTIONS[kind], "to_name": first, "type": TAGS[kind].lower()}
    if kind == "labels":
        text = task.shown[first]
        return [
            tag
            | {
                "id": f"span{number}",
                "value": {"start": start, "end": stop, "text": text[start:stop], "labels": [name]},
            }
            for number, (start, stop, name) in enumerate(task.said)
        ]
    value = {"text": [task.said]} if kind == "completion" else {"choices": as_list(task.said)}
    return [tag | {"id": "said", "value": value}]


def label_studio_config(shown: Sequence[str], kind: Kind, labels: Sequence[str]) -> str:
    """Return the labelling config of a project in which such tasks are labelled."""
    lines = [f'  <Text name="{name}" value="${name}"/>' for name in shown]
    tag, question = TAGS[kind], QUESTIONS[kind]
    if kind == "completion":
        lines.append(f'  <{tag} name="{question}" toName="{shown[0]}" rows="6" editable="true"/>')
    else:
        one = {"classification": ' choice="single"', "classes": ' choice="multiple"'}.get(kind, "")
        inner = "Label" if kind == "labels" else "Choice"
        lines.append(f'  <{tag} name="{question}" toName="{shown[0]}"{one}>')
        lines += [f"    <{inner} value={quoteattr(label)}/>" for label in labels]
        lines.append(f"  </{tag}>")
    return "\n".join(["<View>", *lines, "</View>", ""])


def argilla(tasks: Sequence[Task], kind: Kind, model: str) -> str:
    """Return the JSON that Argilla's `dataset.records.from_json` reads, with suggestions."""
    found = []
    for task in tasks:
        suggestion: dict[str, Any] = {"value": task.said, "agent": model}
        if kind == "labels":
            suggestion["value"] = [
                {"start": start, "end": stop, "label": name} for start, stop, name in task.said
            ]
        if task.probability is not None and kind == "classification":
            suggestion["score"] = task.probability
        found.append({
            "id": task.origin, "fields": dict(task.shown), "metadata": {"uncertainty": task.uncertainty},
            "suggestions": {QUESTIONS[kind]: suggestion}, "responses": {}, "vectors": {},
        })  # fmt: skip
    return json.dumps(found, ensure_ascii=False, indent=1) + "\n"


def doccano(tasks: Sequence[Task], kind: Kind, model: str) -> str:
    """Return the JSON lines that doccano imports, with labels; it shows one text. Raise ConfigError
    for two."""
    lines = []
    for task in tasks:
        if PAIR in task.shown:
            raise ConfigError(
                "doccano shows one text, not two; --tool label-studio and argilla show both"
            )
        (text,) = task.shown.values()
        said = [list(span) for span in task.said] if kind == "labels" else as_list(task.said)
        row = {"text": text, "label": said, "origin": task.origin, "uncertainty": task.uncertainty}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


WRITERS: Mapping[str, Callable[[Sequence[Task], Kind, str], str]] = {
    "label-studio": label_studio, "argilla": argilla, "doccano": doccano,
}  # fmt: skip
