"""A conversation with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from megalite.data.chat import ChatTemplate, Message
from megalite.data.tokenizer import load_tokenizer
from megalite.errors import ConfigError
from megalite.infer.generate import Generator, find_model
from megalite.infer.sampling import Sampling

HELP = "/new begins another conversation, /system TEXT sets what the model is told first, /quit (or Ctrl-D) ends"


class Talk:
    """Holds a conversation, and has the model answer."""

    def __init__(self, generator: Generator, max_tokens: int, sampling: Sampling, system: str = ""):
        """Begin with what the model is told first, `system`, if anything."""
        self._generator, self._max_tokens, self._sampling = generator, max_tokens, sampling
        self._system = system
        self.begin()

    def begin(self) -> None:
        """Forget what was said."""
        self.messages: list[Message] = []
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def say(self, text: str) -> Iterator[str]:
        """Yield the answer to `text`, piece by piece. Raises ConfigError where the conversation has
        become too long; then `text` counts as not said."""
        generator = self._generator
        asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
        request = generator.request(generator.chat_ids(asked), self._max_tokens, self._sampling)
        pieces = []
        for piece in generator.stream(generator.as_chat(request)):
            pieces.append(piece)
            yield piece
        # Only now: a question whose answer was broken off counts as not asked.
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def command(self, line: str) -> str | None:
        """Do what a line that begins with / asks for. Return what to print, or None to end."""
        name, _, rest = line.partition(" ")
        if name in ("/quit", "/exit"):
            return None
        if name == "/system":
            self._system = rest.strip()
        if name in ("/new", "/system"):
            self.begin()
            return "(a new conversation)"
        return HELP


def open_talk(
    path: Path, max_tokens: int, temperature: float | None, top_p: float | None, system: str
) -> Talk:
    """Open the model in `path` for a conversation. What is None is as the model says. Raises
    ConfigError, DataError or CheckpointError, for a missing chat template before the weights are
    read."""
    folder = find_model(path)
    ChatTemplate.of(folder, load_tokenizer(folder))
    generator = Generator.open(folder, num_slots=1)
    asked = {"temperature": temperature, "top_p": top_p}
    given = {name: value for name, value in asked.items() if value is not None}
    return Talk(generator, max_tokens, replace(generator.sampling, **given), system)  # type: ignore[arg-type]


def talk(conversation: Talk, read: Callable[[str], str] = input) -> None:
    """Hold a conversation in the terminal: `read` returns the next line, given a prompt. Ctrl-C ends
    an answer, Ctrl-D the conversation."""
    print(HELP, file=sys.stderr)
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            print()
            return
        if line.startswith("/"):
            told = conversation.command(line)
            if told is None:
                return
            print(told, file=sys.stderr)
        elif line:
            _answer(conversation, line)


def _answer(conversation: Talk, line: str) -> None:
    try:
        for piece in conversation.say(line):
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" … (interrupted; the question counts as not asked)")
    except ConfigError as error:
        print(f"{error}; /new begins another conversation", file=sys.stderr)
