"""Prompts repeated in the answers of a row: some datasets give answers alone, others together with
their prompt."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.data.chat import Message
from megalite.data.messages import Conversation

ASSISTANT = "\n\nAssistant:"
"""Begins an answer in datasets that write conversations as one text, such as hh-rlhf."""


def joined(prompt: Conversation, reply: Conversation, field: str) -> tuple[Conversation, int]:
    """Return the prompt joined with its reply, and the number of the first message that is the
    reply's own.

    `reply` is the answer alone or the whole conversation; `field` names it in errors. Raise
    ValueError if the reply begins with other turns than `prompt`."""
    head, tail = prompt.messages, reply.messages
    if not head:
        return reply, 0
    if tail[0]["role"] in ("assistant", "tool"):
        return _put_together(prompt, reply), len(head)
    has_system, own_system = (int(messages[0]["role"] == "system") for messages in (head, tail))
    if _begins_with(tail[own_system:], head[has_system:]) and (
        not (has_system and own_system) or _alike(head[0], tail[0])
    ):
        missing = Conversation(
            head[: has_system - own_system] if has_system > own_system else [], frozenset()
        )
        return _put_together(missing, reply), max(has_system, own_system) + len(head) - has_system
    raise ValueError(
        f"{field!r} begins with other turns than the prompt, so that it answers another one"
    )


def without_repeated_prompt(prompt: str, sides: Sequence[str]) -> list[str] | None:
    """Return the texts in `sides` without the prompt that all of them repeat. None if one does not
    repeat it."""
    if not all(repeats(prompt, side) for side in sides):
        return None
    return [side[len(prompt) :] for side in sides]


def dialogue(sides: Sequence[str]) -> tuple[str, list[str]] | None:
    """Return the common beginning of conversations that are written as one text, and their last
    answers; None for other texts. Raise ValueError if they differ before the last answer."""
    # The last answer: earlier ones are part of what both were asked.
    cuts = [side.rfind(ASSISTANT) + len(ASSISTANT) for side in sides]
    if not all(ASSISTANT in side for side in sides):
        return None
    prompts = {side[:cut] for side, cut in zip(sides, cuts, strict=True)}
    if len(prompts) > 1:
        raise ValueError("the sides differ before their last answers, so that they are no pair")
    return prompts.pop(), [side[cut:] for side, cut in zip(sides, cuts, strict=True)]


def repeats(prompt: str, side: str) -> bool:
    """Return whether a text begins with the prompt, and not merely with a longer word. No text
    repeats a blank one."""
    if not prompt.strip():
        return False
    within_word = prompt[-1].isalnum() and side[len(prompt) : len(prompt) + 1].isalnum()
    return len(side) > len(prompt) and side.startswith(prompt) and not within_word


def _put_together(prompt: Conversation, reply: Conversation) -> Conversation:
    """Join two conversations and renumber the ignored messages of the second."""
    ignored = prompt.ignored | {len(prompt.messages) + number for number in reply.ignored}
    return Conversation([*prompt.messages, *reply.messages], ignored)


def _begins_with(messages: Sequence[Message], head: Sequence[Message]) -> bool:
    """Return whether `messages` begin with `head` and go on after it."""
    return len(messages) > len(head) and all(
        _alike(a, b) for a, b in zip(head, messages, strict=False)
    )


def _alike(a: Message, b: Message) -> bool:
    """Return whether two messages have the same role and text, white space around it aside."""
    return (
        a["role"] == b["role"]
        and (a.get("content") or "").strip() == (b.get("content") or "").strip()
    )
