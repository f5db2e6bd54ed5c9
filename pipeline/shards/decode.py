"""Encoded image to pixels, the same on every machine with the same decoder: RGB, 8 bits, upright.

Pillow reads headers, but for those of plain JPEGs, and decodes PNG. torchvision decodes JPEG and WebP, to the same
pixels: on JPEG it is 25 % faster on photographs and three times on thumbnails, and Pillow's WebP holds the GIL.
torchvision's PNG decoder crashes the process on damaged files, so it sees none. What is not 8-bit RGB becomes so by
these rules:

- grayscale, of any number of bits, and palette images are spread to three channels;
- CMYK and YCCK are taken as inverted, as Adobe stores them, and a channel is C·K / 255 of the stored values;
- alpha and transparent colours are dropped, so a transparent pixel keeps the colour that is stored for it;
- of 16-bit channels the high byte is kept;
- an orientation that stands before the pixels, in EXIF or else in XMP, is applied, in every format;
- profiles and gamma are not applied;
- of several pictures the first is taken that a plain reader sees, of an APNG or a multi-picture JPEG.

Anything but a whole JPEG, PNG or WebP image is undecodable, and so is an animated WebP.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Generator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torchvision.io
from PIL import ExifTags, Image
from torch import Tensor

BadStatus = Literal["undecodable", "empty", "too_large"]

_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_START, _JPEG_SCAN = b"\xff\xd8", 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Tables, restart interval, comment and application data, but for APP1, which holds EXIF and XMP.
_JPEG_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})
_RGB = int(torchvision.io.ImageReadMode.RGB.value)
_pillow_lock = threading.Lock()


class BadImageError(Exception):
    """An image that cannot be used, and the index status that says why; whether that is fatal is not decided here."""

    def __init__(self, status: BadStatus, reason: str) -> None:
        super().__init__(status, reason)
        self.status: BadStatus = status
        self.reason = reason


class _Header(NamedTuple):
    """Format, stored width and height in pixels, before rotation, and the EXIF orientation (1 to 8)."""

    form: str | None
    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after rotation; orientations from 5 on lie on their side."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header alone.

    Raises:
        BadImageError: empty, or no header of an image that is read here.
    """
    return _header(data).upright


def decode(data: bytes, *, max_pixels: int) -> Tensor:
    """The image as uint8 RGB [3,H,W], upright; memory layout is the decoder's. The GIL is free while pixels decode.

    Raises:
        BadImageError: empty, undecodable (truncated included), or of more than ``max_pixels`` pixels by its header,
            in which case nothing of it is decoded.
    """
    header = _header(data)
    if header.width * header.height > max_pixels:
        raise BadImageError("too_large", f"{header.width}×{header.height} pixels are more than {max_pixels}")
    stored_CHW = _png_pixels(data) if header.form == "PNG" else _pixels(data)
    if tuple(stored_CHW.shape) != (3, header.height, header.width):
        raise BadImageError(
            "undecodable", f"its header says {header.width}×{header.height}, its pixels are {list(stored_CHW.shape)}"
        )
    return _upright(stored_CHW, header.orientation)


def _header(data: bytes) -> _Header:
    if not data:
        raise BadImageError("empty", "0 bytes")
    return _plain_jpeg_header(data) or _pillow_header(data)


def _plain_jpeg_header(data: bytes) -> _Header | None:
    """The header of a JPEG that nothing turns; None: Pillow has to look.

    Pillow's takes longer than the pixels of a thumbnail, with the GIL held. This walks the same segments up to the
    scan (ITU-T T.81, B.1.1) and gives up at metadata that may hold an orientation, and at whatever is out of form.
    """
    if data[:2] != _JPEG_START:
        return None
    frame, at = None, 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], data[at + 2] << 8 | data[at + 3]
        if marker == _JPEG_SCAN:
            return frame
        if marker in _JPEG_FRAMES:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            sound = frame is None and height and width and data[at + 4] == 8 and data[at + 9] in (1, 3, 4)
            frame = _Header("JPEG", width, height, 1)
        else:
            sound = marker in _JPEG_SEGMENTS
        if not sound or length < 2:
            return None
        at += 2 + length
    return None


def _pillow_header(data: bytes) -> _Header:
    try:
        with _pillow_alone(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            # Pillow's own getexif of a PNG decodes it, to look behind the pixels too.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
            form, (width, height) = image.format, image.size
    # Pillow's parsers raise what they stumble over: OSError, SyntaxError, struct.error, KeyError …
    except Exception as error:
        raise BadImageError("undecodable", f"no JPEG, PNG or WebP header: {error}") from error
    return _Header(form, width, height, orientation if orientation in range(1, 9) else 1)


@contextlib.contextmanager
def _pillow_alone() -> Generator[None]:
    """Pillow without its warnings and its own pixel limit, so that a status never hangs on either.

    Both are process-wide, and so is the lock; parsing a header holds the GIL anyway.
    """
    with _pillow_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _pixels(data: bytes) -> Tensor:
    """[3,H,W] uint8 as stored, not rotated."""
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    try:
        # The operator itself: torchvision's Python wrapper warns at every call from 0.29 on, and filters for
        # warnings are not safe among threads. Orientation stays with us: the wrapper has none for WebP.
        stored: Tensor = torch.ops.image.decode_image(encoded, _RGB, False)
    except RuntimeError as error:
        raise BadImageError("undecodable", str(error).splitlines()[0]) from error
    return stored


def _png_pixels(data: bytes) -> Tensor:
    """[3,H,W] uint8 as stored, not rotated."""
    try:
        with _pillow_alone():
            image = Image.open(io.BytesIO(data), formats=("PNG",))
        image.load()
    except Exception as error:
        raise BadImageError("undecodable", str(error)) from error
    # Where this stays, converting a palette warns that its alpha is lost, which is the rule here.
    image.info.pop("transparency", None)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _upright(stored_CHW: Tensor, orientation: int) -> Tensor:
    """Undoes an EXIF orientation (CIPA DC-008, tag 0x0112): mirrored sides first, then the swapped axes."""
    mirrored = [axis for axis, orientations in ((1, (3, 4, 7, 6)), (2, (2, 3, 7, 8))) if orientation in orientations]
    upright = stored_CHW.flip(mirrored) if mirrored else stored_CHW
    return upright.transpose(1, 2) if orientation >= 5 else upright
