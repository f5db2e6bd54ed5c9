"""The teacher is asked again about a sample of rows, and what is stored has to be what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.codec import decode, encode, outputs_of
from pipeline.cache.commit import read_commits
from pipeline.cache.identity import read_header
from pipeline.cache.verify import LiveTeacher, load_live, recompute, verify_cache
from pipeline.cache.verify.live import distance
from pipeline.cache.verify.report import Findings, Recomputed
from pipeline.cache.verify.sample import arrange, pick
from schemas.config import CacheConfig, Config
from tests.marks import slow
from tests.pipeline.cache.verify.forge import commit_of, replace_commit, republish, rewrite_part
from tests.pipeline.caches import TinyCache, build
from tests.pipeline.conftest import TinyConfig
from tests.tolerances import ulps

SHARD, BLOCK = "digits-01", "v0000-0001"
EVERY_OPTION: dict[str, Any] = {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {}, "cutmix": 0.5}


def asked(cache: TinyCache, num_rows: int, *, config: Config | None = None) -> tuple[Findings, Recomputed]:
    live: LiveTeacher = load_live(config or cache.config)
    return recompute(cache.url, live, num_rows=num_rows, shard_urls={})


def add_to_logits(cache: TinyCache, row: int, added: float) -> None:
    """To the first class of one row of the block."""
    output = read_header(cache.url).output("logits")
    assert output is not None

    def change(table: pa.Table) -> pa.Table:
        values = decode(table["logits"], output)
        values[row, 0] += added
        at = table.schema.get_field_index("logits")
        return table.set_column(at, table.schema.field("logits"), encode(values, output))

    rewrite_part(cache, commit_of(cache, SHARD, BLOCK), change)
    republish(cache)


def elsewhere(cache: TinyCache) -> None:
    """As if every part had been built on another machine."""
    for commit in read_commits(cache.url):
        replace_commit(cache, commit.model_copy(update={"environment": {**commit.environment, "device": "other"}}))
    republish(cache)


@pytest.mark.parametrize(
    "overrides",
    [
        slow({}),
        {"cache": {"logits": "fp16", "embeddings": "fp16", "class_means": "none"}},
        slow({"views": {"kind": "crop"}, "teacher": {"precision": "bf16"}}),
        slow({"views": {"mix_group": 5}, "teacher": {"batch_size": 7}}),
        {"views": EVERY_OPTION, "cache": {"logits": "topk:3", "embeddings": "int8"}},
    ],
    ids=["fp32", "fp16", "crop in bf16", "odd groups and batches", "every option of views"],
)
def test_every_row_is_the_same_bits_in_the_environment_of_the_build(
    tiny_config: TinyConfig, tmp_path: Path, overrides: dict[str, Any]
) -> None:
    config = tiny_config(**overrides)
    build(config)
    assert verify_cache(str(tmp_path / "cache")).problems == ()
    findings, found = asked(TinyCache(str(tmp_path / "cache"), config), 10_000)
    has_eval = config.cache is not None and config.cache.class_means == "eval"
    num_rows = 35 * (3 + has_eval)
    assert findings.problems == []
    assert found == Recomputed(rows=num_rows, same_environment=num_rows, identical=num_rows, largest_difference=0.0)


def test_a_sample_is_about_as_large_as_asked_and_of_whole_pairs(built_cache: TinyCache) -> None:
    for num_rows in (1, 2, 9, 30):
        findings, found = asked(built_cache, num_rows)
        assert findings.problems == []
        assert num_rows // 2 <= found.rows <= num_rows + 1


def test_one_changed_bit_of_a_logit_is_found_with_its_row(cache: TinyCache) -> None:
    add_to_logits(cache, 17, 1e-5)
    findings, found = asked(cache, 10_000)
    (problem,) = findings.problems
    assert problem.what == "logits is not what the teacher says"
    assert (problem.shard, problem.view, problem.key) == (SHARD, 1, "digit-0022")
    assert found.identical == found.rows - 1


@pytest.mark.slow
def test_on_another_machine_small_differences_pass_and_large_ones_do_not(cache: TinyCache) -> None:
    elsewhere(cache)
    add_to_logits(cache, 17, 1e-5)
    findings, found = asked(cache, 10_000)
    assert findings.problems == []
    assert found.same_environment == 0
    assert found.identical == found.rows - 1
    assert 0 < found.largest_difference < 1e-3
    add_to_logits(cache, 17, 1.0)
    (problem,) = asked(cache, 10_000)[0].problems
    assert problem.key == "digit-0022"
    assert "standard deviation" in str(problem.got)


@pytest.mark.slow
def test_half_precision_is_allowed_its_rounding_on_another_machine(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(cache={"logits": "fp16", "embeddings": "fp16"})
    build(config)
    cache = TinyCache(str(tmp_path / "cache"), config)
    elsewhere(cache)
    assert asked(cache, 10_000)[0].problems == []


def test_an_answer_that_rounds_the_other_way_elsewhere_passes_and_one_beyond_it_does_not() -> None:
    config = CacheConfig(url="x", logits="fp16")
    (fp16,) = outputs_of(config, num_classes=2, embedding_dim=1)
    # Between 512 and 1024 float16 has steps of 0.5: 1000.26 is kept as 1000.5, and a hair less as 1000.
    made = np.array([[1000.26, 0.0]] * 3, np.float32)
    stored = np.array([[1000.0, 0.0], [1000.5, 0.0], [999.5, 0.0]], np.float32)
    off, allowed = distance(stored, made, fp16, drift=0.05, same_N=np.zeros(3, np.bool_))
    # 1000.26 itself is rounded to fp32.
    np.testing.assert_allclose(off, [0.26, 0, 0.76], rtol=0, atol=ulps(1, 1000.26))
    np.testing.assert_allclose(allowed, 0.24 + 0.05, rtol=0, atol=ulps(1, 1000.26))
    off, allowed = distance(stored, made, fp16, drift=0.05, same_N=np.ones(3, np.bool_))
    assert (off.tolist(), allowed.tolist()) == ([0.5, 0.0, 1.0], [0.0, 0.0, 0.0])


def test_another_teacher_is_told_with_what_differs(cache: TinyCache, tiny_config: TinyConfig) -> None:
    findings, found = asked(cache, 10, config=tiny_config(teacher={"precision": "bf16"}))
    (problem,) = findings.problems
    assert problem.file == "header.json"
    assert problem.got == "teacher.precision: fp32 -> bf16"
    assert found.rows == 0


def test_an_image_that_changed_is_told_and_the_others_are_compared(cache: TinyCache, tmp_path: Path) -> None:
    urls = cache.config.data.shards
    assert isinstance(urls, tuple)
    tar = bytearray(Path(urls[1]).read_bytes())
    tar[tar.index(b"IDAT") + 20] ^= 1
    (tmp_path / "digits-01.tar").write_bytes(tar)
    live = load_live(cache.config)
    moved = {SHARD: str(tmp_path / "digits-01.tar")}
    findings, found = recompute(cache.url, live, num_rows=10_000, shard_urls=moved)
    assert {problem.what.split(" (")[0] for problem in findings.problems} == {
        "this image is not the one that was indexed"
    }
    assert found.rows >= 19 * 6
    assert found.identical == found.rows


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 9))
def test_a_sample_is_spread_evenly_without_a_row_twice(num_rows: int, num_all: int, seed: int) -> None:
    picked = pick(num_rows, num_all, seed).tolist()
    assert len(picked) == min(num_rows, num_all) == len(set(picked))
    for number, position in enumerate(picked):
        assert number * num_all // len(picked) <= position < (number + 1) * num_all // len(picked)


def test_another_seed_picks_other_rows() -> None:
    assert not np.array_equal(pick(50, 1000, 0), pick(50, 1000, 1))
    assert np.array_equal(pick(50, 1000, 0), pick(50, 1000, 0))


@given(st.lists(st.integers(0, 6), max_size=40))
def test_every_row_keeps_its_slot_in_whole_batches(slots: list[int]) -> None:
    order, place = arrange(slots, 7)
    assert len(order) % 7 == 0
    assert len(set(place.tolist())) == len(slots)
    for row, slot in enumerate(slots):
        assert order[place[row]] == row
        assert place[row] % 7 == slot
