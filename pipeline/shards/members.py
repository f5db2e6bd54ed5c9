"""Members of a tar: which sample a name belongs to, and which file a link leads to."""

from __future__ import annotations

import posixpath
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from tarfile import TarInfo
from typing import NamedTuple

from schemas.config import DataConfig

# WebDataset's rules: the key ends at the first dot of the base name, folders included. A name whose first part is
# __like_this__ is metadata.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^.]+)\.(?P<extension>[^/]*)")
_METADATA = re.compile(r"__[^/]*__($|/)")
_MAX_HOPS = 40  # as Linux follows

MISSING = "links whose target is not in the tar"
FOLDER = "links to folders"
OUTSIDE = "links that lead out of the tar"
CIRCULAR = "links in a circle"


def split_name(name: str) -> tuple[str, str] | None:
    """``("a/b", "seg.png")`` for ``a/b.seg.PNG``; None for a name that belongs to no sample."""
    match = None if is_metadata(name) else _NAME.fullmatch(name)
    return (match["key"], match["extension"].lower()) if match else None


def is_metadata(name: str) -> bool:
    return _METADATA.match(name) is not None


def is_hidden(name: str) -> bool:
    """Whether the name of the file or of a folder above it begins with a dot, as ``._a.jpg`` of macOS does."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def image_extensions(data: DataConfig) -> list[str]:
    """The extensions that may hold the image, best first."""
    return [name.strip().lower() for name in data.image.split(";") if name.strip()]


def count_text(members: Mapping[str, int]) -> str:
    """``60 jpg, 58 json``"""
    return ", ".join(f"{count} {name}" for name, count in members.items())


class ByteRange(NamedTuple):
    """The data of a member in the tar: ``offset`` and ``size`` in bytes."""

    offset: int
    size: int


class _File(NamedTuple):
    header_offset: int
    data: ByteRange


class LinkTable:
    """Where the hard and symbolic links of one tar lead. Memory grows with the number of links, not of members.

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
        """The bytes that the link has after the tar is extracted, or the reason why it has none.

        Of several members with the target's name, a hard link takes the last one before it, a symbolic link the last.
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
    """A path in the tar. Hard links name it from the top, symbolic links from the folder that contains them."""
    if link.islnk():
        return _path(link.linkname)
    path = posixpath.normpath(posixpath.join(posixpath.dirname(link.name), link.linkname))
    return None if path.startswith("/") or path.split("/")[0] == ".." else path
