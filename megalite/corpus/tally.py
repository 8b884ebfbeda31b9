"""Tallies what a stage did to the documents that came to it: counts that add up, and samples of
what was dropped.

Tallies of shards can be merged in any order with the same result: the report does not depend on
which worker did which shard.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from megalite.corpus.personal import EMAILS, IPS, replaced

SAMPLES = 3
SAMPLE_CHARS = 320


def num_bytes_of(text: str) -> int:
    """Return the bytes of a text in UTF-8. Lone surrogates count 3 bytes each."""
    return len(text.encode("utf-8", "surrogatepass"))


@dataclass
class Count:
    """Counts documents and the bytes of their text in UTF-8."""

    documents: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int, documents: int = 1) -> None:
        self.documents += documents
        self.num_bytes += num_bytes


@dataclass
class Dropped(Count):
    """Counts documents dropped for one reason, and holds a few of them."""

    samples: list[dict[str, str]] = field(default_factory=list)

    def sample(self, id: str, text: str) -> None:
        """Keep the document if its id's hash is among the smallest.

        The samples are thus not the first ones, and the same ones in every run."""
        digest = hashlib.blake2b(id.encode("utf-8", "replace"), digest_size=8).hexdigest()
        # Kept in order: the last one is the first to go.
        if len(self.samples) < SAMPLES or digest < self.samples[-1]["digest"]:
            self._keep([{"digest": digest, "id": id, "text": _shown(text)}])

    def _keep(self, samples: list[dict[str, str]]) -> None:
        # The smallest of two shards' smallest are the smallest of both: merging in any order
        # agrees.
        both = [*self.samples, *samples]
        self.samples = sorted(both, key=lambda sample: (sample["digest"], sample["id"]))[:SAMPLES]

    def merge(self, other: Dropped) -> None:
        self.add(other.num_bytes, other.documents)
        self._keep(other.samples)


def _shown(text: str) -> str:
    """Return the beginning of a text without personal addresses, because reports are passed
    around."""
    beginning = text[:SAMPLE_CHARS]
    for kind in (EMAILS, IPS):
        beginning, _ = replaced(beginning, kind)
    return beginning


@dataclass
class Tally:
    """Counts what came to a stage and what became of it. The counts add up:

    documents: came.documents = kept.documents + Σ dropped.documents
    bytes: came.num_bytes = kept.num_bytes + Σ dropped.num_bytes + removed_bytes"""

    name: str
    came: Count = field(default_factory=Count)
    kept: Count = field(default_factory=Count)
    dropped: dict[str, Dropped] = field(default_factory=dict)
    """What was dropped, by reason."""
    edited: int = 0
    """Kept documents whose text was changed."""
    removed_bytes: int = 0
    """Bytes that edits removed from kept documents; negative if texts grew."""
    notes: Counter[str] = field(default_factory=Counter)
    """What the check itself counted."""

    def keep(self, before: int, after: int, changed: bool) -> None:
        """Count a document that was kept: its bytes `before` and `after`, and whether its text was
        `changed`."""
        self.came.add(before)
        self.kept.add(after)
        self.edited += changed
        self.removed_bytes += before - after

    def drop(self, before: int, reason: str, id: str, text: str) -> None:
        """Count a document that was dropped for a `reason`: its bytes `before`, `id` and `text`."""
        self.came.add(before)
        dropped = self.dropped.setdefault(reason, Dropped())
        dropped.add(before)
        dropped.sample(id, text)

    def merge(self, other: Tally) -> None:
        """Add the counts of another shard."""
        self.came.add(other.came.num_bytes, other.came.documents)
        self.kept.add(other.kept.num_bytes, other.kept.documents)
        self.edited += other.edited
        self.removed_bytes += other.removed_bytes
        self.notes.update(other.notes)
        for reason, dropped in other.dropped.items():
            self.dropped.setdefault(reason, Dropped()).merge(dropped)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"notes": dict(self.notes)}  # asdict does not copy a Counter rightly

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Tally:
        """Return the tally that `to_json` has written."""
        dropped = {reason: Dropped(**counted) for reason, counted in values["dropped"].items()}
        return cls(
            name=values["name"],
            came=Count(**values["came"]),
            kept=Count(**values["kept"]),
            dropped=dropped,
            edited=values["edited"],
            removed_bytes=values["removed_bytes"],
            notes=Counter(values["notes"]),
        )
