"""One part: its bytes, its structure, and every row against the index, the plan and the commit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray

from pipeline.augment.params import (
    EVAL_VIEW,
    eval_params,
    is_canary,
    sample_keys,
    shard_partners,
    unmix,
    view_params,
)
from pipeline.augment.pixels import pixel_digest
from pipeline.augment.stored_pixels import decode_view
from pipeline.cache.build.blocks import holds_class_sums
from pipeline.cache.build.class_means import ClassSums, merge, sum_rows
from pipeline.cache.build.part_writer import view_ranges
from pipeline.cache.format.codec import (
    config_key,
    decode,
    default_temperature,
    depends_on_temperature,
    is_sampled,
    row_bytes,
    with_column,
)
from pipeline.cache.format.files import empty_cells
from pipeline.cache.format.header import decoded_from
from pipeline.cache.verify.moments import MomentsCheck
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.bounded_parquet import read_bounded
from pipeline.core.errors import CacheError
from pipeline.shards.decode import BadImageError
from pipeline.shards.index import ShardIndex
from pipeline.tasks import Recount
from schemas.cache_format import PIXEL_HASH, PIXELS, Commit, Header, Output, aug_param_columns, part_schema
from schemas.config import Size, ViewsConfig

Columns = dict[str, NDArray[Any]]
"""Column name to [N], over the ok rows of a shard in tar order."""

# The norm of stored numbers differs from that of the fp32 numbers by one rounding of each number, and by the rounding
# of the norm. An int8 number is off by at most one of 255 steps.
_ROUNDING = {"float32": 2.0**-22, "float16": 2.0**-10}
_MIN_SUBNORMAL = {"float32": 0.0, "float16": 2.0**-24}
_STEPS = 255
_DTYPES = {"fp32": "float32", "fp16": "float16"}


@dataclass(frozen=True, slots=True)
class Canary:
    """The stored digest and block means of one row's pixels under one view. ``ordinal`` is among the ok rows."""

    ordinal: int
    view: int
    digest: bytes
    mean: bytes


@dataclass(slots=True)
class PartContent:
    """What other checks need of a part.

    Attributes:
        sums: class sums of the stored embeddings of its first view, if these are exact.
        moment_sums_3: ``MomentsCheck.sums`` of all rows.
    """

    canaries: list[Canary] = field(default_factory=list[Canary])
    sums: ClassSums | None = None
    moment_sums_3: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))


@dataclass(frozen=True, slots=True)
class ReplayedShard:
    """The columns that a plan gives the ok rows of a shard."""

    plan: ViewsConfig
    size: Size
    index: ShardIndex
    keys_N2: NDArray[np.uint64]

    @classmethod
    def of(cls, plan: ViewsConfig, size: Size, index: ShardIndex) -> ReplayedShard:
        """``size``: of the teacher's input."""
        return cls(plan, size, index, sample_keys(plan.seed, index.sample_ids(index.ok)))

    def columns(self, view: int) -> Columns:
        """Box, flip, mixing and the augmentation parameters of a view."""
        ok, ordinal_N = self.index.ok, np.arange(self.index.num_ok, dtype=np.int32)
        widths_N, heights_N = (side[ok].astype(np.int64) for side in (self.index.width, self.index.height))
        if view == EVAL_VIEW:
            params, partner_N = eval_params(self.plan, widths_N, heights_N, self.size), ordinal_N
        else:
            params = view_params(self.plan, self.keys_N2, np.full(len(ok), view, np.int64), widths_N, heights_N)
            mixes = self.plan.mixes
            partner_N = shard_partners(self.plan, self.index.shard_id, view, len(ok)) if mixes else ordinal_N
        params = unmix(params, partner_N == ordinal_N)
        return {
            **{f"box_{side}": params.box_N4[:, at] for at, side in enumerate(("left", "top", "width", "height"))},
            "flip": params.flip_N,
            "mix_row": self.index.row[ok[partner_N]],
            "mix_lambda": params.mix_lambda_N,
            **params.aug_params,
        }

    def canaries(self, view: int) -> NDArray[np.bool_]:
        """The rows that are canaries: bool [N]."""
        chosen_N = is_canary(self.keys_N2, np.full(len(self.keys_N2), view, np.int64))
        chosen_N[:1] = True
        return chosen_N


class PartCheck:
    """Reads one part, a row group at a time. ``replayed`` is None if this version cannot replay the plan."""

    def __init__(
        self,
        commit: Commit,
        header: Header,
        index: ShardIndex,
        replayed: ReplayedShard | None,
        moments: MomentsCheck | None,
        findings: Findings,
    ) -> None:
        self._commit, self._header, self._index = commit, header, index
        self._replayed, self._moments, self._findings = replayed, moments, findings
        self._recount = None if replayed is None else _recount(header, index, mix_group=replayed.plan.mix_group)
        self._rows_by_view = {view.view: view.rows for view in commit.views}
        self._content = PartContent()

    def run(self, path: Path) -> PartContent:
        """
        Raises:
            CacheError: the file is not a part of this format, so that no row can be checked.
        """
        try:
            with pq.ParquetFile(path) as file:
                groups = self._check_structure(file, path)
                stored = [PIXELS] if PIXELS in file.schema_arrow.names else []
                size_bytes = path.stat().st_size
                read = partial(read_bounded, path, size_bytes=size_bytes, metadata=file.metadata, distinct=stored)
                for (view, num_rows), numbers in zip(self._rows_by_view.items(), groups, strict=True):
                    self._check_view(view, num_rows, (read(row_groups=[number]) for number in numbers))
        # pyarrow and NumPy raise these for damaged bytes.
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
            got = f"{type(error).__name__}: {error}"
            raise CacheError("this part cannot be read", code="cache.unreadable-part", got=got) from error
        if self._recount is not None:
            self._recount.compare(self._commit.statistics, self._expect)
        return self._content

    def _expect(self, what: str, got: object, expected: object) -> None:
        self._findings.expect(self._commit.part.path, what, got, expected, shard=self._commit.shard_id)

    def _check_structure(self, file: pq.ParquetFile, path: Path) -> list[range]:
        """The numbers of the row groups of each view."""
        if self._replayed is not None:
            aug_params = {} if self._commit.block.is_eval else aug_param_columns(self._replayed.plan)
            pixels = None if self._commit.block.is_eval else self._header.pixel_type
            schema = part_schema(
                {output.name: row_bytes(output) for output in with_column(self._header.outputs)}, aug_params, pixels
            )
            if not file.schema_arrow.equals(schema):
                got = file.schema_arrow.names
                raise CacheError(
                    "this part has unexpected columns", code="cache.part-columns", got=got, expected=schema.names
                )
        sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        expected = list(self._rows_by_view.values())
        groups = _split(sizes, expected)
        if groups is None:
            raise CacheError("a row group spans views", code="cache.part-row-groups", got=sizes, expected=expected)
        expected_ranges = (self._commit.views, self._commit.footer)
        self._expect(
            "the commit's byte ranges do not match this part", view_ranges(path, self._rows_by_view), expected_ranges
        )
        return groups

    def _check_view(self, view: int, num_rows: int, tables: Iterator[pa.Table]) -> None:
        self._findings.checked["views"] += 1
        ok, replayed = self._index.ok, self._replayed
        expected: Columns = {
            "row": self._index.row[ok],
            "view": np.full(len(ok), view, np.uint16),
            "content_hash": self._index.content_hash[ok],
            **({} if replayed is None else replayed.columns(view)),
        }
        canary_N = None if replayed is None else replayed.canaries(view)
        start = 0
        for table in tables:
            rows = slice(start, start + len(table))
            start = rows.stop
            for name, expected_N in expected.items():
                got_N, expected_M = _array(table, name), expected_N[rows]
                what = f"{name} does not match the index and the plan"
                self._check_rows(what, view, rows, got_N == expected_M, got_N, expected_M)
            self._check_outputs(table, view, rows)
            self._check_canaries(table, view, rows, None if canary_N is None else canary_N[rows])
            if PIXELS in table.schema.names:
                self._check_pixels(table, view, rows)
            self._findings.checked["rows"] += len(table)
        assert start == num_rows

    def _check_rows(
        self,
        what: str,
        view: int,
        rows: slice,
        correct_M: NDArray[np.bool_],
        got_M: Sequence[object] | NDArray[Any] | None = None,
        expected_M: NDArray[Any] | None = None,
    ) -> bool:
        """Adds one problem for all rows of a row group that are not correct; returns whether all are."""
        wrong = np.flatnonzero(~correct_M)
        if not len(wrong):
            return True
        first = int(wrong[0])
        self._findings.add(
            Problem(
                self._commit.part.path,
                what,
                got=None if got_M is None else str(got_M[first]),
                expected=None if expected_M is None else str(expected_M[first]),
                shard=self._commit.shard_id,
                view=view,
                key=self._index.keys[int(self._index.ok[rows.start + first])].as_py(),
                rows=len(wrong),
            )
        )
        return False

    def _check_outputs(self, table: pa.Table, view: int, rows: slice) -> None:
        norm_M = _array(table, "embedding_norm")
        is_norm_M = np.isfinite(norm_M) & (norm_M >= 0)
        self._check_rows("embedding_norm is negative or not finite", view, rows, is_norm_M, norm_M)
        for output in with_column(self._header.outputs):
            with np.errstate(all="ignore"):
                values_MD = decode(table[output.name], output, temperature=default_temperature(output))
            finite_M = np.asarray(np.isfinite(values_MD.reshape(len(values_MD), -1)).all(1))
            if not self._check_rows(f"{output.name} has NaN or infinity", view, rows, finite_M):
                continue
            if output.name == self._index.task.embedding:
                stored_norm_M = np.linalg.norm(values_MD.astype(np.float64), axis=1)
                is_close_M = np.abs(stored_norm_M - norm_M) <= self._norm_error(values_MD, stored_norm_M, output)
                what = "embedding_norm does not match the embedding"
                self._check_rows(what, view, rows, is_close_M, norm_M, stored_norm_M)
                self._add_sums(values_MD, view, rows, output)
                if self._moments is not None:
                    self._content.moment_sums_3 += self._moments.sums(values_MD, view)
            if self._recount is not None and not is_sampled(output):
                exact = output.dtype.startswith("float") and not depends_on_temperature(output)
                exact = exact and not self._decoded_from(output)
                self._recount.add_outputs(output.name, values_MD, rows, exact=exact)
        if self._recount is not None:
            self._recount.add_view(_array(table, "mix_lambda"), rows)

    def _decoded_from(self, output: Output) -> tuple[str, ...]:
        return decoded_from(self._header, config_key(output.name))

    def _norm_error(
        self, values_MD: NDArray[np.float32], norm_M: NDArray[np.float64], output: Output
    ) -> NDArray[np.float64]:
        """The errors of all encodings through which the embeddings went, added up."""
        dtypes = [output.dtype, *(_DTYPES.get(kind, "uint8") for kind in self._decoded_from(output))]
        return np.sum([_norm_error(values_MD, norm_M, dtype) for dtype in dtypes], axis=0)

    def _add_sums(self, values_MD: NDArray[np.float32], view: int, rows: slice, output: Output) -> None:
        """Only fp32 embeddings give exactly the sums that the build computed from the teacher's outputs."""
        exact = output.dtype == "float32" and view == self._commit.views[0].view and not self._decoded_from(output)
        if exact and holds_class_sums(self._header.teacher.get("class_means"), self._commit.block):
            targets = {name: column_N[rows] for name, column_N in self._index.ok_targets.items()}
            ordinals, class_L = self._index.task.class_ids(targets)
            added = sum_rows(values_MD[ordinals], class_L)
            sums = self._content.sums
            self._content.sums = added if sums is None else merge([sums, added])

    def _check_canaries(self, table: pa.Table, view: int, rows: slice, canary_M: NDArray[np.bool_] | None) -> None:
        digests: list[bytes | None] = table["pixel_digest"].to_pylist()
        means: list[bytes | None] = table["pixel_mean"].to_pylist()
        has_digest_M = np.array([digest is not None for digest in digests])
        correct_M = has_digest_M == np.array([mean is not None for mean in means])
        if canary_M is not None:
            correct_M &= has_digest_M == canary_M
        got = ["digest" if has_digest else "no digest" for has_digest in has_digest_M.tolist()]
        if not self._check_rows("a canary is missing, incomplete or unexpected", view, rows, correct_M, got):
            return
        for position, (digest, mean) in enumerate(zip(digests, means, strict=True)):
            if digest is not None and mean is not None:
                self._content.canaries.append(Canary(rows.start + position, view, digest, mean))

    def _check_pixels(self, table: pa.Table, view: int, rows: slice) -> None:
        """Stored views against their hashes and, of canaries, their decoded pixels against the digest."""
        if table[PIXELS].null_count:
            raise empty_cells(PIXELS, table[PIXELS])
        stored = [value.as_buffer() for value in table[PIXELS]]
        got_M = np.array([*map(xxhash.xxh3_64_intdigest, stored)], np.uint64)
        hash_M = _array(table, PIXEL_HASH)
        self._findings.checked["stored views"] += len(stored)
        if not self._check_rows(
            "a stored view does not match its pixel_hash", view, rows, got_M == hash_M, got_M, hash_M
        ):
            return
        digests: list[bytes | None] = table["pixel_digest"].to_pylist()
        size, pixels = self._header.input_size, self._header.pixels or "none"
        correct_M = [
            digest is None or _digest_of(data.to_pybytes(), pixels, size) == digest
            for data, digest in zip(stored, digests, strict=True)
        ]
        what = "the pixels of a stored view are not those of its canary"
        self._check_rows(what, view, rows, np.array(correct_M, np.bool_))


def _digest_of(data: bytes, pixels: str, size: Size) -> bytes | None:
    """Of the pixels of a stored view; None: its bytes are no such view."""
    try:
        return pixel_digest(decode_view(data, pixels=pixels, size=size))
    except BadImageError:
        return None


def _recount(header: Header, index: ShardIndex, *, mix_group: int) -> Recount:
    # Samples do not show the order of the classes.
    outputs = [output.name for output in with_column(header.outputs) if not is_sampled(output)]
    return index.task.recount(index.ok_targets, mix_group=mix_group, outputs=outputs)


def _array(table: pa.Table, name: str) -> NDArray[Any]:
    column = table[name].combine_chunks()
    if column.null_count:
        raise empty_cells(name, column)
    return column.to_numpy(zero_copy_only=False)


def _split(sizes: Sequence[int], expected: Sequence[int]) -> list[range] | None:
    """Row group numbers, split into runs with the expected numbers of rows; None if that is impossible."""
    starts, run_starts = ([0, *accumulate(rows)] for rows in (sizes, expected))
    if starts[-1] != run_starts[-1] or not set(run_starts) <= set(starts):
        return None
    return [range(first, stop) for first, stop in pairwise(map(starts.index, run_starts))]


def _norm_error(values_ND: NDArray[np.float32], norm_N: NDArray[np.float64], dtype: str) -> NDArray[np.float64]:
    """The largest difference between the norms of decoded embeddings and of the fp32 embeddings."""
    width = np.sqrt(values_ND.shape[1])
    if dtype in _ROUNDING:
        return _ROUNDING[dtype] * norm_N + _MIN_SUBNORMAL[dtype] * width
    return np.ptp(values_ND, axis=1).astype(np.float64) / _STEPS * width + _ROUNDING["float32"] * norm_N
