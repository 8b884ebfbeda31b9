"""Locate the answers of a conversation in its rendering by a chat template.

A template may trim texts, drop reasoning from turns that are not the last, put a system prompt or
tools where it likes, or end the last turn differently from the others. If the conversation up to an
answer, rendered with and without that answer, is a prefix of the whole rendering, the answer lies
between the two. Otherwise it is found by substitution: whatever changes in the whole rendering when
a mark stands in for the answer is the answer. Before it stands the model's prompt (the rendering
that asks for the answer), behind it whatever ends the answer."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from megalite.data.chat import MARK, ChatTemplate, Message
from megalite.errors import TemplateLimit

NEVER_MARKED = ("role", "type", "id", "tool_call_id", "name")
"""Message keys whose values templates compare with constants, so that no mark may replace them."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Message keys for the reasoning before an answer; transformers passes all of them to a
template."""


class Answers(NamedTuple):
    """Holds the rendered conversation `text` and the ranges of it that are learned: `spans`,
    ascending."""

    text: str
    spans: list[range]
    is_open: bool
    """The text ends with a learned answer, and no token marks its end."""
    shortened: list[int]
    """Numbers of learned messages of which the template shows less than they hold."""
    unshown: list[int]
    """Numbers of other messages of whose content the template shows nothing."""


def find_answers(
    template: ChatTemplate,
    messages: Sequence[Message],
    learned: Collection[int],
    tools: Any = None,
    **options: Any,
) -> Answers:
    """Find the answers among `messages` whose numbers are in `learned`, each with the token that
    ends it.

    `tools` and `options` are passed to `template`. Raise ValueError if it cannot render the
    messages, or shows none of these answers."""
    return _Finder(template, messages, tools, options).find(sorted(learned))


class _Finder:
    """Renders a conversation, once in full and as often as needed with changes, to locate its
    answers."""

    def __init__(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        tools: Any,
        options: Mapping[str, Any],
    ) -> None:
        self._template, self._messages, self._tools, self._options = (
            template,
            messages,
            tools,
            options,
        )
        self._blocks: list[range] | None = None
        if template.has_blocks(tools):
            # Character ranges of what the template itself marks as the model's words.
            self.text, self._blocks = template.render_with_blocks(messages, tools, **options)
            if not self._blocks:
                raise ValueError("the template's {% generation %} marks nothing in it")
        else:
            self.text = template.render(messages, tools, **options)

    def find(self, learned: Sequence[int]) -> Answers:
        """Return the located answers of the messages numbered `learned`. Raise ValueError if the
        template shows none."""
        places = {number: self._place(number) for number in learned}
        shortened = [n for n, place in places.items() if place is None or not self._holds(n, place)]
        spans = [
            span for place in places.values() if place is not None for span in self._spans(place)
        ]
        if not spans:
            raise ValueError(
                "the chat template shows nothing of the answers that are to be learned"
            )
        # Without a token at its end the caller must add one, or the model never learns to stop.
        is_last = not self.text[spans[-1].stop :].strip()
        is_open = is_last and not self.text[: spans[-1].stop].rstrip().endswith(
            self._template.controls
        )
        others = (n for n in range(len(self._messages)) if n not in places)
        unshown = [n for n in others if not self._is_shown(n)]
        return Answers(self.text, spans, is_open, shortened, unshown)

    def _spans(self, place: range) -> list[range]:
        """Return which parts of the answer at `place` are learned: all of it, or what the
        template's {% generation %} blocks mark, with the token that ends it."""
        if self._blocks is None:
            return [place]
        # A block belongs to this answer if the two overlap; one answer may have several (reasoning,
        # text).
        spans = [
            block for block in self._blocks if block.start < place.stop and place.start < block.stop
        ]
        if spans and self._only_ends(spans[-1].stop, place.stop):
            spans[-1] = range(spans[-1].start, place.stop)
        return spans

    def _only_ends(self, start: int, stop: int) -> bool:
        """Return whether text[start:stop] is not empty, and holds only white space and tokens that
        end a turn."""
        rest = self.text[start:stop]
        is_last = not self.text[stop:].strip()
        for token in self._template.controls:
            rest = rest.replace(token, "")
        return start < stop and not rest.strip() and (is_last or rest != self.text[start:stop])

    def _holds(self, number: int, place: range) -> bool:
        """Return whether `place` shows everything that the message says, white space aside."""
        message, shown = self._messages[number], _bare(self.text[place.start : place.stop])
        thoughts = next((message[key] for key in REASONING if message.get(key) is not None), None)
        texts = [
            message.get("content"),
            thoughts,
            *(call["function"]["name"] for call in message.get("tool_calls") or ()),
        ]
        return all(_bare(text) in shown for text in texts if isinstance(text, str))

    def _is_shown(self, number: int) -> bool:
        """Return whether the template shows any of a message's content, if it has some."""
        content = self._messages[number].get("content")
        if not isinstance(content, str) or not content.strip() or content.strip() in self.text:
            return True
        # It may be written in another way, as JSON or in capitals: whatever becomes of it, it would
        # become of the mark.
        marked = self._marked(self._messages, number)
        return marked is None or MARK.lower() in marked.lower()

    def _place(self, number: int) -> range | None:
        """Return the range of an answer, from where the model begins to answer to the token that
        ends it. None if the template shows none of it."""
        # The easy case: both are prefixes of the whole text, so the answer is what lies between
        # them.
        before, until = self._rendered(self._messages[:number], prompt=True), self._until(number)
        if (
            before
            and until
            and len(before) < len(until)
            and all(map(self.text.startswith, (before, until)))
        ):
            bare = until.rstrip()
            return range(
                len(before), len(bare if bare.endswith(self._template.controls) else until)
            )
        # Else by substitution: whatever differs from the text with a mark in its place.
        marked = self._marked(self._messages, number)
        if marked is None:
            raise ValueError(
                f"the chat template does not let the place of the answer in message {number} be told"
            )
        if MARK not in marked:
            return None
        same = _shared(self.text, marked)
        # The common suffix must not overlap the common prefix, as it would if the answer repeats
        # its surroundings.
        behind = min(_shared(self.text[::-1], marked[::-1]), len(self.text) - same)
        stop = len(self.text) - behind
        return (
            range(self._start(number, same, before), stop + self._end(number, self.text[stop:]))
            or None
        )

    def _until(self, number: int) -> str | None:
        """Return the rendering of the conversation up to the end of message `number`; None if the
        template refuses it."""
        is_last = number == len(self._messages) - 1
        return self.text if is_last else self._rendered(self._messages[: number + 1])

    def _start(self, number: int, same: int, before: str | None) -> int:
        """Return where the model begins to answer. `same` is where the rendering begins to change
        with the answer, `before` the rendering that asks for it, None if the template refuses
        that."""
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
            # The shared text may reach into the answer's first word: go back to the last control
            # token or line. Of "answer" and "an answer" the letter "a" is shared, but belongs to
            # the answer.
            shared = max(self._last_control(whole[:shared]), whole.rfind("\n", 0, shared) + 1)
        return start + shared

    def _end(self, number: int, rest: str) -> int:
        """Return how many characters of `rest`, which follows an answer's text, belong to the
        answer. For the last turn it is everything up to the last control token; for another, what
        also follows it when it is rendered as the last."""
        if number == len(self._messages) - 1:
            return self._last_control(rest) or len(rest)
        last = self._behind(self._messages[: number + 1], number) or ""
        if ended := self._last_control(rest[: _shared(rest, last)]):
            return ended
        if token := next(
            (token for token in self._template.turn_end.tokens if rest.lstrip().startswith(token)),
            "",
        ):
            return rest.index(token) + len(token)
        return len(last) if rest.startswith(last) else 0

    def _last_control(self, text: str) -> int:
        """Return where the last control token in `text` ends, 0 if there is none. Control tokens
        never occur in ordinary text."""
        return max(
            (
                at + len(token)
                for token in self._template.controls
                if (at := text.rfind(token)) >= 0
            ),
            default=0,
        )

    def _behind(self, messages: Sequence[Message], number: int, prompt: bool = False) -> str | None:
        """Return what follows the last text of message `number` in the rendering of `messages`;
        None if it cannot be told."""
        marked = self._marked(messages, number, prompt) if number >= 0 else None
        return marked.rpartition(MARK)[2] if marked is not None and MARK in marked else None

    def _marked(self, messages: Sequence[Message], number: int, prompt: bool = False) -> str | None:
        """Return the rendering with a mark in place of every text of message `number`."""
        return self._rendered(
            [*messages[:number], _with_marks(messages[number]), *messages[number + 1 :]], prompt
        )

    def _rendered(self, messages: Sequence[Message], prompt: bool = False) -> str | None:
        """Return the rendering of `messages`, up to the next answer with `prompt`. None if the
        template refuses."""
        try:
            return self._template.render(messages, self._tools, prompt, **self._options)
        except TemplateLimit:
            raise
        except ValueError:
            return None


def _with_marks(message: Message) -> Message:
    """Return `message` with a mark in place of each of its texts."""
    return {
        key: value if key in NEVER_MARKED else _marks_in(value) for key, value in message.items()
    }


def _marks_in(value: Any) -> Any:
    """Return `value` with a mark in place of each text that is not empty."""
    if isinstance(value, str):
        return MARK if value else value
    if isinstance(value, Mapping):
        return {
            key: item if key in ("type", "id") else _marks_in(item) for key, item in value.items()
        }
    return [_marks_in(item) for item in value] if isinstance(value, list) else value


def _shared(a: str, b: str) -> int:
    """Return the length of the common prefix of `a` and `b`, by bisection."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _bare(text: str) -> str:
    """Return `text` without white space."""
    return re.sub(r"\s+", "", text)
