"""The registry of encodings; rows of floats to a Parquet column and back, by the encoding that an output names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from pipeline.cache.format.codec.dense import DENSE
from pipeline.cache.format.codec.encoding import Encoding, RowIdentity, Rows
from pipeline.cache.format.codec.head import HEAD, LinearHead
from pipeline.cache.format.codec.int4 import INT4
from pipeline.cache.format.codec.int8 import INT8
from pipeline.cache.format.codec.int8t import INT8T
from pipeline.cache.format.codec.sampled import SAMPLED
from pipeline.cache.format.codec.topk import TOPK
from pipeline.cache.format.codec.topk_map import TOPK_MAP
from pipeline.cache.format.files import empty_cells
from pipeline.core.errors import CacheError, ConfigError
from pipeline.tasks import EMBEDDING, OutputSpec
from schemas.cache_format import Output

_ENCODINGS = (DENSE, INT8, INT8T, INT4, TOPK, SAMPLED, HEAD, TOPK_MAP)
_BY_NAME = {encoding.name: encoding for encoding in _ENCODINGS}
_BY_KIND = {kind: encoding for encoding in _ENCODINGS for kind in encoding.kinds}
_MAPS = {"fp32": DENSE, "fp16": DENSE, "int8": INT8, "topk": TOPK_MAP}
"""Encodings of maps [K,h,w] by the value of the config. The others store classes of one row."""
_CONFIG_KEYS = {"embedding": "embeddings"}
_NUM_NAMED = 5
_MAP_AXES = 3


def stored_outputs(specs: Iterable[OutputSpec]) -> tuple[Output, ...]:
    """The outputs that a cache stores for each row.

    Raises:
        ConfigError: an encoding needs more classes, or does not store maps.
    """
    return tuple(_describe(spec) for spec in specs if spec.kind != "none")


def _describe(spec: OutputSpec) -> Output:
    kind, by_kind = spec.kind.partition(":")[0], _MAPS if _is_map(spec.shape) else _BY_KIND
    if kind not in by_kind:
        raise ConfigError(
            f"{kind} stores the classes of one row, and {spec.name} are a map of rows",
            code="config.encoding-of-maps",
            where=f"cache.{config_key(spec.name)}",
            got=spec.kind,
            expected=f"{', '.join(_MAPS)}:k",
            next_step="set cache.logits=int8",
        )
    return by_kind[kind].describe(spec.name, spec.shape, spec.kind)


def _is_map(shape: tuple[int, ...]) -> bool:
    return len(shape) == _MAP_AXES


def has_maps(outputs: Iterable[Output]) -> bool:
    """Whether an output is a map [K,h,w], a row of which may take a megabyte."""
    return any(_is_map(output.shape) for output in outputs)


def config_key(name: str) -> str:
    """The key of ``cache``, and of ``teacher`` in a header, that has the encoding of an output."""
    # All heads have the encoding of ``logits``.
    kind, _, _ = name.partition(".")
    return _CONFIG_KEYS.get(kind, kind)


def _encoding(output: Output) -> Encoding:
    if output.encoding not in _BY_NAME:
        raise CacheError(
            f"this version cannot decode the {output.name} of this cache",
            code="cache.unknown-encoding",
            got=output.encoding,
            expected=", ".join(_BY_NAME),
            next_step="read it with the version that wrote it",
        )
    return _BY_NAME[output.encoding]


def column_name(output: Output) -> str:
    """The column that an output is decoded from: its own, or that of the embedding."""
    return EMBEDDING if output.encoding == HEAD.name else output.name


def with_column(outputs: Iterable[Output]) -> tuple[Output, ...]:
    """Those that are stored, and not computed from another output."""
    return tuple(output for output in outputs if column_name(output) == output.name)


def _row_dtype(output: Output) -> np.dtype[np.void]:
    """The fields of a stored row, in order and without padding."""
    return np.dtype([(field.name, field.dtype, (field.count,)) for field in output.fields])


def check_encodings(outputs: Iterable[Output]) -> None:
    """
    Raises:
        CacheError: an encoding is unknown.
    """
    for output in outputs:
        _encoding(output)


def row_bytes(output: Output) -> int:
    """Bytes of one row as stored, before page compression."""
    # Not the itemsize of a dtype: a plan may have more classes than NumPy has room for.
    return sum(np.dtype(field.dtype).itemsize * field.count for field in output.fields)


def depends_on_temperature(output: Output) -> bool:
    """Whether ``decode`` is a function of the temperature."""
    return _encoding(output).depends_on_temperature or is_fixed(output)


def is_fixed(output: Output) -> bool:
    """Whether the numbers serve the output's ``temperatures`` alone: T · log of mean or sampled probabilities at T."""
    return bool(output.temperatures) and not _encoding(output).depends_on_temperature


def default_temperature(output: Output) -> float:
    """At which an output is decoded where no loss reads it: 1, unless it serves another one alone."""
    return output.temperatures[0] if is_fixed(output) else 1.0


def is_sampled(output: Output) -> bool:
    """Whether single rows have no probability for most classes, and only their mean has that of all."""
    return output.encoding == SAMPLED.name


def check_temperature(output: Output, temperature: float, *, where: str | None = None) -> None:
    """
    Raises:
        CacheError: the output serves other temperatures alone.
    """
    if is_fixed(output) and temperature not in output.temperatures:
        kind = "samples" if is_sampled(output) else "the mean"
        raise CacheError(
            f"the {output.name} of this cache stand for {kind} of probabilities at one temperature",
            code="cache.other-temperature",
            where=where,
            got=f"T = {temperature:g}",
            expected=f"T = {', '.join(f'{stored:g}' for stored in output.temperatures)}",
            next_step="set the temperature of the loss, or use a cache whose logits serve all temperatures",
        )


def encode(
    values: NDArray[np.float32],
    output: Output,
    *,
    keys: Sequence[str] = (),
    identity: RowIdentity | None = None,
) -> pa.Array:
    """[N,…] fp32 to N little-endian rows.

    Args:
        keys: names of the rows, for the error.
        identity: the rows; ``sampled`` needs it.

    Raises:
        CacheError: a value is not finite, or would become infinite in the stored type.
    """
    values_ND = values.reshape(len(values), prod(output.shape))
    rows_N = np.zeros(len(values_ND), _row_dtype(output))
    with np.errstate(over="ignore", invalid="ignore"):
        _encoding(output).pack(values_ND, rows_N, output, identity)
    _check_fits(values_ND, rows_N, output, keys)
    return column_of(rows_N.view(np.uint8).reshape(len(rows_N), rows_N.itemsize))


def _check_fits(values_ND: NDArray[np.float32], rows_N: Rows, output: Output, keys: Sequence[str]) -> None:
    fits_N = np.isfinite(values_ND).all(1)
    for field in output.fields:
        if np.dtype(field.dtype).kind == "f":
            fits_N &= np.isfinite(rows_N[field.name]).all(1)
    if fits_N.all():
        return
    bad = np.flatnonzero(~fits_N)
    raise CacheError(
        f"the teacher's {output.name} do not fit {output.dtype if output.encoding == 'dense' else output.encoding}",
        code="cache.values-do-not-fit",
        where=f"keys {', '.join(np.array(keys)[bad[:_NUM_NAMED]].tolist())}" if keys else None,
        got=f"{len(bad)} rows, largest magnitude {float(np.abs(values_ND).max()):.4g}",
        next_step=f"set cache.{config_key(output.name)}=fp32",
    )


def raw_rows(column: pa.Array) -> NDArray[np.uint8]:
    """A column of fixed-size bytes as [N, bytes of a row], without a copy."""
    width, first = column.type.byte_width, column.offset
    if not len(column):
        return np.empty((0, width), np.uint8)
    raw = np.frombuffer(column.buffers()[1], np.uint8)
    return raw[first * width : (first + len(column)) * width].reshape(-1, width)


def column_of(raw_NW: NDArray[np.uint8]) -> pa.Array:
    """The inverse of ``raw_rows``, without a copy of contiguous rows."""
    num_rows, width = raw_NW.shape
    return pa.Array.from_buffers(pa.binary(width), num_rows, [None, pa.py_buffer(np.ascontiguousarray(raw_NW))])


def decode(
    column: pa.Array | pa.ChunkedArray, output: Output, *, temperature: float = 1.0, head: LinearHead | None = None
) -> NDArray[np.float32]:
    """N stored rows to [N,…] fp32 at the temperature of the loss that reads them.

    Args:
        column: of the part, ``column_name`` of the output.
        head: of the cache; computes the logits whose encoding is ``head``.

    Raises:
        CacheError: the encoding is unknown, the output serves other temperatures alone, or a cell is empty.
    """
    assert temperature > 0
    check_temperature(output, temperature)
    if output.encoding == HEAD.name:
        assert head is not None
        return head.logits(torch.from_numpy(decode(column, head.stored))).numpy()
    encoding, dtype = _encoding(output), _row_dtype(output)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if column.null_count:
        raise empty_cells(output.name, column)
    values_ND = encoding.unpack(raw_rows(column).view(dtype)[:, 0], output, temperature)
    return values_ND.reshape(len(values_ND), *output.shape) if len(output.shape) > 1 else values_ND
