"""Caches of patch tokens: their values, encodings, identity, plan and verification."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from pipeline.cache.build.commit import read_commit_summaries
from pipeline.cache.build.context import cache_config, current_context, prepare
from pipeline.cache.build.header_claim import check_without_weights
from pipeline.cache.format.header import read_header
from pipeline.cache.ops.inspect import inspect_cache
from pipeline.cache.plan.build_plan import plan_cache, plan_size
from pipeline.cache.plan.plan_inputs import collect_plan_inputs, resolve_embedding_dim
from pipeline.cache.plan.plan_warnings import plan_warnings
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.cache.verify import recompute, verify_cache
from pipeline.cache.verify.report import Findings
from pipeline.core.errors import CacheError, ConfigError
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.cache.build.test_outputs import crops, images
from tests.pipeline.caches import TinyCache, build, cache_section, open_built, shard_urls
from tests.pipeline.conftest import TinyConfig, tiny_config_of
from tests.pipeline.student.runs import rewrite_view, set_column
from tests.pipeline.tasks.test_embedding import TOWER, embedding_config
from tests.tolerances import magnitude_of, network_operations, reordered, ulps

TOKENS: dict[str, Any] = {"tokens": "fp32", "tokens_grid": 4, "class_means": "none"}
LAYER = {"tokens_layer": "layer2"}


def tokens_config(tiny_config: TinyConfig, *, cache: dict[str, Any] | None = None, **sections: Any) -> Config:
    """16 tokens of width 6, of a layer of 8×8 positions; of two unmixed views."""
    sections = {"views": {"kind": "crop", "count": 2}, **sections}
    return tiny_config(cache={**TOKENS, **(cache or {})}, teacher={**LAYER, **sections.pop("teacher", {})}, **sections)


@pytest.fixture(scope="module")
def exact(digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """In fp32. Never written to."""
    url = str(tmp_path_factory.mktemp("tokens") / "cache")
    return open_built(tokens_config(lambda **overrides: tiny_config_of(digits_shards, url, overrides)))


@torch.no_grad()
def test_cached_tokens_are_those_of_the_layer_on_the_stored_views(
    exact: TeacherCache, digits_shards: list[str], tiny_config: TinyConfig
) -> None:
    network: Any = current_context(tokens_config(tiny_config)).teacher.module.network
    columns = exact.view("digits-01", 1)
    mean, std = (torch.tensor(values)[:, None, None] for values in ([0.5, 0.4, 0.3], [0.2, 0.3, 0.25]))
    x = (crops(images(digits_shards[1]), columns).float() / 255 - mean) / std
    map_NDHW = network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x)))))
    expected = map_NDHW.unflatten(3, (4, 2)).unflatten(2, (4, 2)).double().mean((3, 5)).flatten(2).transpose(1, 2)
    operations = network_operations(network, torch.zeros(1, 3, 16, 16), backward=False)
    found = columns.decoded("tokens")
    assert found.shape == (15, 16, 6)
    np.testing.assert_allclose(found, expected, rtol=0, atol=reordered(operations, magnitude_of(map_NDHW)))


@pytest.mark.parametrize("encoding", ["fp16", "int8"])
def test_encoded_tokens_lie_within_the_error_of_their_encoding_and_are_verified(
    exact: TeacherCache, tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr("pipeline.cache.build.statistics._SAMPLE_ONE_IN", 1)
    config = tokens_config(tiny_config, cache={"tokens": encoding})
    cache = open_built(config)
    output = cache.header.output("tokens")
    assert output is not None
    assert output.shape == (16, 6)
    cosines: list[float] = []
    for shard in ("digits-00", "digits-01"):
        for view in range(2):
            exact_NPD, stored_NPD = (opened.view(shard, view).decoded("tokens") for opened in (exact, cache))
            # One scale a row for all tokens, and half of a float16's last place.
            span_N = exact_NPD.max((1, 2)) - exact_NPD.min((1, 2))
            largest = magnitude_of(exact_NPD)
            allowed = span_N / 255 / 2 + ulps(4, largest) if encoding == "int8" else largest * 2.0**-11
            assert (np.abs(stored_NPD - exact_NPD).max((1, 2)) <= allowed).all()
            for left, right in zip(exact_NPD.reshape(-1, 6), stored_NPD.reshape(-1, 6), strict=True):
                left, right = left.astype(np.float64), right.astype(np.float64)
                cosines.append(float(left @ right / np.linalg.norm(left) / np.linalg.norm(right)))
    report = inspect_cache(cache.url)
    assert report.token_cosine == pytest.approx(np.mean(cosines), abs=ulps(len(cosines), dtype=torch.float64))
    assert np.mean(cosines) < 1
    assert verify_cache(cache.url).problems == []
    findings = Findings()
    recomputed = recompute(cache.url, current_context(config), findings, num_rows=20, shard_urls={})
    assert (recomputed.rows, recomputed.identical, [*findings.problems]) == (20, 20, [])


def test_other_tokens_are_found_by_the_teacher(tiny_config: TinyConfig) -> None:
    """Of one row, behind digests that fit: only the teacher knows them."""
    config = tokens_config(tiny_config)
    build(config)
    url = cache_section(config).url

    def change(table: Any) -> Any:
        rows = table["tokens"].to_pylist()
        return set_column(table, "tokens", [rows[1], *rows[1:]])

    rewrite_view(TinyCache(url, config), "digits-00", 1, change)
    assert verify_cache(url).problems == []
    findings = Findings()
    recompute(url, current_context(config), findings, num_rows=10_000, shard_urls={})
    assert [(problem.shard, problem.view, problem.key) for problem in findings.problems] == [
        ("digits-00", 1, "digit-0000")
    ]


@pytest.mark.parametrize(
    ("cache", "teacher"),
    [({"tokens": "fp16"}, {}), ({"tokens_grid": 8}, {}), ({}, {"tokens_layer": "layer1"}), ({"tokens": "none"}, {})],
)
def test_a_build_with_other_tokens_is_refused(
    exact: TeacherCache, tiny_config: TinyConfig, cache: dict[str, Any], teacher: dict[str, Any]
) -> None:
    if cache.get("tokens") == "none":
        cache, teacher = {"tokens": "none", "tokens_grid": None}, {"tokens_layer": None}
    config = tokens_config(tiny_config, cache={"url": exact.url, **cache}, teacher=teacher)
    with raises("cache.other-header", CacheError):
        current_context(config).claimed()
    with raises("cache.other-header", CacheError):
        check_without_weights(exact.header, config)
    same = tokens_config(tiny_config, cache={"url": exact.url})
    check_without_weights(exact.header, same)
    assert current_context(same).header.fingerprint == exact.header.fingerprint


def test_a_plan_knows_the_bytes_of_tokens_without_the_weights(
    exact: TeacherCache, tiny_config: TinyConfig, tmp_path: Path
) -> None:
    weights = {"weights": str(tmp_path / "missing.safetensors")}
    for config in (tokens_config(tiny_config, teacher=weights), tokens_config(tiny_config, cache={"url": exact.url})):
        urls = shard_urls(config)
        sizes = {shard: Path(url).stat().st_size for shard, url in urls.items()}
        commits = read_commit_summaries(cache_section(config).url)
        inputs = collect_plan_inputs(config, cache_config(config), urls, sizes, commits)
        inputs = resolve_embedding_dim(inputs)
        assert plan_size(inputs).outputs == {"logits": 40, "embedding": 28, "tokens": 4 * 16 * 6}
    for changes, named in (
        ({"teacher": {"tokens_layer": "layer1"}}, "teacher.tokens_layer: layer2 -> layer1"),
        ({"cache": {"tokens_grid": 2}}, "teacher.tokens_grid: 4 -> 2"),
        ({"cache": {"tokens": "fp16"}}, "teacher.tokens: fp32 -> fp16"),
    ):
        other = tokens_config(tiny_config, **{**changes, "cache": {"url": exact.url, **changes.get("cache", {})}})
        changed = replace(inputs, config=other, cache=cache_config(other))
        assert any(named in warning for warning in plan_warnings(changed, plan_cache(changed)))
    assert not any("another config" in warning for warning in plan_warnings(inputs, plan_cache(inputs)))
    large = tokens_config(tiny_config, views={"kind": "crop", "count": 500, "mix_group": 40_000})
    cache = cache_config(large).model_copy(update={"views_per_part": 500})
    inputs = resolve_embedding_dim(collect_plan_inputs(large, cache, urls, sizes, []))
    named = [warning for warning in plan_warnings(inputs, plan_cache(inputs)) if "cache.tokens_grid" in warning]
    # 4 bytes of (96 + 10 + 7) numbers, for 500 views of 40,000 rows.
    assert len(named) == 1
    assert "9.0 GB" in named[0]


def test_keys_without_effect_are_refused(tiny_config: TinyConfig) -> None:
    with pytest.raises(ValidationError):
        tokens_config(tiny_config, cache={"tokens": "none"})
    unused = tokens_config(tiny_config, cache={"tokens": "none", "tokens_grid": None})
    with raises("config.tokens-unused", ConfigError, where="teacher.tokens_layer"):
        prepare(unused)


def test_a_cache_may_hold_tokens_alone(tiny_config: TinyConfig) -> None:
    config = embedding_config(
        tiny_config(),
        cache={"embeddings": "none", "tokens": "int8"},
        teacher={**TOWER, "tokens_layer": "stem"},
        views={"kind": "eval", "count": 1},
    )
    cache = open_built(config)
    assert [(output.name, output.shape) for output in cache.header.outputs] == [("tokens", (49, 6))]
    assert read_header(cache.url).teacher["tokens_grid"] == 7
    assert verify_cache(cache.url).problems == []
    assert open_cache(cache.url).view("digits-00", 0).decoded("tokens").shape == (20, 49, 6)
