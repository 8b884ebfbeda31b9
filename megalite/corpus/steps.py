"""Steps for datatrove that keep count: a document that comes to a stage leaves it, or is dropped
for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from megalite.corpus.tally import Tally, num_bytes_of

Check = Callable[[Document, Counter[str]], str | None]
"""Returns why a document is dropped, or None. A check may edit the document; what it counts goes
into the report.

A check that is a context manager is entered for the length of a shard."""


class Stage(PipelineStep):
    """Runs a check over all documents but those of the sources that skip it."""

    type = "stage"

    def __init__(self, name: str, check: Check, skipped_sources: Iterable[str] = ()) -> None:
        self.name = name  # first: datatrove's initialiser names its statistics after it
        super().__init__()
        self.tally = Tally(name)
        self._check = check
        self._skipped = frozenset(skipped_sources)

    def run(
        self,
        data: Iterable[Document],
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Document]:
        context = self._check if isinstance(self._check, AbstractContextManager) else nullcontext()
        with context:
            for document in data:
                # Counted all the same, so that stages add up.
                if document.metadata["source"] in self._skipped:
                    size = num_bytes_of(document.text)
                    self.tally.keep(size, size, changed=False)
                    yield document
                elif self._passes(document):
                    yield document

    def counted(self) -> dict[str, Any]:
        """Return the tally of the shard, as JSON."""
        return self.tally.to_json()

    def _passes(self, document: Document) -> bool:
        """Check a document and count it. Returns whether it goes on."""
        text = document.text
        size = num_bytes_of(text)
        try:
            reason = self._check(document, self.tally.notes)
        except Exception as error:
            # Others' rules and parsers meet whatever the web holds: one text must not end a shard.
            reason = f"failed: {type(error).__name__}: {error}"[:120]
        # Mostly the same object: no need to compare.
        changed = document.text is not text and document.text != text
        if changed and not reason and not document.text.strip():
            reason = "nothing left"
        if reason:
            self.tally.drop(size, reason, document.id, text)
            return False
        self.tally.keep(size, num_bytes_of(document.text) if changed else size, changed)
        return True


class Without(PipelineStep):
    """Leaves out documents of a shard. `places` returns for a rank where in its shard they
    stand."""

    type = "stage"

    def __init__(
        self,
        name: str,
        reason: str,
        places: Callable[[int], npt.NDArray[np.uint32]],
    ) -> None:
        self.name = name
        super().__init__()
        self.tally = Tally(name)
        self._reason = reason
        self._places = places

    def run(
        self,
        data: Iterable[Document],
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[Document]:
        listed = set(self._places(rank).tolist())
        # Of what comes here: behind another such step, of what that one has left.
        for place, document in enumerate(data):
            size = num_bytes_of(document.text)
            if place in listed:
                self.tally.drop(size, self._reason, document.id, document.text)
            else:
                self.tally.keep(size, size, changed=False)
                yield document

    def counted(self) -> dict[str, Any]:
        """Return the tally of the shard, as JSON."""
        return self.tally.to_json()
