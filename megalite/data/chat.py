"""A tokenizer's chat template, which renders conversations as transformers does and tells what ends
an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from megalite.data.tokenizer import HuggingFaceTokenizer, Tokenizer
from megalite.data.tokenizer_files import (
    CONFIG,
    TEMPLATES,
    read_object,
    settings_of,
    special_tokens,
)
from megalite.data.turn_end import TurnEnd, find_turn_end
from megalite.errors import DataError, TemplateLimit
from megalite.utils.outside import read_text, reading

Message = Mapping[str, Any]
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
"""Tags that newer templates put around what the model says."""
LARGEST_SOURCE = 1 << 18
"""Most characters of a template; the longest of models' own has some 30 thousand."""
MARK = "\ue0a1\ue0a2megalite\ue0a3"
"""Text from Unicode's private use area that replaces a message's texts to find them in a
rendering."""


class _Names(NamedTuple):
    """Holds what a template names."""

    used: frozenset[str]
    """Variables, attributes and keys."""
    texts: frozenset[str]
    """Other texts, such as those that it compares roles with."""


@dataclass(frozen=True)
class ChatTemplate:
    """Renders conversations with transformers' own code.

    A template may come from anywhere: it runs in a sandbox, under the limits of
    `template_limits`."""

    source: str
    tokens: Mapping[str, str]
    """Special tokens by role, such as eos_token."""
    special: tuple[str, ...]
    """The tokenizer's special tokens, which never occur in ordinary text."""
    added: tuple[str, ...] = ()
    """The special tokens, and others that are matched whole in a text: some tokenizers end answers
    with such."""
    tool_source: str | None = None
    """Template that transformers uses instead if tools are given."""
    folder: Path | None = None
    """Where the template comes from, for messages."""

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate:
        """Open the chat template in `folder`, where `tokenizer` comes from. Raise DataError if
        there is none."""
        try:
            import jinja2  # noqa: F401
            import transformers  # noqa: F401
        except ImportError:
            raise DataError(
                "chat templates need transformers and jinja2; pip install 'megalite[hf]'"
            ) from None
        named = _templates_of(folder)
        if "default" not in named:
            others = f" by the name of default, only {', '.join(named)}" if named else ""
            raise DataError(
                f"{folder} has no chat template{others}; put one into {folder / 'chat_template.jinja'}, such as "
                "configs/chat_template.jinja, or take the tokenizer of a model that was made to chat"
            )
        template, for_tools = named["default"], named.get("tool_use")
        if max(len(template), len(for_tools or "")) > LARGEST_SOURCE:
            raise TemplateLimit(
                f"{folder}: the chat template has more than {LARGEST_SOURCE:,} characters"
            )
        special: Sequence[str] = ()
        added: Sequence[str] = ()
        # Sentencepiece alone never recognises a token in a text.
        if isinstance(tokenizer, HuggingFaceTokenizer):
            special, added = tokenizer.control_tokens(), tokenizer.added_tokens()
        # bos_token, eos_token, …: variables of the template, as transformers gives them.
        tokens = special_tokens(settings_of(folder))
        return cls(template, tokens, tuple(special), tuple(added), for_tools, folder)

    def render(
        self, messages: Sequence[Message], tools: Any = None, prompt: bool = False, **options: Any
    ) -> str:
        """Return the conversation's text; with `prompt`, up to where the model's next answer
        begins.

        `tools` are functions that the model may call; `options` are variables of the template, such
        as enable_thinking. Raise ValueError with the template's own message for messages that it
        cannot render, and TemplateLimit if it does not end."""
        return self._render(messages, tools, {**options, "add_generation_prompt": prompt})[0]

    def render_with_blocks(
        self, messages: Sequence[Message], tools: Any = None, **options: Any
    ) -> tuple[str, list[range]]:
        """Return the conversation's text and the ranges of its {% generation %} blocks. `tools` and
        errors are those of `render`."""
        text, blocks = self._render(
            messages, tools, {**options, "return_assistant_tokens_mask": True}
        )
        return text, [range(*block) for block in blocks]

    def has_blocks(self, tools: Any = None) -> bool:
        """Return whether the template marks the model's words by {% generation %}."""
        return bool(GENERATION.search(self._source_for(tools)))

    def reads(self, name: str) -> bool:
        """Return whether the template uses a variable, a message key or a text of this `name`."""
        return name in self._names.used or name in self._names.texts

    def spells(self, role: str) -> bool:
        """Return whether the template has a text of its own that is this `role`, as those have that
        treat it in some way."""
        return role in self._names.texts

    @cached_property
    def turn_end(self) -> TurnEnd:
        """Return how the template ends an answer."""
        return find_turn_end(self.render, self.added, self.special)

    @cached_property
    def controls(self) -> tuple[str, ...]:
        """Return the tokens that only the template may write: special tokens, and those that end an
        answer."""
        roles = (token for token in self.tokens.values() if token in self.added)
        return tuple(dict.fromkeys([*self.special, *roles, *self.turn_end.tokens]))

    @cached_property
    def _names(self) -> _Names:
        """Return what the template's syntax tree names. Raise DataError for invalid syntax."""
        import jinja2
        from jinja2 import nodes

        used: set[str] = set()
        texts: set[str] = set()
        for source in filter(None, (self.source, self.tool_source)):
            try:
                tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                    GENERATION.sub("", source)
                )
            except jinja2.TemplateSyntaxError as error:
                raise DataError(
                    f"the chat template is not valid: line {error.lineno}: {error.message}"
                ) from None
            used.update(node.attr for node in tree.find_all(nodes.Getattr))
            used.update(node.name for node in tree.find_all(nodes.Name))
            # message['content'] is message.content: what stands in the brackets is a name.
            keys = {id(node.arg) for node in tree.find_all(nodes.Getitem)}
            for node in tree.find_all(nodes.Const):
                if isinstance(node.value, str):
                    (used if id(node) in keys else texts).add(node.value)
        return _Names(frozenset(used), frozenset(texts))

    def _source_for(self, tools: Any) -> str:
        return self.tool_source if tools and self.tool_source is not None else self.source

    def _render(
        self, messages: Sequence[Message], tools: Any, options: Mapping[str, Any]
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the spans of {% generation %} blocks. Raise as `render` does."""
        from megalite.data.template_limits import render

        # Null stands for an absent key, as Arrow writes it; a template would see the key.
        chat = [
            {key: value for key, value in message.items() if value is not None}
            for message in messages
        ]
        values = {**self.tokens, **options}
        try:
            return render(self._source_for(tools), chat=chat, tools=tools or None, **values)
        except TemplateLimit as limit:
            raise TemplateLimit(f"{self.folder}: {limit}" if self.folder else str(limit)) from None
        except Exception as error:  # a template may fail in any way
            raise ValueError(
                f"the chat template refuses it: {error or type(error).__name__}"
            ) from None


def _templates_of(folder: Path) -> dict[str, str]:
    """Return the folder's templates by name. As in transformers, separate files take precedence
    over tokenizer_config.json."""
    files = {path.stem: path for path in sorted((folder / TEMPLATES).glob("*.jinja"))}
    if (own := folder / "chat_template.jinja").is_file():
        files["default"] = own
    found = {}
    for name, path in files.items():
        found[name] = read_text(path, DataError)
    # Not merged: in transformers too, files stand instead of what the settings have.
    configured = read_object(folder / CONFIG).get("chat_template") if not files else None
    with reading(folder / CONFIG, DataError):
        named = (
            configured
            if isinstance(configured, list)
            else [{"name": "default", "template": configured}]
        )
        found |= {
            str(item["name"]): item["template"]
            for item in named
            if isinstance(item["template"], str)
        }
    return found
