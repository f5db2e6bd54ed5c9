"""Samples of a tar, in order and with their byte ranges. A damaged tar is an error, never silently a shorter read."""

from __future__ import annotations

import contextlib
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.members import ByteRange, LinkTable, image_extensions, is_hidden, is_metadata, split_name
from pipeline.shards.omissions import Omissions
from pipeline.shards.tar_headers import TarHeaders
from pipeline.tasks import BadTargetError, TargetMember, task_of
from schemas.cache_format import Status
from schemas.config import DataConfig

_MAX_INT32 = 2**31 - 1
# Sixteen-bit RGBA is the widest pixel of the supported formats. A longer member holds something else.
_BYTES_PER_PIXEL, _HEADROOM_BYTES = 8, 1 << 20
# Of messages about labels.
_MAX_TEXT_BYTES, _MEMBER_BYTES = 64 << 20, 256
_MAX_CHARACTERS, _NUM_NAMED = 80, 5
MemberRules = Literal[1, 2]
"""Which members of a tar belong to samples. 1: dot files in folders form samples, links are ignored, as up to the
first release. 2: hidden members are ignored, links count as the files they lead to."""
_HIDDEN = "hidden members"
_UNREAD_LINKS = "links ignored because the index is older than their support (another cache or index URL includes them)"
_NO_FILES = "devices and pipes"
_NO_EXTENSION = "files without an extension"


@dataclass(frozen=True, slots=True)
class Sample:
    """One WebDataset sample before decoding.

    Attributes:
        target: what ``Task.parse`` returned; None: the sample has none.
        data: the encoded image, ``b""`` if there is none to decode.
    """

    row: int
    key: str
    status: Status
    target: Any | None
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
    """What a reader of a tar finds besides samples.

    Attributes:
        rules_differ: whether ``MemberRules`` 1 and 2 read this tar differently.
    """

    omissions: Omissions = field(default_factory=Omissions)
    rules_differ: bool = False


def unread_links(notes: TarNotes) -> Omissions:
    """What only ``MemberRules`` 1 omit, for which a user may want a new index."""
    omissions = Omissions()
    if count := notes.omissions.counts[_UNREAD_LINKS]:
        omissions.counts[_UNREAD_LINKS] = count
        omissions.examples[_UNREAD_LINKS] = notes.omissions.examples[_UNREAD_LINKS]
    return omissions


@dataclass(slots=True)
class _Group:
    """The consecutive members of one key, as far as they have been read."""

    key: str
    extensions: set[str] = field(default_factory=set[str])
    repeated: bool = False
    truncated: bool = False
    texts: dict[str, tuple[_Member, bytes]] = field(default_factory=dict[str, tuple[_Member, bytes]])
    image: _Member | None = None
    data: bytes = b""


def read_samples(
    path: Path, data: DataConfig, *, where: str, rules: MemberRules = 2, notes: TarNotes | None = None
) -> Iterator[Sample]:
    """Every sample of a local tar, in tar order. Memory does not grow with the tar, except for the keys and links.

    Under ``bad_samples: skip`` a tar that ends early ends in a sample of status ``truncated``: the last one that it
    names, because the members that this sample lacks are unknown.

    Args:
        where: the shard's URL, for messages.
        rules: which members belong to samples: those that an index was built by (``ShardIndex.member_rules``).
        notes: filled while samples are read.

    Raises:
        ShardError: this is no tar, the tar is damaged, holds no sample, or ends early under ``bad_samples: fail``; or
            a label is not valid for the task.
    """
    with path.open("rb") as file:
        yield from _ShardScan(path, file, data, redact(where), rules, notes or TarNotes()).samples()


class _ShardScan:
    """One pass over one tar."""

    def __init__(
        self, path: Path, file: IO[bytes], data: DataConfig, where: str, rules: MemberRules, notes: TarNotes
    ) -> None:
        self._path, self._file, self._where = path, file, where
        self._headers = TarHeaders(file, where, allow_truncated=data.bad_samples == "skip")
        self._rules: MemberRules = rules
        self._notes = notes
        self._links: LinkTable | None = None
        self._ranks = {name: rank for rank, name in enumerate(image_extensions(data))}
        self._task = task_of(data)
        self._target_members = frozenset(self._task.read_members)
        self._max_bytes = min(_MAX_INT32, data.max_pixels * _BYTES_PER_PIXEL + _HEADROOM_BYTES)
        self._keys: set[str] = set()

    def samples(self) -> Iterator[Sample]:
        group: _Group | None = None
        for member in filter(None, map(self._member, self._headers)):
            if group is None or member.key != group.key:
                if group is not None:
                    yield self._finish(group)
                group = _Group(member.key)
            if not self._headers.truncated:
                self._add(group, member)
        if group is None:
            raise self._headers.error(
                "this shard has no samples",
                0,
                code="shard.no-samples",
                got=", ".join(self._notes.omissions.lines()) or None,
                expected="members called <key>.<extension>",
            )
        group.truncated = self._headers.truncated
        yield self._finish(group)

    def _member(self, info: tarfile.TarInfo) -> _Member | None:
        """None: it belongs to no sample."""
        is_link = info.islnk() or info.issym()
        name = split_name(info.name)
        if info.isdir() or not self._is_in_sample(info, is_link=is_link, has_key=name is not None) or name is None:
            return None
        data = self._link_target(info) if is_link else ByteRange(info.offset_data, info.size)
        if data is None:
            return None
        if info.issparse():
            raise self._headers.error(
                "a sparse member has no byte range",
                info.offset,
                code="shard.sparse",
                got=repr(info.name),
                next_step="write this tar again without --sparse",
            )
        key, extension = name
        if not _is_utf8(key):
            raise self._headers.error(
                "a member's name is not UTF-8", info.offset, code="shard.name-not-utf-8", got=repr(info.name)
            )
        return _Member(key, extension, *data)

    def _is_in_sample(self, info: tarfile.TarInfo, *, is_link: bool, has_key: bool) -> bool:
        """Whether this member may belong to a sample. Any other member is counted, except metadata."""
        if self._rules == 2 and is_hidden(info.name):
            self._notes.rules_differ |= has_key and info.isreg()
            self._omit(_HIDDEN, info)
            return False
        if is_link and self._rules == 1:
            self._omit(_UNREAD_LINKS, info)
            return False
        if not (info.isreg() or is_link):
            self._omit(_NO_FILES, info)
            return False
        if not has_key and not is_metadata(info.name):
            self._omit(_HIDDEN if is_hidden(info.name) else _NO_EXTENSION, info)
        return has_key

    def _omit(self, kind: str, info: tarfile.TarInfo) -> None:
        self._notes.omissions.add(kind, info.name.encode("utf-8", "backslashreplace").decode())

    def _link_target(self, link: tarfile.TarInfo) -> ByteRange | None:
        if self._links is None:
            self._links = LinkTable(self._intact_headers)
        target = self._links.resolve(link)
        if isinstance(target, str):
            self._omit(target, link)
            return None
        self._notes.rules_differ = True
        return target

    def _intact_headers(self) -> Iterator[tarfile.TarInfo]:
        """All members before any damage. The pass over the samples reports the damage."""
        with self._path.open("rb") as file, contextlib.suppress(ShardError):
            headers = TarHeaders(file, self._where, allow_truncated=True)
            for info in headers:
                if not headers.truncated:
                    yield info

    def _add(self, group: _Group, member: _Member) -> None:
        if member.extension in group.extensions:
            group.repeated = True
            return
        group.extensions.add(member.extension)
        if member.extension in self._target_members:
            group.texts[member.extension] = member, self._read(member, self._task.max_bytes)
        rank = self._ranks.get(member.extension)
        if rank is not None and (group.image is None or rank < self._ranks[group.image.extension]):
            group.image = member
            group.data = self._read(member, self._max_bytes)

    def _read(self, member: _Member, max_bytes: int) -> bytes:
        """The member's bytes, or none if there are more than ``max_bytes``."""
        if member.size > max_bytes:
            return b""
        self._file.seek(member.offset)
        return self._file.read(member.size)

    def _parse_target(self, group: _Group) -> Any | None:
        try:
            members = {
                extension: TargetMember(text, member.offset, member.size)
                for extension, (member, text) in group.texts.items()
                if member is not group.image
            }
            return self._task.parse_members(members)
        except BadTargetError as error:
            member, text = group.texts[error.member]
            got = _short(text.decode("utf-8", "backslashreplace")) if text else f"{member.size} bytes"
            samples = self._target_texts()
            bad = Counter(filter(None, (self._bad_label(texts, error.what) for texts in samples)))
            if bad.total() > 1:
                first = ", ".join(f"{label} ({count})" for label, count in bad.most_common(_NUM_NAMED))
                more = ", …" if len(bad) > _NUM_NAMED else ""
                got = f"{got}; in this shard {bad.total()} of {len(samples)} {error.what}s are such: {first}{more}"
            raise self._headers.error(
                f"sample {member.key!r}: its {error.what} cannot be used",
                member.offset,
                code="shard.bad-domain" if error.what == "domain" else "shard.bad-label",
                got=got,
                expected=f"{error.expected} in .{member.extension}",
                next_step=self._task.hint(error, samples),
            ) from error

    def _bad_label(self, texts: dict[str, bytes], what: str) -> str | None:
        """What cannot be used as a label, or as a domain."""
        try:
            self._task.parse(texts)
        except BadTargetError as error:
            if error.what != what:
                return None
            label = texts[error.member].decode("utf-8", "backslashreplace") if error.label is None else error.label
            return _short(label.strip())
        return None

    def _target_texts(self) -> list[dict[str, bytes]]:
        """Members with targets of the shard's samples, without links: of all, or of as many as memory allows."""
        samples: dict[str, dict[str, bytes]] = {}
        free_bytes = _MAX_TEXT_BYTES
        for info in self._intact_headers():
            name = split_name(info.name)
            if name is None or name[1] not in self._target_members or not info.isreg() or is_hidden(info.name):
                continue
            text = self._read(_Member(*name, info.offset_data, info.size), self._task.max_bytes)
            free_bytes -= len(text) + _MEMBER_BYTES
            if free_bytes < 0:
                break
            samples.setdefault(name[0], {}).setdefault(name[1], text)
        return [*samples.values()]

    def _finish(self, group: _Group) -> Sample:
        status = self._status(group)
        self._keys.add(group.key)
        image = group.image if group.data else None
        sample = Sample(
            row=self._headers.num_samples,
            key=group.key,
            status=status,
            target=self._parse_target(group),
            offset=image.offset if image else 0,
            size=image.size if image else 0,
            data=group.data,
        )
        self._headers.num_samples += 1
        return sample

    def _status(self, group: _Group) -> Status:
        if group.truncated:
            return "truncated"
        if group.repeated or group.key in self._keys:
            return "duplicate_key"
        if group.image is None:
            return "no_image"
        if group.image.size > self._max_bytes:
            return "too_large"
        return "ok" if group.data else "empty"


def _short(text: str) -> str:
    return repr(text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…")


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
                "this shard is shorter than its index declares",
                code="shard.too-short",
                where=f"{self._where}, byte {offset}",
                got=f"{len(data)} bytes",
                expected=f"{size} bytes",
                next_step="fetch the shard again, or index it again if it was rewritten",
            )
        return data
