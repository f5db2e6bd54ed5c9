"""Class means from a file instead of a pass of one's own.

The file is checked before any work. Its digest is part of the fingerprint, since means of another teacher may be as
wide; its bytes are kept in the cache, so that the cache is whole without the URL.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.build.class_means import encode_imported
from pipeline.cache.format import layout
from pipeline.cache.format.files import REBUILD, read_file
from pipeline.cache.format.nd_json import NdMeans, max_size_bytes, parse_nd_json
from pipeline.core.errors import CacheError, ConfigError, StorageInputError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from schemas.cache_format import Header

_PREFIX = "imported:"


@dataclass(frozen=True, slots=True)
class ImportedMeans:
    """A checked file of class means, byte for byte."""

    data: bytes

    @property
    def mode(self) -> str:
        """What the header says in the place of ``eval`` or ``view0``."""
        return _PREFIX + digest(self.data)


def read_means(url: str, *, num_classes: int, embedding_dim: int) -> ImportedMeans:
    """
    Raises:
        ConfigError: no such file, too large for so many numbers, or not the JSON of this teacher's classes and width.
    """
    where = f"cache.class_means: {redact(url)}"
    limit = max_size_bytes(num_classes=num_classes, embedding_dim=embedding_dim)
    try:
        if (size_bytes := storage.size(url)) > limit:
            raise ConfigError(
                "this file is too large for the class means of this teacher",
                where=where,
                got=f"{size_bytes} bytes",
                expected=f"at most {limit} bytes for {num_classes} classes of {embedding_dim} numbers",
            )
        data = storage.read(url)
    except StorageInputError as error:
        raise ConfigError(
            f"these class means cannot be read: {error.what}",
            where=where,
            got=None if error.got is None else str(error.got),
            expected="none, eval, view0, or the URL of a JSON file",
            next_step=f"restore the file, or name the copy that a begun cache keeps as {layout.IMPORTED_MEANS}",
        ) from error
    parse_nd_json(data, num_classes=num_classes, embedding_dim=embedding_dim, where=where)
    return ImportedMeans(data)


def keep_means(cache_url: str, imported: ImportedMeans) -> None:
    """Copies the file into a cache that was claimed with it; once, since its digest stands in the header."""
    storage.create(storage.join(cache_url, layout.IMPORTED_MEANS), imported.data)


def imported_sha256(header: Header) -> str | None:
    """SHA-256 of the file from which this cache has its class means; None: it makes its own, or has none."""
    mode = str(header.teacher["class_means"])
    return mode.removeprefix(_PREFIX) if mode.startswith(_PREFIX) else None


def read_kept(cache_url: str, header: Header) -> NdMeans:
    """The class means that a cache was begun with.

    Raises:
        CacheError: the cache's copy is missing, or was changed.
    """
    limit = max_size_bytes(num_classes=header.num_classes, embedding_dim=header.embedding_dim)
    data = read_file(cache_url, layout.IMPORTED_MEANS, max_bytes=min(limit, storage.MAX_TABLE_BYTES))
    where, expected = redact(storage.join(cache_url, layout.IMPORTED_MEANS)), imported_sha256(header)
    if (got := digest(data)) != expected:
        raise CacheError(
            "these class means are not those that the cache was begun with",
            where=where,
            got=f"sha256 {got[:16]}",
            expected=str(expected)[:16],
            next_step=REBUILD,
        )
    return parse_nd_json(data, num_classes=header.num_classes, embedding_dim=header.embedding_dim, where=where)


def encode_kept(cache_url: str, header: Header) -> bytes:
    """``class_means.parquet`` of a cache that was begun with a file.

    Raises:
        CacheError: the cache's copy is missing, or was changed.
    """
    kept = read_kept(cache_url, header)
    sha256 = str(imported_sha256(header))
    return encode_imported(kept.class_C, kept.mean_CD, fingerprint=header.fingerprint, sha256=sha256)
