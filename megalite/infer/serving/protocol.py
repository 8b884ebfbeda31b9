"""Bodies of requests, as OpenAI's API has them, and of its answers. What would change an answer and is not supported is
refused by name, never passed over."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    WrapValidator,
    field_validator,
    model_validator,
)

from megalite.infer.answer import Choice, Request
from megalite.infer.sampling import Sampling

MOST_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16
REASONS = {"stop": "stop", "length": "length"}


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""JSON can name what no tokenizer takes."""
Nothing = Annotated[list[Any], Field(max_length=0)] | None


def _one_of(what: str) -> WrapValidator:
    """For several types, of which pydantic would tell each by a name of its own."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {what}") from None

    return WrapValidator(check)


# The first mistake is told, so that a list of a million mistakes takes no longer than one.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Prompt = Annotated[
    Text | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)],
    _one_of("a text, a list of texts, a list of token ids, or a list of such lists"),
]


class Body(BaseModel):
    # Strict: what is no number in JSON is none here, such as true or "5".
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        return (
            {name: value for name, value in values.items() if value is not None} if isinstance(values, dict) else values
        )


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Body):
    """What both kinds of completions share."""

    model: Text = ""
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Annotated[Text | Texts, _one_of("a text or a list of texts")] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    # What changes nothing about an answer is taken and left alone.
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    # What would change it has its usual value, or is refused.
    presence_penalty: float | None = Field(None, ge=0, le=0)
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, float] | None = Field(None, max_length=0)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > MOST_STOPS or not all(0 < len(text) <= 1000 for text in stops):
            raise ValueError(f"at most {MOST_STOPS} texts, each of 1 to 1000 characters")
        return stop

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options need stream: true")
        return self

    def requests(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, num_logprobs: int | None
    ) -> list[Request]:
        """One for each of `n` choices. Without a seed they are different every time."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k == -1:  # as vLLM has it
            asked["top_k"] = 0
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        samplings = [replace(sampling, **asked, seed=wrap(seed + choice)) for choice in range(self.n)]
        return [Request(prompt, max_tokens, one, stop, num_logprobs) for one in samplings]


def wrap(seed: int) -> int:
    """As an int64 counts on."""
    return (seed + 2**63) % 2**64 - 2**63


def _no_echo(value: bool) -> bool:
    if value:
        raise ValueError("is not supported: leave it out, or give false")
    return value


class CompletionBody(Asked):
    prompt: Prompt
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Annotated[bool, AfterValidator(_no_echo)] | None = None
    suffix: Literal[""] | None = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionBody:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of is not supported: leave it out, or give it the value of n")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)


class TextPart(Body):
    type: Literal["text"]
    text: Text


Content = Annotated[
    Text | Annotated[list[TextPart], Field(fail_fast=True)], _one_of("a text or a list of parts of type text")
]


class Message(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    # An answer may be sent back as other servers give it.
    annotations: Nothing = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


Messages = Annotated[list[Message], Field(fail_fast=True)]


class ChatBody(Asked):
    messages: Messages = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Nothing = None
    tool_choice: Literal["none"] | None = None


class Reply:
    """Bodies of one response."""

    def __init__(self, kind: Literal["cmpl", "chatcmpl"], model: str, name_of: Callable[[int], str]):
        """`name_of` gives the text of a token."""
        self.chat, self.name_of = kind == "chatcmpl", name_of
        self.head = {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._offsets: Counter[int] = Counter()
        """Characters of the tokens that each choice has told."""

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, int]) -> dict[str, Any]:
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage}

    def piece(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, **({"usage": usage} if usage else {})}

    def choice(
        self, index: int, text: str, tokens: Sequence[Choice], finish: str | None, streamed: bool
    ) -> dict[str, Any]:
        """Of an answer, or of what is new of it."""
        reason = REASONS.get(finish) if finish else None
        logprobs = self._logprobs(index, tokens) if tokens else None
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if streamed:
            delta = {"content": text} if text else {}
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any]:
        """The first piece of a chat's answer says who speaks."""
        return {"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}

    def _logprobs(self, index: int, tokens: Sequence[Choice]) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._chosen(token) for token in tokens]}
        names, offsets = [self.name_of(t.token) for t in tokens], []
        for name in names:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(name)
        return {
            "tokens": names,
            "token_logprobs": [t.logprob for t in tokens],
            "top_logprobs": [self._named(token) for token in tokens],
            "text_offset": offsets,
        }

    def _named(self, choice: Choice) -> dict[str, float]:
        """The likeliest, and the one that was chosen. Of those that have one name, such as parts of characters, the
        likelier."""
        named: dict[str, float] = {}
        for token, logprob in (*choice.likeliest, (choice.token, choice.logprob)):
            named.setdefault(self.name_of(token), logprob)
        return named

    def _chosen(self, choice: Choice) -> dict[str, Any]:
        likeliest = [self._entry(token, logprob) for token, logprob in choice.likeliest]
        return self._entry(choice.token, choice.logprob) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        name = self.name_of(token)
        # A part of a character has no name to tell its bytes from.
        return {"token": name, "logprob": logprob, "bytes": None if "\ufffd" in name else list(name.encode())}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    total = prompt_tokens + completion_tokens
    return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
