"""Request and response bodies of OpenAI's API. A field that would change an answer and is not
supported is refused by name, never ignored."""

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
from megalite.infer.beams import Beams
from megalite.infer.sampling import Sampling

MOST_LOGPROBS = 20
MOST_CHOICES = 16
MOST_STOPS = 16
REASONS = {"stop": "stop", "length": "length"}


def _whole(text: str) -> str:
    """Return `text`. Raise ValueError for half of a surrogate pair, which JSON can spell."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_whole)]
"""JSON can spell texts that no tokenizer accepts."""
Nothing = Annotated[list[Any], Field(max_length=0)] | None


def _one_of(what: str) -> WrapValidator:
    """Return a validator that describes a union as `what`; pydantic would report each of its types
    separately."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"must be {what}") from None

    return WrapValidator(check)


# Fail at the first mistake, so that a list of a million mistakes takes no longer than one.
Texts = Annotated[list[Text], Field(fail_fast=True)]
Tokens = Annotated[list[int], Field(fail_fast=True)]
Prompt = Annotated[
    Text | Tokens | Texts | Annotated[list[Tokens], Field(fail_fast=True)],
    _one_of("a text, a list of texts, a list of token ids, or a list of such lists"),
]


NoPenalty = Annotated[
    float,
    Field(ge=0, le=0),
    _one_of("left out, or 0: of penalties only repetition_penalty is supported"),
]


class Body(BaseModel):
    """Base of all bodies: unknown fields are refused, and null is the same as leaving a field
    out."""

    # Strict: only a JSON number is a number, not true or "5".
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, values: Any) -> Any:
        # Clients of typed languages send null for whatever is not set.
        return (
            {name: value for name, value in values.items() if value is not None}
            if isinstance(values, dict)
            else values
        )


class StreamOptions(Body):
    """Holds the options of a streamed response."""

    include_usage: bool = False
    include_obfuscation: bool = False


class Asked(Body):
    """Holds the fields that completions and chat completions share."""

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
    num_beams: int = Field(1, ge=1, le=MOST_CHOICES)
    length_penalty: float | None = Field(None, ge=-100, le=100)
    early_stopping: (
        Annotated[bool | Literal["never"], _one_of("true, false or the text never")] | None
    ) = None
    # Accepted and ignored, since these do not change an answer.
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    store: bool | None = None
    service_tier: Text | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    # These would change it: only the value that means nothing is accepted.
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None
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

    @model_validator(mode="after")
    def _options_of_beams(self) -> Self:
        if self.num_beams == 1:
            if self.length_penalty is not None or self.early_stopping is not None:
                raise ValueError("length_penalty and early_stopping need num_beams")
            return self
        if self.temperature or self.top_p not in (None, 1) or self.top_k not in (None, -1, 0):
            raise ValueError("num_beams draws no tokens: leave temperature, top_p and top_k out")
        if self.min_p or getattr(self, "logprobs", None) not in (None, False):
            raise ValueError("num_beams has no min_p and no logprobs: leave them out")
        if self.n > self.num_beams:
            raise ValueError("n must be at most num_beams, which find no more answers")
        return self

    @property
    def beams(self) -> Beams | None:
        """Return the settings of beam search; None without it."""
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        beams = Beams(self.num_beams, penalty, self.early_stopping or False)
        return beams if beams.width > 1 else None

    @property
    def tells_usage(self) -> bool:
        """Return whether a stream ends with the counts of its tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def requests(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling, num_logprobs: int | None
    ) -> list[Request]:
        """Return one Request for each of `n` choices, of at most `max_tokens` tokens behind
        `prompt` (ids). `sampling` holds the defaults, `num_logprobs` the number of logprobs per
        token. Without a seed, choices differ every time; beams find the same."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        asked = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.top_k == -1:  # as vLLM has it
            asked["top_k"] = 0
        # 62 bits: the seeds of further choices, which are added, do not wrap.
        seed = secrets.randbits(62) if self.seed is None else self.seed
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        samplings = [
            replace(sampling, **asked, seed=wrap(seed + choice)) for choice in range(self.n)
        ]
        requests = [Request(prompt, max_tokens, one, stop, num_logprobs) for one in samplings]
        return [
            replace(request, beams=self.beams, place=place if self.beams else 0)
            for place, request in enumerate(requests)
        ]


def wrap(seed: int) -> int:
    """Return `seed` wrapped to an int64, as overflow would."""
    return (seed + 2**63) % 2**64 - 2**63


def _no_echo(value: bool) -> bool:
    """Refuse echo: true."""
    if value:
        raise ValueError("is not supported: leave it out, or give false")
    return value


class CompletionBody(Asked):
    """Holds the body of /v1/completions."""

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
        """Return the prompts as a list, each a text or token ids."""
        return prompts_of(self.prompt)


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """Return a `Prompt` as a list, each a text or token ids."""
    return (
        [prompt]
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int)
        else list(prompt)
    )


def _some_tokens(value: int) -> int:
    """Refuse a text cut to nothing; -1 is as many tokens as fit, as vLLM has it."""
    if value == 0:
        raise ValueError("must be at least 1, or -1")
    return value


Truncation = Annotated[int, Field(ge=-1), AfterValidator(_some_tokens)]


class EmbeddingsBody(Body):
    """Holds the body of /v1/embeddings."""

    model: Text = ""
    input: Prompt
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)
    truncate_prompt_tokens: Truncation | None = None
    user: Text | None = None

    @property
    def inputs(self) -> list[str | list[int]]:
        """Return the inputs as a list, each a text or token ids."""
        return prompts_of(self.input)


class TextDocument(Body):
    """Holds a document of a rerank request that is an object."""

    text: Text


class RerankBody(Body):
    """Holds the body of /v1/rerank, as Jina and Cohere have it."""

    model: Text = ""
    query: Text
    documents: Annotated[
        list[Annotated[Text | TextDocument, _one_of("a text or an object with a text")]],
        Field(fail_fast=True),
    ] = Field(min_length=1)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = True
    user: Text | None = None

    @property
    def texts(self) -> list[str]:
        """Return the documents as texts."""
        return [each if isinstance(each, str) else each.text for each in self.documents]


class ClassifiedText(Body):
    """Holds a text of a classify request that is an object: alone, with a second one, or as
    words."""

    text: Text = ""
    text_pair: Text = ""
    tokens: list[Annotated[Text, Field(min_length=1)]] = Field(default=[])

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.text) == bool(self.tokens) or (self.tokens and self.text_pair):
            raise ValueError("has a text, which may have a text_pair, or else tokens")
        return self


class ClassifyBody(Body):
    """Holds the body of /v1/classify."""

    model: Text = ""
    input: Annotated[
        Text | Annotated[list[Text | ClassifiedText], Field(fail_fast=True, min_length=1)],
        _one_of("a text, or a list of texts or objects with a text, a text_pair or tokens"),
    ]
    truncate_prompt_tokens: Truncation | None = None
    user: Text | None = None

    @property
    def inputs(self) -> list[ClassifiedText]:
        """Return the inputs as a list of objects."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        return [ClassifiedText.model_construct(text=x) if isinstance(x, str) else x for x in inputs]


class TextPart(Body):
    """Holds a content part of type text, the only type supported."""

    type: Literal["text"]
    text: Text


Content = Annotated[
    Text | Annotated[list[TextPart], Field(fail_fast=True)],
    _one_of("a text or a list of parts of type text"),
]


class Message(Body):
    """Holds one message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    # Fields of answers by other servers, which clients send back.
    annotations: Nothing = None
    tool_calls: Nothing = None

    @property
    def text(self) -> str:
        """Return the content as one text."""
        parts = self.content or ""
        return parts if isinstance(parts, str) else "".join(part.text for part in parts)


Messages = Annotated[list[Message], Field(fail_fast=True)]


class ChatBody(Asked):
    """Holds the body of /v1/chat/completions."""

    messages: Messages = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    tools: Nothing = None
    tool_choice: Literal["none"] | None = None


class Reply:
    """Builds the bodies of one response."""

    def __init__(
        self,
        kind: Literal["cmpl", "chatcmpl"],
        model: str,
        name_of: Callable[[int], str],
        version: str,
        tells_usage: bool = False,
        bytes_of: Callable[[int], bytes | None] = lambda _: None,
    ):
        """Start a response of `kind` by the model named `model`. `name_of` gives the text of a
        token, `bytes_of` the bytes of one whose text has an incomplete character. `version` tells
        models apart that are served under one name. A stream that `tells_usage` has its counts in
        the last piece."""
        self.chat, self.name_of, self.tells_usage = kind == "chatcmpl", name_of, tells_usage
        self.bytes_of = bytes_of
        self.head = {
            "id": f"{kind}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": version or None,
        }
        self._offsets: Counter[int] = Counter()
        """Characters of the tokens reported so far, by choice."""

    def whole(self, choices: Sequence[Any], usage: dict[str, int]) -> dict[str, Any]:
        """Return the body of a response that is not streamed. `choices` are entries of answers, or
        what orjson writes in their place."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": usage}

    def piece(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None
    ) -> dict[str, Any]:
        """Return one event of a streamed response."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {
            **self.head,
            "object": kind,
            "choices": choices,
            # As OpenAI's: null in the pieces before the last one.
            **({"usage": usage} if self.tells_usage else {}),
        }

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Choice] | None,
        finish: str | None,
        streamed: bool,
    ) -> dict[str, Any]:
        """Return the entry of choice `index`: a whole answer, or what is new of it if `streamed`.
        `text` and `tokens` are what it adds, `finish` why it ended. Without logprobs `tokens` are
        None; an answer that says nothing has none of them."""
        # OpenAI knows no others: an answer that was cut off is an error before it comes here.
        reason = REASONS.get(finish) if finish else None
        is_told = tokens is not None and (tokens or not streamed)
        logprobs = self._logprobs(index, tokens or ()) if is_told else None
        if not self.chat:
            return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        if streamed:
            delta = {"content": text} if text else {}
            return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first piece of a chat's answer, which names the role."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def _logprobs(self, index: int, tokens: Sequence[Choice]) -> dict[str, Any]:
        """Return the logprobs in the form of chats or of completions."""
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
        """Return the logprobs of the likeliest tokens and the chosen one, by text. If several
        tokens have one text, such as parts of characters, the likelier counts."""
        named: dict[str, float] = {}
        for token, logprob in (*choice.likeliest, (choice.token, choice.logprob)):
            named.setdefault(self.name_of(token), logprob)
        return named

    def _chosen(self, choice: Choice) -> dict[str, Any]:
        """Return a token's entry in a chat's logprobs."""
        likeliest = [self._entry(token, logprob) for token, logprob in choice.likeliest]
        return self._entry(choice.token, choice.logprob) | {"top_logprobs": likeliest}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        """Return a token with its logprob and bytes."""
        name = self.name_of(token)
        # The text of an incomplete character does not tell its bytes, by which clients join parts.
        known = self.bytes_of(token) if "\ufffd" in name else name.encode()
        return {
            "token": name,
            "logprob": logprob,
            "bytes": None if known is None else list(known),
        }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return the body's token counts."""
    total = prompt_tokens + completion_tokens
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": total,
    }


def error(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """Return an error's body: `message`, its `kind`, the faulty field `param`, and a `code`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
