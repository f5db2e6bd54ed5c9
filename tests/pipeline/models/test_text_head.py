"""Zero-shot teachers: logits of a text head on the embedding of a network that is built without a classifier."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor
from torchvision import models

from pipeline.cache.build.context import current_context, prepare
from pipeline.cache.read.reader import open_cache
from pipeline.core.errors import CacheError, ConfigError, ModelError, StorageInputError
from pipeline.models import LoadedModel, load_model, load_untrained
from pipeline.models.summary import check_weights, summarize_model
from pipeline.student.training.config_checks import check_training
from pipeline.student.training.trainer import train
from schemas.config import TeacherConfig
from tests.errors import raises
from tests.pipeline.caches import build
from tests.pipeline.conftest import TinyConfig
from tests.pipeline.models.loading import FACTORIES, NORMALISED, images
from tests.pipeline.student.runs import ALL_TERMS, run_config
from tests.tolerances import ulps

TOWER = "timm/test_vit"  # features of width 64, published with a classifier of 1000
TOWER_KEYS: dict[str, Any] = {"model": TOWER, "kwargs": {"img_size": 64}}
PYTHON = {"model": f"{FACTORIES}:ImageTower", "weights": "random", **NORMALISED}
WIDTHS = {"logits": 7}


def random_weight(rows: int, width: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(3))


def write(
    path: Path,
    weight: Tensor,
    *,
    scale: float = 100.0,
    names: object = None,
    metadata: dict[str, str] | None = None,
    **more: Tensor,
) -> str:
    names = [f"class {row}" for row in range(len(weight))] if names is None else names
    tensors = {"weight": weight, "logit_scale": torch.tensor(scale), **more}
    safetensors.torch.save_file(tensors, path, {"names": json.dumps(names)} if metadata is None else metadata)
    return str(path)


def load(url: str | None, *, num_classes: int = 7, size: int = 64, **keys: Any) -> LoadedModel:
    config = TeacherConfig.model_validate({"weights": "random", "text_head": url, **TOWER_KEYS, **keys})
    return load_model(config, widths={"logits": num_classes}, size=size)


def clip_logits(embedding_BD: Tensor, weight_KD: Tensor, scale: float = 100.0) -> Tensor:
    """The formula of CLIP in float64, row by row."""
    image_BD, text_KD = embedding_BD.double(), weight_KD.double()
    return torch.stack(
        [torch.stack([scale * (e @ w) / (e.norm() * w.norm()) for w in text_KD.unbind()]) for e in image_BD.unbind()]
    )


@torch.no_grad()
def assert_clip(loaded: LoadedModel, expected_BD: Tensor, weight_KD: Tensor, *, size: int = 64) -> None:
    outputs = loaded.module(images(size))
    width = weight_KD.shape[1]
    torch.testing.assert_close(outputs["embedding"], expected_BD, rtol=0, atol=0)
    # Both norms and the product are chains of D + 3 operations on values of at most 1, scaled by 100.
    error = ulps(3 * (width + 3), 100.0)
    expected_BK = clip_logits(expected_BD, weight_KD).float()
    torch.testing.assert_close(outputs["logits"], expected_BK, rtol=0, atol=error)
    assert loaded.module.widths == {"logits": len(weight_KD), "embedding": width}


@pytest.fixture(scope="module")
def tower() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return timm.create_model("test_vit", img_size=64).eval()


@pytest.fixture(scope="module")
def tower_file(tower: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tower") / "weights.safetensors"
    safetensors.torch.save_file(tower.state_dict(), path)
    return str(path)


@torch.no_grad()
def test_logits_of_pooled_features(tower: Any, tower_file: str, tmp_path: Path) -> None:
    """The file has the classifier of the tower, which is not used."""
    weight_KD = random_weight(7, 64)
    loaded = load(write(tmp_path / "head", weight_KD), weights=tower_file)
    features = tower.forward_head(tower.forward_features(images()), pre_logits=True)
    assert_clip(loaded, features, weight_KD)


@torch.no_grad()
def test_logits_of_the_projection_of_a_tower(tower: Any, tower_file: str, tmp_path: Path) -> None:
    weight_KD = random_weight(7, 1000)
    loaded = load(write(tmp_path / "head", weight_KD), weights=tower_file, embedding="output")
    assert_clip(loaded, tower(images()), weight_KD)


@pytest.mark.parametrize("embedding", ["penultimate", "output"])
def test_pretrained_towers_need_no_head_of_the_datas_classes(
    embedding: str, tower: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm loads the whole tower or drops its classifier; only the download is replaced here."""
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: dict(tower.state_dict()))
    width = {"penultimate": 64, "output": 1000}[embedding]
    loaded = load(
        write(tmp_path / "head", random_weight(7, width)),
        weights="pretrained",
        embedding=embedding,
        size=160,
        kwargs={},
    )
    state = loaded.module.network.state_dict()
    assert torch.equal(state["backbone.blocks.0.attn.qkv.weight"], tower.state_dict()["blocks.0.attn.qkv.weight"])
    assert ("backbone.head.weight" in state) == (embedding == "output")


@torch.no_grad()
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_torchvision_networks_return_pooled_features(name: str, tmp_path: Path) -> None:
    network: Any = models.get_model(name, num_classes=5).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    pooled: list[Tensor] = []
    if name == "resnet18":
        network.fc.register_forward_pre_hook(lambda _, args: pooled.append(args[0]))
        network(images())
    else:
        pooled.append(network.features(images()).relu().mean((2, 3)))
    weight_KD = random_weight(7, 512)
    loaded = load(
        write(tmp_path / "head", weight_KD),
        model=f"torchvision/{name}",
        weights=str(tmp_path / "weights.pt"),
        kwargs={},
    )
    embedding_BD = loaded.module(images())["embedding"]
    torch.testing.assert_close(embedding_BD, pooled[0], rtol=ulps(64), atol=ulps(64))
    assert_clip(loaded, embedding_BD, weight_KD)


def test_logits_are_fp32_under_autocast_and_zero_for_a_zero_embedding(tmp_path: Path) -> None:
    url = write(tmp_path / "head", random_weight(7, 6).half())
    model = load_model(TeacherConfig.model_validate({**PYTHON, "text_head": url}), widths=WIDTHS, size=16).module
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = model(images(16))
    assert outputs["logits"].dtype == torch.float32
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        assert not model(images(16))["logits"].any()


@pytest.mark.parametrize(("embedding", "width", "other"), [("penultimate", 1000, 64), ("output", 64, 1000)])
def test_a_width_mismatch_names_both_widths_and_the_other_setting(
    embedding: str, width: int, other: int, tmp_path: Path
) -> None:
    url = write(tmp_path / "head", random_weight(7, width))
    with raises("text-head.width", ModelError) as caught:
        load(url, embedding=embedding)
    assert str((2, other)) in str(caught.value.got)
    assert str((7, width)) in str(caught.value.got)
    assert "embedding: output" in str(caught.value.next_step)
    assert "embedding: penultimate" in str(caught.value.next_step)


WEIGHT = random_weight(7, 64)


@pytest.mark.parametrize(
    "content",
    [
        {"weight": WEIGHT.long()},
        {"weight": WEIGHT[0]},
        {"weight": WEIGHT * torch.nan},
        {"weight": torch.zeros(7, 64)},
        {"weight": WEIGHT, "scale": 0.0},
        {"weight": WEIGHT, "scale": float("inf")},
        {"weight": WEIGHT, "bias": torch.zeros(7)},
        {"weight": WEIGHT, "names": ["a"] * 7},
        {"weight": WEIGHT, "names": ["a", "b"]},
        {"weight": WEIGHT, "names": [*"abcdef", 7]},
        {"weight": WEIGHT, "metadata": {}},
        {"weight": WEIGHT, "metadata": {"names": "[" * 10_000}},
    ],
)
def test_a_file_with_other_content_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    with raises("text-head.invalid", ModelError, exit_code=2):
        load(write(tmp_path / "head", **content))


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickled", b"\xff" * 64])
def test_a_file_of_another_format_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "head").write_bytes(data)
    with raises("text-head.invalid", ModelError):
        load(str(tmp_path / "head"))


def test_errors_of_the_keys(tmp_path: Path) -> None:
    url = write(tmp_path / "head", WEIGHT)
    with raises("text-head.num-classes", ModelError, where=f"teacher.text_head: {url}"):
        load(url, num_classes=8)
    with raises("weights.sha256-mismatch", ModelError):
        load(url, text_head_sha256="0" * 64)
    load(url, text_head_sha256=hashlib.sha256(Path(url).read_bytes()).hexdigest())
    with raises("config.sha256-without-url", ConfigError):
        load(None, text_head_sha256="0" * 64)
    with raises("config.embedding-output", ConfigError):
        load(None, embedding="output")
    with raises("config.embedding-output", ConfigError):
        load(url, embedding="output", model=f"{FACTORIES}:ImageTower")
    with raises("weights.unreadable", StorageInputError, where=f"teacher.text_head: {tmp_path}/none"):
        load(str(tmp_path / "none"))


def test_notes_name_the_classes_and_a_scale_that_looks_like_a_logarithm(tmp_path: Path) -> None:
    (classes,) = load(write(tmp_path / "head", WEIGHT)).notes
    assert "class 0, class 1" in classes
    _, scale = load(write(tmp_path / "log", WEIGHT, scale=4.6052)).notes
    assert "exp()" in scale


def test_checks_without_weights_know_the_text_head(tower_file: str, tmp_path: Path) -> None:
    url = write(tmp_path / "head", WEIGHT)
    config = TeacherConfig.model_validate({"text_head": url, "weights": tower_file, **TOWER_KEYS})
    assert summarize_model(config, widths=WIDTHS, size=64, where="teacher").embedding_dim == 64
    check_weights(config, widths=WIDTHS, size=64, where="teacher")
    loaded = load_model(config, widths=WIDTHS, size=64)
    assert load_untrained(config, widths=WIDTHS, size=64).architecture == loaded.architecture
    assert loaded.architecture["text_head"] == hashlib.sha256(Path(url).read_bytes()).hexdigest()
    assert not {"text_head", "embedding"} & load(None, text_head=None).architecture.keys()


def test_a_cache_of_a_zero_shot_teacher_trains_a_student_by_every_kind_of_loss(
    tiny_config: TinyConfig, tmp_path: Path
) -> None:
    """Also: another text head is another fingerprint, and a replaced file is read again by the same process."""
    weight_KD = random_weight(10, 6)
    url = write(tmp_path / "head", weight_KD)
    config = tiny_config(teacher={**PYTHON, "kwargs": {}, "text_head": url})
    build(config)
    cache = open_cache(str(tmp_path / "cache"))
    columns = cache.view(cache.shards[0].shard_id, 0)
    embedding_ND, logits_NK = (torch.from_numpy(np.array(columns.decoded(name))) for name in ("embedding", "logits"))
    expected_NK = clip_logits(embedding_ND, weight_KD).float()
    torch.testing.assert_close(logits_NK, expected_NK, rtol=0, atol=ulps(3 * 9, 100.0))
    run = run_config(config, tmp_path / "run", loss=[*ALL_TERMS, {"name": "cosine"}], train={"epochs": 1})
    assert train(run)["steps"] == 5
    keys: dict[str, Any] = {"data": {"val_shards": config.data.shards}, "train": {"eval_agreement": True}}
    check_training(run_config(config, tmp_path / "measured", **keys))
    other = {"text_head": write(tmp_path / "other", weight_KD.flip(0))}
    with raises("cache.other-teacher", CacheError, where="teacher.text_head") as caught:
        check_training(run_config(config, tmp_path / "measured", teacher=other, **keys))
    assert hashlib.sha256(Path(url).read_bytes()).hexdigest() in str(caught.value.expected)
    fingerprint = current_context(config).header.fingerprint
    write(tmp_path / "head", weight_KD.flip(0))
    assert current_context(config).header.fingerprint != fingerprint
    with raises("cache.other-header", CacheError) as caught:
        prepare(config)
    assert "text_head" in str(caught.value.got)
