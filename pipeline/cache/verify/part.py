"""One part: its bytes, its structure, and every row against the index, the plan and the commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.class_means import ClassSums, merge, sum_rows
from pipeline.cache.build.commit import file_digest
from pipeline.cache.build.part_writer import view_ranges
from pipeline.cache.format.codec import decode, depends_on_temperature, row_bytes
from pipeline.cache.verify.draws import Columns, ShardAugParams
from pipeline.cache.verify.hits import HitCounts
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError
from pipeline.shards.index import ShardIndex
from schemas.cache_format import Commit, FileRef, Header, Output, aug_param_columns, part_schema

# What the norm of stored numbers may differ by from that of the exact ones, as a share of it: a rounding each, and the
# rounding of the norm. Of eight-bit steps it is a step a number.
_ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-10}
_SMALLEST = {"float32": 0.0, "float16": 2.0**-24}
_STEPS = 255


@dataclass(frozen=True, slots=True)
class Canary:
    """The stored proof of one row's pixels under one view. ``ordinal`` counts the ok rows of the shard."""

    ordinal: int
    view: int
    digest: bytes
    mean: bytes


@dataclass(slots=True)
class PartContent:
    """What other checks need of a part that was read whole."""

    canaries: list[Canary] = field(default_factory=list[Canary])
    sums: ClassSums | None = None
    """Class sums of the stored embeddings of its first view, where these are exact."""


def check_file(path: Path, ref: FileRef) -> None:
    """
    Raises:
        CacheError: the file is not the one that a commit names.
    """
    size_bytes = path.stat().st_size
    if (size_bytes, got := file_digest(path)) != (ref.size_bytes, ref.sha256):
        raise CacheError(
            "this part is not the one that was committed",
            got=f"{size_bytes} bytes, sha256 {got[:16]}",
            expected=f"{ref.size_bytes} bytes, sha256 {ref.sha256[:16]}",
        )


class PartCheck:
    """Reads one part, a row group at a time. ``draws`` are absent where the plan cannot be drawn here."""

    def __init__(
        self, commit: Commit, header: Header, index: ShardIndex, draws: ShardAugParams | None, findings: Findings
    ) -> None:
        self._commit, self._header, self._index = commit, header, index
        self._draws, self._findings = draws, findings
        self._hits = None if draws is None else HitCounts(header, index, mix_group=draws.plan.mix_group)
        self._content = PartContent()

    def run(self, path: Path) -> PartContent:
        """
        Raises:
            CacheError: the file is not a part of this format, so that no row can be checked.
        """
        try:
            with pq.ParquetFile(path) as file:
                groups = self._check_structure(file, path)
                read = partial(read_bounded, path, size_bytes=path.stat().st_size, metadata=file.metadata)
                for (view, rows), numbers in zip(self._rows_by_view().items(), groups, strict=True):
                    self._check_view(view, rows, (read(row_groups=[at]) for at in numbers))
        # What pyarrow and NumPy raise for bytes that are not what they claim.
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            raise CacheError("this part cannot be read", got=f"{type(error).__name__}: {error}") from error
        if self._hits is not None:
            self._hits.compare(self._commit.statistics, self._emit)
        return self._content

    def _rows_by_view(self) -> dict[int, int]:
        return {view.view: view.rows for view in self._commit.views}

    def _emit(self, what: str, got: object, expected: object) -> None:
        path = self._commit.part.path
        self._findings.add(Problem(path, what, got=str(got), expected=str(expected), shard=self._commit.shard_id))

    def _check_structure(self, file: pq.ParquetFile, path: Path) -> list[list[int]]:
        """The row groups of each view."""
        if self._draws is not None:
            drawn = {} if self._commit.block.is_eval else aug_param_columns(self._draws.plan)
            schema = part_schema({output.name: row_bytes(output) for output in self._header.outputs}, drawn)
            if not file.schema_arrow.equals(schema):
                raise CacheError("this part has other columns", got=file.schema_arrow.names, expected=schema.names)
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        groups = _split(sizes, list(self._rows_by_view().values()))
        if groups is None:
            raise CacheError("a row group spans views", got=sizes, expected=list(self._rows_by_view().values()))
        ranges, footer = view_ranges(path, self._rows_by_view())
        if (ranges, footer) != (self._commit.views, self._commit.footer):
            self._emit("the commit's byte ranges are not those of this part", ranges, self._commit.views)
        return groups

    def _check_view(self, view: int, num_rows: int, tables: Iterator[pa.Table]) -> None:
        self._findings.checked["views"] += 1
        expected = self._expected(view)
        canary_N = None if self._draws is None else self._draws.canaries(view)
        start = 0
        for table in tables:
            rows = slice(start, start + len(table))
            start = rows.stop
            self._check_columns(table, view, rows, expected)
            self._check_values(table, view, rows)
            self._check_canaries(table, view, rows, canary_N)
            self._findings.checked["rows"] += len(table)
        assert start == num_rows

    def _expected(self, view: int) -> Columns:
        ok = self._index.ok
        return {
            "row": self._index.row[ok],
            "view": np.full(len(ok), view, np.uint16),
            "content_hash": self._index.content_hash[ok],
            **({} if self._draws is None else self._draws.columns(view)),
        }

    def _check_columns(self, table: pa.Table, view: int, rows: slice, expected: Columns) -> None:
        for name, expected_N in expected.items():
            got_N, expected_N = _array(table, name), expected_N[rows]
            wrong = np.flatnonzero(got_N != expected_N)
            if len(wrong):
                first = wrong[0]
                self._emit_rows(f"{name} is not what it has to be", view, rows, wrong, got_N[first], expected_N[first])

    def _emit_rows(
        self, what: str, view: int, rows: slice, wrong: NDArray[np.intp], got: object, expected: object = None
    ) -> None:
        """One problem for all rows of a row group that share it; the first is named."""
        key = self._index.keys[int(self._index.ok[rows.start + wrong[0]])].as_py()
        self._findings.add(
            Problem(
                self._commit.part.path,
                what,
                got=str(got),
                expected=None if expected is None else str(expected),
                shard=self._commit.shard_id,
                view=view,
                key=key,
                rows=len(wrong),
            )
        )

    def _check_values(self, table: pa.Table, view: int, rows: slice) -> None:
        norm_N = _array(table, "embedding_norm")
        wrong = np.flatnonzero(~(np.isfinite(norm_N) & (norm_N >= 0)))
        if len(wrong):
            self._emit_rows("the norm of an embedding is none", view, rows, wrong, norm_N[wrong[0]])
        for output in self._header.outputs:
            with np.errstate(all="ignore"):
                values_ND = decode(table[output.name], output)
            finite_N = np.isfinite(values_ND).all(1)
            wrong = np.flatnonzero(~finite_N)
            if len(wrong):
                self._emit_rows(f"{output.name} with NaN or infinity", view, rows, wrong, "not finite")
                continue
            if output.name == "embedding":
                self._check_norms(values_ND, norm_N, view, rows, output)
                self._add_sums(values_ND, view, rows, output)
            if output.name == "logits" and self._hits is not None:
                exact = output.dtype.startswith("float") and not depends_on_temperature(output)
                self._hits.add_logits(values_ND, rows, exact=exact)
        if self._hits is not None:
            self._hits.add_view(_array(table, "mix_lambda"), rows)

    def _check_norms(
        self, values_ND: NDArray[np.float32], norm_N: NDArray[np.float32], view: int, rows: slice, output: Output
    ) -> None:
        own_N = np.linalg.norm(values_ND.astype(np.float64), axis=1)
        wrong = np.flatnonzero(~(np.abs(own_N - norm_N) <= _norm_error(values_ND, own_N, output.dtype)))
        if len(wrong):
            first = wrong[0]
            self._emit_rows("the norm is not the embedding's", view, rows, wrong, norm_N[first], f"{own_N[first]:.7g}")

    def _add_sums(self, values_ND: NDArray[np.float32], view: int, rows: slice, output: Output) -> None:
        """Only fp32 embeddings add up to the very sums that the build made of the teacher's own."""
        exact = output.dtype == "float32" and view == self._commit.views[0].view
        if exact and holds_class_sums(self._header.teacher.get("class_means"), self._commit.block):
            added = sum_rows(values_ND, self._index.label[self._index.ok[rows]])
            sums = self._content.sums
            self._content.sums = added if sums is None else merge([sums, added])

    def _check_canaries(self, table: pa.Table, view: int, rows: slice, canary_N: NDArray[np.bool_] | None) -> None:
        digests: list[bytes | None] = table["pixel_digest"].to_pylist()
        means: list[bytes | None] = table["pixel_mean"].to_pylist()
        stored = [position for position, digest in enumerate(digests) if digest is not None]
        complete_N = np.array([(one is None) == (other is None) for one, other in zip(digests, means, strict=True)])
        stored_N = np.isin(np.arange(len(table)), stored)
        wrong = np.flatnonzero(~complete_N if canary_N is None else ~complete_N | (stored_N != canary_N[rows]))
        if len(wrong):
            got = "one" if stored_N[wrong[0]] else "none"
            self._emit_rows("a proof of pixels where none belongs, or none where one does", view, rows, wrong, got)
            return
        for position in stored:
            digest, mean = digests[position], means[position]
            assert digest is not None
            assert mean is not None
            self._content.canaries.append(Canary(rows.start + position, view, digest, mean))


def _array(table: pa.Table, name: str) -> NDArray[Any]:
    column = table[name].combine_chunks()
    if column.null_count:
        raise CacheError(f"column {name} has empty cells", got=f"{column.null_count} of {len(column)}")
    return column.to_numpy(zero_copy_only=False)


def _split(sizes: Sequence[int], expected: Sequence[int]) -> list[list[int]] | None:
    """Numbers of the row groups, cut so that each run has the rows wanted; None where no cut does."""
    runs: list[list[int]] = []
    number = 0
    for rows in expected:
        run: list[int] = []
        while rows > 0 and number < len(sizes):
            rows -= sizes[number]
            run.append(number)
            number += 1
        if rows:
            return None
        runs.append(run)
    return runs if number == len(sizes) else None


def _norm_error(values_ND: NDArray[np.float32], norm_N: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """How far the norm of decoded embeddings may lie from that of the exact ones."""
    width = np.sqrt(values_ND.shape[1])
    if dtype in _ROUNDING:
        return _ROUNDING[dtype] * norm_N + _SMALLEST[dtype] * width
    return np.ptp(values_ND, axis=1).astype(np.float64) / _STEPS * width + _ROUNDING["float32"] * norm_N
