"""Encode conversations as token ids such that only the chat template can write a control token.

This holds wherever a conversation is tokenized: in serving, training and evaluation."""

from __future__ import annotations

import json
import re
import secrets
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from megalite.data.answers import REASONING
from megalite.data.chat import ChatTemplate, Message
from megalite.data.token_values import Part, Text, token_values
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.utils.outside import is_unicode

MARKS = re.compile(r"megalite[0-9a-f]{16}(?:begin|close)")
"""Marks of any encoder. They have only letters and digits, so that templates which write JSON leave
them alone."""
SAID = ("content", *REASONING)
"""Keys of the assistant's messages whose texts may hold tokens such as `<think>`, which the
assistant writes itself."""
CHANGED = "the chat template changes the letters of a message that holds a control token, so that it cannot be told"
DISGUISED = "a message holds characters that the tokenizer takes for a control token"


class ContentEncoder:
    """Encodes chats as transformers' `apply_chat_template` does, except that control tokens spelled
    out in a message become ordinary characters (as with `split_special_tokens=True`).

    Control tokens are the tokenizer's special tokens and those that the template spells, such as
    `<tool_call>`; the assistant's own messages may hold the latter. Before rendering they are
    enclosed in marks that no author of a message can guess, and afterwards they are read as
    text."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        """Prepare the patterns of control tokens of `tokenizer` and `template`."""
        self._tokenizer, self._template = tokenizer, template
        # Random, so that no message can contain a mark and escape the treatment.
        self._secret = f"megalite{secrets.token_hex(8)}"
        self._mark = re.compile(f"{self._secret}(?:begin|close)")
        self._plain: tokenizers.Tokenizer | None = None
        self._special = self._spelled = _any_of(())
        self._ids: frozenset[int] = frozenset()
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            return  # control tokens that a text spells out stay text
        values = json.loads(tokenizer.to_json())
        added = values["added_tokens"]
        special = {token["content"]: token["id"] for token in added if token["special"]}
        # `special` must never come from a message; `spelled` may stand in the assistant's own
        # words.
        spelled = {
            token["content"]: token["id"]
            for token in added
            if _is_spelled(token["content"], template)
        }
        self._special, self._spelled = _any_of(special), _any_of(special | spelled)
        model = values["model"]
        # Which stands for text.
        unknown = (
            special.get(model.get("unk_token")),
            model.get("unk_id"),
        )
        self._ids = frozenset((special | spelled).values()) - frozenset(unknown)
        # The same vocabulary without added tokens: it spells "<|im_end|>" with ordinary ones.
        plain = values | {
            "added_tokens": [],
            "post_processor": None,
            "truncation": None,
            "padding": None,
        }
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))

    def mark(self, messages: Sequence[Message]) -> list[Message]:
        """Return `messages` with their control tokens marked, ready for the template."""
        return [self._marked(message) for message in messages]

    def mark_values(self, values: Any) -> Any:
        """Return other template inputs (tools, variables) with their control tokens marked."""
        return _changed(values, self._spelled, self._wrap)

    def unmark(self, text: Text) -> Text:
        """Return a rendering without its marks; its `literal` gives the ranges of control tokens
        that are text. Raise ValueError if the template has changed a mark."""
        if self._secret not in text.text.lower():
            return text._replace(literal=[])
        starts = [found.start() for found in self._mark.finditer(text.text)]
        length = len(f"{self._secret}begin")

        def moved(place: int) -> int:
            # Marks before this place, all of one length; a place within a mark moves to where that
            # was.
            number = bisect_left(starts, place)
            inside = starts[number - 1] + length - place if number else 0
            return place - number * length + max(inside, 0)

        # A template may have split a message and separated two marks: count only complete pairs.
        controls = re.finditer(
            f"(?<={self._secret}begin)(?:{self._spelled.pattern})(?={self._secret}close)", text.text
        )
        literal = [range(moved(found.start()), moved(found.end())) for found in controls]
        plain = self._mark.sub("", text.text)
        if self._secret in plain.lower():
            raise ValueError(CHANGED)
        parts = [Part(moved(part.start), moved(part.stop), part.value) for part in text.parts]
        return text._replace(text=plain, parts=parts, literal=literal)

    def render(self, messages: Sequence[Message], prompt: bool = True) -> str:
        """Return the conversation's text with control tokens of its messages marked, for
        `encode_marked`. Raise as the template's `render` does."""
        return self._template.render(self.mark(messages), prompt=prompt)

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation, up to where the model's next answer begins. Raise
        ValueError with the template's message for `messages` that it cannot render, and for
        characters that the tokenizer would turn into a control token."""
        return self.encode_marked(self.render(messages))

    def encode_marked(self, text: str) -> list[int]:
        """Return the token ids of rendered marked messages. Raise ValueError as `encode` does."""
        if not is_unicode(text):
            raise ValueError(
                "a message or the chat template holds half of a surrogate pair, which no UTF-8 text does"
            )
        return [token for _, ids in self._pieces(self.unmark(Text(text, []))) for token in ids]

    def token_values(self, text: Text) -> tuple[list[int], np.ndarray]:
        """Return the token ids of an unmarked text and the value of each, [T]. Raise ValueError as
        `encode` does."""
        assert isinstance(self._tokenizer, HuggingFaceTokenizer)
        if not text.literal:
            ids, values = token_values(self._tokenizer, text)
            self._check(text.text, ids)
            return ids, values
        ids, found = [], []
        for place, some in self._pieces(text):
            within = []
            for part in text.parts:
                # What of the part lies in this piece, counted from where the piece begins.
                start, stop = max(part.start, place.start), min(part.stop, place.stop)
                if start < stop:
                    within.append(Part(start - place.start, stop - place.start, part.value))
            if place in text.literal:
                value = max((part.value for part in within), default=0)
                values = np.full(len(some), value, np.int64)
            else:
                _, values = token_values(
                    self._tokenizer, Text(text.text[place.start : place.stop], within)
                )
            ids += some
            found.append(values)
        return ids, np.concatenate(found)

    def _marked(self, message: Message) -> Message:
        """Return one message with its control tokens marked."""
        texts = SAID if message.get("role") == "assistant" else ()
        return {
            self.mark_values(key): _changed(
                value, self._special if key in texts else self._spelled, self._wrap
            )
            for key, value in message.items()
        }

    def _wrap(self, found: re.Match[str]) -> str:
        """Return a found control token between the two marks."""
        return f"{self._secret}begin{found[0]}{self._secret}close"

    def _pieces(self, text: Text) -> Iterator[tuple[range, list[int]]]:
        """Yield (range, ids) in order: of the stretches between literal control tokens, and of
        these tokens as text."""
        start = 0
        for place in [*(text.literal or ()), range(len(text.text), len(text.text))]:
            if start < place.start:
                part = text.text[start : place.start]
                ids = self._tokenizer.encode(part)
                self._check(part, ids)
                yield range(start, place.start), ids
            if place:
                yield place, self._as_text(text.text[place.start : place.stop])
            start = place.stop

    def _check(self, text: str, ids: Sequence[int]) -> None:
        """Raise ValueError if `ids` have more control tokens than `text` spells."""
        # A tokenizer that normalizes may take other characters for those of a control token.
        if sum(map(self._ids.__contains__, ids)) > len(self._spelled.findall(text)):
            raise ValueError(DISGUISED)

    def _as_text(self, control: str) -> list[int]:
        """Return ids that spell a control token as ordinary text."""
        assert self._plain is not None
        ids = self._plain.encode(control, add_special_tokens=False).ids
        if self._ids.isdisjoint(ids):
            return ids
        # The vocabulary itself holds it too, not only the added tokens: encode it letter by letter.
        letters = [self._plain.encode(letter, add_special_tokens=False).ids for letter in control]
        return [token for found in letters for token in found if token not in self._ids]


def without_marks(text: str) -> str:
    """Return a rendering as a person reads it."""
    return MARKS.sub("", text)


def _changed(value: Any, controls: re.Pattern[str], change: Any) -> Any:
    """Apply `change` to every control token in `value`, also in keys, since a template may write
    them."""
    if isinstance(value, str):
        return controls.sub(change, value)
    if isinstance(value, Mapping):
        return {
            _changed(key, controls, change): _changed(item, controls, change)
            for key, item in value.items()
        }
    return (
        [_changed(item, controls, change) for item in value] if isinstance(value, list) else value
    )


def _is_spelled(token: str, template: ChatTemplate) -> bool:
    """Return whether a template spells `token`. Plain words and white space, which some tokenizers
    add in numbers, do not count."""
    sources = filter(None, (template.source, template.tool_source))
    return any(token in source for source in sources) and re.fullmatch(r"[\w\s]*", token) is None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that matches any of `tokens`, the longest first as tokenizers do; without
    tokens it matches nothing."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
