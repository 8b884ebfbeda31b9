"""The answers of an endpoint, in a file that is only ever appended to.

A line is written when its answer is there, in one write: a killed process leaves whole lines, and
at most a torn last one, which the next start cuts off."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from megalite.errors import DataError


@dataclass(frozen=True)
class Answer:
    """What came back of a request."""

    text: str
    finish: str
    """Why it ends: stop, length, content_filter. refused: the endpoint does not answer this."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_metered: bool = True
    """False: the endpoint has not said how many tokens; these are the most it can be."""
    tries: int = 1


def key_of_request(body: dict[str, Any], slot: int, call: int) -> str:
    """Return the name of a request: of all that decides its answer, and of its place."""
    # The body is the whole request, so that a changed prompt or temperature is asked anew. The place
    # is there as well: two calls with the same text must not get one answer.
    told = json.dumps([body, slot, call], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(told.encode(errors="surrogatepass"), digest_size=16).hexdigest()


class Answers:
    """Holds the answers of a folder, those of earlier starts too. Raises DataError for a damaged
    line that is not the last."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Answer] = {}
        # A descriptor and no file object: one call of `os.write` is one write, without a buffer that
        # a kill would cut anywhere.
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            self._read()
        except BaseException:
            os.close(self._file)
            raise
        self.num_found = len(self._known)
        """Answers of earlier starts."""

    def _read(self) -> None:
        size = 0
        with open(self._path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # torn: the process was killed, or the disk was full, within this line
                size += len(line)
                try:
                    values = json.loads(line)
                    key = values.pop("key")
                    self._known[key] = Answer(**values)
                except (ValueError, TypeError, KeyError, AttributeError):
                    raise DataError(
                        f"{self._path}:{number} is no answer; delete the line to have it asked again"
                    ) from None
        os.ftruncate(self._file, size)  # what was torn is asked again

    def get(self, key: str) -> Answer | None:
        """Return the answer to a request, None if there is none yet."""
        return self._known.get(key)

    def add(self, key: str, answer: Answer) -> None:
        """Append an answer, all of it or nothing. Raises OSError."""
        line = (json.dumps({"key": key, **asdict(answer)}) + "\n").encode()
        size = os.fstat(self._file).st_size
        if os.write(self._file, line) != len(line):
            # Other answers are on their way: one behind a torn line would be lost with it, and the
            # next start would find a damaged line that is not the last.
            os.ftruncate(self._file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
        self._known[key] = answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Once at the end and not for each: a power cut costs the last answers, which are asked again.
        os.fsync(self._file)
        os.close(self._file)
