"""Headers of a tar, with every kind of damage detected.

``tarfile`` ends without an error at a garbled header, at a missing end of archive and at a hole of zeros, so
``TarHeaders`` checks each of these ends against the bytes of the file.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO

from pipeline.core.errors import ShardError
from pipeline.shards.file_kinds import not_a_tar

# What tarfile raises for a header whose checksum is right and whose numbers or records are not.
BAD_HEADER = (tarfile.TarError, ValueError, OverflowError, LookupError, RecursionError)

_EXTENDED = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
# Of names and times. tarfile reads them whole, whatever size they declare.
_MAX_EXTENDED_BYTES = 1 << 20
_TYPE_OFFSET = 156
_KIND_BYTES = 4096
_END_OF_ARCHIVE = 2 * tarfile.BLOCKSIZE
_CHUNK_BYTES = 1 << 20


class TarHeaders:
    """One pass over the members of one open tar.

    Args:
        where: the shard's URL without credentials, for messages.
        allow_truncated: a tar that ends early ends the pass and sets ``truncated``; otherwise it is an error.

    Attributes:
        truncated: whether the tar ends early. If it ends inside a member, that member comes last, and this is set
            before it comes.
        num_samples: set by the reader of the samples; every error names it.
    """

    def __init__(self, file: IO[bytes], where: str, *, allow_truncated: bool) -> None:
        self._file, self._where, self._allow_truncated = file, where, allow_truncated
        self.truncated = False
        self.num_samples = 0

    def __iter__(self) -> Iterator[tarfile.TarInfo]:
        size_bytes = os.fstat(self._file.fileno()).st_size
        # The constructor of TarFile reads the first member.
        self._check_extended(0)
        self._file.seek(0)
        try:
            archive = tarfile.TarFile(fileobj=self._file, encoding="utf-8", errors="surrogateescape")
        except BAD_HEADER as error:
            self._file.seek(0)
            raise not_a_tar(self._file.read(_KIND_BYTES), self._where, ", byte 0, after 0 samples") from error
        end = 0
        while not self.truncated and (info := self._next(archive, end)) is not None:
            # A negative size would send tarfile back over the same members forever.
            if info.size < 0 or archive.offset <= end:
                raise self._garbled(end, got=f"a member of {info.size} bytes")
            if archive.offset > size_bytes:
                self._end_early("this shard ends inside a member", end, got=f"{size_bytes} bytes in all")
            end = archive.offset
            yield info
        if not self.truncated:
            self._check_end(end)

    def _next(self, archive: tarfile.TarFile, end: int) -> tarfile.TarInfo | None:
        if end:
            self._check_extended(end)
        try:
            info = archive.next()
        except BAD_HEADER as error:
            # Extended headers are read one after another. If the bytes run out among them, the tar ends there.
            if self._file.read(1) or not end:
                raise self._garbled(end, got=str(error)) from error
            self._end_early("this shard ends inside a header", end)
            return None
        # tarfile stores every member that it has read. A million of them take a gigabyte.
        archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
        return info

    def _check_extended(self, offset: int) -> None:
        """Refuses extended headers before the next member if they would fill the memory."""
        total = 0
        self._file.seek(offset)
        while (block := self._file.read(tarfile.BLOCKSIZE))[_TYPE_OFFSET : _TYPE_OFFSET + 1] in _EXTENDED:
            size_bytes = _extended_size(block)
            total += tarfile.BLOCKSIZE + size_bytes
            if size_bytes < 0 or total > _MAX_EXTENDED_BYTES:
                raise self.error(
                    "the extended headers of a member are too large",
                    offset,
                    code="shard.extended-header-too-large",
                    got=f"{total} bytes",
                    expected=f"at most {_MAX_EXTENDED_BYTES} bytes of names and times",
                )
            self._file.seek(-size_bytes % tarfile.BLOCKSIZE + size_bytes, os.SEEK_CUR)

    def _check_end(self, end: int) -> None:
        self._file.seek(end)
        tail = self._file.read(_END_OF_ARCHIVE)
        garbled = bool(tail.strip(b"\0"))
        size_bytes = os.fstat(self._file.fileno()).st_size
        if garbled and _exceeds(tail[: tarfile.BLOCKSIZE], size_bytes - end):
            self._end_early("this shard ends inside a header", end)
            return
        if len(tail) < (tarfile.BLOCKSIZE if garbled else _END_OF_ARCHIVE):
            self._end_early("this shard is truncated: it has no end-of-archive block", end)
            return
        if garbled:
            raise self._garbled(end)
        while chunk := self._file.read(_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise self.error(
                    "bytes follow the end of this archive",
                    self._file.tell() - len(chunk.lstrip(b"\0")),
                    code="shard.bytes-after-end",
                    expected="one tar in each file, without holes",
                )

    def _end_early(self, what: str, offset: int, *, got: str | None = None) -> None:
        if not self._allow_truncated:
            raise self.error(what, offset, code="shard.truncated", got=got)
        self.truncated = True

    def _garbled(self, offset: int, *, got: str | None = None) -> ShardError:
        return self.error("a tar header is garbled", offset, code="shard.damaged", got=got)

    def error(
        self,
        what: str,
        offset: int,
        *,
        code: str,
        got: str | None = None,
        expected: str | None = None,
        next_step: str = "write or fetch this shard again",
    ) -> ShardError:
        """An error at a byte of this tar."""
        return ShardError(
            what,
            code=code,
            where=f"{self._where}, byte {offset}, after {self.num_samples} samples",
            got=got,
            expected=expected,
            next_step=next_step,
        )


def _extended_size(block: bytes) -> int:
    """Bytes that follow the header; 0 if it is damaged, which tarfile reports."""
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size
    except BAD_HEADER:
        return 0


def _exceeds(block: bytes, size_bytes: int) -> bool:
    """Whether an extended header (a long name, PAX) begins here whose data exceed the rest of the file.

    Recent versions of tarfile take the part that is present for a garbled header, and end without an error.
    """
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return info.type in _EXTENDED and tarfile.BLOCKSIZE + info.size > size_bytes
