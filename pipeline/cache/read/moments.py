"""Reads the mean and covariance of a cache's embeddings, which ``stillroom cache moments`` computes."""

from __future__ import annotations

from pipeline import storage
from pipeline.cache.build.moments import EmbeddingMoments, decode_moments
from pipeline.cache.format import layout
from pipeline.cache.format.files import check_sha256, parse_record, read_file
from pipeline.cache.read.reader import TeacherCache
from pipeline.core.errors import CacheError
from pipeline.core.hashing import digest
from pipeline.core.redaction import quoted, redact
from schemas.cache_format import Moments


def find_moments(cache: TeacherCache) -> Moments | None:
    """The record of the moments of this state of the cache; None if they were not computed.

    Raises:
        CacheError: the record was changed after it was written, or is of another teacher or state.
    """
    manifest_sha256 = digest(cache.manifest_bytes)
    url = storage.join(cache.url, layout.moments_path(manifest_sha256))
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        return None
    record = parse_moments(data, where=redact(url))
    if (record.fingerprint, record.manifest_sha256) != (cache.header.fingerprint, manifest_sha256):
        raise CacheError(
            "these moments belong to another teacher or to another state of the cache",
            code="cache.other-moments",
            where=redact(url),
            got=f"fingerprint {record.fingerprint}, manifest {record.manifest_sha256[:16]}",
            expected=f"fingerprint {cache.header.fingerprint}, manifest {manifest_sha256[:16]}",
            next_step=_remedy(cache),
        )
    return record


def parse_moments(data: bytes, *, where: str) -> Moments:
    """
    Raises:
        CacheError: the record was changed after it was written.
    """
    return parse_record(Moments, data, where=where)


def read_moments_record(cache_url: str, path: str) -> Moments:
    """A record of ``moments/``, of whatever state of the cache.

    Raises:
        CacheError: it was changed after it was written.
    """
    url = storage.join(cache_url, path)
    return parse_moments(read_file(cache_url, path, max_bytes=storage.MAX_RECORD_BYTES), where=redact(url))


def read_moments(cache: TeacherCache, record: Moments) -> EmbeddingMoments:
    """The numbers that a record names.

    Raises:
        CacheError: the file is missing, was changed after it was written, or has another width than the embeddings.
    """
    path = record.table.path
    where = redact(storage.join(cache.url, path))
    data = read_file(cache.url, path)
    check_sha256(data, record.table.sha256, where=where, next_step=_remedy(cache))
    moments, dim = decode_moments(data, where=where), cache.header.embedding_dim
    if len(moments.mean_D) != dim:
        raise CacheError(
            "these moments have another width than the embeddings of the cache",
            code="cache.invalid-moments",
            where=where,
            got=f"D = {len(moments.mean_D)}",
            expected=f"D = {dim}",
            next_step=_remedy(cache),
        )
    return moments


def _remedy(cache: TeacherCache) -> str:
    return f"remove the files of {layout.MOMENTS} and run: stillroom cache moments {quoted(cache.url)}"
