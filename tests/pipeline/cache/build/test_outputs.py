"""The outputs in a cache are the teacher's, recomputed from the tars without any code of the build."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xxhash
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import horizontal_flip, resized_crop

from pipeline.augment.params import EVAL_VIEW, is_canary, sample_keys
from pipeline.cache.read.reader import TeacherCache, ViewColumns, open_cache
from pipeline.cache.verify import verify_cache
from pipeline.models.cifar import CifarResNet, resnet
from tests.pipeline.caches import TinyCache, open_built
from tests.pipeline.conftest import TinyConfig, tiny_config_of
from tests.tolerances import magnitude_of, network_operations, reordered, ulps

SIZE, SHARDS = 16, ("digits-00", "digits-01")
CacheOf = Callable[[str], TeacherCache]


PLANS: dict[str, dict[str, Any]] = {
    "function_matching": {},
    "half": {"cache": {"logits": "fp16", "embeddings": "none"}},
    "crop": {"views": {"kind": "crop", "count": 2}, "cache": {"class_means": "view0"}},
    "eval": {"views": {"kind": "eval", "count": 1}, "cache": {"class_means": "none"}},
}


@pytest.fixture(scope="module")
def network() -> CifarResNet:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        network = resnet(10, 8, (4, 4, 6, 7))
        for name, buffer in network.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
    assert isinstance(network, CifarResNet)
    return network.eval()


@pytest.fixture(scope="module")
def cache_of(network: CifarResNet, digits_shards: list[str], tmp_path_factory: pytest.TempPathFactory) -> CacheOf:
    """The cache of the network's outputs under one of ``PLANS``, built once."""
    folder = tmp_path_factory.mktemp("outputs")
    weights = str(folder / "teacher.safetensors")
    safetensors.torch.save_file(network.state_dict(), weights)

    @cache
    def built(plan: str) -> TeacherCache:
        overrides = {"teacher": {"weights": weights}, **PLANS[plan]}
        return open_built(tiny_config_of(digits_shards, f"{folder}/{plan}", overrides))

    return built


def images(url: str) -> list[torch.Tensor]:
    """uint8 [3,H,W] of a shard, in tar order."""
    with tarfile.open(url) as archive:
        members = [member for member in archive.getmembers() if member.name.endswith(".png")]
        encoded = [archive.extractfile(member) for member in members]
        pixels = [np.array(Image.open(io.BytesIO(file.read())).convert("RGB")) for file in encoded if file]
    return [torch.from_numpy(image).permute(2, 0, 1) for image in pixels]


def crops(shard: list[torch.Tensor], columns: ViewColumns) -> torch.Tensor:
    """uint8 [N,3,16,16]."""
    views: list[torch.Tensor] = []
    for image, (left, top, width, height), flip in zip(shard, columns.box_N4.tolist(), columns.flip_N, strict=True):
        view = resized_crop(
            image, top, left, height, width, [SIZE, SIZE], interpolation=InterpolationMode.BILINEAR, antialias=True
        )
        views.append(horizontal_flip(view) if flip else view)
    return torch.stack(views)


@torch.no_grad()
def infer_by_hand(
    network: CifarResNet, pixels_NCHW: torch.Tensor, columns: ViewColumns
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and embedding; mixes and normalises in float64."""
    unit = pixels_NCHW.double() / 255
    partner = torch.from_numpy(np.searchsorted(columns.row_N, columns.mix_row_N))
    lam = torch.from_numpy(columns.mix_lambda_N.astype(np.float64))[:, None, None, None]
    mixed = lam * unit + (1 - lam) * unit[partner]
    mean, std = torch.tensor([[0.5, 0.4, 0.3], [0.2, 0.3, 0.25]], dtype=torch.float64)[:, None, :, None, None]
    x = ((mixed - mean) / std).float()
    features = network.layer3(network.layer2(network.layer1(torch.relu(network.bn1(network.conv1(x))))))
    embedding = features.mean((2, 3))
    return embedding @ network.fc.weight.T + network.fc.bias, embedding


def forward_error(network: CifarResNet, outputs: torch.Tensor) -> float:
    operations = network_operations(network, torch.zeros(1, 3, SIZE, SIZE), backward=False)
    return reordered(operations, magnitude_of(outputs))


def check_view(cache: TeacherCache, network: CifarResNet, url: str, shard: str, view: int) -> ViewColumns:
    columns = cache.view(shard, view)
    logits, embedding = infer_by_hand(network, crops(images(url), columns), columns)
    for found, expected in ((columns.logits_NK, logits), (columns.embedding_ND, embedding)):
        assert found is not None
        np.testing.assert_allclose(found, expected, rtol=0, atol=forward_error(network, expected))
    norms = [np.sqrt((row.astype(np.float64) ** 2).sum()) for row in columns.decoded("embedding")]
    # Computed in float64, stored as fp32.
    np.testing.assert_allclose(columns.embedding_norm_N, norms, rtol=ulps(1))
    return columns


def test_function_matching_equals_a_recomputation_by_hand(
    cache_of: CacheOf, digits_shards: list[str], network: CifarResNet
) -> None:
    for url, shard in zip(digits_shards, SHARDS, strict=True):
        for view in range(3):
            columns = check_view(cache_of("function_matching"), network, url, shard, view)
            mixed_N = columns.mix_row_N != columns.row_N
            assert (columns.mix_lambda_N[~mixed_N] == 1).all()
            # Partners are mutual and of the same mix group of 8.
            assert np.array_equal(columns.mix_row_N[columns.mix_row_N], columns.row_N)
            assert np.array_equal(columns.mix_row_N // 8, columns.row_N // 8)
            # 15 rows are a group of 8 and one of 7, whose odd row is not mixed; 20 rows are 8, 8 and 4.
            assert (~mixed_N).sum() == (1 if shard == "digits-01" else 0)


def test_the_eval_pass_is_the_unmixed_centre(cache_of: CacheOf, digits_shards: list[str], network: CifarResNet) -> None:
    columns = check_view(cache_of("function_matching"), network, digits_shards[0], "digits-00", EVAL_VIEW)
    for image, box in zip(images(digits_shards[0]), columns.box_N4.tolist(), strict=True):
        height, width = image.shape[1:]
        side = round(0.875 * min(height, width))
        assert box == [(width - side) // 2, (height - side) // 2, side, side]
    assert not columns.flip_N.any()
    assert (columns.mix_lambda_N == 1).all()


@pytest.mark.parametrize("kind", ["crop", "eval"])
def test_plans_that_do_not_mix_equal_a_recomputation_by_hand(
    kind: str, cache_of: CacheOf, digits_shards: list[str], network: CifarResNet
) -> None:
    cache = cache_of(kind)
    for view in range(cache.num_views):
        columns = check_view(cache, network, digits_shards[0], "digits-00", view)
        assert np.array_equal(columns.mix_row_N, columns.row_N)
        assert (columns.mix_lambda_N == 1).all()


@pytest.mark.parametrize(("kind", "view"), [("function_matching", EVAL_VIEW), ("crop", 0)])
def test_class_means_are_those_of_the_stored_embeddings(kind: str, view: int, cache_of: CacheOf) -> None:
    cache = cache_of(kind)
    means = cache.class_means()
    assert means is not None
    total, count = np.zeros((10, 7)), np.zeros(10, int)
    for entry in cache.shards:
        columns, labels = cache.view(entry.shard_id, view), cache.index(entry).targets["label"]
        for embedding_D, label in zip(columns.decoded("embedding"), labels, strict=True):
            total[label] += embedding_D
            count[label] += 1
    assert means.count_K.tolist() == count.tolist()
    # Fixed point rounds each row to 2^-25; the mean is then rounded to fp32.
    np.testing.assert_allclose(means.mean_KD, total / count[:, None], rtol=ulps(1), atol=2.0**-25)


def test_decoded_outputs_that_a_cache_does_not_store_are_none(tiny_cache: TinyCache) -> None:
    columns = open_cache(tiny_cache.url).view("digits-00", 0)
    for name in ("logits", "embedding"):
        stored = replace(columns, outputs={name: columns.outputs[name]})
        assert (stored.logits_NK is None, stored.embedding_ND is None) == (name != "logits", name != "embedding")


@pytest.mark.slow
def test_half_precision_is_stored_to_half_a_unit_in_the_last_place(cache_of: CacheOf) -> None:
    full, half = (cache_of(plan).view("digits-00", 0) for plan in ("function_matching", "half"))
    assert [*half.outputs] == ["logits"]
    assert np.array_equal(half.decoded("logits"), full.decoded("logits").astype(np.float16).astype(np.float32))
    assert np.array_equal(half.embedding_norm_N, full.embedding_norm_N)


def test_the_first_row_of_every_view_proves_its_pixels(cache_of: CacheOf, digits_shards: list[str]) -> None:
    cache = cache_of("function_matching")
    for url, shard in zip(digits_shards, SHARDS, strict=True):
        for view in (0, 1, 2, EVAL_VIEW):
            columns = cache.view(shard, view)
            pixels = crops(images(url), columns)
            ids = cache.index(cache.shards[SHARDS.index(shard)]).sample_ids(columns.row_N)
            by_hash = is_canary(sample_keys(0, ids), np.full(len(ids), view, np.int64))
            for row, digest in enumerate(columns.pixel_digest):
                chosen = row == 0 or bool(by_hash[row])
                assert (digest is not None) == (columns.pixel_mean[row] is not None) == chosen
                if digest is not None:
                    hwc = pixels[row].permute(1, 2, 0).contiguous().numpy()
                    assert digest == xxhash.xxh3_128(hwc.tobytes()).digest()
                    blocks = hwc.reshape(8, 2, 8, 2, 3).astype(float).mean((1, 3))
                    stored = np.frombuffer(columns.pixel_mean[row] or b"", np.uint8).reshape(8, 8, 3)
                    assert np.abs(stored - blocks).max() <= 0.5


def test_about_one_row_in_a_thousand_is_a_canary() -> None:
    keys = sample_keys(0, [f"s/{number}" for number in range(20_000)])
    share = np.mean([is_canary(keys, np.full(len(keys), view, np.int64)).mean() for view in range(5)])
    # 100,000 draws: the standard deviation is 1e-4.
    assert abs(share - 0.001) < 5e-4


def test_statistics_count_the_hits_of_the_eval_pass(cache_of: CacheOf) -> None:
    cache = cache_of("function_matching")
    top1 = top5 = 0
    for entry in cache.shards:
        logits_NK, labels = cache.view(entry.shard_id, EVAL_VIEW).decoded("logits"), cache.index(entry).targets["label"]
        ranked_NK = np.argsort(-logits_NK, axis=1)
        top1 += int((ranked_NK[:, 0] == labels).sum())
        top5 += int((ranked_NK[:, :5] == labels[:, None]).any(1).sum())
    statistics = cache.manifest.statistics
    assert (statistics.labelled, statistics.top1_hits, statistics.top5_hits) == (35, top1, top5)
    assert sum(statistics.class_counts.values()) == 35


def test_a_teacher_of_equal_logits_hits_by_class_index_and_verifies(tiny_config: TinyConfig, tmp_path: Path) -> None:
    """A head of zeros, as a new head often begins: not every label is its first class."""
    network = resnet(10, 8, (4, 4, 6, 7))
    torch.nn.init.zeros_(network.fc.weight)
    torch.nn.init.zeros_(network.fc.bias)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    cache = open_built(tiny_config(teacher={"weights": f"{tmp_path}/teacher.safetensors"}))
    label_N = np.concatenate([cache.index(entry).targets["label"] for entry in cache.shards])
    statistics = cache.manifest.statistics
    assert statistics.labelled == len(label_N) == 35
    assert statistics.top1_hits == (label_N == 0).sum()
    assert statistics.top5_hits == (label_N < 5).sum()
    assert verify_cache(cache.url).problems == []
