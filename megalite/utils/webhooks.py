"""Telling a webhook something, in the form that Slack, Mattermost and Rocket.Chat take: JSON whose
`text` is shown."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from megalite.utils.secrecy import hide_secrets

SECONDS = 10.0
"""Time limit of a try."""
WAIT_S = 1.0
"""Pause before the second try; before each further one it is twice as long."""
LONGEST_TEXT = 2000
PASSING = (408, 429)
"""Statuses, beside those from 500 on, after which another try may help."""


class NotTold(Exception):
    """Raised where a webhook could not be told. The text does not name its address, which may be a
    secret."""


def post(address: str, body: Mapping[str, Any], tries: int = 1) -> None:
    """Send `body`, whose `text` is escaped and cut, in at most `tries` tries of SECONDS each. Raise
    NotTold."""
    if not address.startswith(("http://", "https://")):
        # urllib opens files as well.
        raise NotTold("its address is not one of http or https")
    data = json.dumps({**body, "text": _plain(str(body["text"]))}).encode()
    for attempt in range(tries):
        why, may_pass = _try(address, data)
        if not why:
            return
        if not may_pass or attempt + 1 == tries:
            raise NotTold(why)
        time.sleep(WAIT_S * 2**attempt)


def _plain(text: str) -> str:
    text = hide_secrets(text)[:LONGEST_TEXT]
    # Slack reads these three as markup: no name may become a link or call everybody.
    for letter, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(letter, escaped)
    return text


def _try(address: str, data: bytes) -> tuple[str, bool]:
    """Return why the webhook was not told, empty if it was, and whether that may pass."""
    headers = {"Content-Type": "application/json", "User-Agent": "megalite"}
    found: list[tuple[str, bool]] = []

    def send() -> None:
        try:
            request = urllib.request.Request(address, data, headers, method="POST")
            with urllib.request.urlopen(request, timeout=SECONDS):
                found.append(("", False))
        except urllib.error.HTTPError as error:
            # What is refused for good is not asked for again.
            found.append((f"it answered {error.code}", error.code >= 500 or error.code in PASSING))
        except Exception as error:  # also an address without a host, or an answer that is no HTTP
            reason = getattr(error, "reason", error)
            # A socket's time ends with ours: whichever is first, there was no answer.
            if not isinstance(reason, TimeoutError):
                found.append((getattr(reason, "strerror", None) or type(reason).__name__, True))

    # On a thread: looking up a name has no time limit.
    thread = threading.Thread(target=send, name="webhook", daemon=True)
    thread.start()
    thread.join(SECONDS)
    return found[0] if found else (f"no answer in {SECONDS:g} s", True)
