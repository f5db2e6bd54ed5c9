"""``cache.logits: auto``: the classes decide the encoding of a new cache, the header that of an existing one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.cache_ops import verify
from jobs.plan_cache import report
from pipeline.cache.build.context import cache_config, current_context, prepare
from pipeline.cache.build.encodings import with_encodings
from pipeline.cache.build.header_claim import check_without_weights
from pipeline.cache.format.header import read_header
from pipeline.core.errors import CacheError
from schemas.config import Config
from tests.errors import raises
from tests.pipeline.caches import build, cache_section, files
from tests.pipeline.conftest import TinyConfig

KEYS: dict[str, Any] = {"embeddings": "none", "class_means": "none"}


def config_of(tiny_config: TinyConfig, num_classes: int, *, logits: str = "auto", count: int = 1) -> Config:
    views = {"count": count, "kind": "crop"}
    return tiny_config(data={"num_classes": num_classes}, views=views, cache={**KEYS, "logits": logits})


@pytest.mark.parametrize(("num_classes", "encoding"), [(255, "fp16"), (256, "int8t"), (1000, "int8t")])
def test_a_new_cache_has_int8t_from_256_classes(tiny_config: TinyConfig, num_classes: int, encoding: str) -> None:
    config = config_of(tiny_config, num_classes)
    assert cache_config(config).logits == encoding
    prepare(config)
    header = read_header(cache_section(config).url)
    assert header.teacher["logits"] == encoding
    explicit = config_of(tiny_config, num_classes, logits=encoding)
    assert current_context(explicit).header.fingerprint == header.fingerprint


def test_a_key_that_is_not_written_is_auto() -> None:
    assert cache_section(Config.model_validate({"cache": {"url": "x"}})).logits == "auto"


def test_several_heads_and_embeddings_have_the_defaults_of_their_tasks(tiny_config: TinyConfig) -> None:
    heads = {"color": {"num_classes": 300}, "shape": {"num_classes": 3}}
    data = {"task": "heads", "num_classes": None, "label": "json", "heads": heads}
    assert cache_config(tiny_config(data=data, cache={**KEYS, "logits": "auto"})).logits == "fp16"
    tree = {"data": {"task": "embedding"}, "cache": {"url": "x"}}
    assert with_encodings(Config.model_validate(tree)).cache == Config.model_validate(tree).cache
    domains = tiny_config(data={"num_classes": 300, "domain": "shard"}, cache={**KEYS, "logits": "auto"})
    assert cache_config(domains).logits == "int8t"


@pytest.mark.parametrize("logits", ["fp16", "int8"])
def test_an_existing_cache_is_extended_with_the_encoding_of_its_header(tiny_config: TinyConfig, logits: str) -> None:
    build(config_of(tiny_config, 300, logits=logits))
    config = config_of(tiny_config, 300, count=2)
    url = cache_section(config).url
    header = files(url)["header.json"]
    sizes = {"fp16": 600, "int8": 308}
    plan = report(config, measured=False)
    assert plan.plan.size.outputs == {"logits": sizes[logits]}
    assert not any("another config" in warning for warning in plan.warnings)
    check_without_weights(read_header(url), config)
    manifest = build(config)
    assert (manifest.num_views, files(url)["header.json"]) == (2, header)
    with raises("cache.other-header", CacheError, got=f"teacher.logits: {logits} -> int8t"):
        prepare(config_of(tiny_config, 300, logits="int8t"))
    with raises("cache.other-header", CacheError):
        prepare(config_of(tiny_config, 10))


@pytest.mark.parametrize("logits", ["fp16", "int8t"])
def test_a_cache_is_verified_at_any_url(tiny_config: TinyConfig, tmp_path: Path, logits: str) -> None:
    config = config_of(tiny_config, 300, logits=logits)
    build(config)
    Path(cache_section(config).url).rename(tmp_path / "moved")
    # There is no cache at the URL of the config, which would be stored as int8t.
    found = verify(str(tmp_path / "moved"), config=config_of(tiny_config, 300), num_rows=20)
    assert (found.problems, found.recomputed is not None and found.recomputed.identical) == ([], 20)
