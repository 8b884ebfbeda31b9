"""Telling of alarms: once when one begins and once when it ends, by a webhook that may fail."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megalite.checkpoint.folder import write_json
from megalite.errors import DataError
from megalite.utils.outside import read_object

TRIES, WAIT_S, TIMEOUT_S = 3, 1.0, 10.0
"""Each further try waits twice as long as the one before."""


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
        gone = [name for name, x in self.standing.items() if name not in alarms and x["told"]]
        self.ended = [name for name in dict.fromkeys([*self.ended, *gone]) if name not in alarms]
        before = self.standing
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


def post(url: str, body: Mapping[str, Any]) -> str:
    """Send `body` as JSON, and return why it could not be sent; empty if it was. The address, which
    may hold a secret, is not in it."""
    try:
        request = urllib.request.Request(
            url, json.dumps(body).encode(), {"content-type": "application/json"}, method="POST"
        )
    except ValueError:
        return "its address is not one of http or https"
    if request.type not in ("http", "https"):
        return "its address is not one of http or https"
    why = ""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(WAIT_S * 2 ** (attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S):
                return ""
        except urllib.error.HTTPError as error:
            why = f"it answers with status {error.code}"
            # What is refused for good is not asked for again.
            if error.code < 500 and error.code not in (408, 429):
                break
        except (OSError, ValueError) as error:
            why = str(getattr(error, "reason", None) or error)
        except Exception as error:  # such as an answer that is no HTTP
            why = type(error).__name__
    return why


def tell(state: AlarmState, url: str | None) -> Sequence[str]:
    """Tell of what has changed since it was last told, and save the state; without a `url` nobody
    is told. Return warnings."""
    warnings, news = [], state.news
    if news and url and (why := post(url, news)):
        warnings.append(f"the webhook was not told, and will be next time: {why}")
    else:
        state.mark_told()
    state.save()
    return warnings
