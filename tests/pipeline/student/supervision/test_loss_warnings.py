"""Warnings about losses: each with its number, and only where it applies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from pipeline.cache.read.reader import open_cache
from pipeline.models.cifar import resnet
from pipeline.shards.writer import pack_shards
from pipeline.student.data.sources import RowSource
from pipeline.student.losses import CompositeLoss
from pipeline.student.supervision.class_frequencies import counts_by_head
from pipeline.student.supervision.loss_warnings import fidelity_warnings, loss_warnings
from pipeline.student.supervision.spec import resolve_spec
from pipeline.student.training.trainer import train
from schemas.cache_format import Header, Output, Statistics
from schemas.config import Config, LossConfig
from tests.pipeline.caches import TinyCache, build, cache_section, digit_samples
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.student.runs import KD, cached_source, indexed_source, run_config

DIST: dict[str, Any] = {"name": "dist"}
NO_INTRA = {**DIST, "intra_weight": 0.0}
BALANCED: dict[str, Any] = {"name": "ce", "prior": "balanced"}
EVEN = list(range(10)) * 4


def warnings_of(config: Config, source: RowSource, *, world_size: int = 1) -> list[str]:
    """Without the warning that the tests' teacher has random weights."""
    counts = counts_by_head(source, CompositeLoss(config.loss, source.task, where="a test").heads_of_priors)
    texts = loss_warnings(config, resolve_spec(config), source, counts, world_size=world_size)
    return [text for text in texts if "teacher.weights is random" not in text]


@pytest.mark.parametrize(
    ("labels", "num_classes", "loss", "batch", "world_size", "parts"),
    [
        ([0, 1] * 8, 2, DIST, 8, 1, ("K = 2", "use kd")),
        # Shares and their ratio.
        ([0] * 45 + [1] * 45 + [2] * 3, 3, DIST, 90, 1, ("48.39%", "rarest 3.23%, a ratio of 15;", "compare with kd")),
        # Of ten even classes a batch of 6 lacks a given one with chance 0.9⁶ = 0.53, a batch of 7 with 0.48.
        (EVEN, 10, DIST, 6, 1, ("batches of 6 rows: 100% of the 10 classes are absent", "; raise train.global_batch")),
        (EVEN, 10, DIST, 7, 1, ()),
        # Relations are within a rank unless they are gathered.
        (EVEN, 10, DIST, 8, 2, ("batches of 4 rows", "set gather: true")),
        (EVEN, 10, {**DIST, "gather": True}, 8, 2, ()),
        # A class that never occurs is absent and no imbalance.
        ([0, 1, 2, 3] * 4, 5, DIST, 16, 1, ("20% of the 5 classes are absent",)),
        ([0, 1, 2, 3] * 4, 5, BALANCED, 16, 1, ("ce with a prior: 1 of 5 classes have no training rows (4)",)),
        ([0, 1, 2, 3] * 4, 4, BALANCED, 16, 1, ()),
        ([0] * 15 + [1], 2, KD[0], 2, 1, ()),
        ([0] * 15 + [1], 2, {**DIST, "weight": 0.0}, 2, 1, ()),
        (EVEN, 10, NO_INTRA, 2, 1, ()),
        ([None] * 8, 5, DIST, 2, 1, ()),
    ],
)
def test_dist_gives_a_warning_with_its_number_where_it_suits_the_labels_badly(
    tiny_config: TinyConfig,
    tmp_path: Path,
    labels: list[int | None],
    num_classes: int,
    loss: dict[str, Any],
    batch: int,
    world_size: int,
    parts: tuple[str, ...],
) -> None:
    samples = (
        (key, {"png": members["png"], **({} if label is None else {"cls": str(label).encode()})})
        for (key, members), label in zip(digit_samples(len(labels)), labels, strict=True)
    )
    shards = pack_shards(samples, f"{tmp_path}/labels-%02d.tar", shard_size=max(len(labels) // 2, 1))
    base = tiny_config(data={"shards": shards, "num_classes": num_classes})
    keys: dict[str, Any] = {"loss": [*KD, loss], "train": {"global_batch_size": batch}}
    config = run_config(base, tmp_path / "run", mode="online", **keys)
    texts = warnings_of(config, indexed_source(config, tmp_path / "index"), world_size=world_size)
    assert len(texts) == bool(parts)
    assert all(part in text for text in texts for part in parts)


def test_views_of_an_image_bring_no_further_class_into_a_batch(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """12 rows of 6 images, which lack a given one of ten even classes with chance 0.53."""
    samples = (
        (key, {"png": members["png"], "cls": str(label).encode()})
        for (key, members), label in zip(digit_samples(len(EVEN)), EVEN, strict=True)
    )
    base = tiny_config(data={"shards": pack_shards(samples, f"{tmp_path}/labels-%02d.tar", shard_size=20)})
    keys: dict[str, Any] = {"loss": [*KD, DIST], "train": {"global_batch_size": 12, "views_per_image": 2}}
    config = run_config(base, tmp_path / "run", mode="online", **keys)
    (text,) = warnings_of(config, indexed_source(config, tmp_path / "index"))
    assert "batches of 12 rows of 6 images: 100% of the 10 classes are absent" in text


def test_a_warning_names_the_head_that_it_is_about(tiny_config: TinyConfig, tmp_path: Path) -> None:
    samples = [
        (key, {"png": members["png"], "json": json.dumps({"color": 2 * (row == 0), "tags": [row % 9]}).encode()})
        for row, (key, members) in enumerate(digit_samples(20))
    ]
    heads = {"color": {"num_classes": 3}, "tags": {"num_classes": 9, "kind": "multilabel"}}
    keys = {"task": "heads", "label": "json", "num_classes": None, "heads": heads}
    base = tiny_config(data={"shards": pack_shards(samples, f"{tmp_path}/heads-%02d.tar", shard_size=20), **keys})
    config = run_config(base, tmp_path / "run", mode="online", loss=[DIST], train={"global_batch_size": 10})
    of_labels, imbalanced, absent = warnings_of(config, indexed_source(config, tmp_path / "index"))
    assert "dist of head tags" in of_labels
    assert "K = 9" in of_labels
    assert "dist of head color on imbalanced classes" in imbalanced
    assert "a ratio of 19" in imbalanced
    # One row in twenty is in 10 rows with chance 1 - 0.95¹⁰ = 0.40; class 1 never.
    assert "dist of head color in batches of 10 rows: 67% of the 3 classes" in absent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("views", "class_means"),
    [({"kind": "crop"}, "none"), ({"kind": "function_matching"}, "eval"), ({"kind": "function_matching"}, "none")],
    ids=["unmixed views", "an eval pass", "neither, so from the indexes"],
)
def test_a_cached_run_warns_like_an_online_one(
    tiny_config: TinyConfig, tmp_path: Path, views: dict[str, Any], class_means: str
) -> None:
    base = tiny_config(views=views, cache={"class_means": class_means})
    build(base)
    keys: dict[str, Any] = {"loss": [DIST], "train": {"global_batch_size": 6}}
    online = run_config(base, tmp_path / "online", mode="online", **keys)
    texts = warnings_of(online, indexed_source(online, tmp_path / "index"))
    assert len(texts) == 1
    cached = run_config(base, tmp_path / "cached", **keys)
    assert warnings_of(cached, cached_source(TinyCache(cache_section(base).url, base))) == texts


# ---- encodings that are too coarse for a loss


SECTIONS: TypeAdapter[list[LossConfig]] = TypeAdapter(list[LossConfig])
# Over 200 rows, by temperature.
KL = {"1.0": 1.0, "2.0": 3.0, "4.0": 8.0}
AT_4: dict[str, Any] = {"name": "kd", "temperature": 4.0}
DIST_AT_2 = {**DIST, "temperature": 2.0}


@pytest.fixture
def header(built_cache: TinyCache) -> Header:
    return open_cache(built_cache.url).header


def fidelity_of(header: Header, encoding: str, losses: list[dict[str, Any]], **sums: Any) -> list[str]:
    named = header.model_copy(update={"teacher": {**header.teacher, "logits": encoding}})
    return fidelity_warnings(named, Statistics(fidelity_rows=200, **sums), SECTIONS.validate_python(losses))


@pytest.mark.parametrize(
    ("encoding", "loss", "sums", "parts"),
    [
        ("topk:5", AT_4, {}, ("kd at T = 4: logits in topk:5 are 0.04 nats of KL from", "cache.logits=int8 is closer")),
        ("int8", {**AT_4, "temperature": 1.0}, {}, ()),
        # Half way in log T between two temperatures: (3 + 8) / 2 over 200 rows.
        ("int8", {**AT_4, "temperature": 8**0.5}, {}, ("0.028 nats", "more than 0.01; cache.logits=fp16")),
        # Beyond the measured temperatures the nearest is named.
        ("int4", {**AT_4, "temperature": 8.0}, {}, ("0.04 nats", "(measured at T = 4, the nearest)")),
        ("int4", {**AT_4, "temperature": 0.5}, {"kl_sum": {**KL, "1.0": 5.0}}, ("0.025 nats", "T = 1, the nearest)")),
        # DIST is judged by correlation and not by KL.
        ("fp16", DIST_AT_2, {"pearson_sum": dict.fromkeys(KL, 0.1)}, ()),
        ("fp16", DIST_AT_2, {"kl_sum": dict.fromkeys(KL, 0.0), "pearson_sum": KL}, ("fp16 are 0.015 of correlation",)),
    ],
)
def test_a_warning_names_loss_temperature_number_and_a_better_encoding(
    header: Header, encoding: str, loss: dict[str, Any], sums: dict[str, Any], parts: tuple[str, ...]
) -> None:
    texts = fidelity_of(header, encoding, [{"name": "ce"}, loss], **{"kl_sum": KL, **sums})
    assert len(texts) == bool(parts)
    assert all(part in text for text in texts for part in parts)


def test_a_loss_of_no_weight_no_measured_rows_and_no_logits_warn_of_nothing(header: Header) -> None:
    losses = [{"name": "kd", "weight": 0.0}, {"name": "nd"}]
    assert fidelity_of(header, "topk:5", losses, kl_sum=KL) == []
    kd = SECTIONS.validate_python([{"name": "kd"}])
    assert fidelity_warnings(header, Statistics(kl_sum=KL), kd) == []
    bare = header.model_copy(update={"outputs": ()})
    assert fidelity_warnings(bare, Statistics(fidelity_rows=1, kl_sum=KL), kd) == []


def test_tokens_far_from_the_teachers_are_named_with_a_better_encoding(header: Header) -> None:
    tokens = Output(name="tokens", shape=(4, 3), dtype="uint8", encoding="int8", fields=())
    named = header.model_copy(
        update={"teacher": {**header.teacher, "tokens": "int8"}, "outputs": (*header.outputs, tokens)}
    )
    losses = SECTIONS.validate_python([{"name": "token_mse"}, {"name": "cosine"}])
    far, near = (Statistics(fidelity_rows=200, token_cosine_sum=200 * cosine) for cosine in (0.996, 0.9995))
    (text,) = fidelity_warnings(named, far, losses)
    assert all(part in text for part in ("token_mse", "0.9960", "cache.tokens=fp16"))
    assert fidelity_warnings(named, near, losses) == fidelity_warnings(named, far, losses[1:]) == []


def test_a_training_warns_once_before_its_first_step(tiny_config: TinyConfig, tmp_path: Path) -> None:
    # One of the 35 digits is measured. The teacher has large logits, so that a single logit of ten changes little.
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        network = resnet(10, 8, (4, 4, 6, 7))
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
