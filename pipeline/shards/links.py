"""Links of a tar to files of the same tar: hard links of GNU tar, and symbolic links."""

from __future__ import annotations

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterable
from tarfile import TarInfo
from typing import NamedTuple

_MAX_HOPS = 40  # as Linux follows

MISSING = "links whose target is not in the tar"
FOLDER = "links to folders"
OUTSIDE = "links that lead out of the tar"
CIRCULAR = "links in a circle"


class ByteRange(NamedTuple):
    """Of a member's data in the tar: ``offset`` and ``size`` in bytes."""

    offset: int
    size: int


class _File(NamedTuple):
    header_offset: int
    data: ByteRange


class LinkTable:
    """Where the links of one tar lead. Memory grows with the number of links, not of members.

    Args:
        headers: reads the tar's headers from the start; called twice.
    """

    def __init__(self, headers: Callable[[], Iterable[TarInfo]]) -> None:
        self._links = {_path(info.name): _target(info) for info in headers() if info.islnk() or info.issym()}
        targets = {target for target in self._links.values() if target is not None}
        self._files: defaultdict[str, list[_File]] = defaultdict(list)
        self._folders: set[str] = set()
        for info in headers():
            path = _path(info.name)
            if path in targets and info.isreg() and not info.issparse():
                self._files[path].append(_File(info.offset, ByteRange(info.offset_data, info.size)))
            elif path in targets and info.isdir():
                self._folders.add(path)

    def resolve(self, link: TarInfo) -> ByteRange | str:
        """The bytes that extracting the tar would give the link; else the reason why there are none.

        Of several members of the target's name, a hard link takes the last before it, a symbolic link the last.
        """
        target = _target(link)
        for _ in range(_MAX_HOPS):
            if target is None:
                return OUTSIDE
            if files := self._files.get(target):
                earlier = [file for file in files if file.header_offset < link.offset] if link.islnk() else []
                return (earlier or files)[-1].data
            if target not in self._links:
                return FOLDER if target in self._folders else MISSING
            target = self._links[target]
        return CIRCULAR


def _path(name: str) -> str:
    return posixpath.normpath(name.lstrip("/"))


def _target(link: TarInfo) -> str | None:
    """A path in the tar. Hard links name it from the top, symbolic links from the folder they are in."""
    if link.islnk():
        return _path(link.linkname)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.linkname))
    return None if path.startswith("/") or path.split("/")[0] == ".." else path
