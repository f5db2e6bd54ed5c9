"""URLs of files and objects: the allow-list of protocols, absolute paths, brace patterns."""

from __future__ import annotations

import re
from pathlib import Path

from braceexpand import braceexpand

from pipeline.core.errors import StorageInputError
from pipeline.core.redaction import redact

NAME_TOO_LONG = "storage.name-too-long"
"""Code of the error for a name that a file system cannot have."""
WRITABLE = ("file", "memory", "s3", "gs", "gcs", "az", "abfs", "abfss")
READABLE = (*WRITABLE, "http", "https", "hf")
_MAX_LABEL_BYTES = 100
_PATH_ALTERNATIVES = re.compile(r"\{[^}]*[/~]")
_SCHEME_WITHOUT_SLASHES = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(?!//)")


def protocol(url: str) -> str:
    """The URL's protocol, ``file`` for a bare path.

    Raises:
        StorageInputError: the protocol is not on the allow-list, or the URL is empty, chained, runs a command, lacks
            the slashes after its protocol, or names no bucket.
    """
    head, sep, tail = url.partition("://")
    name = head.lower() if sep else "file"
    if not url.strip():
        raise _refused(url, got="an empty URL", next_step="name a file or a folder")
    if "::" in url:
        raise _refused(url, got="a chained URL", next_step="give a plain URL; commands and chained URLs are never run")
    if not sep and (scheme := _SCHEME_WITHOUT_SLASHES.match(url)):
        got = f"{scheme[0]!r} without the two slashes of a URL"
        raise _refused(url, got=got, next_step="write PROTOCOL://…, or ./ before a path that has a colon in its name")
    if name not in READABLE or "\0" in url:
        got = "a zero byte" if "\0" in url else f"protocol {name!r}"
        raise _refused(url, got=got, next_step="give a plain URL; commands and chained URLs are never run")
    if sep and head != name:
        next_step = f"write {name}:// in lower case"
        raise _refused(url, got=f"protocol {head!r}", next_step=next_step, code="storage.scheme-not-lower-case")
    if name == "file" and sep and not tail.startswith("/"):
        got, next_step = f"file:// with a host, {tail.partition('/')[0]!r}", "write file:///PATH, or only the path"
        raise _refused(url, got=got, next_step=next_step, code="storage.file-url-with-host")
    if name not in ("file", "memory") and not tail.partition("/")[0].rpartition("@")[2]:
        raise _refused(url, got=f"{name}:// without a bucket or host", next_step=f"write {name}://NAME/…")
    return name


def _refused(url: str, *, got: str, next_step: str, code: str = "storage.refused-url") -> StorageInputError:
    expected = f"a path, or one of {', '.join(READABLE)}"
    return StorageInputError(
        "this URL is refused", code=code, where=redact(url), got=got, expected=expected, next_step=next_step
    )


def join(base: str, *parts: str) -> str:
    """``base/part/…`` for a path or a URL. A bare ``s3://`` keeps its slashes.

    Raises:
        StorageInputError: a part leads out of ``base``. Parts may come from untrusted files.
    """
    if any(name == ".." for part in parts for name in part.split("/")):
        raise StorageInputError(
            "this path leads out of its folder",
            code="storage.path-outside-folder",
            where=redact(base),
            got="/".join(parts),
            expected="no .. in it",
        )
    head, sep, tail = base.rpartition("://")
    return "/".join([head + sep + tail.rstrip("/"), *parts])


def last_name(url: str) -> str:
    """The last name of a redacted URL, for messages about it."""
    return redact(url).rstrip("/").rpartition("/")[2]


def short_name(name: str) -> str:
    """The end of a name in at most 100 bytes, for names of local copies, which add a prefix and suffixes."""
    return name.encode()[-_MAX_LABEL_BYTES:].decode(errors="ignore")


def expand_home(path: str) -> str:
    """A path with a leading ``~`` or ``~user`` replaced by that home folder; any other path or URL unchanged.

    Raises:
        StorageInputError: the home folder is unknown. Unexpanded, the path would name a folder called ``~``.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise StorageInputError(
            "the home folder of this path is unknown",
            code="storage.unknown-home",
            where=path,
            got=path.partition("/")[0],
            expected="~/… with HOME set, or ~USER/… of a user of this machine",
            next_step="write an absolute path, or ./ before a name that begins with ~",
        ) from error


def absolute(url: str) -> str:
    """A bare path as an absolute path, with ``~`` expanded; a URL unchanged.

    Another process may have another working directory and another home folder."""
    is_path = protocol(url) == "file" and "://" not in url
    return str(Path(expand_home(url)).absolute()) if is_path else url


def absolute_patterns(patterns: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """``absolute`` of brace patterns. They stay unexpanded, because a pattern is short, except alternatives of whole
    paths or URLs, as in ``{~/a,/b}/0.tar``: each of these is absolute or relative."""
    if isinstance(patterns, tuple):
        return tuple(url for pattern in patterns for url in _as_tuple(absolute_patterns(pattern)))
    if _PATH_ALTERNATIVES.match(patterns):
        return tuple(absolute(url) for url in expand(patterns))
    return absolute(patterns)


def _as_tuple(patterns: str | tuple[str, ...]) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else patterns


def expand(patterns: str | tuple[str, ...]) -> list[str]:
    """Brace patterns to URLs, in the order written, with ``~`` expanded; every URL checked against the allow-list."""
    urls: list[str] = []
    for pattern in _as_tuple(patterns):
        try:
            urls.extend(map(expand_home, braceexpand(pattern)))
        except ValueError as error:
            raise StorageInputError(
                "a brace in this pattern is not closed",
                code="storage.unclosed-brace",
                where=redact(pattern),
                expected="…{00000..00009}.tar",
            ) from error
    for url in urls:
        protocol(url)
    return urls
