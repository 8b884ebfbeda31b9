"""Ratings of answers by users, stored in the form that finetuning reads.

A folder of JSON lines. `completion.jsonl` has answers to learn, rated well or corrected, with their
prompt (a text, or messages, of which only the rated answer is learned). `preference.jsonl` has
pairs of a correction and the answer it corrects. `rejected.jsonl` has answers rated badly, from
which alone nothing can be learned."""

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
    """Holds the body of /v1/ratings. Raises ValueError for fields that contradict each other."""

    messages: Messages | None = Field(None, min_length=1, description="what was answered")
    prompt: Text | None = Field(
        None,
        min_length=1,
        max_length=LONGEST,
        description="of a model that goes on from a text, the text",
    )
    answer: Text = Field(max_length=LONGEST)
    rating: Literal["up", "down"]
    model: Text = Field("", description="whose answer it is, where the server has several")
    id: Text | None = Field(
        None, max_length=100, description="the id of the response that is rated"
    )
    correction: Text | None = Field(
        None, max_length=LONGEST, description="what the answer should have been"
    )

    @model_validator(mode="after")
    def _one_question(self) -> RatingBody:
        if (self.messages is None) == (self.prompt is None):
            raise ValueError("give either messages or a prompt")
        if any(message.role == "assistant" and not message.text for message in self.messages or ()):
            raise ValueError("a message of the assistant says nothing")
        return self

    @model_validator(mode="after")
    def _a_correction_corrects(self) -> RatingBody:
        if self.correction is not None and (
            not self.correction.strip() or self.correction == self.answer
        ):
            raise ValueError("a correction must say something, and something else than the answer")
        return self

    @model_validator(mode="after")
    def _nothing_is_not_good(self) -> RatingBody:
        if self.good is not None and not self.good.strip():
            raise ValueError("from an answer that says nothing, nothing can be learned")
        return self

    @property
    def asked(self) -> str | list[dict[str, str]]:
        """Return what was answered: the prompt, or the messages."""
        if self.messages is None:
            return self.prompt or ""
        return [{"role": message.role, "content": message.text} for message in self.messages]

    @property
    def good(self) -> str | None:
        """Return the answer to learn: the correction, or the answer if it was rated well; None
        otherwise."""
        return self.correction or (self.answer if self.rating == "up" else None)

    @property
    def kind(self) -> str:
        """Return "up", "down" or "corrected"."""
        return "corrected" if self.correction is not None else self.rating


class Ratings:
    """Stores ratings in a folder that several servers may write to. Raises ConfigError if it cannot
    be created."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"ratings cannot be kept in {folder}: {error.strerror}") from None

    def add(self, rating: RatingBody, model: str) -> None:
        """Store a rating of an answer by the model named `model`, durably when it returns. Raise OSError."""
        asked, answer, good = rating.asked, rating.answer, rating.good
        facts = {"rating": rating.kind, "model": model, "time": int(time.time())}
        facts |= {"id": rating.id} if rating.id else {}
        if good is None:
            self._append("rejected.jsonl", {"prompt": asked, "rejected": answer} | facts)
            return
        self._append("completion.jsonl", {"prompt": asked, "completion": good} | facts)
        if rating.correction is not None and answer:
            self._append(
                "preference.jsonl", {"prompt": asked, "chosen": good, "rejected": answer} | facts
            )

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Append a whole line or nothing, also behind a line that a crash cut off. Raise
        OSError."""
        data = orjson.dumps(row) + b"\n"
        file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            locked = _lock(file)
            size = os.fstat(file).st_size
            # A line that a crash cut off must not swallow this one.
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            # One write to a file opened with O_APPEND, so that lines of several servers do not mix.
            written = os.write(file, data)
            if written != len(data):
                if locked:
                    os.ftruncate(file, size)
                raise OSError(f"only {written} of {len(data)} bytes fitted on the disk")
            os.fsync(file)
        finally:
            os.close(file)


def _lock(file: int) -> bool:
    """Lock the file until it is closed, and return whether that worked. Some cluster file systems
    have no locks: there, too, what fits is appended in one write."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
        return False
    return True
