"""Whether a request was meant for this server, as far as a browser's headers say."""

from __future__ import annotations

import ipaddress
import re
import socket

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(:[0-9]{1,5})?", re.IGNORECASE)


def is_own_name(host: str, bound: str, local: str) -> bool:
    """Whether a Host header names the server by a name that nobody else can give to this machine.

    A page can have its own name lead to 127.0.0.1 ("DNS rebinding"), and is then of the server's origin; an address
    cannot be led elsewhere. `bound`: what was asked to be listened on; `local`: the connection's own address."""
    found = _HOST.fullmatch(host)
    if not found:
        return False
    name, everywhere = found[1].strip("[]").lower().rstrip("."), bound in ("", "0.0.0.0", "::")
    if name in ("localhost", bound.lower(), local.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return everywhere and name == socket.gethostname().lower()
    return everywhere or address.is_loopback


def is_own_page(origin: str, host: str) -> bool:
    """Whether an Origin header is that of a page that the server of this Host header has sent."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()
