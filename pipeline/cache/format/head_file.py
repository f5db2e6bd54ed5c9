"""The linear head of the teacher in a cache whose logits are computed from the stored embeddings."""

from __future__ import annotations

from pipeline import storage
from pipeline.cache.format import layout
from pipeline.cache.format.codec import LinearHead
from pipeline.cache.format.codec.head import NAME
from pipeline.cache.format.files import check_sha256, read_file
from pipeline.core.errors import CacheError
from pipeline.core.redaction import redact
from pipeline.tasks import EMBEDDING
from pipeline.tasks.classification import LOGITS
from schemas.cache_format import Header

_SPARE_BYTES = 1 << 16


def head_sha256(header: Header) -> str | None:
    """SHA-256 of the file; None: the cache has none."""
    return header.teacher.get("head")


def read_head(cache_url: str, header: Header) -> LinearHead | None:
    """
    Raises:
        CacheError: the file is missing or was changed, or does not fit the header.
    """
    sha256, stored = head_sha256(header), header.output(EMBEDDING)
    computed = [output.name for output in header.outputs if output.encoding == NAME]
    if not computed and sha256 is None:
        return None
    where = redact(storage.join(cache_url, layout.HEAD))
    if computed != [LOGITS] or sha256 is None or stored is None:
        raise CacheError(
            "this header does not say how logits are computed from embeddings",
            code="cache.invalid-head",
            where=redact(storage.join(cache_url, layout.HEADER)),
            got=f"computed: {', '.join(computed) or 'nothing'}; {'no' if sha256 is None else 'a'} digest of "
            f"{layout.HEAD}; {'no' if stored is None else 'an'} embedding",
            expected="computed: logits; a digest; an embedding",
            next_step="build another cache",
        )
    num_bytes = 4 * header.num_classes * (header.embedding_dim + 1) + _SPARE_BYTES
    data = read_file(cache_url, layout.HEAD, max_bytes=num_bytes)
    check_sha256(data, sha256, where=where)
    return LinearHead.parse(data, num_classes=header.num_classes, stored=stored, where=where)


def store_head(cache_url: str, head: LinearHead) -> None:
    """Writes the file into a cache that was claimed with it, once: its digest is in the header."""
    storage.create(storage.join(cache_url, layout.HEAD), head.to_bytes())
