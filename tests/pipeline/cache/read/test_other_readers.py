"""pandas, Polars and DuckDB read a part, and docs/reference/format.md is enough to decode its logits."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest

from pipeline.cache.read.reader import open_cache
from tests.pipeline.caches import build, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.tolerances import ulps

Columns = dict[str, Sequence[Any]]


def by_pandas(path: Path) -> Columns:
    frame = pd.read_parquet(path)
    return {name: frame[name].tolist() for name in frame.columns}


def by_polars(path: Path) -> Columns:
    return pl.read_parquet(path).to_dict(as_series=False)


def by_duckdb(path: Path) -> Columns:
    with duckdb.connect() as connection:
        result = connection.execute("SELECT * FROM read_parquet(?)", [str(path)])
        names = [column[0] for column in result.description]
        return dict(zip(names, zip(*result.fetchall(), strict=True), strict=True))


def decode_row(cell: bytes, output: dict[str, Any]) -> list[float]:
    """A row of int8 or topk at T = 1, by the document: ``fields`` one after another, little-endian."""
    letters = {"<f4": "f", "<f2": "e", "|u1": "B", "<u2": "H", "<i4": "i"}
    layout = "".join(f"{field['count']}{letters[field['dtype']]}" for field in output["fields"])
    numbers = iter(struct.unpack("<" + layout, cell))
    fields = {field["name"]: [next(numbers) for _ in range(field["count"])] for field in output["fields"]}
    if output["encoding"] == "int8":
        return [fields["offset"][0] + fields["scale"][0] * code for code in fields["codes"]]
    (top,), (step,) = fields["top"], fields["step"]
    logits = [top - 3 * math.expm1(step * fields["levels"][0])] * output["shape"][0]
    for number, code in zip(fields["ids"], fields["codes"], strict=True):
        logits[number] = top - 3 * math.expm1(step * code)
    return logits


@pytest.mark.slow
@pytest.mark.parametrize("read", [by_pandas, by_polars, by_duckdb])
@pytest.mark.parametrize("logits", ["int8", "topk:3"])
def test_every_column_of_a_part_is_read_and_a_row_of_logits_decoded(
    tiny_config: TinyConfig, read: Callable[[Path], Columns], logits: str
) -> None:
    config = tiny_config(cache={"logits": logits, "class_means": "none", "views_per_part": 3})
    build(config)
    assert config.cache is not None
    commit = next(commit for commit in read_commits(config.cache.url) if commit.shard_id == "digits-01")
    path = Path(config.cache.url, commit.part.path)
    columns, expected = read(path), pq.read_table(path)
    assert list(columns) == expected.column_names
    for name in expected.column_names:
        # Empty cells are None, or the NaN of pandas.
        cells = [None if isinstance(cell, float) and cell != cell else cell for cell in columns[name]]
        assert cells == expected[name].to_pylist(), name
    header = json.loads(Path(config.cache.url, "header.json").read_text())
    output = next(output for output in header["outputs"] if output["name"] == "logits")
    decoded = decode_row(columns["logits"][15 + 4], output)
    stored = open_cache(config.cache.url).view("digits-01", 1).decoded("logits")[4]
    # One side in float64. int8: a product and a sum. topk: an exponent of at most log(1 + span / 3), of which an error
    # weighs span + 3 times as much; then exp, factor and difference.
    span = float(np.ptp(decoded)) + 3
    error = ulps(1 + 3 + np.log(span / 3), max(span, float(np.abs(decoded).max())))
    np.testing.assert_allclose(decoded, stored, rtol=0, atol=error)
