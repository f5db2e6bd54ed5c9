"""Mean and covariance of a cache's embeddings: records and tables by their digests, numbers along one direction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cache.build.moments import EmbeddingMoments, decode_moments
from pipeline.cache.format import layout
from pipeline.cache.format.files import check_sha256, read_file
from pipeline.cache.read.moments import read_moments_record
from pipeline.cache.verify.report import Findings
from schemas.cache_format import Header, Manifest, Moments

# Sums of float64 squares, of a cache of any size, against the variance that the covariance gives along a direction.
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class MomentsCheck:
    """The moments of the current manifest, and a direction along which the rows of the parts are compared with them: a
    wrong mean or covariance would have to be orthogonal to it.

    Attributes:
        direction_D: -1 and 1, at random.
    """

    path: str
    moments: EmbeddingMoments
    num_views: int
    direction_D: NDArray[np.float64]

    def sums(self, values_MD: NDArray[np.float32], view: int) -> NDArray[np.float64]:
        """[3]: number of the rows, and sums of their values along the direction, from the mean, and of the squares."""
        if view >= self.num_views:
            return np.zeros(3)
        along_M = (values_MD.astype(np.float64) - self.moments.mean_D) @ self.direction_D
        return np.array([len(along_M), along_M.sum(), (along_M**2).sum()])

    def compare(self, sums_3: NDArray[np.float64], findings: Findings) -> None:
        """Compares the sums over all rows of the manifest."""
        num_rows, total, squares = sums_3.tolist()
        variance = float(self.direction_D @ self.moments.covariance_DD @ self.direction_D)
        scale = float(np.trace(self.moments.covariance_DD)) or 1.0
        is_mean = abs(total / num_rows) <= _TOLERANCE * scale**0.5
        is_variance = abs(squares / (num_rows - 1) - variance) <= _TOLERANCE * scale
        findings.expect(
            self.path, "whether this mean and covariance are those of the rows", is_mean & is_variance, True
        )


def read_moments(
    cache_url: str,
    entries: Sequence[storage.Entry],
    header: Header | None,
    manifest: Manifest | None,
    manifest_sha256: str,
    findings: Findings,
) -> tuple[set[str], MomentsCheck | None]:
    """Reads and compares all records and tables of moments. Returns the paths of tables that records name, and the
    check of those of the current manifest."""
    named, check = set[str](), None
    for path in (entry.path for entry in entries if layout.is_moments_record(entry.path) and not entry.is_temporary):
        with findings.capture(path, "moments"):
            record = read_moments_record(cache_url, path)
            named.add(record.table.path)
            table_path = layout.moments_table_path(record.manifest_sha256, record.table.sha256)
            findings.expect(path, "the path of the table does not match the record", record.table.path, table_path)
            expected_path = layout.moments_path(record.manifest_sha256)
            findings.expect(path, "these moments belong to another manifest", path, expected_path)
            if header is not None:
                what = "these moments belong to another teacher"
                findings.expect(path, what, record.fingerprint, header.fingerprint)
            moments = _read_table(cache_url, record, header, findings)
            if moments is not None and manifest is not None and record.manifest_sha256 == manifest_sha256:
                num_rows = manifest.num_ok * manifest.num_views
                findings.expect(path, "rows of these moments", record.num_rows, num_rows)
                direction_D = np.random.default_rng(0).choice([-1.0, 1.0], len(moments.mean_D))
                check = MomentsCheck(record.table.path, moments, manifest.num_views, direction_D)
    return named, check


def _read_table(cache_url: str, record: Moments, header: Header | None, findings: Findings) -> EmbeddingMoments | None:
    """The numbers of a record; None if they have a problem."""
    path = record.table.path
    with findings.capture(path):
        data = read_file(cache_url, path)
        check_sha256(data, record.table.sha256, where=path)
        moments = decode_moments(data, where=path)
        covariance_DD, width = moments.covariance_DD, len(moments.mean_D)
        valid = bool(np.isfinite(covariance_DD).all() and (covariance_DD == covariance_DD.T).all())
        valid = findings.expect(path, "whether the covariance is finite and symmetric", valid, True)
        if header is not None:
            valid &= findings.expect(path, "numbers of a row of the embedding", width, header.embedding_dim)
        return moments if valid else None
    return None
