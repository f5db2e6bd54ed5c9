"""An encoding that does not fit stops a build: before any work if the config shows it, otherwise with the keys."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.cache.build.context import prepare
from pipeline.core.errors import CacheError, ConfigError
from pipeline.models.cifar import resnet
from tests.pipeline.caches import build
from tests.pipeline.conftest import TinyConfig


@pytest.mark.parametrize("logits", ["topk:10", "int4", "int8t", "sampled:10@4"])
def test_too_few_classes_are_found_before_a_teacher_is_loaded(
    tiny_config: TinyConfig, tmp_path: Path, logits: str
) -> None:
    config = tiny_config(cache={"logits": logits}, teacher={"weights": str(tmp_path / "nowhere.safetensors")})
    with pytest.raises(ConfigError, match=r"config\.too-few-classes"):
        prepare(config)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("logits", ["fp16", "topk:3"])
def test_logits_that_do_not_fit_stop_the_build_with_their_keys(
    tiny_config: TinyConfig, tmp_path: Path, logits: str
) -> None:
    network = resnet(10, 8, (4, 4, 6, 7))
    with torch.no_grad():
        network.fc.weight.mul_(1e7)
    save_file(network.state_dict(), tmp_path / "loud.safetensors")
    config = tiny_config(cache={"logits": logits}, teacher={"weights": str(tmp_path / "loud.safetensors")})
    with pytest.raises(CacheError, match=r"cache\.values-do-not-fit[\s\S]*keys digit-00[\s\S]*cache.logits=fp32"):
        build(config)


SAMPLED = ("sampled:3", "sampled:0@1", "sampled:3@0", "sampled:3@0.0", "sampled:3@4.0", "sampled:3@04", "sampled:3@-1")


@pytest.mark.parametrize("logits", ["int16", "topk", "topk:0", "topk:-1", "topk:1.5", "topk:01", *SAMPLED])
def test_a_value_that_names_no_encoding_is_refused(tiny_config: TinyConfig, logits: str) -> None:
    with pytest.raises(ValueError, match=r"expected auto, fp32, fp16, int8, int8t, int4, head, none, topk:k"):
        tiny_config(cache={"logits": logits})
