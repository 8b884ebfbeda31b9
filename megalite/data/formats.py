"""Formats of labelled data, and what is learned from each row: chats, prompts with completions,
preferred and rejected answers, sources with targets, texts with a class, words with labels,
questions with the texts that answer them.

Field names are those of TRL, OpenAI, ShareGPT and the `datasets` library. A row becomes one or two
texts with values over parts of them. A token's value, in PREFIX.mask, is that of the part it lies
in: 0 where nothing is learned, 1 where the token itself is learned, 1 + number of the class where
that is; of a text with several classes 1 + their set as bits, of a number 1 + the bits of its
fp32; of an answer 1 where it starts, 2 where it ends, and 3 where it does both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from megalite.data.answers import find_answers
from megalite.data.chat import ChatTemplate
from megalite.data.contents import ContentEncoder
from megalite.data.messages import (
    MEDIA,
    MISSPELT,
    NEUTRAL,
    Conversation,
    read_messages,
    read_tools,
    with_arguments,
    with_system,
    without_nulls,
)
from megalite.data.pairs import dialogue, joined, repeats, without_repeated_prompt
from megalite.data.token_values import Part, Text, token_values
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megalite.errors import DataError, TemplateLimit
from megalite.utils.outside import is_unicode, shown
from megalite.utils.spelling import nearest

Format = Literal[
    "chat", "completion", "preference", "seq2seq", "classification", "labels", "answers", "pairs"
]
FORMATS: tuple[Format, ...] = get_args(Format)
CLASSES = ("classification", "labels")
"""Formats whose tokens have classes."""
WHOLE = (*CLASSES, "answers", "pairs")
"""Formats whose texts are begun and ended as the tokenizer does it."""
Problem = Literal["single_label", "multi_label", "regression"]
PROBLEMS: tuple[Problem, ...] = get_args(Problem)
LABEL_FIELDS = {
    "classification": ("label", "labels", "score"),
    "labels": ("labels", "ner_tags", "tags"),
}
CHATS = ("messages", "conversations", "conversation")
OF_CHATS = ("tools", "functions", "system", "system_prompt", "chat_template_kwargs")
OPENAI_PAIR = ("input", "preferred_output", "non_preferred_output")
FIRST_TEXTS = ("text", "sentence", "sentence1", "premise")
ANCHORS = ("anchor", "query", *FIRST_TEXTS)
PARTNERS = ("positive", "answer", "text_pair", "sentence2", "hypothesis")
SECOND_TEXTS = ("text_pair", "sentence2", "hypothesis")
FIELDS: Mapping[Format, tuple[str, ...]] = {
    "chat": (*CHATS, *OF_CHATS),
    "completion": ("prompt", "completion", *OF_CHATS),
    "preference": ("prompt", "messages", "chosen", "rejected", *OPENAI_PAIR, *OF_CHATS),
    "seq2seq": ("source", "input", "target", "output"),
    "pairs": (*ANCHORS, *PARTNERS),
    "classification": (*FIRST_TEXTS, *SECOND_TEXTS, *LABEL_FIELDS["classification"]),
    "labels": ("tokens", "words", *LABEL_FIELDS["labels"]),
    "answers": ("question", "context", "answers", "is_impossible"),
}
REFUSED = {
    **dict.fromkeys(MEDIA, "only text can be learned"),
    **dict.fromkeys(
        ("weight", "weights", "loss_weight", "sample_weight"),
        "rows have no weights; only messages have",
    ),
    "documents": "texts to look things up in are not given to chat templates",
    "history": "give earlier turns as messages",
}
"""Fields that are refused because they would change what is learned."""
RESERVED = frozenset((
    "messages", "conversation", "conversations", "tools", "documents", "template", "chat_template", "learned", "prompt",
    "add_generation_prompt", "continue_final_message", "return_assistant_tokens_mask",
))  # fmt: skip
"""Template variables that hold the conversation itself, which a row's `chat_template_kwargs` cannot
set."""
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Holds how rows are encoded."""

    format: Format
    tokenizer: str
    last_only: bool = False
    """Learn only the last answer of a chat."""
    labels: tuple[str, ...] = ()
    """Names of the classes."""
    problem: Problem = "single_label"
    """What is told of a text: one class, any number of them, or a number."""


class Encoded(NamedTuple):
    """Holds a document of a token file."""

    ids: Sequence[int]
    values: np.ndarray
    """[len(ids)], as in PREFIX.mask."""
    text_bytes: int


class Encoder:
    """Encodes rows of one format as tokens. Raises DataError if the tokenizer lacks what the format
    needs."""

    def __init__(self, settings: Settings) -> None:
        self.tokenizer = text_tokenizer(settings.tokenizer)
        self.seen: Counter[str] = Counter()
        """What was ignored in rows that were accepted, and how often."""
        self._settings = settings
        self._template: ChatTemplate | None = None
        self._contents: ContentEncoder | None = None
        self._texts: Callable[[Values], list[Text]] = getattr(self, f"_{settings.format}")
        if settings.format == "chat":
            self._open_template()
        if settings.format not in WHOLE:
            self._check_end()

    def _check_end(self) -> None:
        """Raise DataError if the tokenizer has no end-of-document token."""
        if self.tokenizer.eod_id is None:
            raise DataError(
                f"{self._settings.tokenizer} names no end-of-document token, without which a model never learns where "
                "to end: give tokenizer_config.json an eos_token"
            )

    def encode(self, rows: Sequence[Values]) -> list[list[Encoded] | str]:
        """Return for each row its document, the two documents of a preference, or the reason why
        there are none."""
        return [self._encode(row) for row in rows]

    def _encode(self, row: Values) -> list[Encoded] | str:
        """Encode one row. A refused row leaves no trace in `seen`."""
        before = self.seen.copy()
        try:
            row = without_nulls(row)
            self._check_fields(row)
            found = [self._encoded(text) for text in self._texts(row)]
            return [_as_one(*found)] if self._settings.format == "seq2seq" else found
        except TemplateLimit:
            raise
        except ValueError as error:
            why = str(error).removesuffix(_hint(self._settings.format))
        except Exception as error:
            # What rows hold is anybody's; one that breaks something costs itself alone.
            why = f"cannot be read: {type(error).__name__}: {error}"
        self.seen = before
        return why

    def _encoded(self, text: Text) -> Encoded:
        """Tokenize one text and the values of its parts."""
        if not is_unicode(text.text):
            raise ValueError("it holds half of a surrogate pair, which no UTF-8 text does")
        if text.literal is not None and self._contents is not None:
            ids, values = self._contents.token_values(text)
        else:
            ids, values = token_values(self.tokenizer, text)
        # Each text is encoded by itself, so that no token reaches from one into the other.
        if text.pair:
            behind = [*self.tokenizer.between_ids, *self.tokenizer.encode(text.pair)]
            ids, values = [*ids, *behind], np.pad(values, (0, len(behind)), mode="edge")
        if self._settings.format == "answers":
            values = _ends_of(values)
        if text.lead:
            before = [*self.tokenizer.encode(text.lead), *self.tokenizer.between_ids]
            ids, values = [*before, *ids], np.pad(values, (len(before), 0))
        if text.add_begin:
            begin = self.tokenizer.begin_ids
            end = self.tokenizer.end_ids if self._settings.format in WHOLE else []
            # Encoders tell the class of a text at its first token.
            value = values[0] if self._settings.format == "classification" and len(values) else 0
            ids = [*begin, *ids, *end]
            values = np.pad(values, (len(begin), len(end)), constant_values=value)
            if self._settings.format == "answers" and not values.any():
                values[0] = 3  # no answer: where the text begins
        if self._settings.format not in WHOLE:
            values[:1] = 0  # no token precedes it, so that nothing can predict it
        if text.add_end and ids[-1:] != [self.tokenizer.eod_id]:
            assert self.tokenizer.eod_id is not None
            ids, values = [*ids, self.tokenizer.eod_id], np.append(values, 1)
        return Encoded(ids, values, len(text.text.encode()) + len(text.pair.encode()))

    def _check_fields(self, row: Values) -> None:
        """Raise ValueError for a field that is refused or looks misspelt. Other unknown fields are
        counted, and so are never ignored silently."""
        used = FIELDS[self._settings.format]
        for name, value in row.items():
            if name in used or name in NEUTRAL or value in ("", [], {}):
                continue
            if name in REFUSED:
                raise ValueError(f"the row has {name!r}: {REFUSED[name]}")
            if near := nearest(name, used, MISSPELT):
                raise ValueError(f"unknown field {name!r}; did you mean {near!r}?")
            self.seen[f"field {name!r}"] += 1
        # As KTO's datasets have it: an answer and a verdict. SFT would learn the bad ones too.
        if self._settings.format not in WHOLE and row.get("label") in (False, 0, "0", "false"):
            raise ValueError(
                "the row's 'label' says that its answer was rejected; from it alone nothing is learned"
            )

    # --- formats: each method turns a row into its texts, or raises ValueError that says what is wrong with it

    def _chat(self, row: Values) -> list[Text]:
        """Return the text of a conversation, of which all answers, or the last one, are learned."""
        field = _first(row, *CHATS)
        talk = self._conversation(row, row[field], field)
        learned = talk.answers()
        if self._settings.last_only:
            learned = learned[-1:]
        return [self._answered(row, talk, learned)]

    def _completion(self, row: Values) -> list[Text]:
        """Return the text of a prompt and its completion, plain or as messages."""
        prompt, completion = row[_first(row, "prompt")], row[_first(row, "completion")]
        if isinstance(prompt, str) and isinstance(completion, str):
            self._no_messages(row)
            [answer] = self._without_prompt(prompt, [completion])
            return [_continued(prompt, answer, "completion")]
        talk, first = self._replied(row, prompt, completion, "completion")
        return [self._answered(row, talk, talk.answers(first))]

    def _preference(self, row: Values) -> list[Text]:
        """Return the texts of the chosen and the rejected answer to the same prompt."""
        if isinstance(asked := row.get("input"), Mapping) and "preferred_output" in row:
            outputs: dict[str, Any] = dict(
                zip(("chosen", "rejected"), map(row.get, OPENAI_PAIR[1:]), strict=True)
            )
            row = {**row, **asked, **outputs, "messages": None, "prompt": asked.get("messages")}
        sides = {field: row[_first(row, field)] for field in ("chosen", "rejected")}
        if sides["chosen"] == sides["rejected"]:
            raise ValueError("'chosen' and 'rejected' are the same")
        prompt = next((row[field] for field in ("prompt", "messages") if row.get(field)), None)
        if row.get("messages") not in (None, prompt, sides["chosen"]):
            raise ValueError(
                "the row has 'prompt' and 'messages', which differ; leave one of them out"
            )
        if all(isinstance(side, str) for side in sides.values()) and (
            prompt is None or isinstance(prompt, str)
        ):
            self._no_messages(row)
            return self._text_pair(row, prompt, sides)
        if prompt is None and not all(isinstance(side, list) for side in sides.values()):
            raise ValueError(f"no field 'prompt' or 'messages'; fields here: {', '.join(row)}")
        talks = {
            field: self._replied(row, prompt or [], side, field)[0] for field, side in sides.items()
        }
        # DPO compares two answers to one prompt; what comes before them cancels out only if equal.
        if talks["chosen"].messages[:-1] != talks["rejected"].messages[:-1]:
            raise ValueError(
                "'chosen' and 'rejected' differ before their last answers, so that they are no pair"
            )
        texts = [
            self._answered(row, talk, talk.answers(len(talk.messages) - 1))
            for talk in talks.values()
        ]
        if texts[0].text == texts[1].text:
            raise ValueError(
                "'chosen' and 'rejected' have the same last answer, so that they are no pair"
            )
        return texts

    def _seq2seq(self, row: Values) -> list[Text]:
        """Return the texts of a source and its target, each of which ends by itself."""
        sides = [
            _text(row, _first(row, *names)) for names in (("source", "input"), ("target", "output"))
        ]
        return [Text(side, [], add_end=True, add_begin=True) for side in sides]

    def _classification(self, row: Values) -> list[Text]:
        """Return a text, or two, whose tokens all have the value of its class."""
        text = _text(row, _first(row, *FIRST_TEXTS))
        second = next((name for name in SECOND_TEXTS if row.get(name) is not None), None)
        pair = _text(row, _first(row, *SECOND_TEXTS)) if second else ""
        value = self._value(row[_first(row, *LABEL_FIELDS["classification"])])
        # On every token, so that a truncated text keeps its class; the model predicts it at one of
        # them.
        return [Text(text, [Part(0, len(text), 1 + value)], add_begin=True, pair=pair)]

    def _pairs(self, row: Values) -> list[Text]:
        """Return two texts that belong together, all of whose tokens are learned."""
        texts = [_text(row, _first(row, *names)) for names in (ANCHORS, PARTNERS)]
        return [Text(text, [Part(0, len(text), 1)], add_begin=True) for text in texts]

    def _value(self, label: Any) -> int:
        """Return the class of a text as a number, its classes as bits, or the bits of its
        number."""
        problem = self._settings.problem
        if problem == "single_label":
            if isinstance(label, list):
                raise ValueError(
                    f"{label!r:.50} is a list of labels, which --problem multi_label takes"
                )
            return self._number(label)
        if problem == "multi_label":
            if not isinstance(label, list):
                raise ValueError(
                    f"{label!r:.50} is no list of labels, which --problem multi_label takes"
                )
            return sum(1 << number for number in {self._number(each) for each in label})
        largest = float(np.finfo(np.float32).max)
        if (
            isinstance(label, bool)
            or not isinstance(label, int | float)
            or not abs(label) <= largest
        ):
            raise ValueError(f"{label!r:.50} is no number, which --problem regression takes")
        return int(np.float32(label).view(np.uint32))

    def _labels(self, row: Values) -> list[Text]:
        """Return the words joined by spaces, the first token of each with its label. The label -100
        means none."""
        field, of = _first(row, "tokens", "words"), _first(row, *LABEL_FIELDS["labels"])
        words, labels = row[field], row[of]
        if not (
            isinstance(words, list)
            and words
            and all(isinstance(word, str) and word for word in words)
        ):
            raise ValueError(f"{field!r} must be a list of words that are not empty")
        if not isinstance(labels, list) or len(labels) != len(words):
            raise ValueError(
                f"{of!r} must be a list of {len(words)} labels, one for each of {field!r}"
            )
        parts, place = [], 0
        for word, label in zip(words, labels, strict=True):
            parts.append(
                Part(place, place + len(word), 0 if label == -100 else 1 + self._number(label))
            )
            place += len(word) + 1
        return [Text(" ".join(words), parts, first_only=True, add_begin=True)]

    def _answers(self, row: Values) -> list[Text]:
        """Return a question and the text that may answer it, of which the first answer is a
        part."""
        question, context = (_text(row, _first(row, name)) for name in ("question", "context"))
        parts = [
            Part(start, start + len(text), 1) for text, start in read_answers(row, context)[:1]
        ]
        return [Text(context, parts, add_begin=True, lead=question)]

    # --- parts of formats -------------------------------------------------------------------------

    def _conversation(self, row: Values, found: Any, field: str) -> Conversation:
        """Return the messages in `found`, with the row's system prompt."""
        system = row.get("system", row.get("system_prompt"))
        return read_messages(with_system(found, system), field, self._open_template(), self.seen)

    def _replied(
        self, row: Values, prompt: Any, reply: Any, field: str
    ) -> tuple[Conversation, int]:
        """Return a prompt and its reply as one conversation, and the number of the first message
        after the prompt."""
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if isinstance(reply, str):
            reply = [{"role": "assistant", "content": reply}]
        replied = read_messages(
            [reply] if isinstance(reply, Mapping) else reply,
            field,
            self._open_template(),
            self.seen,
        )
        if not replied.messages or replied.messages[-1]["role"] != "assistant":
            raise ValueError(f"{field!r} must end with a message of the assistant")
        return joined(self._conversation(row, turns, "prompt"), replied, field)

    def _answered(self, row: Values, talk: Conversation, learned: Sequence[int]) -> Text:
        """Render a conversation and return its text, with the answers numbered in `learned` as
        parts."""
        template = self._open_template()
        tools, options = read_tools(row, template), row.get("chat_template_kwargs", {})
        if not isinstance(options, Mapping):
            raise ValueError("'chat_template_kwargs' must be an object")
        if own := sorted(RESERVED & options.keys()):
            raise ValueError(
                f"'chat_template_kwargs' has {own[0]!r}, which is not for a row to set"
            )
        messages = with_arguments(template, talk.messages, tools, options)
        contents = self._contents = self._contents or ContentEncoder(self.tokenizer, template)
        tools, options = contents.mark_values(tools), contents.mark_values(options)
        found = find_answers(template, contents.mark(messages), learned, tools, **options)
        if found.shortened:
            self.seen["answers of which the chat template leaves out a part"] += len(
                found.shortened
            )
        for role in sorted({str(messages[number]["role"]) for number in found.unshown}):
            self.seen[f"messages of role {role!r} that the chat template does not show"] += sum(
                messages[number]["role"] == role for number in found.unshown
            )
        return contents.unmark(
            Text(
                found.text, [Part(span.start, span.stop, 1) for span in found.spans], found.is_open
            )
        )

    def _text_pair(self, row: Values, prompt: str | None, sides: Mapping[str, str]) -> list[Text]:
        """Return the two texts of a preference in plain text. Without a prompt, it is taken from
        dialogues such as hh-rlhf's."""
        if prompt is None:
            written = dialogue(list(sides.values()))
            if written is None:
                raise ValueError(f"no field 'prompt' or 'messages'; fields here: {', '.join(row)}")
            prompt, answers = written
        else:
            answers = self._without_prompt(prompt, list(sides.values()))
        return [
            _continued(prompt, answer, field) for field, answer in zip(sides, answers, strict=True)
        ]

    def _without_prompt(self, prompt: str, sides: Sequence[str]) -> list[str]:
        """Return the answers without the prompt, if all of them repeat it."""
        rest = without_repeated_prompt(prompt, sides)
        if rest is None:
            # One answer of a pair may well echo its question: only a person can tell.
            if any(repeats(prompt, side) for side in sides):
                self.seen[
                    "pairs of which one side alone begins with the prompt, taken as they are"
                ] += 1
            return list(sides)
        self.seen["prompts that their answers repeat, and that are taken once"] += 1
        return rest

    def _no_messages(self, row: Values) -> None:
        """Raise ValueError for fields that only conversations can have."""
        for name in OF_CHATS:
            if row.get(name):
                raise ValueError(
                    f"the row has {name!r}, which only messages can take; give the prompt as messages"
                )

    def _open_template(self) -> ChatTemplate:
        """Return the tokenizer's chat template, opened once. Raise DataError if there is none."""
        if self._template is None:
            path = Path(self._settings.tokenizer)
            self._template = ChatTemplate.of(path if path.is_dir() else path.parent, self.tokenizer)
        return self._template

    def _number(self, label: Any) -> int:
        """Return the number of a class given by number or name. Raise ValueError if it is
        unknown."""
        names = self._settings.labels
        label = whole_number(label)
        if isinstance(label, int) and 0 <= label < len(names):
            return label
        if str(label) in names and isinstance(label, str):
            return names.index(label)
        raise ValueError(f"label {label!r} is none of the {len(names)}: {', '.join(names[:20])}")


def text_tokenizer(path: str) -> HuggingFaceTokenizer:
    """Open the tokenizer in `path`. Raise DataError if it cannot tell which characters a token is
    made of."""
    tokenizer: Tokenizer = load_tokenizer(path)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise DataError(f"{path}: labelled data needs a folder with a tokenizer.json")
    return tokenizer


def read_answers(row: Values, context: str) -> list[tuple[str, int]]:
    """Return the answers that a row has, each with the character of `context` where it starts; none
    where the text does not answer. They are in SQuAD's form, or a list of objects. Raise ValueError
    for what is neither, and for an answer that is not there."""
    found = row.get("answers") or []
    if isinstance(found, Mapping):
        texts, starts = found.get("text"), found.get("answer_start")
        if not (isinstance(texts, list) and isinstance(starts, list) and len(texts) == len(starts)):
            raise ValueError("'answers' must have as many 'answer_start' as 'text', in two lists")
        found = [{"text": text, "answer_start": at} for text, at in zip(texts, starts, strict=True)]
    answers = []
    for each in found if isinstance(found, list) else [found]:
        text = start = None
        if isinstance(each, Mapping):
            text, start = each.get("text"), whole_number(each.get("answer_start"))
        if not isinstance(text, str) or not text.strip() or not isinstance(start, int):
            raise ValueError(f"{each!r:.80} is no answer with a 'text' and an 'answer_start'")
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(f"the answer {text!r:.50} is not at character {start} of the context")
        answers.append((text, start))
    return answers


def labels_in(row: Values, format: Format) -> list[Any]:
    """Return the labels that a row names. Raise ValueError if it has none."""
    labels = row[_first(row, *LABEL_FIELDS[format])]
    if format == "classification" and not isinstance(labels, list):
        labels = [labels]
    elif not isinstance(labels, list):
        raise ValueError("the labels must be a list, one for each word")
    if wrong := next((label for label in labels if not isinstance(label, str | int | float)), None):
        raise ValueError(f"label {shown(wrong)} is neither a word nor a number")
    return [whole_number(label) for label in labels if format == "classification" or label != -100]


def whole_number(label: Any) -> Any:
    """Return a label as an integer if it is one: pandas writes integers with gaps as floats."""
    is_whole = isinstance(label, bool | int) or (isinstance(label, float) and label.is_integer())
    return int(label) if is_whole else label


def _ends_of(values: np.ndarray) -> np.ndarray:
    """Return the values of an answer's first and last token, from those of all its tokens."""
    ends = np.zeros_like(values)
    if len(places := np.flatnonzero(values)):
        ends[places[0]] += 1
        ends[places[-1]] += 2
    return ends


def _as_one(source: Encoded, target: Encoded) -> Encoded:
    """Return a source and its target as one document, of which the target is learned, its first
    token too."""
    values = np.repeat([0, 1], [len(source.ids), len(target.ids)])
    return Encoded([*source.ids, *target.ids], values, source.text_bytes + target.text_bytes)


def _continued(prompt: str, completion: str, field: str) -> Text:
    """Return prompt and completion as one text, of which the completion is learned."""
    if not completion.strip():
        raise ValueError(f"{field!r} is empty")
    text, part = prompt + completion, Part(len(prompt), len(prompt) + len(completion), 1)
    return Text(text, [part], add_end=True, add_begin=True, may_split=True)


SIGNS: Mapping[str, Format] = {
    **dict.fromkeys(CHATS, "chat"),
    **dict.fromkeys(("chosen", "preferred_output"), "preference"),
    "completion": "completion",
    "answers": "answers",
    **dict.fromkeys(("target", "source"), "seq2seq"),
    **dict.fromkeys(("ner_tags", "tokens"), "labels"),
    "label": "classification",
    "positive": "pairs",
}
"""Fields by which rows of a format are known."""


def format_of(fields: Iterable[str]) -> Format | None:
    """Return the format that fields of a row are those of; None where it is not known."""
    return next((SIGNS[field] for field in fields if field in SIGNS), None)


def hint_of_format(fields: Iterable[str]) -> str:
    """Return the end of a message about a row that lacks a field: the format that its fields are
    those of, or nothing."""
    known = format_of(fields)
    return _hint(known) if known else ""


def _hint(format: Format) -> str:
    return f"; --format {format} takes such rows"


def _first(row: Values, *names: str) -> str:
    """Return which of several synonymous fields the row has. Raise ValueError if there is none, or
    two that differ."""
    found = [name for name in names if row.get(name) is not None]
    if not found:
        wanted = " or ".join(map(repr, names))
        there = [str(name) for name, value in row.items() if value is not None]
        raise ValueError(
            f"no field {wanted}; fields here: {', '.join(there) or 'none'}{hint_of_format(there)}"
        )
    if other := next((name for name in found if row[name] != row[found[0]]), None):
        raise ValueError(
            f"the row has {found[0]!r} and {other!r}, which differ; leave one of them out"
        )
    return found[0]


def _text(row: Values, field: str) -> str:
    """Return the text of a field. Raise ValueError if it is empty or no text."""
    if not isinstance(row[field], str) or not row[field].strip():
        raise ValueError(f"{field!r} must be text that is not empty, not {row[field]!r:.50}")
    return row[field]
