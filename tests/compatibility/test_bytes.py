"""The bytes of a new cache: a change of the code that moves a byte of header, index, part, commit or manifest fails.

The digests are those of one pyarrow, which compresses. Everything else is exact on any machine: views are whole images
of their own size, the teacher computes with integers, and fidelity is measured on none of the few rows.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.cache.ops.relabel import relabel
from pipeline.core.hashing import canonical_json, digest
from pipeline.shards.writer import Members, pack_shards
from schemas.config import Config
from tests.pipeline.caches import build, files

SIZE, NUM_IMAGES, NUM_CLASSES = 16, 12, 10
PYARROW = "26.0.1"


class IntegerNetwork(nn.Module):
    """Sums of pixels, and small integer multiples of them: fp32 holds each of them exactly."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        factors = torch.arange(4 * num_classes) * 7 % 5 - 2
        self.factors = nn.Parameter(factors.reshape(4, num_classes).float())

    def forward_embedding(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        pixels_BCHW = torch.round(images_BCHW * 255)
        quarters_BCHWhw = pixels_BCHW.unfold(2, SIZE // 2, SIZE // 2).unfold(3, SIZE // 2, SIZE // 2)
        embedding_BD = quarters_BCHWhw.sum((1, 4, 5)).flatten(1) / 2**12
        return embedding_BD @ self.factors, embedding_BD

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_embedding(images_BCHW)[0]


def samples() -> Iterator[tuple[str, Members]]:
    """One image cannot be decoded, and one has no label."""
    pixels_NHWC = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIZE, SIZE, 3), np.uint8)
    for number, pixels_HWC in enumerate(pixels_NHWC):
        buffer = io.BytesIO()
        Image.fromarray(pixels_HWC).save(buffer, "PNG", compress_level=0)
        image = buffer.getvalue()[: 100 if number == 4 else None]
        label = {} if number == 7 else {"cls": b"%d" % (number * 3 % NUM_CLASSES)}
        yield f"image-{number:02d}", {"png": image, **label, "other": b"%d" % (number % 2)}


def without_environment(content: bytes) -> bytes:
    """A record without the numeric environment and without the paths of this test."""
    body = json.loads(content)
    return canonical_json({key: value for key, value in body.items() if key not in ("environment", "base", "digest")})


def digests(url: str) -> dict[str, str]:
    return {
        path: digest(without_environment(content) if path.endswith(".json") else content)
        for path, content in files(url).items()
    }


@pytest.mark.skipif(pa.__version__ != PYARROW, reason=f"the digests are those of pyarrow {PYARROW}")
def test_a_new_cache_has_the_bytes_of_format_v1(tmp_path: Path) -> None:
    shards = pack_shards(samples(), f"{tmp_path}/shard-%d.tar", shard_size=8)
    config = Config.model_validate(
        {
            "data": {
                "shards": shards,
                "num_classes": NUM_CLASSES,
                "bad_samples": "skip",
                "max_bad_share": 0.5,
                "missing_labels": "ignore",
            },
            "teacher": {
                "model": f"python:{__name__}:IntegerNetwork",
                "weights": "random",
                "mean": [0, 0, 0],
                "std": [1, 1, 1],
                "batch_size": 4,
            },
            "views": {"kind": "crop", "count": 3, "size": SIZE, "mix_group": 4, "area": [1, 1], "aspect": [1, 1]},
            "cache": {
                "url": f"{tmp_path}/cache",
                "logits": "int8",
                "embeddings": "fp16",
                "class_means": "view0",
                "views_per_part": 2,
            },
            "ray": {"address": "none"},
        }
    )
    assert build(config).statistics.fidelity_rows == 0, "fidelity depends on the processor"
    url, expected = f"{tmp_path}/cache", json.loads((Path(__file__).parent / "bytes.json").read_text())
    built = digests(url)
    assert built == expected["built"]
    relabel(url, label="other")
    relabelled = digests(url)
    assert {path: digest for path, digest in relabelled.items() if digest != built.get(path)} == expected["relabelled"]
