"""How a view is encoded and decoded: known bytes, settings of the JPEG, the same pixels on every processor."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from pipeline.augment.pixels import apply_view, pixel_digest
from pipeline.augment.stored_pixels import ENCODER, decode_view, encode_jpeg, render_view
from pipeline.core.config_loading import build_section
from pipeline.shards.decode import BadImageError
from schemas.config import ViewsConfig
from tests.errors import raises
from tests.marks import slow
from tests.processors import printed

KNOWN_BYTES = {
    1: "6ffd8b4c3af63046",
    50: "84ceeee296ebc92d",
    90: "dd22e5224a053296",
    100: "1d77290675bfca37",
}
KNOWN_PIXELS = "ad6ee07bd241f66715fcffb880c5874d"


def picture(height: int = 40, width: int = 56) -> Tensor:
    """Slopes and edges: uint8 [3,H,W] of integers, so that it is the same everywhere."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [(5 * x + 3 * y) % 256, (x * x + 7 * y) % 256, np.where((x // 8 + y // 8) % 2, 230, 20)]
    return torch.from_numpy(np.stack(planes).astype(np.uint8))


@pytest.mark.parametrize("quality", [*KNOWN_BYTES])
def test_the_bytes_of_the_encoder_are_known(quality: int) -> None:
    digest = hashlib.sha256(encode_jpeg(picture(), quality)).hexdigest()[:16]
    assert digest == KNOWN_BYTES[quality], f"{ENCODER} encodes in another way than torchvision 0.29"


@pytest.mark.parametrize("quality", [1, 90, 100])
def test_another_library_writes_the_same_jpeg_at_4_2_0_without_further_options(quality: int) -> None:
    data, buffer = encode_jpeg(picture(), quality), io.BytesIO()
    Image.fromarray(picture().permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    with Image.open(io.BytesIO(data)) as own, Image.open(buffer) as other:
        # Component id, horizontal and vertical sampling factor, quantisation table.
        assert own.layer == other.layer == [(1, 2, 2, 0), (2, 1, 1, 1), (3, 1, 1, 1)]  # pyright: ignore[reportAttributeAccessIssue]
        assert "progressive" not in own.info
        assert own.quantization == other.quantization  # pyright: ignore[reportAttributeAccessIssue]
        assert np.array_equal(np.asarray(own), np.asarray(other))


@pytest.mark.parametrize("capability", ["default", slow("avx2"), slow("avx512")])
def test_decoded_pixels_are_known_and_the_same_for_all_instruction_sets(capability: str) -> None:
    code = (
        "from tests.pipeline.augment.test_stored_pixels import picture\n"
        "from pipeline.augment.pixels import pixel_digest\n"
        "from pipeline.augment.stored_pixels import render_view\n"
        "box, keys = (3, 2, 45, 33), {'size': 32, 'interpolation': 'bilinear', 'fill': (0, 0, 0)}\n"
        "view = render_view(picture(), box, True, quality=90, **keys)[0]\n"
        "print(pixel_digest(view).hex())"
    )
    assert printed(code, capability=capability) == KNOWN_PIXELS


@settings(max_examples=25)
@given(st.integers(1, 100), st.integers(1, 40))
def test_a_rendered_view_is_what_its_jpeg_decodes_to(quality: int, size: int) -> None:
    box = (3, 2, 45, 33)
    view, data = render_view(picture(), box, True, quality=quality, size=size, interpolation="bilinear", fill=(0, 0, 0))
    assert data is not None
    assert torch.equal(view, decode_view(data, pixels=f"jpeg:{quality}", size=size))
    assert view.shape == (3, size, size)
    assert view.dtype == torch.uint8


def test_without_a_quality_a_view_is_not_encoded() -> None:
    box = (3, 2, 45, 33)
    view, data = render_view(picture(), box, False, quality=None, size=20, interpolation="bicubic", fill=(0, 0, 0))
    assert data is None
    assert torch.equal(view, apply_view(picture(), box, False, size=20, interpolation="bicubic"))


def test_a_jpeg_differs_from_the_view_by_less_at_a_higher_quality() -> None:
    view = apply_view(picture(), (0, 0, 40, 40), False, size=32, interpolation="bilinear")
    errors = [
        (decode_view(encode_jpeg(view, quality), pixels="jpeg", size=32).int() - view.int()).square().sum().item()
        for quality in (10, 50, 90, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


def test_raw_bytes_are_the_pixels_in_rows() -> None:
    view = picture(8, 8)
    data = view.permute(1, 2, 0).contiguous().numpy().tobytes()
    stored = decode_view(data, pixels="raw", size=8)
    assert torch.equal(stored, view)
    assert pixel_digest(stored) == pixel_digest(view)
    # Channels-last, like a rendered view.
    assert stored.stride() == apply_view(view, (0, 0, 8, 8), False, size=8, interpolation="bilinear").stride()


@pytest.mark.parametrize(
    ("data", "pixels"),
    [
        (b"", "raw"),
        (bytes(3 * 64 - 1), "raw"),
        (b"", "jpeg:90"),
        (encode_jpeg(picture(8, 9), 90), "jpeg:90"),
        (encode_jpeg(picture(16, 16), 90), "jpeg:90"),
        (encode_jpeg(picture(8, 8), 90)[:-40], "jpeg:90"),
    ],
)
def test_bytes_that_are_no_view_of_this_size_are_refused(data: bytes, pixels: str) -> None:
    with pytest.raises(BadImageError):
        decode_view(data, pixels=pixels, size=8)


@pytest.mark.parametrize("pixels", ["none", "raw", "jpeg:1", "jpeg:90", "jpeg:100"])
def test_the_key_takes_none_raw_and_qualities(pixels: str) -> None:
    assert ViewsConfig.model_validate({"pixels": pixels}).pixels == pixels


@pytest.mark.parametrize("pixels", ["jpeg", "jpeg:0", "jpeg:101", "jpeg:09", "jpeg:9.5", "png", "RAW", "webp:90"])
def test_the_key_refuses_anything_else(pixels: str) -> None:
    with raises("config.wrong-value"):
        build_section(ViewsConfig, {"pixels": pixels}, where="views")
