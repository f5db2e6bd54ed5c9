"""Class means from a file, instead of an eval pass.

The file is checked before any work. Its digest is part of the fingerprint, because another teacher's means may have the
same width. Its bytes are stored in the cache, which therefore does not depend on the URL.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline import storage
from pipeline.cache.build.class_means import encode_imported
from pipeline.cache.format import layout
from pipeline.cache.format.files import check_sha256, read_file
from pipeline.cache.format.nd_json import max_size_bytes, parse_nd_json
from pipeline.core.errors import ConfigError, StorageInputError
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from schemas.cache_format import Header

_PREFIX = "imported:"


@dataclass(frozen=True, slots=True)
class ImportedMeans:
    """The bytes of a checked file of class means."""

    data: bytes

    @property
    def mode(self) -> str:
        """The value of the header in the place of ``eval`` or ``view0``."""
        return _PREFIX + digest(self.data)


def read_means(url: str, *, num_classes: int, embedding_dim: int) -> ImportedMeans:
    """
    Raises:
        ConfigError: the file cannot be read, is too large for so many numbers, or does not fit the teacher.
    """
    where = f"cache.class_means: {redact(url)}"
    limit = max_size_bytes(num_classes=num_classes, embedding_dim=embedding_dim)
    try:
        if (size_bytes := storage.size(url)) > limit:
            raise ConfigError(
                "this file is too large for the class means of this teacher",
                code="config.class-means-too-large",
                where=where,
                got=f"{size_bytes} bytes",
                expected=f"at most {limit} bytes for {num_classes} classes of {embedding_dim} numbers",
                next_step="name a file of this teacher's class means in cache.class_means",
            )
        data = storage.read(url)
    except StorageInputError as error:
        raise ConfigError(
            f"these class means cannot be read: {error.what}",
            code="config.class-means-unreadable",
            where=where,
            got=None if error.got is None else str(error.got),
            expected="none, eval, view0, or the URL of a JSON file",
            next_step=f"restore the file, or name the copy in a begun cache: {layout.IMPORTED_MEANS}",
        ) from error
    parse_nd_json(data, num_classes=num_classes, embedding_dim=embedding_dim, where=where)
    return ImportedMeans(data)


def store_means(cache_url: str, imported: ImportedMeans) -> None:
    """Copies the file into a cache that was claimed with it, once: its digest is in the header."""
    storage.create(storage.join(cache_url, layout.IMPORTED_MEANS), imported.data)


def imported_sha256(header: Header) -> str | None:
    """SHA-256 of the file of this cache's class means; None if the cache computes its class means, or has none."""
    mode = str(header.teacher["class_means"])
    return mode.removeprefix(_PREFIX) if mode.startswith(_PREFIX) else None


def encode_stored(cache_url: str, header: Header) -> bytes:
    """``class_means.parquet`` from the cache's copy of the imported file.

    Raises:
        CacheError: the copy is missing, or was changed.
    """
    limit = max_size_bytes(num_classes=header.num_classes, embedding_dim=header.embedding_dim)
    data = read_file(cache_url, layout.IMPORTED_MEANS, max_bytes=min(limit, storage.MAX_TABLE_BYTES))
    where, sha256 = redact(storage.join(cache_url, layout.IMPORTED_MEANS)), str(imported_sha256(header))
    check_sha256(data, sha256, where=where)
    means = parse_nd_json(data, num_classes=header.num_classes, embedding_dim=header.embedding_dim, where=where)
    return encode_imported(means.class_C, means.mean_CD, fingerprint=header.fingerprint, sha256=sha256)
