"""Find how a chat template ends an answer, from what it renders: by tokens, or by a text if the
tokenizer has no token for it.

Both what is learned of answers and where generated ones stop follow from this."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from megalite.data.tokenizer import Tokenizer
from megalite.errors import TemplateLimit

# Letters and digits alone, which no template trims, quotes or splits; and no words, which one might
# hold itself.
MARKS = ("QUESTION7f3a", "ANSWER7f3a", "NEXT7f3a", "ARGUMENT7f3a")
MARKUP = re.compile(r"[<>|{}\[\]#]")
"""Characters of texts that end answers, but not of sentences."""
FUNCTION = {"type": "function", "function": {"name": "look_up", "description": "", "parameters": {
    "type": "object", "properties": {"of": {"type": "string"}}
}}}  # fmt: skip
CALL = {
    "type": "function",
    "id": "a1B2c3D4e",
    "function": {"name": "look_up", "arguments": {"of": MARKS[3]}},
}


Render = Callable[[Sequence[Mapping[str, Any]], Any], str]
"""Returns the text of messages, with tools. Raises ValueError if the template cannot render
them."""


class TurnEnd(NamedTuple):
    """Holds the tokens and texts that end an answer."""

    tokens: tuple[str, ...] = ()
    """An answer is over at each of these; the one behind the last turn comes first."""
    texts: tuple[str, ...] = ()
    """The same, for ends that no added token stands for."""

    def ids(self, tokenizer: Tokenizer) -> TurnEndIds:
        """Return the ends as token ids, as far as single tokens stand for them."""
        tokens, texts = [tokenizer.vocabulary()[token] for token in self.tokens], []
        for text in self.texts:
            alone = tokenizer.encode(text)
            if len(alone) == 1 and tokenizer.decode(alone) == text:
                tokens.insert(0, alone[0])
            else:
                texts.append(text)
        return TurnEndIds(tuple(dict.fromkeys(tokens)), tuple(texts))


class TurnEndIds(NamedTuple):
    """Holds the token ids and texts that end an answer."""

    tokens: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    """Ends of several tokens each."""


def find_turn_end(render: Render, added: Collection[str], special: Collection[str]) -> TurnEnd:
    """Return what a template puts behind an answer: behind the last one, before another question,
    and behind a tool call.

    It is empty if the template puts nothing there, or refuses the conversation. `render` is the
    template's; `added` are the tokens that the tokenizer matches whole in a text, `special` those
    of them that never occur in ordinary text."""
    question, answer, following = (
        {"role": role, "content": mark}
        for role, mark in zip(("user", "assistant", "user"), MARKS, strict=False)
    )
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    whole = _rendered(render, [question, answer, following])
    between = _behind(whole, MARKS[1]).rpartition(MARKS[2])[0]
    behind = _behind(_rendered(render, [question, answer]), MARKS[1])
    # The text between an answer and the next question, without the part that begins a question.
    before_next = between.removesuffix(_shared_end(between, whole.partition(MARKS[0])[0]))
    called = _behind(_rendered(render, [question, call], [FUNCTION]), MARKS[3])
    tokens = [_first(added, behind), _first(added, before_next), _last(special, called)]
    text = _up_to_a_token(added, behind)
    is_end = MARKUP.search(text) and between.lstrip().startswith(text)
    return TurnEnd(tuple(dict.fromkeys(filter(None, tokens))), (text,) if is_end else ())


def _rendered(render: Render, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> str:
    """Return the rendering, empty if the template refuses it."""
    try:
        return render(messages, tools)
    except TemplateLimit:
        raise
    except ValueError:
        return ""


def _behind(text: str, mark: str) -> str:
    """Return the text behind the last `mark`, empty if the template left it out."""
    return text.rpartition(mark)[2] if mark in text else ""


def _shared_end(one: str, other: str) -> str:
    """Return the common suffix of two texts."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(one[::-1], other[::-1], strict=False))
    return "".join(letter for letter, _ in same)[::-1]


def _first(added: Collection[str], text: str) -> str | None:
    """Return the added token that comes first in a text, the longest of several there; None without
    any."""
    found = [(place, -len(token), token) for token in added if (place := text.find(token)) >= 0]
    return min(found)[2] if found else None


def _last(special: Collection[str], text: str) -> str | None:
    """Return the special token that comes last in a text. Not the first: behind one such as
    </tool_call> another call may follow."""
    found = [(text.rfind(token) + len(token), token) for token in special if token in text]
    return max(found)[1] if found else None


def _up_to_a_token(added: Collection[str], text: str) -> str:
    """Return the text before the first added token, without white space around it."""
    places = [place for token in added if (place := text.find(token)) >= 0]
    return text[: min(places, default=len(text))].strip()
