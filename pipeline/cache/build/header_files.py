"""The files that a header names by their digests."""

from __future__ import annotations

from pipeline.cache.build.imported_means import imported_sha256
from pipeline.cache.format import layout
from pipeline.cache.format.head_file import head_sha256
from schemas.cache_format import Header


def header_files(header: Header) -> dict[str, str]:
    """SHA-256 by path: imported class means, and the linear head that computes logits from stored embeddings."""
    files = {layout.IMPORTED_MEANS: imported_sha256(header), layout.HEAD: head_sha256(header)}
    return {path: sha256 for path, sha256 in files.items() if sha256 is not None}
