"""What a stage did to the documents that came to it: counts that add up, and samples of what was dropped.

Tallies of shards are merged in any order to the same result, so the report does not depend on who did which shard."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from megalite.corpus.personal import EMAILS, IPS, replaced

SAMPLES = 3
SAMPLE_CHARS = 320


def num_bytes_of(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


@dataclass
class Count:
    documents: int = 0
    num_bytes: int = 0  # of text in UTF-8

    def add(self, num_bytes: int, documents: int = 1) -> None:
        self.documents += documents
        self.num_bytes += num_bytes


@dataclass
class Dropped(Count):
    samples: list[dict[str, str]] = field(default_factory=list)

    def sample(self, id: str, text: str) -> None:
        """Keep a few, chosen by a hash of their ids: not the first ones, and the same ones in every run."""
        digest = hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).hexdigest()
        if len(self.samples) < SAMPLES or digest < self.samples[-1]["digest"]:
            self._keep([{"digest": digest, "id": id, "text": _shown(text)}])

    def _keep(self, samples: list[dict[str, str]]) -> None:
        self.samples = sorted([*self.samples, *samples], key=lambda sample: (sample["digest"], sample["id"]))[:SAMPLES]

    def merge(self, other: Dropped) -> None:
        self.add(other.num_bytes, other.documents)
        self._keep(other.samples)


def _shown(text: str) -> str:
    """The beginning. A report is passed around: nobody's addresses are in it."""
    beginning = text[:SAMPLE_CHARS]
    for kind in (EMAILS, IPS):
        beginning, _ = replaced(beginning, kind)
    return beginning


@dataclass
class Tally:
    """documents: came.documents = kept.documents + Σ dropped.documents
    bytes: came.num_bytes = kept.num_bytes + Σ dropped.num_bytes + removed_bytes"""

    name: str
    came: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    dropped: dict[str, Dropped] = field(default_factory=dict)  # by reason
    edited: int = 0  # kept documents whose text is another than before
    removed_bytes: int = 0  # within kept documents; negative where the text grew
    notes: Counter[str] = field(default_factory=Counter)

    def keep(self, before: int, after: int, changed: bool) -> None:
        """A document of so many bytes of text went on with so many."""
        self.came.add(before)
        self.kept.add(after)
        self.edited += changed
        self.removed_bytes += before - after

    def drop(self, before: int, reason: str, id: str, text: str) -> None:
        self.came.add(before)
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.add(before)
        dropped.sample(id, text)

    def merge(self, other: Tally) -> None:
        self.came.add(other.came.num_bytes, other.came.documents)
        self.kept.add(other.kept.num_bytes, other.kept.documents)
        self.edited += other.edited
        self.removed_bytes += other.removed_bytes
        self.notes.update(other.notes)
        for reason, dropped in other.dropped.items():
            self.dropped.setdefault(reason, Dropped()).merge(dropped)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": dict(self.notes)}  # of a Counter, asdict makes something else

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        return cls(
            name=values["name"],
            came=Count(**values["came"]),
            kept=Count(**values["kept"]),
            dropped={reason: Dropped(**dropped) for reason, dropped in values["dropped"].items()},
            edited=values["edited"],
            removed_bytes=values["removed_bytes"],
            notes=Counter(values["notes"]),
        )
