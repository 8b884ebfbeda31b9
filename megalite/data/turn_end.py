"""How a chat template ends an answer, told from what it renders: by tokens, or by a text where the tokenizer has no
token for it. What is learned of answers and where generated ones end both go by this."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from megalite.data.tokenizer import Tokenizer
from megalite.errors import TemplateLimit

MARKS = ("QUESTION7f3a", "ANSWER7f3a", "NEXT7f3a", "ARGUMENT7f3a")
MARKUP = re.compile(r"[<>|{}\[\]#]")
"""What a text has that ends answers but no sentences."""
FUNCTION = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {
    "type": "object", "properties": {"of": {"type": "string"}}
}}}  # fmt: skip
CALL = {"type": "function", "id": "a1B2c3D4e", "function": {"name": "look_up", "arguments": {"of": MARKS[3]}}}


Render = Callable[[Sequence[Mapping[str, Any]], Any], str]
"""The text of messages, with tools. Raises ValueError where the template cannot render them."""


class TurnEnd(NamedTuple):
    tokens: tuple[str, ...] = ()
    """At each of which an answer is over, the one behind the last turn first."""
    texts: tuple[str, ...] = ()
    """Likewise, where no added token stands for them."""

    def ids(self, tokenizer: Tokenizer) -> TurnEndIds:
        """Return the same as token ids, as far as single tokens stand for it."""
        tokens, texts = [tokenizer.vocabulary()[token] for token in self.tokens], []
        for text in self.texts:
            alone = tokenizer.encode(text)
            if len(alone) == 1 and tokenizer.decode(alone) == text:
                tokens.insert(0, alone[0])
            else:
                texts.append(text)
        return TurnEndIds(tuple(dict.fromkeys(tokens)), tuple(texts))


class TurnEndIds(NamedTuple):
    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """Of several tokens each."""


def find_turn_end(render: Render, added: Collection[str], special: Collection[str]) -> TurnEnd:
    """Return what a template puts behind an answer: the last one, one before another question, and a call of a tool.
    All that is left out where it puts nothing there, or refuses the conversation.

    `added` are the tokens that the tokenizer matches whole in a text, `special` those of them that no text holds."""
    question, answer, following = (
        {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), MARKS, strict=False)
    )
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    whole = _rendered(render, [question, answer, following])
    between = _behind(whole, MARKS[1]).rpartition(MARKS[2])[0]
    behind = _behind(_rendered(render, [question, answer]), MARKS[1])
    # What stands between an answer and a question, but for how a question begins.
    before_next = between.removesuffix(_shared_end(between, whole.partition(MARKS[0])[0]))
    called = _behind(_rendered(render, [question, call], [FUNCTION]), MARKS[3])
    tokens = [_first(added, behind), _first(added, before_next), _last(special, called)]
    text = _up_to_a_token(added, behind)
    is_end = MARKUP.search(text) and between.lstrip().startswith(text)
    return TurnEnd(tuple(dict.fromkeys(filter(None, tokens))), (text,) if is_end else ())


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    try:
        return render(messages, tools)
    except TemplateLimit:
        raise
    except ValueError:
        return ""


def _behind(text: str, mark: str) -> str:
    """The text behind the last mark; nothing where the template left it out."""
    return text.rpartition(mark)[2] if mark in text else ""


def _shared_end(one: str, other: str) -> str:
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False))
    return "".join(letter for letter, _ in same)[::-1]


def _first(added: Collection[str], text: str) -> str | None:
    """The first added token in a text, wherever it stands; of several there, the longest."""
    found = [(place, -len(token), token) for token in added if (place := text.find(token)) >= 0]
    return min(found)[2] if found else None


def _last(special: Collection[str], text: str) -> str | None:
    """Not one such as </tool_call>, behind which another call may follow."""
    found = [(text.rfind(token) + len(token), token) for token in special if token in text]
    return max(found)[1] if found else None


def _up_to_a_token(added: Collection[str], text: str) -> str:
    """The text before the first added token, without white space around it."""
    places = [place for token in added if (place := text.find(token)) >= 0]
    return text[: min(places, default=len(text))].strip()
