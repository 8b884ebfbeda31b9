"""PREFIX.json beside a token file: what it was made from, by which library, and what was left
out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from megalite.data.inputs import Report
from megalite.errors import DataError
from megalite.utils.changes import changes
from megalite.utils.files import replacing
from megalite.utils.outside import check_apart, read_object

SHOWN = 4
"""Most settings that a message names."""
LEFT_OUT = (
    "num_empty",
    "num_bad",
    "num_mended",
    "num_hidden",
    "num_binary",
    "left_out",
    "as_text",
    "messages",
)


@dataclass
class Preprocessed:
    """Holds what was written to `prefix`.bin, .idx and .json. `text_bytes` counts UTF-8; `settings`
    is everything that the tokens depend on; `tokenized_by` is the library; `num_left` counts
    documents that gigatoken left to Hugging Face's tokenizers. `remark` is for the user and is not
    stored."""

    prefix: str
    settings: dict[str, Any]
    tokenized_by: str
    num_documents: int
    num_tokens: int
    text_bytes: int
    num_left: int
    report: Report
    lines_read: dict[str, int] = field(default_factory=dict)
    """Of a shard: how many lines of the last file that it has read, by the file's path."""
    seconds: float = 0.0
    remark: str = ""

    def __str__(self) -> str:
        """Return a summary, the remark and the report, for the console."""
        summary = (
            f"{self.prefix}: {self.num_documents:,} documents, {self.num_tokens:,} tokens from "
            f"{decimal(self.text_bytes)} of text"
        )
        if self.seconds:
            rate = f"{decimal(int(self.text_bytes / self.seconds))}/s, {self.num_tokens / self.seconds:,.0f} tokens/s"
            summary += f" in {self.seconds:.1f} s ({rate})"
        return "\n".join(line for line in (summary, self.remark, str(self.report)) if line)

    def write(self) -> None:
        """Write PREFIX.json durably, by rename. Raise OSError."""
        values = {
            "num_documents": self.num_documents,
            "num_tokens": self.num_tokens,
            **self.settings,
            "tokenized_by": self.tokenized_by,
            "num_left": self.num_left,
            "text_bytes": self.text_bytes,
            **{name: getattr(self.report, name) for name in LEFT_OUT},
            **({"lines_read": self.lines_read} if self.lines_read else {}),
        }
        with replacing(Path(f"{self.prefix}.json"), durable=True) as temporary:
            # A byte of a file's name that is not UTF-8 is a lone surrogate in Python, which becomes
            # the escape that JSON has for it.
            text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
            temporary.write_bytes(text.encode("utf-8", "backslashreplace"))


def check_inputs(prefix: str, files: Iterable[str]) -> None:
    """Raise DataError where a token file of this prefix would take the place of one that it is made
    of."""
    inputs = list(files)
    for suffix in ("json", "bin", "idx", "mask", "src"):
        check_apart(Path(f"{prefix}.{suffix}"), inputs, DataError)


def other_settings(prefix: str, settings: dict[str, Any]) -> str:
    """Return how the settings of an existing token file differ from `settings`, as part of a
    sentence; empty if there is no file or no difference."""
    try:
        values = json.loads(Path(f"{prefix}.json").read_text(encoding="utf-8"))
        found = changes({name: values.get(name) for name in settings}, settings)
    except (OSError, ValueError, AttributeError):
        return ""  # it only explains: what it cannot read is made anew all the same
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return "; ".join(map(str, found[:SHOWN])) + more


def read_metadata(prefix: str, settings: dict[str, Any]) -> Preprocessed | None:
    """Return what `write` wrote for a token file of exactly these settings, None if there is
    none."""
    try:
        values = read_object(Path(f"{prefix}.json"), DataError)
        if any(values[name] != value for name, value in settings.items()):
            return None
        counts = {
            name: values[name]
            for name in ("tokenized_by", "num_documents", "num_tokens", "text_bytes", "num_left")
        }
        report = Report(**{name: values[name] for name in LEFT_OUT if name in values})
        lines = {str(path): int(count) for path, count in values.get("lines_read", {}).items()}
    except (DataError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Preprocessed(prefix, settings, report=report, lines_read=lines, **counts)
