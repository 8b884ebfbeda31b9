"""What people think of answers, kept as finetuning reads it.

A folder of JSON lines: `chat.jsonl` and, of models that have no chat template, `completion.jsonl` have answers to be
learned, rated well or corrected; `preference.jsonl` pairs of a correction with what it corrects; `rejected.jsonl`
answers rated badly, of which alone nothing can be learned."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, model_validator

from megalite.errors import ConfigError
from megalite.infer.serving.protocol import Body, Message

LONGEST = 1_000_000


class RatingBody(Body):
    messages: list[Message] | None = Field(None, min_length=1, description="what was answered")
    prompt: str | None = Field(None, max_length=LONGEST, description="of a model that goes on from a text, the text")
    answer: str = Field(max_length=LONGEST)
    rating: Literal["up", "down"]
    correction: str | None = Field(None, max_length=LONGEST, description="what the answer should have been")

    @model_validator(mode="after")
    def _one_question(self) -> RatingBody:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or a prompt")
        return self

    @model_validator(mode="after")
    def _a_correction_corrects(self) -> RatingBody:
        if self.correction is not None and (not self.correction.strip() or self.correction == self.answer):
            raise ValueError("a correction must say something, and something else than the answer")
        return self

    @property
    def asked(self) -> str | list[dict[str, str]]:
        if self.messages is None:
            return self.prompt or ""
        return [{"role": message.role, "content": message.text} for message in self.messages]

    @property
    def kind(self) -> str:
        return "corrected" if self.correction is not None else self.rating


class Ratings:
    def __init__(self, folder: Path):
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"ratings cannot be kept in {folder}: {error.strerror}") from None

    def add(self, rating: RatingBody, model: str) -> None:
        """On the disk when it returns. Raises OSError."""
        asked, answer = rating.asked, rating.answer
        facts = {"rating": rating.kind, "model": model, "time": int(time.time())}
        good = answer if rating.correction is None else rating.correction
        with self._lock:
            if rating.correction is not None:
                self._append("preference.jsonl", {"prompt": asked, "chosen": good, "rejected": answer} | facts)
            if rating.kind == "down":
                self._append("rejected.jsonl", {"prompt": asked, "rejected": answer} | facts)
            elif isinstance(asked, str):
                self._append("completion.jsonl", {"prompt": asked, "completion": good} | facts)
            else:
                self._append("chat.jsonl", {"messages": [*asked, {"role": "assistant", "content": good}]} | facts)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """A whole line, even behind one that a crash cut off."""
        data = orjson.dumps(row) + b"\n"
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(file, data)
            if written != len(data):
                raise OSError(f"only {written} of {len(data)} bytes fitted on the disk")
            os.fsync(file)
        finally:
            os.close(file)
