"""URLs fit to be shown: without user, password, query and fragment, in which stores and proxies put credentials."""

from __future__ import annotations

import re
import shlex

# Of bounded length, so that a long word costs no more than its length.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,15}://"
# Up to the next blank, quote or URL: a query may hold anything else, and of a list only the first would be cut.
_URL = re.compile(rf"{_SCHEME}(?:(?!{_SCHEME})[^\s'\"])*")
# What stands before the @ of these is a container's name, unless it has a password.
_WITH_CONTAINER = ("az", "abfs", "abfss")
# A slash or question mark in a password that was not encoded ends what a URL takes for the host, and the rest of the
# password follows. Hosts have ports, which are digits; buckets have none.
_BROKEN_USER = re.compile(r"[^/?#@\[]*:(?!\d*(?:[/?#]|$))[^@]*[/?#].*@")
_USER_OF_BUCKET = re.compile(r"[^/?#@]*:.*@")
_WITH_PORT = ("http", "https", "ray")


def redact(url: str) -> str:
    """The URL without user, password, query and fragment, fit for a message or a manifest; a path as it is."""
    head, sep, tail = url.partition("://")
    if not sep:
        return url
    if broken := (_BROKEN_USER if head.lower() in _WITH_PORT else _USER_OF_BUCKET).match(tail):
        tail = tail[broken.end() :]
    tail = re.split(r"[?#]", tail, maxsplit=1)[0]
    authority, slash, path = tail.partition("/")
    user, _, host = authority.rpartition("@")
    kept = f"{user}@" if user and head.lower() in _WITH_CONTAINER and not re.search("[:@]", user) else ""
    return f"{head}://{kept}{host}{slash}{path}"


def quoted(url: str) -> str:
    """The redacted URL as a shell takes it, for commands that users are given."""
    return shlex.quote(redact(url))


def redact_text(text: str) -> str:
    """The text with every URL in it redacted, also those in lists and in what other libraries say."""
    return _URL.sub(lambda found: redact(found[0]), text)
