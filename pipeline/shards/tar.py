"""Samples out of a tar, in order and with their byte ranges; a damaged tar is never a shorter read without a word.

``tarfile`` ends quietly at a garbled header, at a missing end of archive and at a hole of zeros, so each of its ends
is checked here against the bytes themselves.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Self

from pipeline.errors import ShardError
from pipeline.storage import redact
from schemas.cache import Status
from schemas.config import DataConfig

# WebDataset's rules: the key ends at the first dot of the base name, folders included; a name whose first part is
# __like_this__ is metadata.
_NAME = re.compile(r"(?P<key>(?:.*/)?[^.]+)\.(?P<extension>[^/]*)")
_METADATA = re.compile(r"__[^/]*__($|/)")

_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
# Of names and times; tarfile reads them whole, whatever they claim to be.
_MAX_EXTENDED_BYTES = 1 << 20
_TYPE_AT = 156
_END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20
_MAX_LABEL_BYTES = 64
_MAX_INT32 = 2**31 - 1
# Sixteen-bit RGBA is the widest pixel of the formats read here; whatever is longer than that holds something else.
_BYTES_PER_PIXEL, _HEADROOM_BYTES = 8, 1 << 20
# What tarfile lets through of a header whose checksum is right and whose numbers or records are not.
BAD_HEADER = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError)


@dataclass(frozen=True, slots=True)
class Sample:
    """One WebDataset sample before decoding. ``data`` is the encoded image, ``b""`` where there is none to decode."""

    row: int
    key: str
    status: Status
    label: int | None
    offset: int
    size: int
    data: bytes


@dataclass(frozen=True, slots=True)
class _Member:
    """A regular file of the tar that belongs to a sample."""

    key: str
    extension: str
    offset: int
    size: int


@dataclass(slots=True)
class _Group:
    """The consecutive members of one key, as far as they have been read."""

    key: str
    extensions: set[str] = field(default_factory=set[str])
    repeated: bool = False
    truncated: bool = False
    label: int | None = None
    image: _Member | None = None
    data: bytes = b""


def split_name(name: str) -> tuple[str, str] | None:
    """``("a/b", "seg.png")`` for ``a/b.seg.PNG``; None for a name that belongs to no sample."""
    match = None if _METADATA.match(name) else _NAME.fullmatch(name)
    return (match["key"], match["extension"].lower()) if match else None


def image_extensions(data: DataConfig) -> list[str]:
    """The extensions that may hold the image, best first."""
    return [name.strip().lower() for name in data.image.split(";") if name.strip()]


def read_samples(path: Path, data: DataConfig, *, where: str) -> Iterator[Sample]:
    """Every sample of a local tar, in tar order. Memory does not grow with the tar, but for the set of keys.

    Under ``bad_samples: skip`` a tar that was cut short ends in a sample of status ``truncated``: the last one that it
    names, since nobody can know what that one lacks.

    Args:
        where: the shard's URL, for messages.

    Raises:
        ShardError: the tar is damaged, holds no sample, or ends early under ``bad_samples: fail``; or a label is not an
            integer in [0, num_classes).
    """
    yield from _ShardScan(data, redact(where)).samples(path)


class _ShardScan:
    """One pass over one tar; knows how far it has come, since every error has to say it."""

    def __init__(self, data: DataConfig, where: str) -> None:
        self._where = where
        self._ranks = {name: rank for rank, name in enumerate(image_extensions(data))}
        self._label = None if data.label is None else data.label.lower()
        self._num_classes = data.num_classes
        self._max_bytes = min(_MAX_INT32, data.max_pixels * _BYTES_PER_PIXEL + _HEADROOM_BYTES)
        self._may_be_cut, self._is_cut = data.bad_samples == "skip", False
        self._seen: set[str] = set()
        self._num_samples = 0

    def samples(self, path: Path) -> Iterator[Sample]:
        with path.open("rb") as file:
            group: _Group | None = None
            for member in self._members(file):
                if group is None or member.key != group.key:
                    if group is not None:
                        yield self._finish(group)
                    group = _Group(member.key)
                if not self._is_cut:
                    self._take(group, member, file)
            if group is None:
                raise self._error("this shard holds no samples", 0, wanted="members called <key>.<extension>")
            group.truncated = self._is_cut
            yield self._finish(group)

    def _members(self, file: IO[bytes]) -> Iterator[_Member]:
        """Where the tar is cut inside a member, that one comes last; ``_is_cut`` is set before."""
        size_bytes = os.fstat(file.fileno()).st_size
        # The constructor reads the first member.
        self._check_extended(file, 0)
        file.seek(0)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        except BAD_HEADER as error:
            raise self._error("this is not an uncompressed tar", 0, got=str(error)) from error
        end = 0
        while not self._is_cut and (info := self._next(archive, file, end)) is not None:
            # A size below zero would send tarfile back over the same members for ever.
            if info.size < 0 or archive.offset <= end:
                raise self._error("a garbled tar header", end, got=f"a member of {info.size} bytes")
            if archive.offset > size_bytes:
                self._cut("this shard ends inside a member", end, got=f"{size_bytes} bytes in all")
            end = archive.offset
            if (member := self._member(info)) is not None:
                yield member
        if not self._is_cut:
            self._check_end(file, end)

    def _cut(self, what: str, offset: int, *, got: str | None = None) -> None:
        if not self._may_be_cut:
            raise self._error(what, offset, got=got)
        self._is_cut = True

    def _next(self, archive: tarfile.TarFile, file: IO[bytes], end: int) -> tarfile.TarInfo | None:
        if end:
            self._check_extended(file, end)
        try:
            info = archive.next()
        except BAD_HEADER as error:
            # Extended headers are read one after another; whoever runs out of bytes among them was cut there.
            if file.read(1) or not end:
                raise self._error("a garbled tar header", end, got=str(error)) from error
            self._cut("this shard ends inside a header", end)
            return None
        # tarfile remembers every member it has seen; a million of them is a gigabyte.
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        return info

    def _check_extended(self, file: IO[bytes], at: int) -> None:
        """Refuses the extended headers before the next member where they would fill the memory."""
        total = 0
        file.seek(at)
        while (block := file.read(tarfile.BLOCKSIZE))[_TYPE_AT : _TYPE_AT + 1] in _EXTENDED:
            size_bytes = _extended_size(block)
            total += tarfile.BLOCKSIZE + size_bytes
            if size_bytes < 0 or total > _MAX_EXTENDED_BYTES:
                raise self._error(
                    "the extended headers of a member are too large",
                    at,
                    got=f"{total} bytes",
                    wanted=f"at most {_MAX_EXTENDED_BYTES} bytes of names and times",
                )
            file.seek(-size_bytes % tarfile.BLOCKSIZE + size_bytes, os.SEEK_CUR)

    def _member(self, info: tarfile.TarInfo) -> _Member | None:
        if not info.isreg() or (name := split_name(info.name)) is None:
            return None
        if info.issparse():
            raise self._error("a sparse member has no byte range", info.offset, got=repr(info.name))
        key, extension = name
        if not _is_utf8(key):
            raise self._error("a member's name is not UTF-8", info.offset, got=repr(info.name))
        return _Member(key, extension, info.offset_data, info.size)

    def _check_end(self, file: IO[bytes], end: int) -> None:
        file.seek(end)
        tail = file.read(_END_OF_ARCHIVE)
        garbled = bool(tail.strip(b"\0"))
        size_bytes = os.fstat(file.fileno()).st_size
        if garbled and _outgrows(tail[: tarfile.BLOCKSIZE], size_bytes - end):
            self._cut("this shard ends inside a header", end)
            return
        if len(tail) < (tarfile.BLOCKSIZE if garbled else _END_OF_ARCHIVE):
            self._cut("this shard has no end-of-archive block: it was cut short", end)
            return
        if garbled:
            raise self._error("a garbled tar header", end)
        while chunk := file.read(_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise self._error(
                    "bytes follow the end of this archive",
                    file.tell() - len(chunk.lstrip(b"\0")),
                    wanted="one tar a file, without holes",
                )

    def _take(self, group: _Group, member: _Member, file: IO[bytes]) -> None:
        if member.extension in group.extensions:
            group.repeated = True
            return
        group.extensions.add(member.extension)
        if member.extension == self._label:
            group.label = self._parse_label(member, _read(file, member, _MAX_LABEL_BYTES))
        rank = self._ranks.get(member.extension)
        if rank is not None and (group.image is None or rank < self._ranks[group.image.extension]):
            group.image = member
            group.data = _read(file, member, self._max_bytes)

    def _parse_label(self, member: _Member, text: bytes) -> int:
        digits = text.strip()
        bound = _MAX_INT32 + 1 if self._num_classes is None else self._num_classes
        # int() alone would also take 1_000, signs and digits of other scripts.
        if not digits.isdigit() or int(digits) >= bound:
            raise self._error(
                f"sample {member.key!r}: its label cannot be used",
                member.offset,
                got=repr(text.decode("utf-8", "backslashreplace")) if text else f"{member.size} bytes",
                wanted=f"an integer in [0, {bound}) as text in .{member.extension}",
                next_step="correct the label, data.num_classes or data.label",
            )
        return int(digits)

    def _finish(self, group: _Group) -> Sample:
        status = self._status(group)
        self._seen.add(group.key)
        held = group.image if group.data else None
        sample = Sample(
            row=self._num_samples,
            key=group.key,
            status=status,
            label=group.label,
            offset=held.offset if held else 0,
            size=held.size if held else 0,
            data=group.data,
        )
        self._num_samples += 1
        return sample

    def _status(self, group: _Group) -> Status:
        if group.truncated:
            return "truncated"
        if group.repeated or group.key in self._seen:
            return "duplicate_key"
        if group.image is None:
            return "no_image"
        if group.image.size > self._max_bytes:
            return "too_large"
        return "ok" if group.data else "empty"

    def _error(
        self, what: str, offset: int, *, got: str | None = None, wanted: str | None = None, next_step: str | None = None
    ) -> ShardError:
        return ShardError(
            what,
            where=f"{self._where}, byte {offset}, after {self._num_samples} samples",
            got=got,
            wanted=wanted,
            next_step=next_step or "write or fetch this shard again",
        )


def _extended_size(block: bytes) -> int:
    """Bytes that follow the header; 0 where it is damaged, which tarfile tells."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except BAD_HEADER:
        return 0


def _outgrows(block: bytes, size_bytes: int) -> bool:
    """Whether an extended header (a long name, PAX) begins here whose data do not fit into what is left of the file.

    Recent versions of tarfile take the part that is there for a garbled header, and end without a word.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return info.type in _EXTENDED and tarfile.BLOCKSIZE + info.size > size_bytes


def _read(file: IO[bytes], member: _Member, limit: int) -> bytes:
    """The member's bytes, or none where there are more than ``limit``."""
    if member.size > limit:
        return b""
    file.seek(member.offset)
    return file.read(member.size)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class ShardReader:
    """Reads a local shard by byte range. Threads may share one: it has no file position."""

    def __init__(self, path: Path, *, where: str) -> None:
        self._where = redact(where)
        self._file = path.open("rb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes from ``offset``.

        Raises:
            ShardError: the file ends before that.
        """
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != size:
            raise ShardError(
                "this shard is shorter than its index says",
                where=f"{self._where}, byte {offset}",
                got=f"{len(data)} bytes",
                wanted=f"{size} bytes",
                next_step="fetch the shard again, or index it anew if it was rewritten",
            )
        return data
