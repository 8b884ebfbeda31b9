"""Replaces email and public IP addresses with addresses that nobody has.

Each kind has one replacement, where datatrove goes through a list: what a text becomes depends on
the text alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from datatrove.pipeline.formatters.pii import public_ip_validator

# datatrove's own pattern takes quadratic time on long runs without spaces. No address has more than
# 64 characters before its @, and a part of its domain no more than 63.
EMAIL = (
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}\b"
)
# Behind four numbers a full stop may end the sentence; with a digit behind it, it is a fifth.
IPV4 = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
# Allocated addresses begin with 2 or 3. That excludes `std::` and the like. The longest has eight
# groups of four: 34 characters behind the first colon.
IPV6 = r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])"
EMAILS, IPS = "email addresses", "IP addresses"

CONTEXT = 80
"""Number of characters before and after four numbers that may say that they are a version."""
VERSION_WORDS = (
    "v|ver|vers|versions?|releases?|rel|rev|revisions?|builds?|firmware|driver|kernel|sdk|patch|update|section|chapter|"
    "clause|§"
)
HOST_WORDS = "ip|host|server|addr|address|client|node|tcp|udp"
BEFORE_A_VERSION = re.compile(
    rf"""(?:(?<![\w@])(?:{VERSION_WORDS})[\s.:=#("'`]*   # version 1.2.3.4
           # versions 1.2.3.4, 1.2.3.5 and 1.2.4.0. Possessive, or each gap of n spaces would be
           # cut in n ways, and ten gaps in n^10.
           (?:\d+(?:\.\d+)+[\s,/&–-]*+(?:(?:and|or|to|through|until)\s++|(?<=\s)))*+
         | (?:[=<>~^!]=|~>|[<>^~])\s*["']?               # package>=1.2.3.4
         | (?<![\w/.:@-])(?!(?:{HOST_WORDS})[-/_])       # name-1.2.3.4, Agent/1.2.3.4
           [A-Za-z][\w+]{{0,30}}(?:-[A-Za-z][\w+]{{0,30}}){{0,4}}[-/_]
        )\Z""",
    re.I | re.X,
)
BEHIND_A_VERSION = re.compile(
    r"[-+~.]?(?:rc|alpha|beta|dev|pre|post|snapshot|release|final|stable|ubuntu|debian|dfsg|el|fc|amd64|x86|arm|linux|win|"
    r"src|bin|py|tar|zip|tgz|gz|whl|jar|exe|msi|deb|rpm|dmg|apk|dll|so)(?![A-Za-z])|-\d+(?:ubuntu|\.el|\.fc)",
    re.I,
)


def _is_email_of_somebody(match: re.Match[str]) -> bool:
    return not match[0].lower().endswith(("@example.com", "@example.org", "@example.net"))


def _is_ipv4_of_somebody(match: re.Match[str]) -> bool:
    """Return whether four numbers are a public address, and not a version, as the text around them
    may say."""
    if not public_ip_validator(match[0]):
        return False
    before = match.string[max(match.start() - CONTEXT, 0) : match.start()]
    behind = match.string[match.end() : match.end() + CONTEXT]
    return not (BEFORE_A_VERSION.search(before) or BEHIND_A_VERSION.match(behind))


def _is_ipv6_of_somebody(match: re.Match[str]) -> bool:
    return public_ip_validator(match[0])


class Replacer(NamedTuple):
    """Says what to replace, by what, and which matches of the pattern count."""

    pattern: re.Pattern[str]
    replacement: str
    is_somebodys: Callable[[re.Match[str]], bool]


REPLACERS = {
    EMAILS: [Replacer(re.compile(EMAIL), "email@example.com", _is_email_of_somebody)],
    IPS: [
        Replacer(re.compile(IPV4), "192.0.2.1", _is_ipv4_of_somebody),
        Replacer(re.compile(IPV6), "2001:db8::1", _is_ipv6_of_somebody),
    ],
}
SIGNS = {EMAILS: "@", IPS: ""}
"""Strings that any address of the kind contains: a text without it need not be searched."""


def replaced(text: str, kind: str) -> tuple[str, int]:
    """Replace the addresses of a `kind` (EMAILS or IPS) in `text`. Returns the new text and their
    number."""
    count = 0
    if SIGNS[kind] not in text:
        return text, 0
    # One after another, as a replacement of one pattern is no match of the next.
    for pattern, replacement, is_somebodys in REPLACERS[kind]:

        def put(
            match: re.Match[str],
            replacement: str = replacement,
            is_somebodys: Callable = is_somebodys,
        ) -> str:
            nonlocal count
            # The pattern finds candidates; whether one is somebody's takes more than a pattern.
            if not is_somebodys(match):
                return match[0]
            count += 1
            return replacement

        text = pattern.sub(put, text)
    return text, count
