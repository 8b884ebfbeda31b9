"""Conversations as token ids, in which only the chat template can say a control token."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Sequence

import tokenizers

from megalite.data.chat import ChatTemplate, Message
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer


class ContentEncoder:
    """Encodes chats as transformers' `apply_chat_template` does, but for control tokens that a message spells out:
    those become the characters they are made of, as by `split_special_tokens=True`.

    Control tokens are the tokenizer's special ones and those which the template spells, such as `<tool_call>`; what
    the assistant has said before may hold the latter."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate):
        self._tokenizer, self._template = tokenizer, template
        self._plain: tokenizers.Tokenizer | None = None
        self._special = self._spelled = _any_of(())
        self._ids: frozenset[int] = frozenset()
        if not isinstance(tokenizer, HuggingFaceTokenizer):
            return  # control tokens that a text spells out stay text
        values = json.loads(tokenizer.to_json())
        added = values["added_tokens"]
        special = {token["content"]: token["id"] for token in added if token["special"]}
        spelled = {token["content"]: token["id"] for token in added if _is_spelled(token["content"], template.source)}
        self._special, self._spelled = _any_of(special), _any_of(special | spelled)
        model = values["model"]
        unknown = (special.get(model.get("unk_token")), model.get("unk_id"))  # which stands for text
        self._ids = frozenset((special | spelled).values()) - frozenset(unknown)
        plain = values | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a conversation, up to where the model's next answer begins. Raises ValueError with what
        the template says of messages that it cannot render, and for control tokens in disguise."""
        # Marks that nobody who sends a message can know.
        begin, end = (f"\ue000{secrets.token_hex(8)}{letter}\ue001" for letter in "be")
        marked = [self._marked(message, begin, end) for message in messages]
        text = self._template.render(marked, prompt=True)
        ids: list[int] = []
        for number, part in enumerate(re.split(f"{begin}(.*?){end}", text, flags=re.DOTALL)):
            # A template may have taken a message apart, and two marks from each other.
            part = part.replace(begin, "").replace(end, "")
            if part:
                ids += self._as_text(part) if number % 2 else self._by_template(part)
        return ids

    def _marked(self, message: Message, begin: str, end: str) -> Message:
        if not message.get("content"):
            return message
        controls = self._special if message["role"] == "assistant" else self._spelled
        content = controls.sub(lambda found: f"{begin}{found[0]}{end}", message["content"])
        return {**message, "content": content}

    def _by_template(self, part: str) -> list[int]:
        ids = self._tokenizer.encode(part)
        # A tokenizer that normalizes may take other characters for those of a control token.
        if sum(token in self._ids for token in ids) > len(self._spelled.findall(part)):
            raise ValueError("a message holds characters that the tokenizer takes for a control token")
        return ids

    def _as_text(self, control: str) -> list[int]:
        assert self._plain is not None
        ids = self._plain.encode(control, add_special_tokens=False).ids
        if self._ids.isdisjoint(ids):
            return ids
        # It is a token of the model itself as well: letter by letter it is none.
        letters = [self._plain.encode(letter, add_special_tokens=False).ids for letter in control]
        return [token for found in letters for token in found if token not in self._ids]


def _is_spelled(token: str, source: str) -> bool:
    """Whether a template says a token that is no plain word, of which some tokenizers add many, and no white space."""
    return token in source and re.fullmatch(r"[\w\s]*", token) is None


def _any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """The longest goes first, as tokenizers take it."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
