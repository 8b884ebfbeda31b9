"""Where the answers of a conversation stand in its rendering by a chat template.

A template may trim texts, drop thoughts from turns that are not the last, put a system prompt or tools where it
likes, or end the last turn in another way than the others. Where the conversation up to an answer, with and without
it, still begins the whole rendering, its place is between the two. Elsewhere it is found in the whole: what changes
when a mark stands in for the answer is the answer. Before it stands what the model is given (the rendering that asks
for the answer), behind it what ends it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megalite.data.chat import MARK, ChatTemplate, Message
from megalite.errors import TemplateLimit

NEVER_MARKED = ("role", "type", "id", "tool_call_id", "name")
"""Keys of messages whose values templates compare with others."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names of what a model thought before it answered; transformers gives a template all of them."""


class Answers(NamedTuple):
    """`text` is the whole conversation's; `spans`, ascending, are what is learned of it."""

    text: str
    spans: list[range]
    is_open: bool
    """The text ends with a learned answer, and no token says that the answer is over."""
    shortened: list[int]
    """Numbers of messages of which the template shows less than they hold."""


def find_answers(
    template: ChatTemplate, messages: Sequence[Message], learned: Collection[int], tools: Any = None, **options: Any
) -> Answers:
    """Find the answers in the messages of the numbers `learned`, each with the token that ends it.

    Raises ValueError where the template cannot render the messages, or shows none of these answers."""
    return _Finder(template, messages, tools, options).find(sorted(learned))


class _Finder:
    def __init__(
        self, template: ChatTemplate, messages: Sequence[Message], tools: Any, options: Mapping[str, Any]
    ) -> None:
        self._template, self._messages, self._tools, self._options = template, messages, tools, options
        self._blocks: list[range] | None = None
        if template.has_blocks(tools):
            self.text, self._blocks = template.render_with_blocks(messages, tools, **options)
            if not self._blocks:
                raise ValueError("the template's {% generation %} marks nothing in it")
        else:
            self.text = template.render(messages, tools, **options)

    def find(self, learned: Sequence[int]) -> Answers:
        places = {number: self._place(number) for number in learned}
        shortened = [n for n, place in places.items() if place is None or not self._holds(n, place)]
        spans = [span for place in places.values() if place is not None for span in self._spans(place)]
        if not spans:
            raise ValueError("the chat template shows nothing of the answers that are to be learned")
        is_last = not self.text[spans[-1].stop :].strip()
        is_open = is_last and not self.text[: spans[-1].stop].rstrip().endswith(self._template.controls)
        return Answers(self.text, spans, is_open, shortened)

    def _spans(self, place: range) -> list[range]:
        """What is learned of an answer: all, or what the template marks, and what ends it."""
        if self._blocks is None:
            return [place]
        spans = [block for block in self._blocks if block.start < place.stop and place.start < block.stop]
        if spans and self._only_ends(spans[-1].stop, place.stop):
            spans[-1] = range(spans[-1].start, place.stop)
        return spans

    def _only_ends(self, start: int, stop: int) -> bool:
        """Whether there is something, and nothing but white space and tokens that end a turn."""
        rest = self.text[start:stop]
        is_last = not self.text[stop:].strip()
        for token in self._template.controls:
            rest = rest.replace(token, "")
        return start < stop and not rest.strip() and (is_last or rest != self.text[start:stop])

    def _holds(self, number: int, place: range) -> bool:
        """Whether the template shows all that a message says, white space aside."""
        message, shown = self._messages[number], _bare(self.text[place.start : place.stop])
        thoughts = next((message[key] for key in REASONING if message.get(key) is not None), None)
        texts = [
            message.get("content"),
            thoughts,
            *(call["function"]["name"] for call in message.get("tool_calls") or ()),
        ]
        return all(_bare(text) in shown for text in texts if isinstance(text, str))

    def _place(self, number: int) -> range | None:
        """From where the model begins to answer to the token that ends the answer. None where the template shows none
        of it."""
        before, until = self._rendered(self._messages[:number], prompt=True), self._until(number)
        if before and until and len(before) < len(until) and all(map(self.text.startswith, (before, until))):
            bare = until.rstrip()
            return range(len(before), len(bare if bare.endswith(self._template.controls) else until))
        marked = self._marked(self._messages, number)
        if marked is None:
            raise ValueError(f"the chat template does not let the place of the answer in message {number} be told")
        if MARK not in marked:
            return None
        same = _shared(self.text, marked)
        behind = min(_shared(self.text[::-1], marked[::-1]), len(self.text) - same)
        stop = len(self.text) - behind
        return range(self._start(number, same, before), stop + self._end(number, self.text[stop:])) or None

    def _until(self, number: int) -> str | None:
        """The conversation up to a message's end."""
        is_last = number == len(self._messages) - 1
        return self.text if is_last else self._rendered(self._messages[: number + 1])

    def _start(self, number: int, same: int, before: str | None) -> int:
        """Where the model begins to answer. `same`: up to where nothing changes when the answer does; `before`: what
        is rendered to ask for it."""
        if before is not None and self.text.startswith(before):
            return len(before)
        asked, whole = (
            self._behind(messages, number - 1, prompt)
            for messages, prompt in ((self._messages[:number], True), (self._messages, False))
        )
        if asked is None or whole is None or not self.text.endswith(whole):
            return same
        start, shared = len(self.text) - len(whole), _shared(asked, whole)
        if shared < len(asked) and start + shared != same:
            # Part of a word may be the answer's.
            shared = max(self._last_control(whole[:shared]), whole.rfind("\n", 0, shared) + 1)
        return start + shared

    def _end(self, number: int, rest: str) -> int:
        """How much of `rest`, which follows an answer's text, is the answer's. Of the last turn, all up to the last
        token that no text holds; of another, what follows it also where it is the last."""
        if number == len(self._messages) - 1:
            return self._last_control(rest) or len(rest)
        last = self._behind(self._messages[: number + 1], number) or ""
        if ended := self._last_control(rest[: _shared(rest, last)]):
            return ended
        if token := next((token for token in self._template.turn_end.tokens if rest.lstrip().startswith(token)), ""):
            return rest.index(token) + len(token)
        return len(last) if rest.startswith(last) else 0

    def _last_control(self, text: str) -> int:
        """Where the last token that no text holds ends. 0 without any."""
        return max((at + len(token) for token in self._template.controls if (at := text.rfind(token)) >= 0), default=0)

    def _behind(self, messages: Sequence[Message], number: int, prompt: bool = False) -> str | None:
        """What follows the texts of a message."""
        marked = self._marked(messages, number, prompt) if number >= 0 else None
        return marked.rpartition(MARK)[2] if marked is not None and MARK in marked else None

    def _marked(self, messages: Sequence[Message], number: int, prompt: bool = False) -> str | None:
        return self._rendered([*messages[:number], _with_marks(messages[number]), *messages[number + 1 :]], prompt)

    def _rendered(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """None where the template refuses."""
        try:
            return self._template.render(messages, self._tools, prompt, **self._options)
        except TemplateLimit:
            raise
        except ValueError:
            return None


def _with_marks(message: Message) -> Message:
    return {key: value if key in NEVER_MARKED else _marks_in(value) for key, value in message.items()}


def _marks_in(value: Any) -> Any:
    """The same with a mark for every text."""
    if isinstance(value, str):
        return MARK if value else value
    if isinstance(value, Mapping):
        return {key: item if key in ("type", "id") else _marks_in(item) for key, item in value.items()}
    return [_marks_in(item) for item in value] if isinstance(value, list) else value


def _shared(a: str, b: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
