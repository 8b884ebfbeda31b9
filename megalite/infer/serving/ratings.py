"""What people think of answers, kept as finetuning reads it.

A folder of JSON lines: `completion.jsonl` has answers to be learned, rated well or corrected, behind what they answer,
a text or messages: of a conversation only the answer that was rated is learned. `preference.jsonl` has pairs of a
correction with what it corrects; `rejected.jsonl` answers rated badly, of which alone nothing can be learned."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import Any, Literal

import orjson
from pydantic import Field, model_validator

from megalite.errors import ConfigError
from megalite.infer.serving.protocol import Body, Messages, Text

LONGEST = 1_000_000


class RatingBody(Body):
    messages: Messages | None = Field(None, min_length=1, description="what was answered")
    prompt: Text | None = Field(
        None, min_length=1, max_length=LONGEST, description="of a model that goes on from a text, the text"
    )
    answer: Text = Field(max_length=LONGEST)
    rating: Literal["up", "down"]
    correction: Text | None = Field(None, max_length=LONGEST, description="what the answer should have been")

    @model_validator(mode="after")
    def _one_question(self) -> RatingBody:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or a prompt")
        if any(message.role == "assistant" and not message.text for message in self.messages or ()):
            raise ValueError("a message of the assistant says nothing")
        return self

    @model_validator(mode="after")
    def _a_correction_corrects(self) -> RatingBody:
        if self.correction is not None and (not self.correction.strip() or self.correction == self.answer):
            raise ValueError("a correction must say something, and something else than the answer")
        return self

    @model_validator(mode="after")
    def _nothing_is_not_good(self) -> RatingBody:
        if self.good is not None and not self.good.strip():
            raise ValueError("from an answer that says nothing, nothing can be learned")
        return self

    @property
    def asked(self) -> str | list[dict[str, str]]:
        if self.messages is None:
            return self.prompt or ""
        return [{"role": message.role, "content": message.text} for message in self.messages]

    @property
    def good(self) -> str | None:
        """What is to be learned."""
        return self.correction or (self.answer if self.rating == "up" else None)

    @property
    def kind(self) -> str:
        return "corrected" if self.correction is not None else self.rating


class Ratings:
    """In a folder that several servers may write to."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"ratings cannot be kept in {folder}: {error.strerror}") from None

    def add(self, rating: RatingBody, model: str) -> None:
        """On the disk when it returns. Raises OSError."""
        asked, answer, good = rating.asked, rating.answer, rating.good
        facts = {"rating": rating.kind, "model": model, "time": int(time.time())}
        if good is None:
            self._append("rejected.jsonl", {"prompt": asked, "rejected": answer} | facts)
            return
        self._append("completion.jsonl", {"prompt": asked, "completion": good} | facts)
        if rating.correction is not None and answer:
            self._append("preference.jsonl", {"prompt": asked, "chosen": good, "rejected": answer} | facts)

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """A whole line or none, also behind one that a crash cut off."""
        data = orjson.dumps(row) + b"\n"
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            locked = _lock(file)
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            written = os.write(file, data)
            if written != len(data):
                if locked:
                    os.ftruncate(file, size)
                raise OSError(f"only {written} of {len(data)} bytes fitted on the disk")
            os.fsync(file)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    """Until it is closed. Some file systems of clusters have no locks: what fits is appended whole there, too."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
