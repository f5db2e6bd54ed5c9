"""The views of a cache as it stores them: encoded as JPEG or raw, and decoded as teacher and student see them.

The encoder is that of torchvision, libjpeg-turbo with its defaults: baseline, 4:2:0, integer DCT, the Huffman tables of
the standard. Its bytes are part of no digest: pixels are compared after decoding. A test has their digest, so that a
version with another encoder is noticed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor

from pipeline.augment.pixels import apply_view
from pipeline.shards.decode import BadImageError, decode
from schemas.config import Interpolation, Size, ViewsConfig, height_width, size_text

JPEG, RAW = "jpeg", "raw"
ENCODER = f"torchvision {torchvision.__version__}"


def encode_jpeg(view_CHW: Tensor, quality: int) -> bytes:
    """The operator itself, which releases the GIL; torchvision's function adds nothing for one image."""
    return torch.ops.image.encode_jpeg(view_CHW, quality).numpy().tobytes()


def jpeg_settings(quality: int) -> dict[str, Any]:
    """All settings that decide the pixels of an encoded view, in the views id."""
    return {"codec": "jpeg", "quality": quality, "subsampling": "4:2:0"}


def encoder_environment(plan: ViewsConfig) -> dict[str, str]:
    """The encoder in the environment of a commit, if it decides the pixels of the views."""
    return {} if plan.jpeg_quality is None else {"pixel_encoder": ENCODER}


def other_encoder(environment: Mapping[str, Any]) -> str | None:
    """Why views that this process encodes are not comparable with those of a commit; None: they are."""
    encoder = environment.get("pixel_encoder", ENCODER)
    return None if encoder == ENCODER else f"views encoded by {encoder}, not comparable with those of {ENCODER}"


def render_view(
    image_CHW: Tensor,
    box: Sequence[int],
    flip: bool,
    aug_params: Mapping[str, float] | None = None,
    *,
    quality: int | None,
    size: Size,
    interpolation: Interpolation,
    fill: tuple[int, int, int],
) -> tuple[Tensor, bytes | None]:
    """A view as networks see it: that of ``apply_view``, encoded and decoded by a plan that encodes with loss.

    Args:
        quality: ``ViewsConfig.jpeg_quality``; None: the view is not encoded.

    Returns:
        uint8 [3, H, W], and the JPEG if there is one.
    """
    view_CHW = apply_view(image_CHW, box, flip, aug_params, size=size, interpolation=interpolation, fill=fill)
    if quality is None:
        return view_CHW, None
    data = encode_jpeg(view_CHW, quality)
    return decode_view(data, pixels=JPEG, size=size), data


def decode_view(data: bytes, *, pixels: str, size: Size) -> Tensor:
    """A stored view: uint8 [3, H, W] over H×W×C memory.

    Args:
        pixels: ``views.pixels`` of the plan: ``raw``, or a JPEG's with or without its quality.

    Raises:
        BadImageError: these bytes are not such a view.
    """
    height, width = height_width(size)
    if pixels != RAW:
        view_CHW = decode(data, max_pixels=height * width)
    elif len(data) == 3 * height * width:
        # A copy: torch may not see memory that must not be written to.
        view_CHW = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    else:
        raise BadImageError("undecodable", f"{len(data)} bytes are no view of {size_text(size)} pixels")
    if view_CHW.shape != (3, height, width):
        raise BadImageError("undecodable", f"a view of {list(view_CHW.shape)}, not of {size_text(size)} pixels")
    return view_CHW
