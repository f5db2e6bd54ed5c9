"""Redacts URLs for messages: removes user, password, query and fragment, where stores and proxies put credentials."""

from __future__ import annotations

import re
import shlex

# Of bounded length, so that matching takes linear time.
_SCHEME = r"[A-Za-z][A-Za-z0-9+.-]{0,15}://"
# Up to the next blank, quote or URL: a query may contain any other character, such as the comma of a list of URLs.
_URL = re.compile(rf"{_SCHEME}(?:(?!{_SCHEME})[^\s'\"])*")
# In these URLs, the name of a container precedes the @, unless it has a password.
_WITH_CONTAINER = ("az", "abfs", "abfss")
# An unencoded slash or question mark in a password ends the apparent host of a URL, and the rest of the password
# follows. Hosts have ports, which are digits; buckets have none.
_BROKEN_USER = re.compile(r"[^/?#@\[]*:(?!\d*(?:[/?#]|$))[^@]*[/?#].*@")
_USER_OF_BUCKET = re.compile(r"[^/?#@]*:.*@")
_WITH_PORT = ("http", "https", "ray")


def redact(url: str) -> str:
    """The URL without user, password, query and fragment, for a message or a manifest; a path unchanged."""
    head, sep, tail = url.partition("://")
    if not sep:
        return url
    if broken := (_BROKEN_USER if head.lower() in _WITH_PORT else _USER_OF_BUCKET).match(tail):
        tail = tail[broken.end() :]
    tail = re.split(r"[?#]", tail, maxsplit=1)[0]
    authority, slash, path = tail.partition("/")
    user, _, host = authority.rpartition("@")
    container = f"{user}@" if user and head.lower() in _WITH_CONTAINER and not re.search("[:@]", user) else ""
    return f"{head}://{container}{host}{slash}{path}"


def quoted(url: str) -> str:
    """The redacted URL, quoted for a shell, for commands in messages."""
    return shlex.quote(redact(url))


def redact_text(text: str) -> str:
    """The text with every URL in it redacted, also in lists and in messages of other libraries."""
    return _URL.sub(lambda match: redact(match[0]), text)
