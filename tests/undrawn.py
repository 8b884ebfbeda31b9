"""Imported by tests and by the server that ranks are forked from: runs draw no loss.png, which takes
as long as the run of a second whose test has no use for it. The fixture `drawn` lets them."""

from __future__ import annotations

import pytest

from megalite.observe.plot import PlotSink

DRAW = PlotSink._draw
PlotSink._draw = lambda self: None  # type: ignore[method-assign]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process draw their losses, as they do for users."""
    monkeypatch.setattr(PlotSink, "_draw", DRAW)
