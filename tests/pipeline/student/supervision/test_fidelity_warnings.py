"""A training warns about an encoding that is too coarse for one of its losses, with the number, and about no other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from pipeline.cache.read.reader import open_cache
from pipeline.models.cifar import resnet
from pipeline.student.supervision.loss_warnings import fidelity_warnings
from pipeline.student.training.trainer import train
from schemas.cache_format import Header, Statistics
from schemas.config import LossConfig
from tests.pipeline.caches import TinyCache, build
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import run_config

LOSSES: TypeAdapter[list[LossConfig]] = TypeAdapter(list[LossConfig])


@pytest.fixture
def header(built_cache: TinyCache) -> Header:
    return open_cache(built_cache.url).header


def warnings(header: Header, encoding: str, losses: list[dict[str, Any]], **sums: Any) -> list[str]:
    """What 200 measured rows with these sums warn of."""
    named = header.model_copy(update={"teacher": {**header.teacher, "logits": encoding}})
    return fidelity_warnings(named, Statistics(fidelity_rows=200, **sums), LOSSES.validate_python(losses))


KL = {"1.0": 1.0, "2.0": 3.0, "4.0": 8.0}


def test_a_warning_names_loss_temperature_number_and_a_better_encoding(header: Header) -> None:
    losses = [{"name": "ce"}, {"name": "kd", "temperature": 4.0}]
    (text,) = warnings(header, "topk:5", losses, kl_sum=KL)
    assert text.startswith("kd at T = 4: logits in topk:5 are 0.04 nats of KL from the teacher's, more than 0.01; ")
    assert text.endswith("cache.logits=int8 is closer")


def test_a_hundredth_of_a_nat_is_no_warning(header: Header) -> None:
    assert warnings(header, "int8", [{"name": "kd", "temperature": 1.0}], kl_sum=KL) == []


def test_between_two_temperatures_the_number_lies_between(header: Header) -> None:
    (text,) = warnings(header, "int8", [{"name": "kd", "temperature": 8**0.5}], kl_sum=KL)
    # Half way in log T: (3 + 8) / 2 over 200 rows.
    assert "0.028 nats" in text
    assert "cache.logits=fp16" in text


@pytest.mark.parametrize(("temperature", "nearest", "number"), [(8.0, 4, "0.04"), (0.5, 1, "0.025")])
def test_beyond_the_measured_temperatures_the_nearest_is_named(
    header: Header, temperature: float, nearest: int, number: str
) -> None:
    sums = {**KL, "1.0": 5.0}
    (text,) = warnings(header, "int4", [{"name": "kd", "temperature": temperature}], kl_sum=sums)
    assert f"{number} nats of KL from the teacher's (measured at T = {nearest}, the nearest)" in text


def test_dist_is_judged_by_correlation_and_not_by_kl(header: Header) -> None:
    dist = [{"name": "dist", "temperature": 2.0}]
    assert warnings(header, "fp16", dist, kl_sum=KL, pearson_sum=dict.fromkeys(KL, 0.1)) == []
    (text,) = warnings(header, "fp16", dist, kl_sum=dict.fromkeys(KL, 0.0), pearson_sum=KL)
    assert text.startswith("dist at T = 2: logits in fp16 are 0.015 of correlation")


def test_a_loss_of_no_weight_no_measured_rows_and_no_logits_warn_of_nothing(header: Header) -> None:
    losses = [{"name": "kd", "weight": 0.0}, {"name": "nd"}]
    assert warnings(header, "topk:5", losses, kl_sum=KL) == []
    kd = LOSSES.validate_python([{"name": "kd"}])
    assert fidelity_warnings(header, Statistics(kl_sum=KL), kd) == []
    bare = header.model_copy(update={"outputs": ()})
    assert fidelity_warnings(bare, Statistics(fidelity_rows=1, kl_sum=KL), kd) == []


def test_a_training_warns_once_before_its_first_step(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # One of the 35 digits is measured. The teacher has large logits, so that a single logit of ten changes little.
    network = resnet(10, 8, (4, 4, 6, 7))
    with torch.no_grad():
        network.fc.weight.mul_(30)
    save_file(network.state_dict(), tmp_path / "loud.safetensors")
    config = tiny_config(
        teacher={"weights": str(tmp_path / "loud.safetensors")}, cache={"logits": "topk:1", "class_means": "none"}
    )
    build(config)
    losses = [{"name": "kd", "temperature": 4.0}, {"name": "ce"}]
    events: list[dict[str, Any]] = []
    train(run_config(config, tmp_path / "run", loss=losses, train={"epochs": 1}), report=events.append)
    assert [event["kind"] for event in events].count("warning") == 1
    assert events[0]["kind"] == "warning"
    assert "kd at T = 4: logits in topk:1 are" in events[0]["text"]
