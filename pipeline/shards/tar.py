"""Samples out of a tar, in order and with their byte ranges; a damaged tar is never a shorter read without a word.

``tarfile`` ends quietly at a garbled header, at a missing end of archive and at a hole of zeros, so each of its ends
is checked here against the bytes themselves.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal, Self

from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.file_kinds import file_kind
from pipeline.shards.links import ByteRange, LinkTable
from pipeline.shards.omissions import Omissions
from schemas.cache_format import Status
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
_KIND_BYTES = 4096
_END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20
_MAX_LABEL_BYTES = 64
_MAX_INT32 = 2**31 - 1
# Sixteen-bit RGBA is the widest pixel of the formats read here; whatever is longer than that holds something else.
_BYTES_PER_PIXEL, _HEADROOM_BYTES = 8, 1 << 20
MemberRules = Literal[1, 2]
"""Which members of a tar belong to samples. 1: dot files in folders form samples, links are ignored, as up to the
first release. 2: hidden members are ignored, links count as the files they lead to."""
HIDDEN = "hidden members"
_UNREAD_LINKS = "links ignored because the index is older than their support (another cache or index URL includes them)"
_NO_FILES = "devices and pipes"
_NO_EXTENSION = "files without an extension"

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
class TarNotes:
    """What reading a tar found besides samples.

    Attributes:
        rules_differ: whether ``MemberRules`` 1 and 2 read this tar differently.
    """

    omissions: Omissions = field(default_factory=Omissions)
    rules_differ: bool = False


def unread_links(notes: TarNotes) -> Omissions:
    """What only ``MemberRules`` 1 leave out, for which a user may want a new index."""
    found = Omissions()
    if number := notes.omissions.counts[_UNREAD_LINKS]:
        found.counts[_UNREAD_LINKS] = number
        found.examples[_UNREAD_LINKS] = notes.omissions.examples[_UNREAD_LINKS]
    return found


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


def is_hidden(name: str) -> bool:
    """Whether the file or a folder above it has a name that begins with a dot, as ``._a.jpg`` of macOS."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def image_extensions(data: DataConfig) -> list[str]:
    """The extensions that may hold the image, best first."""
    return [name.strip().lower() for name in data.image.split(";") if name.strip()]


def read_samples(
    path: Path, data: DataConfig, *, where: str, rules: MemberRules = 2, notes: TarNotes | None = None
) -> Iterator[Sample]:
    """Every sample of a local tar, in tar order. Memory does not grow with the tar, but for the sets of keys and links.

    Under ``bad_samples: skip`` a tar that was cut short ends in a sample of status ``truncated``: the last one that it
    names, since nobody can know what that one lacks.

    Args:
        where: the shard's URL, for messages.
        rules: which members belong to samples; those that an index was made by (``ShardIndex.member_rules``).
        notes: filled while samples are read.

    Raises:
        ShardError: this is no tar, the tar is damaged, holds no sample, or ends early under ``bad_samples: fail``; or
            a label is not an integer in [0, num_classes).
    """
    yield from _ShardScan(path, data, redact(where), rules, notes or TarNotes()).samples()


class _ShardScan:
    """One pass over one tar; knows how far it has come, since every error has to say it."""

    def __init__(self, path: Path, data: DataConfig, where: str, rules: MemberRules, notes: TarNotes) -> None:
        self._path, self._data, self._where = path, data, where
        self._rules: MemberRules = rules
        self._notes = notes
        self._links: LinkTable | None = None
        self._ranks = {name: rank for rank, name in enumerate(image_extensions(data))}
        self._label = None if data.label is None else data.label.lower()
        self._num_classes = data.num_classes
        self._max_bytes = min(_MAX_INT32, data.max_pixels * _BYTES_PER_PIXEL + _HEADROOM_BYTES)
        self._may_be_cut, self._is_cut = data.bad_samples == "skip", False
        self._seen: set[str] = set()
        self._num_samples = 0

    def samples(self) -> Iterator[Sample]:
        with self._path.open("rb") as file:
            group: _Group | None = None
            for member in self._members(file):
                if group is None or member.key != group.key:
                    if group is not None:
                        yield self._finish(group)
                    group = _Group(member.key)
                if not self._is_cut:
                    self._take(group, member, file)
            if group is None:
                omitted = ", ".join(self._notes.omissions.lines())
                raise self._error(
                    "this shard holds no samples",
                    0,
                    code="shard.no-samples",
                    got=omitted or None,
                    expected="members called <key>.<extension>",
                )
            group.truncated = self._is_cut
            yield self._finish(group)

    def _members(self, file: IO[bytes]) -> Iterator[_Member]:
        for info in self._headers(file):
            if (member := self._member(info)) is not None:
                yield member

    def _headers(self, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
        """Where the tar is cut inside a member, that one comes last; ``_is_cut`` is set before."""
        size_bytes = os.fstat(file.fileno()).st_size
        # The constructor reads the first member.
        self._check_extended(file, 0)
        file.seek(0)
        try:
            archive = tarfile.TarFile(fileobj=file, encoding="utf-8", errors="surrogateescape")
        except BAD_HEADER as error:
            file.seek(0)
            raise not_a_tar(file.read(_KIND_BYTES), self._where, ", byte 0, after 0 samples") from error
        end = 0
        while not self._is_cut and (info := self._next(archive, file, end)) is not None:
            # A size below zero would send tarfile back over the same members for ever.
            if info.size < 0 or archive.offset <= end:
                raise self._error("a garbled tar header", end, got=f"a member of {info.size} bytes")
            if archive.offset > size_bytes:
                self._cut("this shard ends inside a member", end, got=f"{size_bytes} bytes in all")
            end = archive.offset
            yield info
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
                    expected=f"at most {_MAX_EXTENDED_BYTES} bytes of names and times",
                )
            file.seek(-size_bytes % tarfile.BLOCKSIZE + size_bytes, os.SEEK_CUR)

    def _member(self, info: tarfile.TarInfo) -> _Member | None:
        is_link = info.islnk() or info.issym()
        name = split_name(info.name)
        if info.isdir() or not self._is_wanted(info, is_link=is_link, has_key=name is not None) or name is None:
            return None
        found = self._link_target(info) if is_link else ByteRange(info.offset_data, info.size)
        if found is None:
            return None
        if info.issparse():
            raise self._error(
                "a sparse member has no byte range",
                info.offset,
                code="shard.sparse",
                got=repr(info.name),
                next_step="write this tar again without --sparse",
            )
        key, extension = name
        if not _is_utf8(key):
            raise self._error(
                "a member's name is not UTF-8", info.offset, code="shard.name-not-utf-8", got=repr(info.name)
            )
        return _Member(key, extension, *found)

    def _is_wanted(self, info: tarfile.TarInfo, *, is_link: bool, has_key: bool) -> bool:
        """Whether this member may belong to a sample; what does not is counted, but for metadata."""
        if self._rules == 2 and is_hidden(info.name):
            self._notes.rules_differ |= has_key and info.isreg()
            self._omit(HIDDEN, info)
            return False
        if is_link and self._rules == 1:
            self._omit(_UNREAD_LINKS, info)
            return False
        if not (info.isreg() or is_link):
            self._omit(_NO_FILES, info)
            return False
        if not has_key and not _METADATA.match(info.name):
            self._omit(HIDDEN if is_hidden(info.name) else _NO_EXTENSION, info)
        return has_key

    def _omit(self, kind: str, info: tarfile.TarInfo) -> None:
        self._notes.omissions.add(kind, info.name.encode("utf-8", "backslashreplace").decode())

    def _link_target(self, link: tarfile.TarInfo) -> ByteRange | None:
        if self._links is None:
            self._links = LinkTable(self._sound_headers)
        target = self._links.resolve(link)
        if isinstance(target, str):
            self._omit(target, link)
            return None
        self._notes.rules_differ = True
        return target

    def _sound_headers(self) -> Iterable[tarfile.TarInfo]:
        """All members before any damage, which the pass that needs their names meets by itself."""
        data = self._data.model_copy(update={"bad_samples": "skip"})
        scan = _ShardScan(self._path, data, self._where, self._rules, TarNotes())
        with self._path.open("rb") as file, contextlib.suppress(ShardError):
            for info in scan._headers(file):
                if not scan._is_cut:
                    yield info

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
                    expected="one tar a file, without holes",
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
                code="shard.bad-label",
                got=repr(text.decode("utf-8", "backslashreplace")) if text else f"{member.size} bytes",
                expected=f"an integer in [0, {bound}) as text in .{member.extension}",
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
        self,
        what: str,
        offset: int,
        *,
        code: str = "shard.damaged",
        got: str | None = None,
        expected: str | None = None,
        next_step: str | None = None,
    ) -> ShardError:
        return ShardError(
            what,
            code=code,
            where=f"{self._where}, byte {offset}, after {self._num_samples} samples",
            got=got,
            expected=expected,
            next_step=next_step or "write or fetch this shard again",
        )


_UNPACK = {"gzip": "gunzip -c", "zstd": "zstd -dc", "xz": "xz -dc", "bzip2": "bunzip2 -c", "lz4": "lz4 -dc"}
_FETCH_AGAIN = "check its address and the access to it, and fetch it again: a server sent this in its place"
_INSTEAD = {
    "an empty file": "fetch or write this shard again",
    "HTML": _FETCH_AGAIN,
    "XML": _FETCH_AGAIN,
    "JSON": _FETCH_AGAIN,
    "a Git LFS pointer": "run: git lfs pull, in the repository that it is from",
    "a git-annex pointer": "run: git annex get, in the repository that it is from",
}


def not_a_tar(head: bytes, where: str, place: str = "") -> ShardError:
    """The error for a file that ``tarfile`` refuses, which names what the file is.

    Args:
        head: its first bytes, at least 512 unless it is shorter.
        where: its URL, without credentials.
        place: what follows the URL in the message.
    """
    kind = file_kind(head)
    name = where.rpartition("/")[2]
    if kind in _UNPACK:
        next_step = f"unpack it: mkdir -p unpacked && {_UNPACK[kind]} {name} > unpacked/{name}"
    elif "image" in kind or kind in ("JPEG", "PNG", "WEBP") or "archive" in kind:
        next_step = "make shards of a folder of images: stillroom shards pack FOLDER OUT"
    else:
        next_step = _INSTEAD.get(kind, "write or fetch this shard again")
    return ShardError(
        "this is not an uncompressed tar",
        code="shard.not-a-tar",
        where=where + place,
        got="a tar with a garbled first header" if kind == "a tar" else kind,
        expected="a tar of samples, not compressed: they are read by byte range",
        next_step=next_step,
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
                code="shard.too-short",
                where=f"{self._where}, byte {offset}",
                got=f"{len(data)} bytes",
                expected=f"{size} bytes",
                next_step="fetch the shard again, or index it anew if it was rewritten",
            )
        return data
