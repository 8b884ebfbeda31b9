"""What rows of labelled data look like, and what is to be learned from each: chats, prompts with completions, preferred
and rejected answers, texts with a class, words with labels.

Field names are those of TRL, OpenAI, ShareGPT and the `datasets` library. A row becomes one or two texts with values
over parts of them; a token's value, in PREFIX.mask, is that of the part it lies in: 0 where nothing is learned, 1 where
the token is learned itself, 1 + number of the class where that is."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from megalite.data.chat import ChatTemplate, Message
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalite.errors import DataError

Format = Literal["chat", "completion", "preference", "classification", "labels"]
FORMATS: tuple[Format, ...] = get_args(Format)
CLASSES = ("classification", "labels")
"""Formats whose tokens have classes."""
LABEL_FIELDS = {"classification": ("label", "labels"), "labels": ("labels", "ner_tags", "tags")}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant"}
"""ShareGPT's names."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    format: Format
    tokenizer: str
    last_only: bool = False
    """Of a chat, only the last answer is learned."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""


class Part(NamedTuple):
    start: int
    stop: int
    value: int


class Text(NamedTuple):
    """Of a row, with the parts that have values."""

    text: str
    parts: Sequence[Part]
    add_end: bool = False
    """It is to end with the tokenizer's end-of-document token, which is learned."""
    first_only: bool = False
    """Of each part, only the first token has the value."""
    add_begin: bool = False
    """It is to begin with what the tokenizer has begin every text, as whoever asks the model does; a chat template
    writes that itself."""


class Encoded(NamedTuple):
    """A document of a token file."""

    ids: Sequence[int]
    values: np.ndarray
    """[len(ids)], as in PREFIX.mask."""
    text_bytes: int


class Encoder:
    """Rows of one format into tokens. Raises DataError where the tokenizer cannot serve."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = text_tokenizer(settings.tokenizer)
        self._settings = settings
        self._template: ChatTemplate | None = None
        self._texts: Callable[[Values], list[Text]] = getattr(self, f"_{settings.format}")
        if settings.format == "chat":
            self._open_template()
        if settings.format not in CLASSES and self.tokenizer.eod_id is None:
            raise DataError(
                f"{settings.tokenizer} names no end-of-document token, without which a model never learns where to "
                "end: give tokenizer_config.json an eos_token"
            )

    def encode(self, rows: Sequence[Values]) -> list[list[Encoded] | str]:
        """Of each row the one document, or the two of a preference; or why there are none."""
        texts: list[list[Text] | str] = []
        for row in rows:
            try:
                texts.append(self._texts(row))
            except ValueError as error:
                texts.append(str(error))
        flat = [text for found in texts if not isinstance(found, str) for text in found]
        encoded = iter(self._encode(flat))
        return [found if isinstance(found, str) else [next(encoded) for _ in found] for found in texts]

    def _encode(self, texts: Sequence[Text]) -> list[Encoded]:
        found = []
        together = self.tokenizer.encode_with_offsets([text.text for text in texts])
        for text, (ids, offsets) in zip(texts, together, strict=True):
            places = np.array(offsets, np.int64).reshape(-1, 2)
            borders = [] if text.first_only else _reached_across(places, text.parts)
            if borders:
                apart = self._encode_apart(text.text, borders)
                # Where a tokenizer has a space begin every text, pieces of one would be another text.
                if self.tokenizer.decode(apart[0]) == self.tokenizer.decode(ids):
                    ids, places = apart
            values = _values_of(places, text)
            if text.add_begin:
                begin = self.tokenizer.begin_ids
                ids, values = [*begin, *ids], np.concatenate([np.zeros(len(begin), np.int64), values])
            if self._settings.format not in CLASSES:
                values[:1] = 0  # nothing comes before it to tell it from
            if text.add_end:
                assert self.tokenizer.eod_id is not None
                ids, values = [*ids, self.tokenizer.eod_id], np.append(values, 1)
            found.append(Encoded(ids, values, len(text.text.encode())))
        return found

    def _encode_apart(self, text: str, borders: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """Whoever asks the model gives it what comes before an answer alone: no token may reach across."""
        cuts = [0, *borders, len(text)]
        pieces = self.tokenizer.encode_with_offsets([text[a:b] for a, b in itertools.pairwise(cuts)])
        places = [np.array(p[1], np.int64).reshape(-1, 2) + cut for p, cut in zip(pieces, cuts, strict=False)]
        return [token for ids, _ in pieces for token in ids], np.concatenate(places)

    # --- formats: each takes a row to its texts, or raises ValueError that says what is wrong with it ------------

    def _chat(self, row: Values) -> list[Text]:
        field = _first(row, "messages", "conversations", "conversation")
        return [self._answered(_messages(row[field], field), row.get("tools"), self._settings.last_only)]

    def _completion(self, row: Values) -> list[Text]:
        prompt, completion = row[_first(row, "prompt")], row[_first(row, "completion")]
        if isinstance(prompt, str) and isinstance(completion, str):
            return [_continued(prompt, completion, "completion")]
        return [self._replied(_messages(prompt, "prompt"), completion, "completion", row.get("tools"))]

    def _preference(self, row: Values) -> list[Text]:
        sides = {field: row[_first(row, field)] for field in ("chosen", "rejected")}
        if sides["chosen"] == sides["rejected"]:
            raise ValueError("'chosen' and 'rejected' are the same")
        prompt = next((row[field] for field in ("prompt", "messages") if row.get(field)), None)
        if isinstance(prompt, str) and all(isinstance(side, str) for side in sides.values()):
            return [_continued(prompt, side, field) for field, side in sides.items()]
        if prompt is None and not all(isinstance(side, list) for side in sides.values()):
            raise ValueError(f"no field 'prompt' or 'messages'; fields here: {', '.join(row)}")
        before = _messages([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt or [], "prompt")
        return [self._replied(before, side, field, row.get("tools")) for field, side in sides.items()]

    def _classification(self, row: Values) -> list[Text]:
        text = _text(row, _first(row, "text", "sentence"))
        label = self._number(row[_first(row, *LABEL_FIELDS["classification"])])
        # Of every token, so that a text that is cut keeps it; a model tells it at the last one.
        return [Text(text, [Part(0, len(text), 1 + label)], add_begin=True)]

    def _labels(self, row: Values) -> list[Text]:
        field, of = _first(row, "tokens", "words"), _first(row, *LABEL_FIELDS["labels"])
        words, labels = row[field], row[of]
        if not (isinstance(words, list) and words and all(isinstance(word, str) and word for word in words)):
            raise ValueError(f"{field!r} must be a list of words that are not empty")
        if not isinstance(labels, list) or len(labels) != len(words):
            raise ValueError(f"{of!r} must be a list of {len(words)} labels, one for each of {field!r}")
        parts, place = [], 0
        for word, label in zip(words, labels, strict=True):
            parts.append(Part(place, place + len(word), 0 if label == -100 else 1 + self._number(label)))
            place += len(word) + 1
        return [Text(" ".join(words), parts, first_only=True, add_begin=True)]

    # --- parts of formats ----------------------------------------------------------------------------------------

    def _answered(self, messages: Sequence[Message], tools: Any, last: bool) -> Text:
        template = self._open_template()
        text, spans = template.answers(messages, tools, last)
        # An end behind a turn of somebody else's is not the model's to learn.
        is_last = not text[spans[-1].stop :].strip()
        add_end = is_last and not template.is_ended(text, spans[-1])
        return Text(text, [Part(s.start, s.stop, 1) for s in spans], add_end)

    def _replied(self, before: list[Message], reply: Any, field: str, tools: Any) -> Text:
        """A conversation of which the last answer is learned."""
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        messages = [*before, *_messages([reply] if isinstance(reply, Mapping) else reply, field)]
        if not messages or messages[-1]["role"] != "assistant":
            raise ValueError(f"{field!r} must end with a message of the assistant")
        return self._answered(messages, tools, last=True)

    def _open_template(self) -> ChatTemplate:
        if self._template is None:
            self._template = ChatTemplate.of(Path(self._settings.tokenizer), self.tokenizer.control_tokens())
        return self._template

    def _number(self, label: Any) -> int:
        names = self._settings.labels
        if isinstance(label, int) and 0 <= label < len(names):
            return int(label)
        if str(label) in names and isinstance(label, str):
            return names.index(label)
        raise ValueError(f"label {label!r} is none of the {len(names)}: {', '.join(names[:20])}")


def text_tokenizer(path: str) -> HuggingFaceTokenizer:
    """Raises DataError where it cannot say which characters a token is made of."""
    tokenizer: Tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise DataError(f"{path}: labelled data needs a folder with a tokenizer.json")
    return tokenizer


def labels_in(row: Values, format: Format) -> list[Any]:
    """The labels that a row names. Raises ValueError where it has none."""
    labels = row[_first(row, *LABEL_FIELDS[format])]
    if format == "classification":
        return [labels]
    if not isinstance(labels, list):
        raise ValueError("the labels must be a list, one for each word")
    return [label for label in labels if label != -100]


def _reached_across(places: np.ndarray, parts: Sequence[Part]) -> list[int]:
    """Beginnings of parts that lie within a token."""
    starts = {part.start for part in parts}
    return sorted(start for start in starts if np.any((places[:, 0] < start) & (start < places[:, 1])))


def _values_of(places: np.ndarray, text: Text) -> np.ndarray:
    """places: [T, 2], the characters [start, stop) of each token → [T]."""
    values = np.zeros(len(places), np.int64)
    for part in text.parts:
        first = int(np.searchsorted(places[:, 1], part.start, side="right"))
        last = int(np.searchsorted(places[:, 0], part.stop, side="left"))
        values[first : first + (last > first) if text.first_only else last] = part.value
    return values


def _continued(prompt: str, completion: str, field: str) -> Text:
    if not completion:
        raise ValueError(f"{field!r} is empty")
    return Text(
        prompt + completion, [Part(len(prompt), len(prompt) + len(completion), 1)], add_end=True, add_begin=True
    )


def _first(row: Values, *names: str) -> str:
    """The field that is there of several that mean the same."""
    for name in names:
        if row.get(name) is not None:
            return name
    wanted = " or ".join(map(repr, names))
    raise ValueError(f"no field {wanted}; fields here: {', '.join(map(str, row)) or 'none'}")


def _text(row: Values, field: str) -> str:
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{field!r} must be text that is not empty, not {row[field]!r:.50}")
    return row[field]


def _messages(found: Any, field: str) -> list[Message]:
    """Checked, in the words that templates know."""
    if not isinstance(found, list):
        raise ValueError(f"{field!r} must be a list of messages, not {type(found).__name__}")
    messages = []
    for number, message in enumerate(found):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} of {field!r} is not an object but {type(message).__name__}")
        if "from" in message and "role" not in message:
            role = message["from"]
            message = {"role": ROLES.get(str(role), role), "content": message.get("value")}
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not role:
            raise ValueError(f"message {number} of {field!r} has no 'role'; its keys: {', '.join(message)}")
        if not (isinstance(content, str | list) or message.get("tool_calls")):
            raise ValueError(f"message {number} of {field!r} has no 'content'; its keys: {', '.join(message)}")
        if isinstance(content, list):  # OpenAI's, of which most templates know nothing
            if not all(isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content):
                raise ValueError(f"message {number} of {field!r} holds something else than text")
            message = {**message, "content": "".join(part["text"] for part in content)}
        if role == "assistant" and not message.get("content") and not message.get("tool_calls"):
            raise ValueError(f"message {number} of {field!r} is an empty answer")
        messages.append(message)
    return messages
