"""Conversations as text by a tokenizer's own chat template, and which part of the text is the model's to say."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from megalite.errors import DataError

Message = Mapping[str, Any]
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""Marks, in newer templates, what the model says."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders as transformers does, with whose code it is done: a template may come from anywhere, and runs in a
    sandbox."""

    source: str
    tokens: Mapping[str, str]
    """Special tokens by their role, such as eos_token."""
    controls: tuple[str, ...]
    """All tokens that no text holds. What ends an answer is one of them."""

    @classmethod
    def of(cls, folder: Path, controls: Sequence[str]) -> ChatTemplate:
        """Of a tokenizer's folder. Raises DataError where it has none."""
        try:
            import jinja2  # noqa: F401
            import transformers  # noqa: F401
        except ImportError:
            raise DataError("chat templates need transformers and jinja2; pip install 'megalite[hf]'") from None
        settings = _read(folder / "tokenizer_config.json")
        source = _template_of(folder, settings.get("chat_template"))
        if source is None:
            raise DataError(
                f"{folder} has no chat template; put one into {folder / 'chat_template.jinja'}, such as "
                "configs/chat_template.jinja, or take the tokenizer of a model that was made to chat"
            )
        named = _read(folder / "special_tokens_map.json") | settings
        tokens = {key: _text_of(value) for key, value in named.items() if key.endswith("_token")}
        return cls(source, {key: text for key, text in tokens.items() if text is not None}, tuple(controls))

    def render(self, messages: Sequence[Message], tools: Any = None, prompt: bool = False) -> str:
        """`prompt`: up to where the model's next answer begins. Raises ValueError with what the template says of
        messages that it cannot render."""
        return self._render(messages, tools, add_generation_prompt=prompt)[0]

    def answers(self, messages: Sequence[Message], tools: Any = None, last: bool = False) -> tuple[str, list[range]]:
        """The text of a conversation, and where in it the assistant's answers stand, with the token that ends each;
        only the last one's place where `last`. Raises ValueError where there is none, or the template does not let it
        be told."""
        numbers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not numbers:
            raise ValueError("no message is the assistant's, so that there is nothing to learn from")
        if GENERATION.search(self.source):
            text, found = self._render(messages, tools, return_assistant_tokens_mask=True)
            if not found:
                raise ValueError("the template's {% generation %} marks nothing in it")
            spans = [range(*span) for span in (found[-1:] if last else found)]
            return text, self._with_ends(text, spans, found[-1][1])
        text, spans = self.render(messages, tools), []
        for number in numbers[-1:] if last else numbers:
            before = self.render(messages[:number], tools, prompt=True)
            until = self.render(messages[: number + 1], tools)
            end = self._shared_end(text, until, len(before)) if until.startswith(before) else None
            if end is None:
                raise ValueError(
                    f"the template renders the conversation up to the answer in message {number} in another way than "
                    "the whole, so that the answer's place cannot be told; mark what the model says by "
                    "{% generation %} … {% endgeneration %} in the template, or learn from the last answer alone"
                )
            spans.append(range(len(before), end))
        return text, spans

    def is_ended(self, text: str, span: range) -> bool:
        """Whether what stands there ends with a token that no text holds."""
        return text[: span.stop].endswith(self.controls)

    def _shared_end(self, text: str, until: str, start: int) -> int | None:
        """Where the answer that begins there ends in a whole conversation, from what is rendered until then. None where
        that is another text."""
        if text.startswith(until):
            return self._end(until, start)
        # Some templates put an end of text behind the last turn, whichever it is: Phi-3's.
        same = takewhile(lambda pair: pair[0] == pair[1], zip(text, until, strict=False))
        shared = "".join(letter for letter, _ in same)
        ends = [found + len(token) for token in self.controls if (found := shared.rfind(token, start)) >= 0]
        rest = until[max(ends, default=0) :]
        for token in self.controls:
            rest = rest.replace(token, "")
        return max(ends) if ends and not rest.strip() else None

    def _end(self, text: str, start: int) -> int:
        """Without the white space that a template puts behind the token which ends an answer."""
        bare = text.rstrip()
        return len(bare) if len(bare) > start and bare.endswith(self.controls) else len(text)

    def _with_ends(self, text: str, spans: Sequence[range], last: int) -> list[range]:
        """Spans that leave out the token which ends an answer, with it: the one behind the last answer's end."""
        if text[:last].endswith(self.controls):
            return list(spans)
        end = next((token for token in self.controls if text.startswith(token, last)), "")
        return [range(s.start, s.stop + len(end) * text.startswith(end, s.stop)) for s in spans]

    def _render(self, messages: Sequence[Message], tools: Any, **options: Any) -> tuple[str, list[tuple[int, int]]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [{key: value for key, value in message.items() if value is not None} for message in messages]
        try:
            texts, spans = render_jinja_template(
                [chat], tools=tools or None, chat_template=self.source, **options, **self.tokens
            )
        except Exception as error:  # a template may fail in any way
            raise ValueError(f"the chat template refuses it: {error}") from None
        return texts[0], spans[0] if spans else []


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON: {error}") from None
    return values if isinstance(values, dict) else {}


def _template_of(folder: Path, configured: Any) -> str | None:
    """A file of its own goes before one inside of tokenizer_config.json, which may name several."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    if isinstance(configured, list):
        named = {item["name"]: item["template"] for item in configured}
        return named.get("default")
    return configured


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
