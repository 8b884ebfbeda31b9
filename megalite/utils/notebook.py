"""Show in a notebook (Jupyter, VS Code, Colab) what changes in place: a line with a bar, or a picture."""

from __future__ import annotations

import base64
import sys
import time
import warnings
from html import escape
from pathlib import Path
from typing import Any

REDRAW_SECONDS = 0.5
"""A notebook takes each drawing as a message, and drops them where they come too fast."""


def in_notebook() -> bool:
    """Return whether this process computes the cells of a notebook."""
    # Not imported for the answer: where it is not imported, nobody runs a cell.
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    # IPython on a terminal has none.
    return hasattr(shell, "kernel")


if in_notebook():
    # Of tqdm, which others import, for want of a package that nothing here needs.
    warnings.filterwarnings("ignore", "IProgress not found")


class _Output:
    """An output of the cell that runs, which later calls replace."""

    def __init__(self) -> None:
        self._handle: Any = None

    def put(self, data: dict[str, str]) -> None:
        """Show `data`, the same in several forms, by their media types."""
        from IPython.display import display

        if self._handle is None:
            self._handle = display(data, raw=True, display_id=True)
        else:
            self._handle.update(data, raw=True)


class NotebookBar:
    """Show a bar with a line of text, in place."""

    def __init__(self) -> None:
        self._output = _Output()
        self._drawn = -REDRAW_SECONDS
        self._pending: dict[str, str] | None = None

    def show(self, completed: float, total: float, line: str) -> None:
        """Show that `completed` of `total` is done, now or, where it was just drawn, with the next
        one."""
        bar = f'<progress value="{completed:.0f}" max="{total:.0f}"></progress>'
        text = f'<code style="white-space: pre-wrap">{escape(line)}</code>'
        self._pending = {"text/plain": line, "text/html": f"<div>{bar} {text}</div>"}
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self.close()

    def close(self) -> None:
        """Show what was told last."""
        if self._pending:
            self._output.put(self._pending)
            self._pending, self._drawn = None, time.monotonic()


class NotebookPicture:
    """Show a picture from a file, in place."""

    def __init__(self) -> None:
        self._output = _Output()

    def show(self, path: Path) -> None:
        """Show a PNG as it is now, as wide as the cell at most. Raises OSError."""
        picture = base64.b64encode(path.read_bytes()).decode()
        name = escape(str(path))
        html = f'<img alt="{name}" src="data:image/png;base64,{picture}" style="width: 800px; max-width: 100%">'
        self._output.put({"text/plain": str(path), "text/html": html})
