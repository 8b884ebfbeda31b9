"""Read the messages of conversations as rows of labelled data spell them, into the keys and roles
that chat templates know.

Names are OpenAI's (roles, content parts, tool_calls, function_call, weight), ShareGPT's (from,
value) and derived ones. Every key is used, counted by its name, or refused."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from megalite.data.answers import REASONING
from megalite.data.chat import ChatTemplate, Message
from megalite.errors import TemplateLimit
from megalite.utils.spelling import nearest

ROLES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant",
    "bing": "assistant", "claude": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "function_call": "assistant", "function": "tool", "observation": "tool", "tool_response": "tool",
}  # fmt: skip
"""Other names for the roles that templates know."""
KNOWN_ROLES = ("system", "user", "assistant", "tool")
USED = ("role", "from", "content", "value", "weight", "tool_calls", "function_call", *REASONING)
NEUTRAL = frozenset((
    "category", "conversation_id", "created", "created_at", "date", "dataset", "file_name", "hash", "id", "idx",
    "index", "lang", "language", "license", "meta", "metadata", "model", "num_turns", "prompt_id", "rating", "refusal",
    "score", "score_chosen", "score_rejected", "source", "split", "subset", "time", "timestamp", "title",
    "tool_call_id", "turn_identifier", "url", "uuid",
))  # fmt: skip
"""Facts about a row or message that do not affect what is learned."""
MISSPELT = 0.82
"""Likeness (see `utils.spelling`) from which an unknown key is taken for a misspelt one: most are
facts of the row."""
LEARNING = (
    "train",
    "training",
    "trainable",
    "learn",
    "loss",
    "mask",
    "masked",
    "loss_weight",
    "weights",
)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")


class Conversation(NamedTuple):
    """Holds the messages of a conversation, and which answers are not learned."""

    messages: list[Message]
    ignored: frozenset[int]
    """Numbers of the assistant's messages that are not learned: those of weight 0."""

    def answers(self, first: int = 0) -> list[int]:
        """Return the numbers of the answers to learn, from message `first` on. Raise ValueError if
        there are none."""
        all_of = [
            n
            for n, message in enumerate(self.messages)
            if n >= first and message["role"] == "assistant"
        ]
        if not all_of:
            raise ValueError(
                "no message is the assistant's, so that there is nothing to learn from"
            )
        left = [number for number in all_of if number not in self.ignored]
        if not left:
            raise ValueError("every answer has weight 0, so that there is nothing to learn from")
        return left


def read_messages(
    found: Any, field: str, template: ChatTemplate, seen: Counter[str]
) -> Conversation:
    """Check the messages `found` in the row's `field` and return them as `template` expects them.
    `seen` counts what is ignored. Raise ValueError that names the message and its fault."""
    if not isinstance(found, list):
        raise ValueError(f"{field!r} must be a list of messages, not {type(found).__name__}")
    messages: list[Message] = []
    ignored = set()
    for number, message in enumerate(found):
        where = f"message {number} of {field!r}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{where} is not an object but {type(message).__name__}")
        read = _read_message(message, where, template, seen)
        # Of weight 0, an answer may be empty: nothing is learned of it.
        if _weight(message, read["role"], where) == 0:
            ignored.add(number)
        elif read["role"] == "assistant" and not _says_anything(read):
            raise ValueError(f"{where} is an empty answer")
        messages.append(read)
    return Conversation(messages, frozenset(ignored))


def with_system(found: Any, system: Any) -> Any:
    """Return the messages with the row's system prompt in front. Raise ValueError if they begin
    with another one."""
    if system is None or system == "" or not isinstance(found, list):
        return found
    if not isinstance(system, str):
        raise ValueError(f"'system' must be text, not {type(system).__name__}")
    first = found[0] if found and isinstance(found[0], Mapping) else {}
    if first.get("role", first.get("from")) in ("system", "developer"):
        if first.get("content", first.get("value")) != system:
            raise ValueError(
                "the row has a 'system' prompt, and its messages begin with another one"
            )
        return found
    return [{"role": "system", "content": system}, *found]


def read_tools(row: Mapping[str, Any], template: ChatTemplate) -> list[Any] | None:
    """Return the tools that a row names, possibly as JSON text; None if there are none. Raise
    ValueError if the template does not show them."""
    tools, functions = (_listed(row.get(name), name) for name in ("tools", "functions"))
    tools = [*tools, *({"type": "function", "function": function} for function in functions)]
    if tools and not template.reads("tools"):
        raise ValueError("the row has 'tools', which the chat template does not show to the model")
    return tools or None


def with_arguments(
    template: ChatTemplate, messages: Sequence[Message], tools: Any, options: Mapping[str, Any]
) -> Sequence[Message]:
    """Return the messages with tool-call arguments in the form that `template` takes, rendered with
    `tools` and `options` to find out. OpenAI's arguments are JSON text, which some templates would
    quote once more and others require. Raise ValueError."""
    # Rendered as they are first: only the template shows which form it takes.
    functions = [
        call["function"] for message in messages for call in message.get("tool_calls") or ()
    ]
    texts = [
        function["arguments"]
        for function in functions
        if isinstance(function.get("arguments"), str)
    ]
    if not functions:
        return messages
    try:
        shown = template.render(messages, tools, **options)
    except TemplateLimit:
        raise
    except ValueError:
        if len(texts) == len(functions):
            raise
        return _change_arguments(
            messages, lambda given: given if isinstance(given, str) else json.dumps(given)
        )
    # Quoted text in the rendering shows that the template serializes arguments itself: it needs
    # objects.
    if any(json.dumps(text, ensure_ascii=False) in shown for text in texts if '"' in text):
        return _change_arguments(
            messages, lambda given: _parsed(given, "arguments") if isinstance(given, str) else given
        )
    return messages


def without_nulls(value: Any) -> Any:
    """Return `value` without keys whose value is null or NaN: Arrow and pandas write them for
    absent keys."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if not is_missing(item)}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def is_missing(value: Any) -> bool:
    """Return whether a value is null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _read_message(
    message: Message, where: str, template: ChatTemplate, seen: Counter[str]
) -> dict[str, Any]:
    """Return one message in the keys that templates know. `where` names it in errors. Raise
    ValueError."""
    given, content = (
        _either(message, "role", "from", where),
        _either(message, "content", "value", where),
    )
    role = _role(given, where, message, template)
    result = {
        key: value
        for key, value in message.items()
        if key not in ("from", "value", "weight", "function_call")
    }
    result |= {"role": role}
    _check_keys(result, where, template, seen)
    if calls := _tool_calls(message, given, content, where, template):
        result["tool_calls"] = calls
        content = None if given == "function_call" else content
    if content is None and not calls and not _thoughts(message):
        raise ValueError(f"{where} has no 'content'; its keys: {', '.join(map(str, message))}")
    result.pop("content", None)
    return result if content is None else result | {"content": _text_of(content, where)}


def _either(message: Message, name: str, other: str, where: str) -> Any:
    """Return the value of one of two synonymous keys. Raise ValueError if both are there and
    differ."""
    if name in message and other in message and message[name] != message[other]:
        raise ValueError(f"{where} has {name!r} and {other!r}, which differ")
    return message.get(name, message.get(other))


def _role(given: Any, where: str, message: Message, template: ChatTemplate) -> str:
    """Return the role that templates know. Raise ValueError for an unknown one."""
    if given is not None and not isinstance(given, str):
        raise ValueError(f"the role of {where} must be text, not {type(given).__name__}")
    if not given:
        raise ValueError(f"{where} has no 'role'; its keys: {', '.join(map(str, message))}")
    # A role of the template's own. transformers writes any other as it stands, so that "tools" for
    # "tool" would be learned without a word.
    if given not in KNOWN_ROLES and template.spells(given) and given not in ROLES:
        return given
    role = ROLES.get(given.lower(), given.lower())
    if role == "developer":  # OpenAI's newer name
        return "system"
    if role in KNOWN_ROLES:
        return role
    raise ValueError(
        f"{where} has the role {given!r}, which is none of {', '.join(KNOWN_ROLES)}, nor another name for one, such as "
        "human or gpt, nor one that the chat template knows"
    )


def _check_keys(message: Message, where: str, template: ChatTemplate, seen: Counter[str]) -> None:
    """Raise ValueError for a key that is refused or looks misspelt, and count other unknown
    keys."""
    for key, value in message.items():
        if key in USED or template.reads(key) or value in (None, "", [], {}):
            continue
        if key in MEDIA:
            raise ValueError(f"{where} has {key!r}: only text can be learned")
        if key in LEARNING:
            raise ValueError(
                f"{where} has {key!r}; what is learned of a conversation is said by 'weight', 0 or 1"
            )
        if near := nearest(key, USED, MISSPELT):
            raise ValueError(f"{where} has an unknown key {key!r}; did you mean {near!r}?")
        if key not in NEUTRAL:
            seen[f"key {key!r} of messages, which the chat template does not use"] += 1


def _weight(message: Message, role: str, where: str) -> int:
    """Return a message's weight, 0 (not learned) or 1. Raise ValueError for another."""
    weight = message.get("weight")
    if weight is None:
        return 1
    # OpenAI takes no other. Between them the mask has no value: a token is learned or is not.
    if weight not in (0, 1) or isinstance(weight, str):
        raise ValueError(f"{where} has weight {weight!r}, which must be 0 (not learned) or 1")
    if weight and role != "assistant":
        raise ValueError(f"{where} has weight 1, but only what the assistant says is learned")
    return int(weight)


def _tool_calls(
    message: Message, given: Any, content: Any, where: str, template: ChatTemplate
) -> list[Any]:
    """Return the tool calls of a message in any of OpenAI's and ShareGPT's forms. Raise
    ValueError."""
    calls = message.get("tool_calls") or []
    if (single := message.get("function_call")) is not None:  # what OpenAI had before tools
        calls = [*calls, single]
    if given == "function_call":
        calls = _parsed(content, f"{where}, a function_call,")
        calls = calls if isinstance(calls, list) else [calls]
    if not isinstance(calls, list):
        raise ValueError(f"'tool_calls' of {where} must be a list, not {type(calls).__name__}")
    if calls and not template.reads("tool_calls"):
        raise ValueError(f"{where} has 'tool_calls', which the chat template does not write")
    return [_tool_call(call, where) for call in calls]


def _tool_call(call: Any, where: str) -> Mapping[str, Any]:
    """Return one tool call in OpenAI's present form. Raise ValueError."""
    call = (
        call
        if not isinstance(call, Mapping) or "function" in call
        else {"type": "function", "function": call}
    )
    function = call["function"] if isinstance(call, Mapping) else None
    if (
        not isinstance(function, Mapping)
        or not isinstance(function.get("name"), str)
        or not function["name"]
    ):
        raise ValueError(f"a tool call of {where} has no function with a name: {call!r:.80}")
    if not isinstance(function.get("arguments", {}), Mapping | str):
        raise ValueError(
            f"the arguments of {function['name']!r} in {where} must be an object, or JSON text of one"
        )
    return without_nulls(call)


def _change_arguments(messages: Sequence[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Return the messages with `change` applied to the arguments of every tool call."""

    def changed(call: Mapping[str, Any]) -> Mapping[str, Any]:
        function = call["function"]
        given = change(function.get("arguments", {}))
        return {**call, "function": {**function, "arguments": given}}

    found: list[Message] = []
    for message in messages:
        if calls := message.get("tool_calls"):
            message = {**message, "tool_calls": list(map(changed, calls))}
        found.append(message)
    return found


def _listed(found: Any, name: str) -> list[Any]:
    """Return tools as a list; they may come as one object or as JSON text. Raise ValueError."""
    if isinstance(found, str) and found.strip():
        found = without_nulls(_parsed(found, repr(name)))
    found = [found] if isinstance(found, Mapping) and found else found or []
    if not isinstance(found, list) or not all(isinstance(item, Mapping) for item in found):
        raise ValueError(
            f"{name!r} must be a list of objects that describe functions, or JSON text of one"
        )
    return found


def _text_of(content: Any, where: str) -> str:
    """Return the content as one text; content parts are joined. Raise ValueError for anything but
    text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"'content' of {where} must be text, not {type(content).__name__}")
    texts = []
    for part in content:  # OpenAI's, of which most templates know nothing
        kind, text = type(part).__name__, part
        if isinstance(part, Mapping):
            kind, text = part.get("type", "text"), part.get("text")
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text", "str"):
            raise ValueError(f"{where} holds something else than text: a part of type {kind!r}")
        texts.append(text)
    return "".join(texts)


def _parsed(text: Any, what: str) -> Any:
    """Parse JSON `text`. Raise ValueError that names `what` it is."""
    try:
        return json.loads(text)
    except (TypeError, ValueError):
        raise ValueError(f"{what} must be JSON: {text!r:.80}") from None


def _thoughts(message: Message) -> bool:
    """Return whether the message holds reasoning."""
    return any(isinstance(message.get(key), str) and message[key].strip() for key in REASONING)


def _says_anything(message: Message) -> bool:
    """Return whether an answer has text, tool calls or reasoning."""
    content: Any = message.get("content") or ""
    return bool(content.strip() or message.get("tool_calls") or _thoughts(message))
