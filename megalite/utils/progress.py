"""Show that long work makes progress."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import Progress, ProgressColumn, TextColumn

from megalite.utils.notebook import NotebookBar, in_notebook

SECONDS_PER_LINE = 5.0


class ProgressMeter:
    """Show a progress bar on a terminal or in a notebook; elsewhere, as in a job's log, a line every
    few seconds. Without console, nothing."""

    def __init__(
        self,
        name: str,
        total: int,
        columns: Sequence[ProgressColumn],
        console: Console | None,
        **fields: Any,
    ) -> None:
        """Show progress up to `total` under `name`. `fields` are values for the `columns`, until
        `show` gives newer ones."""
        self.total, self._console = total, console
        self._start = self._said = time.monotonic()
        self._bar: Progress | None = None
        self._in_notebook = NotebookBar() if console is not None and in_notebook() else None
        if console is not None and console.is_terminal:
            self._bar = Progress(TextColumn(name), *columns, console=console)
            self._task = self._bar.add_task("", total=total, **fields)

    @property
    def elapsed(self) -> float:
        """Return the seconds since it was made."""
        # Callers divide by it.
        return max(time.monotonic() - self._start, 1e-9)

    def show(self, completed: int, line: str, due: bool = False, **fields: Any) -> None:
        """Show that `completed` of the total is done; `line` says the same where there is no bar,
        at once where it is `due`. `fields` are values for the columns."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, **fields)
        elif self._in_notebook is not None:
            self._in_notebook.show(completed, self.total, line)
        elif self._console is not None and (due or now - self._said >= SECONDS_PER_LINE):
            self._said = now
            self._console.print(line, highlight=False)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._in_notebook is not None:
            self._in_notebook.close()
