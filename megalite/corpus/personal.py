"""Email and public IP addresses, replaced by addresses that nobody has.

There is one replacement each, where datatrove goes through a list: what a text becomes depends on the text alone."""

from __future__ import annotations

from datatrove.pipeline.formatters.pii import PIIReplacer, public_ip_validator

# datatrove's own pattern takes quadratic time on long runs without spaces. No address has more than 64 characters
# before its @, and a part of its domain no more than 63.
EMAIL = (
    r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~.-]{1,64}@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,63}\b"
)
IPV4 = r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)"
# Addresses that are given out begin with 2 or 3; `std::` and the like are none.
IPV6 = r"(?<![\w:.])[23][0-9A-Fa-f]{3}:[0-9A-Fa-f:]{2,34}(?![\w:])"
EMAILS, IPS = "email addresses", "IP addresses"


def _is_somebodys(address: str) -> bool:
    return not address.lower().endswith(("@example.com", "@example.org", "@example.net"))


REPLACERS = {
    EMAILS: [PIIReplacer(EMAIL, "email@example.com", _is_somebodys)],
    IPS: [
        PIIReplacer(IPV4, "192.0.2.1", public_ip_validator),
        PIIReplacer(IPV6, "2001:db8::1", public_ip_validator),
    ],
}
SIGNS = {EMAILS: "@", IPS: ""}  # what a text must hold for a search to be worth while


def replaced(text: str, kind: str) -> tuple[str, int]:
    """The text without addresses of this kind, and how many there were."""
    count = 0
    for replacer in REPLACERS[kind] if SIGNS[kind] in text else ():
        count += sum(map(replacer.validator, replacer.regex.findall(text)))
        text = replacer.replace(text)
    return text, count
