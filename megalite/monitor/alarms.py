"""Telling of alarms: once when one begins and once when it ends, by a webhook that may fail."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import write_json
from megalite.errors import DataError
from megalite.utils.outside import read_object
from megalite.utils.webhooks import NotTold, post

TRIES = 3
"""Nobody waits for the command, as they do for a job that ends."""


class AlarmState:
    """Remembers in a file which alarms stand and have been told of."""

    def __init__(self, file: Path):
        self.file = file
        try:
            state = read_object(file, DataError) if file.exists() else {}
            self.standing: dict[str, dict[str, Any]] = {
                str(name): {
                    "text": str(x["text"]),
                    "since": float(x["since"]),
                    "told": bool(x["told"]),
                }
                for name, x in state.get("standing", {}).items()
            }
            self.ended = [str(name) for name in state.get("ended", [])]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DataError(f"{file} is not a state of alarms: delete it") from None

    def update(self, alarms: Mapping[str, str], now: float) -> None:
        """Take in the alarms that stand `now`, in seconds since 1970."""
        # An alarm that came and went before anybody was told of it is no news any more.
        gone = [name for name, x in self.standing.items() if name not in alarms and x["told"]]
        # Earlier ends wait here as long as the webhook is away; one that stands again has not ended.
        self.ended = [name for name in dict.fromkeys([*self.ended, *gone]) if name not in alarms]
        before = self.standing
        # `since` and `told` stay those of the first time; the text has the numbers of now.
        self.standing = {
            name: {"since": now, "told": False} | before.get(name, {}) | {"text": text}
            for name, text in alarms.items()
        }

    @property
    def news(self) -> dict[str, Any] | None:
        """Return what is to be told, as the body of a webhook; None where nothing has changed.
        `text` is what Slack, Mattermost and others show."""
        fresh = [name for name, x in self.standing.items() if not x["told"]]
        if not (fresh or self.ended):
            return None
        lines = [f"ALARM {x['text']}" for name, x in self.standing.items() if name in fresh]
        lines += [f"over: {name}" for name in self.ended]
        alarms = [{"name": name} | x for name, x in self.standing.items()]
        # Besides the text, all that stands and not only the news: who reads the fields need not
        # remember what came before.
        return {
            "text": "megalite monitor\n" + "\n".join(lines),
            "status": "firing" if self.standing else "resolved",
            "alarms": [{key: x[key] for key in ("name", "text", "since")} for x in alarms],
            "resolved": self.ended,
        }

    def mark_told(self) -> None:
        """Remember that all has been told."""
        self.ended = []
        for alarm in self.standing.values():
            alarm["told"] = True

    def save(self) -> None:
        """Write the file."""
        write_json(self.file, {"standing": self.standing, "ended": self.ended})


def tell(state: AlarmState, url: str | None) -> Sequence[str]:
    """Tell of what has changed since it was last told, and save the state; without a `url` nobody
    is told. Return warnings."""
    warnings, news = [], state.news
    try:
        if news and url:
            post(url, news, TRIES)
        # Also where there is no webhook: one that is given later hears of what begins then.
        state.mark_told()
    except NotTold as error:
        warnings.append(f"the webhook was not told, and will be next time: {error}")
    state.save()
    return warnings
