"""Decide by a browser's headers whether a request was meant for this server."""

from __future__ import annotations

import ipaddress
import re
import socket

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\s:/@\[\]]+)(:[0-9]{1,5})?", re.IGNORECASE)


def is_own_name(host: str, bound: str, local: str) -> bool:
    """Return whether the Host header `host` names the server by a name that nobody else can point
    to this machine.

    A foreign page can point its own name to 127.0.0.1 (DNS rebinding), and then has the server's
    origin; an IP address cannot be redirected. `bound` is what the server was asked to listen on,
    `local` the connection's own address."""
    found = _HOST.fullmatch(host)
    if not found:
        return False
    name, everywhere = found[1].strip("[]").lower().rstrip("."), bound in ("", "0.0.0.0", "::")
    # A page under a name of its own cannot send these: a browser sends the name that it asked for.
    if name in ("localhost", bound.lower(), local.lower()):
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return everywhere and name == socket.gethostname().lower()
    return everywhere or address.is_loopback


def is_own_page(origin: str, host: str) -> bool:
    """Return whether the header `origin` belongs to a page that this server (of the header `host`)
    has sent."""
    scheme, _, place = origin.partition("://")
    return scheme in ("http", "https") and place.lower() == host.lower()
