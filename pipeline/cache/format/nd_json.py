"""Class means in the JSON format of ND's authors (Wang 2023, 2305.17007): ``{"<class id>": [D numbers], …}``.

Their files have four decimals, an indent of four, and keys in the order in which a pass over the data first meets the
classes. Readers look classes up by key, so ``parse_nd_json`` requires neither the indent nor the order.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ConfigError

DECIMALS = 4
_MAX_NUMBER_BYTES = 64
"""A number takes 25 bytes at full precision, and its indent at most as many."""


_FAULTS = {
    "config.class-means-empty": "this file has no class means",
    "config.class-means-overflow": "a class mean is too large for float32",
    "config.class-means-not-json": "this file of class means is not one JSON object",
    "config.class-means-unknown-class": "this file of class means has a class that the teacher does not have",
    "config.class-means-not-numbers": "a class mean is not a list of numbers",
    "config.class-means-wrong-width": "a class mean differs in width from the teacher's embedding",
}


@dataclass(frozen=True, slots=True)
class NdMeans:
    """Means of the C classes of a file, in ascending order of the classes."""

    class_C: NDArray[np.int32]
    mean_CD: NDArray[np.float32]


def max_size_bytes(*, num_classes: int, embedding_dim: int) -> int:
    """An upper bound for the file of so many class means."""
    return (num_classes + 1) * (embedding_dim + 1) * _MAX_NUMBER_BYTES


def format_nd_json(class_C: Sequence[int], mean_CD: NDArray[np.float32], *, decimals: int | None = DECIMALS) -> bytes:
    """The JSON of C classes in the given order. With ``decimals=None`` the numbers are exact."""
    exact_CD = mean_CD.astype(np.float64)
    rows = (exact_CD if decimals is None else exact_CD.round(decimals)).tolist()
    return json.dumps({str(name): row for name, row in zip(class_C, rows, strict=True)}, indent=4).encode()


def parse_nd_json(data: bytes, *, num_classes: int, embedding_dim: int, where: str) -> NdMeans:
    """Parses strictly: refuses any file that another reader could interpret differently.

    Raises:
        ConfigError: the data is not such a JSON, or its classes or widths are not those of the teacher.
    """
    tree = _load(data, where)
    classes = sorted((_class_id(key, num_classes, where), key) for key in tree)
    if not classes:
        _refuse("config.class-means-empty", where, got="{}")
    rows = [_row(tree[key], key, embedding_dim, where) for _, key in classes]
    with np.errstate(over="ignore"):
        mean_CD = np.array(rows, np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(mean_CD).all(axis=1))
    if len(bad):
        _refuse("config.class-means-overflow", where, got=f"class {classes[bad[0]][0]}")
    return NdMeans(np.array([number for number, _ in classes], np.int32), mean_CD)


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(data, object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse("config.class-means-not-json", where, got=str(error), cause=error)
    if not isinstance(tree, dict):
        _refuse("config.class-means-not-json", where, got=f"a {type(tree).__name__}")
    return tree


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"key {name!r} occurs twice")
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _class_id(key: str, num_classes: int, where: str) -> int:
    # Python's int also accepts " 7", "+7", "07" and "7_0", so that two keys could mean one class.
    is_canonical = key.isascii() and key.isdigit() and len(key) <= len(str(num_classes)) and str(int(key)) == key
    if not is_canonical or int(key) >= num_classes:
        _refuse(
            "config.class-means-unknown-class",
            where,
            got=f"key {key[:40]!r}",
            expected=f"class ids 0 to {num_classes - 1}",
        )
    return int(key)


def _row(row: object, key: str, embedding_dim: int, where: str) -> list[float]:
    if not isinstance(row, list) or any(type(value) not in (int, float) for value in row):
        _refuse("config.class-means-not-numbers", where, got=f"class {key}", expected=f"{embedding_dim} numbers")
    if len(row) != embedding_dim:
        _refuse(
            "config.class-means-wrong-width",
            where,
            got=f"class {key}: {len(row)} numbers",
            expected=f"{embedding_dim} numbers",
        )
    try:
        return [float(value) for value in row]
    except OverflowError as error:
        _refuse("config.class-means-overflow", where, got=f"class {key}", cause=error)


def _refuse(
    code: str,
    where: str,
    *,
    got: str,
    expected: str = '{"<class id>": [D numbers], …}',
    cause: Exception | None = None,
) -> NoReturn:
    raise ConfigError(
        _FAULTS[code],
        code=code,
        where=where,
        got=got,
        expected=expected,
        next_step="name a file of this teacher's class means, or let the build compute them: cache.class_means=eval",
    ) from cause
