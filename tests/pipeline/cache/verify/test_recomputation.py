"""Outputs of a sample of rows are computed again and compared with the stored outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.build.context import current_context
from pipeline.cache.format.codec import decode, encode, stored_outputs
from pipeline.cache.format.header import read_header
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.recomputation import arrange, distance, pick
from pipeline.cache.verify.report import Findings, Recomputed
from pipeline.tasks import OutputSpec
from schemas.config import Config
from tests.marks import slow
from tests.pipeline.cache.verify.forge import commit_of, replace_commit, republish, rewrite_part
from tests.pipeline.caches import TinyCache, build, cache_section, read_commits
from tests.pipeline.conftest import TinyConfig
from tests.tolerances import ulps

SHARD, BLOCK = "digits-01", "v0000-0001"
EVERY_OPTION: dict[str, Any] = {"jitter": {"hue": 0.1}, "randaugment": {}, "erasing": {}, "cutmix": 0.5}


def recompute_rows(cache: TinyCache, num_rows: int, *, config: Config | None = None) -> tuple[Findings, Recomputed]:
    findings = Findings()
    context = current_context(config or cache.config)
    return findings, recompute(cache.url, context, findings, num_rows=num_rows, shard_urls={})


def add_to_logits(cache: TinyCache, row: int, added: float) -> None:
    """Adds to the logit of class 0 of a row of the block."""
    output = read_header(cache.url).output("logits")
    assert output is not None

    def change(table: pa.Table) -> pa.Table:
        values = decode(table["logits"], output)
        values[row, 0] += added
        at = table.schema.get_field_index("logits")
        return table.set_column(at, table.schema.field("logits"), encode(values, output))

    rewrite_part(cache, commit_of(cache, SHARD, BLOCK), change)
    republish(cache)


def move_to_other_device(cache: TinyCache) -> None:
    """Rewrites the commits as if another device had built every part."""
    for commit in read_commits(cache.url):
        replace_commit(cache, commit.model_copy(update={"environment": {**commit.environment, "device": "other"}}))
    republish(cache)


@pytest.mark.parametrize(
    "overrides",
    [
        slow({}),
        slow({"cache": {"logits": "fp16", "embeddings": "fp16", "class_means": "none"}}),
        slow({"views": {"kind": "crop"}, "teacher": {"precision": "bf16"}}),
        slow({"views": {"mix_group": 5}, "teacher": {"batch_size": 7}}),
        {"views": EVERY_OPTION, "cache": {"logits": "topk:3", "embeddings": "int8"}},
        {"cache": {"logits": "sampled:2@4", "embeddings": "none"}},
    ],
    ids=["fp32", "fp16", "crop in bf16", "odd groups and batches", "every option of views", "sampled"],
)
def test_every_row_has_the_same_bits_in_the_environment_of_the_build(
    tiny_config: TinyConfig, digits_shards: list[str], tmp_path: Path, overrides: dict[str, Any]
) -> None:
    config = tiny_config(data={"shards": digits_shards[1:]}, **overrides)
    build(config)
    assert verify_cache(str(tmp_path / "cache")).problems == []
    findings, recomputed = recompute_rows(TinyCache(str(tmp_path / "cache"), config), 10_000)
    num_rows = 15 * (3 + (cache_section(config).class_means == "eval"))
    assert findings.problems == []
    assert recomputed == Recomputed(
        rows=num_rows, same_environment=num_rows, identical=num_rows, largest_difference=0.0
    )


def test_a_sample_has_about_the_requested_rows_and_complete_pairs(built_cache: TinyCache) -> None:
    for num_rows in (1, 2, 9, 30):
        findings, recomputed = recompute_rows(built_cache, num_rows)
        assert findings.problems == []
        assert num_rows // 2 <= recomputed.rows <= num_rows + 1


def test_one_changed_bit_of_a_logit_is_found_with_its_row(cache: TinyCache) -> None:
    add_to_logits(cache, 17, 1e-5)
    findings, recomputed = recompute_rows(cache, 10_000)
    (problem,) = findings.problems
    assert problem.what == "logits differs from the teacher's output"
    assert (problem.shard, problem.view, problem.key) == (SHARD, 1, "digit-0022")
    assert recomputed.identical == recomputed.rows - 1


@pytest.mark.slow
def test_on_another_machine_small_differences_pass_and_large_ones_do_not(cache: TinyCache) -> None:
    move_to_other_device(cache)
    add_to_logits(cache, 17, 1e-5)
    findings, recomputed = recompute_rows(cache, 10_000)
    assert findings.problems == []
    assert recomputed.same_environment == 0
    assert recomputed.identical == recomputed.rows - 1
    assert 0 < recomputed.largest_difference < 1e-3
    add_to_logits(cache, 17, 1.0)
    (problem,) = recompute_rows(cache, 10_000)[0].problems
    assert problem.key == "digit-0022"
    assert "standard deviation" in str(problem.got)


@pytest.mark.slow
def test_half_precision_may_differ_by_its_rounding_on_another_machine(tiny_config: TinyConfig, tmp_path: Path) -> None:
    config = tiny_config(cache={"logits": "fp16", "embeddings": "fp16"})
    build(config)
    cache = TinyCache(str(tmp_path / "cache"), config)
    move_to_other_device(cache)
    assert recompute_rows(cache, 10_000)[0].problems == []


def test_an_output_may_round_to_the_other_neighbour_on_another_machine_and_no_further() -> None:
    (fp16,) = stored_outputs([OutputSpec("logits", (2,), "fp16")])
    # Between 512 and 1024 float16 has steps of 0.5: 1000.26 is stored as 1000.5, and a slightly smaller output as 1000.
    new = np.array([[1000.26, 0.0]] * 3, np.float32)
    stored = np.array([[1000.0, 0.0], [1000.5, 0.0], [999.5, 0.0]], np.float32)
    off, allowed = distance(stored, new, fp16, drift=0.05, same_N=np.zeros(3, np.bool_))
    # 1000.26 itself is rounded to fp32.
    np.testing.assert_allclose(off, [0.26, 0, 0.76], rtol=0, atol=ulps(1, 1000.26))
    np.testing.assert_allclose(allowed, 0.24 + 0.05, rtol=0, atol=ulps(1, 1000.26))
    off, allowed = distance(stored, new, fp16, drift=0.05, same_N=np.ones(3, np.bool_))
    assert (off.tolist(), allowed.tolist()) == ([0.5, 0.0, 1.0], [0.0, 0.0, 0.0])


def test_another_teacher_is_one_problem_with_the_difference(cache: TinyCache, tiny_config: TinyConfig) -> None:
    findings, recomputed = recompute_rows(cache, 10, config=tiny_config(teacher={"precision": "bf16"}))
    (problem,) = findings.problems
    assert problem.file == "header.json"
    assert problem.got == "teacher.precision: fp32 -> bf16"
    assert recomputed.rows == 0


def test_a_changed_image_is_a_problem_and_the_other_rows_are_compared(cache: TinyCache, tmp_path: Path) -> None:
    urls = cache.config.data.shards
    assert isinstance(urls, tuple)
    tar = bytearray(Path(urls[1]).read_bytes())
    tar[tar.index(b"IDAT") + 20] ^= 1
    (tmp_path / "digits-01.tar").write_bytes(tar)
    findings, moved = Findings(), {SHARD: str(tmp_path / "digits-01.tar")}
    context = current_context(cache.config)
    recomputed = recompute(cache.url, context, findings, num_rows=10_000, shard_urls=moved)
    assert {problem.code for problem in findings.problems} == {"shard.image-changed"}
    assert recomputed.rows >= 19 * 6
    assert recomputed.identical == recomputed.rows


@given(st.integers(0, 300), st.integers(1, 300), st.integers(0, 9))
def test_a_sample_is_spread_evenly_without_duplicates(num_rows: int, num_all: int, seed: int) -> None:
    picked = pick(num_rows, num_all, seed).tolist()
    assert len(picked) == min(num_rows, num_all) == len(set(picked))
    for number, position in enumerate(picked):
        assert number * num_all // len(picked) <= position < (number + 1) * num_all // len(picked)


def test_another_seed_picks_other_rows() -> None:
    assert not np.array_equal(pick(50, 1000, 0), pick(50, 1000, 1))
    assert np.array_equal(pick(50, 1000, 0), pick(50, 1000, 0))


@given(st.lists(st.integers(0, 6), max_size=40))
def test_every_row_has_its_slot_in_full_batches(slots: list[int]) -> None:
    order, position = arrange(slots, 7)
    assert len(order) % 7 == 0
    assert len(set(position.tolist())) == len(slots)
    for row, slot in enumerate(slots):
        assert order[position[row]] == row
        assert position[row] % 7 == slot
