"""Read what annotation tools export as rows of labelled data: Label Studio (JSON, JSON-MIN), Argilla
(records as JSON, nested or flat) and doccano (JSONL, a file for each annotator).

An export holds items, and what one or several annotators said of each. An item becomes one row of a
format: by the commonest judgement, or only where all agree. Rows that are no export pass through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from megalite.data.agreement import describe, krippendorff
from megalite.data.formats import FIRST_TEXTS, SECOND_TEXTS
from megalite.data.rows import Row
from megalite.utils.outside import shown

Disagreement = Literal["vote", "drop"]
RULES: tuple[Disagreement, ...] = get_args(Disagreement)
WORD = re.compile(r"\w+|[^\w\s]")
OUTSIDE = "O"
PAIRS = (
    ("left", "right"), ("answer1", "answer2"), ("response1", "response2"), ("text1", "text2"), ("a", "b"),
    ("answer_a", "answer_b"), ("response_a", "response_b"), ("option1", "option2"), ("output1", "output2"),
)  # fmt: skip
"""Names that two answers to be compared usually have, the left one first."""
PROMPTS = ("prompt", "instruction", "question", "query")
TEXTS = ("text", "sentence", "document", "content")


class Tool(Protocol):
    """Describes what a tool exports."""

    name: str

    def reads(self, values: Mapping[str, Any]) -> bool:
        """Return whether a row is of its exports."""

    def shown(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the annotator of a row was shown, by name."""

    def judgements(self, row: Row, kind: str) -> Iterable[tuple[Any, str, Any]]:
        """Yield what was said in a row: the number of its item, the annotator, and the judgement of
        this `kind`, see `Item`. Raise ValueError, KeyError or TypeError for what is no export."""


@dataclass
class Item:
    """Holds what annotators were shown, and what each of them said of it."""

    row: Row
    shown: Mapping[str, Any]
    said: dict[str, Any] = field(default_factory=dict)
    """By annotator: a class, a set of classes, a number, spans (start, stop, label), an order of
    names, the best first, or a text."""


@dataclass
class Annotated:
    """Holds the rows of an export, and how they came about."""

    rows: list[Row]
    agreement: dict[str, float]
    counts: Counter[str]
    """What was left out, and how often."""


def tool_of(row: Row) -> Tool | None:
    """Return the tool whose export a row is of, None for any other row."""
    return next((tool for tool in TOOLS if not row.why and tool.reads(row.values)), None)


def read_annotations(
    rows: Iterable[Row], tool: Tool, format: str, problem: str, rule: Disagreement
) -> Annotated:
    """Return the rows of `format` that an export of `tool` gives. `problem` is that of a
    classification; `rule` is what becomes of items on which annotators disagree."""
    kind = {"multi_label": "classes", "regression": "regression"}.get(problem, format)
    items: dict[Any, Item] = {}
    counts: Counter[str] = Counter()
    found: list[Row] = []
    for row in rows:
        try:
            if row.why:
                raise ValueError(row.why)
            said = list(tool.judgements(row, kind))
            shown_values = tool.shown(row.values)
            for key, annotator, value in said:
                # Two projects may count their items alike: a number is of one item only where the
                # text is the same as well.
                place = key, *(str(shown_values.get(name)) for name in (*TEXTS, *PROMPTS))
                items.setdefault(place, Item(row, shown_values)).said[annotator] = value
            counts["items that an annotator has not judged"] += not said
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            found.append(row._replace(why=f"not what {tool.name} exports: {error}"))
    sound = []
    for item in items.values():
        try:
            found += _row_of(item, format, kind, rule, counts)
            sound.append(_comparable(item, kind))
        except (ValueError, KeyError, TypeError) as error:
            found.append(item.row._replace(why=str(error)))
    return Annotated(found, _agreement(sound, kind), +counts)


def _row_of(
    item: Item, format: str, kind: str, rule: Disagreement, counts: Counter[str]
) -> list[Row]:
    """Return the row of an item, or none where its annotators disagree too much."""
    values = list(item.said.values())
    if not values:
        return []
    if kind == "regression" and rule == "vote":
        value: Any = sum(values) / len(values)
    else:
        ranked = Counter(values).most_common()
        value, most = ranked[0]
        tied = sum(count == most for _, count in ranked) > 1
        # Of spans a tie is none yet: whole sets of them are rarely the same, single ones are.
        if (rule == "drop" and len(ranked) > 1) or (tied and kind != "labels"):
            counts["items on which annotators disagree"] += 1
            return []
        if tied:
            value = _most_spans(values)
    return [item.row._replace(values=MAKERS[format](item.shown, value), why="")]


def _most_spans(values: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Return the spans that more than half of the annotators marked alike."""
    marked = Counter(span for spans in values for span in set(spans))
    return tuple(sorted(span for span, count in marked.items() if 2 * count > len(values)))


def _comparable(item: Item, kind: str) -> list[dict[str, Any]]:
    """Return what annotators said of an item, in parts that are compared: of spans, the label of
    each word. Raise ValueError for spans that overlap."""
    if kind != "labels":
        return [item.said]
    text = _text_in(item.shown)
    tags = {name: _words_of(text, spans) for name, spans in item.said.items()}
    return [dict(zip(tags, labels, strict=True)) for labels in zip(*tags.values(), strict=True)]


def _words_of(text: str, spans: Sequence[tuple[int, int, str]]) -> list[str]:
    """Return the label of each word of a text whose words are not cut by spans."""
    _words(text, spans)
    return [
        next(
            (label for start, stop, label in spans if start < word.end() and word.start() < stop),
            OUTSIDE,
        )
        for word in WORD.finditer(text)
    ]


def _agreement(items: Sequence[list[dict[str, Any]]], kind: str) -> dict[str, float]:
    """Return how far annotators agree."""
    labels = [said for item in items for said in item]
    if kind in ("completion", "seq2seq"):
        return {}  # corrections are rarely the same, letter by letter
    if kind == "regression":
        found = krippendorff([list(said.values()) for said in labels], interval=True)
        return {"krippendorff_alpha": found} if any(len(said) > 1 for said in labels) else {}
    return describe(labels)


# --- rows of a format: each function takes what was shown and what was said of it ------------------


def _text_in(shown_values: Mapping[str, Any], names: Sequence[str] = TEXTS) -> str:
    """Return the text among what was shown. Raise ValueError if it cannot be told."""
    texts = {
        key: value
        for key, value in shown_values.items()
        if isinstance(value, str) and value.strip()
    }
    found = [key for key in names if key in texts] or list(texts)
    if len(found) != 1 and found[:1] not in ([name] for name in names):
        raise ValueError(
            f"which of {', '.join(texts) or 'no fields'} is the text? name it {names[0]!r} in the tool's project"
        )
    return texts[found[0]]


def _words(text: str, spans: Sequence[tuple[int, int, str]]) -> tuple[list[str], list[str]]:
    """Return the words of a text, cut where spans begin and end, and the label of each by BIO.
    Raise ValueError for spans that overlap or lie outside."""
    ordered, last = sorted(spans), 0
    for start, stop, label in ordered:
        if not last <= start < stop <= len(text):
            raise ValueError(
                f"the span {label!r} at {start} to {stop} overlaps another one, or lies outside of the text"
            )
        last = stop
    words, labels, place = [], [], 0
    for start, stop, label in [*ordered, (len(text), len(text), "")]:
        outside = WORD.findall(text[place:start])
        inside = WORD.findall(text[start:stop])
        words += outside + inside
        labels += [OUTSIDE] * len(outside)
        labels += [f"{'I' if number else 'B'}-{label}" for number in range(len(inside))]
        place = stop
    return words, labels


def _classification(shown_values: Mapping[str, Any], value: Any) -> dict[str, Any]:
    found = {"label": list(value) if isinstance(value, tuple) else value}
    if second := next((name for name in SECOND_TEXTS if shown_values.get(name)), None):
        return found | {
            "text": _text_in(shown_values, FIRST_TEXTS),
            "text_pair": shown_values[second],
        }
    return found | {"text": _text_in(shown_values)}


def _labels(shown_values: Mapping[str, Any], value: Any) -> dict[str, Any]:
    words, labels = _words(_text_in(shown_values), value)
    return {"tokens": words, "labels": labels}


def _preference(shown_values: Mapping[str, Any], value: Any) -> dict[str, Any]:
    best, worst = (shown_values[name] for name in (value[0], value[-1]))
    return {"prompt": _text_in(shown_values, PROMPTS), "chosen": best, "rejected": worst}


def _completion(shown_values: Mapping[str, Any], value: Any) -> dict[str, Any]:
    return {"prompt": _text_in(shown_values, PROMPTS), "completion": value}


def _seq2seq(shown_values: Mapping[str, Any], value: Any) -> dict[str, Any]:
    return {"source": _text_in(shown_values, ("source", *TEXTS)), "target": value}


MAKERS = {
    "classification": _classification, "labels": _labels, "preference": _preference, "completion": _completion,
    "seq2seq": _seq2seq,
}  # fmt: skip


# --- tools: each says whether a row is of its exports, what was shown, and who said what -----------


class LabelStudio:
    """Tasks with their annotations, and JSON-MIN, which has one annotation a row."""

    name = "Label Studio"

    def reads(self, values: Mapping[str, Any]) -> bool:
        return (isinstance(values.get("data"), dict) and "annotations" in values) or (
            "annotation_id" in values and "annotator" in values
        )

    def shown(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        data = values.get("data")
        return _with_items(data if isinstance(data, dict) else values)

    def judgements(self, row: Row, kind: str) -> Iterable[tuple[Any, str, Any]]:
        values = row.values
        if "annotations" not in values:
            yield values.get("id"), str(values["annotator"]), self._minimal(values, kind)
            return
        for annotation in values["annotations"]:
            # The annotator has passed the task over; what was marked before that is still there.
            if annotation.get("was_cancelled"):
                continue
            by = annotation.get("completed_by")
            by = by.get("email", by.get("id")) if isinstance(by, dict) else by
            found = self._value(annotation["result"], self.shown(values), kind)
            if found is not None:
                yield values.get("id", row.line), str(by), found

    @staticmethod
    def _value(results: Sequence[Any], shown_values: Mapping[str, Any], kind: str) -> Any:
        """Return what one annotation says, None if it says nothing of this kind."""
        of_type: dict[str, list[Any]] = {}
        for result in results:
            # Relations join what others of the results mark, and mark nothing themselves.
            if result.get("type") not in ("relation", None):
                of_type.setdefault(result["type"], []).append(result)
        if kind == "labels":
            return tuple(sorted(_span(each["value"]) for each in of_type.get("labels", [])))
        if kind == "preference":
            if "pairwise" in of_type:
                result = of_type["pairwise"][0]
                names = _sides(result.get("to_name"), shown_values)
                return names if result["value"]["selected"] == "left" else names[::-1]
            for each in of_type.get("ranker", []):
                return _order(each["value"]["ranker"], shown_values)
            return None
        if kind == "regression":
            ratings = [*of_type.get("rating", []), *of_type.get("number", [])]
            return float(next(iter(ratings[0]["value"].values()))) if ratings else None
        if kind in ("completion", "seq2seq"):
            texts = of_type.get("textarea", [])
            return "\n".join(as_list(texts[0]["value"]["text"])) if texts else None
        chosen = [name for each in of_type.get("choices", []) for name in each["value"]["choices"]]
        return _classes(chosen, kind)

    @staticmethod
    def _minimal(values: Mapping[str, Any], kind: str) -> Any:
        """Return what a row of JSON-MIN says: one of its fields, whose name is free."""
        known = {"id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"}
        found = {
            key: value for key, value in values.items() if key not in (*known, *TEXTS, *PROMPTS)
        }
        if kind == "labels":
            spans = next((x for x in found.values() if isinstance(x, list)), [])
            return tuple(sorted(_span(each) for each in spans))
        if len(found) != 1:
            raise ValueError(
                f"which of {', '.join(found) or 'no fields'} is the judgement? export as JSON, not JSON-MIN"
            )
        (value,) = found.values()
        if isinstance(value, dict) and "choices" in value:
            value = value["choices"]
        if kind == "regression":
            return float(value["rating"] if isinstance(value, dict) else value)
        return _classes(as_list(value), kind) if kind in ("classification", "classes") else value


class Argilla:
    """Records with the responses to each question, nested or flat."""

    name = "Argilla"

    def reads(self, values: Mapping[str, Any]) -> bool:
        return (isinstance(values.get("fields"), dict) and "responses" in values) or any(
            key.endswith(".responses") for key in values
        )

    def shown(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        if isinstance(values.get("fields"), dict):
            return values["fields"]
        passed = ("id", "status", "_server_id", "inserted_at", "updated_at")
        return {key: x for key, x in values.items() if "." not in key and key not in passed}

    def judgements(self, row: Row, kind: str) -> Iterable[tuple[Any, str, Any]]:
        values = row.values
        responses: dict[str, Any] = {}
        if isinstance(values.get("fields"), dict):
            responses = values["responses"] or {}
        else:
            for key in values:
                if key.endswith(".responses") and values[key]:
                    users = values[f"{key}.users"]
                    statuses = values.get(f"{key}.status") or ["submitted"] * len(users)
                    responses[key.removesuffix(".responses")] = [
                        {"value": value, "user_id": user, "status": status}
                        for value, user, status in zip(values[key], users, statuses, strict=True)
                    ]
        for answers in responses.values():
            for answer in answers:
                if answer.get("status") in (None, "submitted"):
                    value = self._value(answer["value"], self.shown(values), kind)
                    if value is not None:
                        yield values.get("id", row.line), str(answer["user_id"]), value

    @staticmethod
    def _value(value: Any, shown_values: Mapping[str, Any], kind: str) -> Any:
        """Return what one response says, None if its question is of another kind."""
        items = value if isinstance(value, list) else []
        if kind == "labels":
            is_spans = all(isinstance(each, dict) and "start" in each for each in items)
            return (
                tuple(sorted(_span(each) for each in items))
                if items == value and is_spans
                else None
            )
        if kind == "preference":
            is_order = items and all(isinstance(each, dict) and "rank" in each for each in items)
            return _order(items, shown_values) if is_order else None
        if kind == "regression":
            return float(value) if isinstance(value, int | float) else None
        if kind in ("completion", "seq2seq"):
            return value if isinstance(value, str) else None
        if isinstance(value, str) or (items and all(isinstance(each, str) for each in items)):
            return _classes(as_list(value), kind)
        return None


class Doccano:
    """Rows of a text and its labels. With several annotators doccano exports a file for each, whose
    name is theirs."""

    name = "doccano"

    def reads(self, values: Mapping[str, Any]) -> bool:
        # Rows of any corpus have a text and a label; a capital "Comments" is doccano's alone.
        return (
            "text" in values
            and "Comments" in values
            and bool({"label", "entities", "cats"} & {*values})
        )

    def shown(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"text": values["text"]}

    def judgements(self, row: Row, kind: str) -> Iterable[tuple[Any, str, Any]]:
        values, by = row.values, Path(row.path).name.partition(".")[0]
        key = values.get("id", row.line)
        if kind == "labels":
            spans = values.get("entities", values.get("label"))
            yield key, by, tuple(sorted(_span(each) for each in spans or []))
            return
        said = values.get("cats", values.get("label")) or []
        if kind in ("completion", "seq2seq"):
            if said:
                yield key, by, said[0]
        elif (value := _classes(said, kind)) is not None:
            yield key, by, value


TOOLS: tuple[Tool, ...] = (LabelStudio(), Argilla(), Doccano())


# --- parts of judgements -----------------------------------------------------------------------------


def as_list(value: Any) -> list[Any]:
    """Return a value as a list of it, a list as it is."""
    return value if isinstance(value, list) else [value]


def _classes(chosen: Sequence[str], kind: str) -> Any:
    """Return the class that was chosen, or the classes where several may be; None for none. Raise
    ValueError for several where one is wanted."""
    if kind == "classes":
        return tuple(sorted(chosen))
    if len(chosen) > 1:
        raise ValueError(
            f"{shown(list(chosen))} are several classes, which --problem multi_label takes"
        )
    return chosen[0] if chosen else None


def _span(value: Any) -> tuple[int, int, str]:
    """Return (start, stop, label) of a span in any tool's spelling."""
    if isinstance(value, list | tuple):
        start, stop, label = value
    else:
        start = value["start"] if "start" in value else value["start_offset"]
        stop = value["end"] if "end" in value else value["end_offset"]
        label = value["labels"] if "labels" in value else value["label"]
    if isinstance(label, list):
        (label,) = label
    return int(start), int(stop), str(label)


def _sides(named: Any, shown_values: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of the two texts that were compared, the left one first. Raise ValueError if
    they cannot be told."""
    candidates = [tuple(named)] if isinstance(named, list) and len(named) == 2 else []
    for pair in (*candidates, *PAIRS):
        if all(isinstance(shown_values.get(name), str) for name in pair):
            return pair[0], pair[1]
    raise ValueError(
        f"which of {', '.join(shown_values)} are the two answers? give the tags the names of the fields"
    )


def _with_items(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what was shown, with the items of lists to be ranked by their ids."""
    found = dict(data)
    for value in data.values():
        for item in value if isinstance(value, list) else ():
            if isinstance(item, dict) and "id" in item:
                text = next((item[key] for key in ("body", "text", "title") if item.get(key)), None)
                found[str(item["id"])] = text
    return found


def _order(ranking: Any, shown_values: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Return names from the best to the worst, None where the best or the worst is shared. Raise
    ValueError for a name that was not shown."""
    if isinstance(ranking, dict):  # Label Studio: lists by bucket
        ranking = next(iter(ranking.values()))
    ranks = {
        str(each["value"] if isinstance(each, dict) else each): (
            each["rank"] if isinstance(each, dict) else place
        )
        for place, each in enumerate(ranking)
    }
    names = sorted(ranks, key=lambda name: ranks[name])
    if unknown := next(
        (name for name in names if not isinstance(shown_values.get(name), str)), None
    ):
        raise ValueError(f"{unknown!r} was ranked, but no text of that name was shown")
    if len(names) < 2 or list(ranks.values()).count(ranks[names[0]]) > 1:
        return None
    return tuple(names) if ranks[names[0]] < ranks[names[-1]] else None
