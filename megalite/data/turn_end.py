"""How a chat template ends an answer, told from what it renders: by tokens, or by a text where the tokenizer has no
token for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from megalite.data.chat import ChatTemplate, Message
from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer

MARKS = ("QUESTION7f3a", "ANSWER7f3a", "NEXT7f3a", "ARGUMENT7f3a")
MARKUP = re.compile(r"[<>|{}\[\]#]")
"""What a text has that ends answers but no sentences."""
FUNCTION = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {
    "type": "object", "properties": {"of": {"type": "string"}}
}}}  # fmt: skip
CALL = {"type": "function", "id": "a1B2c3D4e", "function": {"name": "look_up", "arguments": {"of": MARKS[3]}}}


class TurnEnd(NamedTuple):
    tokens: tuple[int, ...] = ()
    """At each of which an answer is over."""
    texts: tuple[str, ...] = ()
    """Likewise, of several tokens each."""


def turn_end(template: ChatTemplate, tokenizer: Tokenizer) -> TurnEnd:
    """Return what the template puts behind an answer: the last one, one before another question, and a call of a tool.
    All that is left out where it puts nothing there, or refuses the conversation."""
    question, answer, following = (
        {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), MARKS, strict=False)
    )
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    whole = _render(template, [question, answer, following])
    between = _behind(whole, MARKS[1]).rpartition(MARKS[2])[0]
    behind = _behind(_render(template, [question, answer]), MARKS[1])
    # What stands between an answer and a question, but for how a question begins.
    before_next = between.removesuffix(_shared_end(between, whole.partition(MARKS[0])[0]))
    tokens = [_first(tokenizer, behind), _first(tokenizer, before_next)]
    called = _render(template, [question, call], [FUNCTION])
    tokens.append(_last_special(tokenizer, _behind(called, MARKS[3])))
    texts = []
    text = _up_to_a_token(tokenizer, behind)
    if MARKUP.search(text) and between.lstrip().startswith(text):
        alone = tokenizer.encode(text)
        if len(alone) == 1 and tokenizer.decode(alone) == text:
            tokens.insert(0, alone[0])
        else:
            texts.append(text)
    return TurnEnd(tuple(dict.fromkeys(token for token in tokens if token is not None)), tuple(texts))


def _render(template: ChatTemplate, messages: Sequence[Message], tools: Any = None) -> str:
    try:
        return template.render(messages, tools)
    except ValueError:
        return ""


def _behind(text: str, mark: str) -> str:
    """The text behind the last mark; nothing where the template left it out."""
    return text.rpartition(mark)[2] if mark in text else ""


def _shared_end(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False))
    return "".join(letter for letter, _ in same)[::-1]


def _added(tokenizer: Tokenizer) -> list[str]:
    return tokenizer.added_tokens() if isinstance(tokenizer, HuggingFaceTokenizer) else []


def _first(tokenizer: Tokenizer, text: str) -> int | None:
    """The first token of its own in a text, wherever it stands."""
    found = [(place, -len(token), token) for token in _added(tokenizer) if (place := text.find(token)) >= 0]
    return tokenizer.vocabulary()[min(found)[2]] if found else None


def _last_special(tokenizer: Tokenizer, text: str) -> int | None:
    """Not one such as </tool_call>, behind which another call may follow."""
    known = tokenizer.control_tokens() if isinstance(tokenizer, HuggingFaceTokenizer) else []
    found = [(text.rfind(token) + len(token), token) for token in known if token in text]
    return tokenizer.vocabulary()[max(found)[1]] if found else None


def _up_to_a_token(tokenizer: Tokenizer, text: str) -> str:
    """The text before the first token of its own, without white space around it."""
    places = [place for token in _added(tokenizer) if (place := text.find(token)) >= 0]
    return text[: min(places, default=len(text))].strip()
