"""Class means as the JSON of ND's authors (Wang 2023, 2305.17007): ``{"<class id>": [D numbers], …}``.

Their files have four decimals and an indent of four, keys in the order in which a pass over the data met the classes.
Readers look classes up by key, so neither is asked of a file that is read.
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
"""A number written in full takes 25 bytes, and an indent as many."""


@dataclass(frozen=True, slots=True)
class NdMeans:
    """Means of the C classes of a file, classes ascending."""

    class_C: NDArray[np.int32]
    mean_CD: NDArray[np.float32]


def max_size_bytes(*, num_classes: int, embedding_dim: int) -> int:
    """No file of so many numbers is larger."""
    return (num_classes + 1) * (embedding_dim + 1) * _MAX_NUMBER_BYTES


def format_nd_json(class_C: Sequence[int], mean_CD: NDArray[np.float32], *, decimals: int | None = DECIMALS) -> bytes:
    """The JSON of C classes in the order given; ``decimals`` None: every digit, so that the floats come back."""
    exact_CD = mean_CD.astype(np.float64)
    rows = (exact_CD if decimals is None else exact_CD.round(decimals)).tolist()
    return json.dumps({str(name): row for name, row in zip(class_C, rows, strict=True)}, indent=4).encode()


def parse_nd_json(data: bytes, *, num_classes: int, embedding_dim: int, where: str) -> NdMeans:
    """Strict: one clear error for whatever another reader could take for something else.

    Raises:
        ConfigError: not such a JSON; or classes or widths that are not this teacher's.
    """
    tree = _load(data, where)
    classes = sorted((_class_id(key, num_classes, where), key) for key in tree)
    if not classes:
        _refuse("these class means hold no class", where, got="{}")
    rows = [_row(tree[key], key, embedding_dim, where) for _, key in classes]
    with np.errstate(over="ignore"):
        mean_CD = np.array(rows, np.float64).astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(mean_CD).all(axis=1))
    if len(bad):
        _refuse("a class mean is beyond float32", where, got=f"class {classes[bad[0]][0]}")
    return NdMeans(np.array([number for number, _ in classes], np.int32), mean_CD)


def _load(data: bytes, where: str) -> dict[str, Any]:
    try:
        tree = json.loads(data, object_pairs_hook=_unrepeated, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        _refuse("these class means are not JSON of one object", where, got=str(error), cause=error)
    if not isinstance(tree, dict):
        _refuse("these class means are not JSON of one object", where, got=f"a {type(tree).__name__}")
    return tree


def _unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {name!r} stands there twice")
    return tree


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _class_id(key: str, num_classes: int, where: str) -> int:
    # Python's int reads " 7", "+7", "07" and "7_0" too, and two of them could mean one class.
    plain = key.isascii() and key.isdigit() and len(key) <= len(str(num_classes)) and str(int(key)) == key
    if not plain or int(key) >= num_classes:
        _refuse(
            "these class means name a class that the teacher does not have",
            where,
            got=f"key {key[:40]!r}",
            expected=f"class ids 0 to {num_classes - 1}",
        )
    return int(key)


def _row(row: object, key: str, embedding_dim: int, where: str) -> list[float]:
    if not isinstance(row, list) or any(type(value) not in (int, float) for value in row):
        _refuse("a class mean is not a list of numbers", where, got=f"class {key}", expected=f"{embedding_dim} numbers")
    if len(row) != embedding_dim:
        _refuse(
            "a class mean is not as wide as the teacher's embedding",
            where,
            got=f"class {key}: {len(row)} numbers",
            expected=f"{embedding_dim} numbers",
        )
    try:
        return [float(value) for value in row]
    except OverflowError as error:
        _refuse("a class mean is beyond float32", where, got=f"class {key}", cause=error)


def _refuse(
    what: str,
    where: str,
    *,
    got: str,
    expected: str = '{"<class id>": [D numbers], …}',
    cause: Exception | None = None,
) -> NoReturn:
    raise ConfigError(
        what,
        where=where,
        got=got,
        expected=expected,
        next_step="give this teacher's class means, or let the build make them: cache.class_means=eval",
    ) from cause
