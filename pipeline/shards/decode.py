"""Decodes an image to upright 8-bit RGB, with the same pixels on every machine with the same decoder.

Pillow reads headers, except those of plain JPEGs and PNGs, and decodes PNG. torchvision decodes JPEG and WebP, to the
same pixels: for JPEG it is 25 % faster on photographs and three times as fast on thumbnails, and Pillow's WebP holds
the GIL. torchvision's PNG decoder crashes the process on damaged files, so it only decodes thumbnails whose whole
content is checked before (``plain_png``). Other images become 8-bit RGB by these rules:

- grayscale images of any bit depth and palette images are expanded to three channels;
- CMYK and YCCK are read as inverted, as Adobe stores them, and a channel is C·K / 255 of the stored values;
- alpha and transparent colours are dropped, so a transparent pixel has its stored colour;
- 16-bit channels are reduced to the high byte;
- an orientation before the pixels, in EXIF or else in XMP, is applied, in every format;
- profiles and gamma are not applied;
- damaged or too large metadata count as absent: without a readable orientation the pixels stay as stored;
- an APNG or a multi-picture JPEG is its first image, as a plain reader shows it.

Anything except a complete JPEG, PNG or WebP image is undecodable, and so is an animated WebP.
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
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pipeline.core.errors import first_line
from pipeline.shards.file_kinds import file_kind
from pipeline.shards.plain_png import plain_png_size

BadStatus = Literal["undecodable", "empty", "too_large"]

_FORMATS = ("JPEG", "PNG", "WEBP")
_PLAIN_PNG = "plain PNG"
_JPEG_START, _JPEG_SCAN = b"\xff\xd8", 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Tables, restart interval, comment and application data, except APP1, which holds EXIF and XMP.
_JPEG_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})
# Chunks of a PNG that no pixel depends on. APNG's chunks are needed: they mark the end of the first image.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_METADATA = _PNG_TEXT | {
    *(b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV", b"cLLI", b"mDCv", b"cLLi", b"sBIT", b"pHYs", b"tIME"),
    *(b"bKGD", b"hIST", b"sPLT", b"eXIf", b"oFFs", b"pCAL", b"sCAL", b"sTER", b"dSIG"),
}
_PNG_ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_MAX_KEYWORD_BYTES = max(map(len, _PNG_ORIENTATION_KEYWORDS))
_RGB = int(torchvision.io.ImageReadMode.RGB.value)
_pillow_lock = threading.Lock()


class BadImageError(Exception):
    """An image that cannot be used, with its index status. The caller decides whether that is fatal."""

    def __init__(self, status: BadStatus, reason: str) -> None:
        super().__init__(status, reason)
        self.status: BadStatus = status
        self.reason = reason


class _Header(NamedTuple):
    """Format, stored width and height in pixels, before rotation, and the EXIF orientation (1 to 8).

    The format of a PNG that torchvision can decode is ``_PLAIN_PNG``.
    """

    format: str | None
    width: int
    height: int
    orientation: int

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height after rotation. Orientations from 5 on swap the axes."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels after EXIF rotation, from the header.

    Raises:
        BadImageError: empty, or no header of a supported image.
    """
    return _header(data).upright


def decode(data: bytes, *, max_pixels: int) -> Tensor:
    """The upright image as uint8 RGB [3,H,W], in the decoder's memory layout. The GIL is released during decoding.

    Raises:
        BadImageError: empty, undecodable (truncated included), or of more than ``max_pixels`` pixels by its header;
            such an image is not decoded.
    """
    header = _header(data)
    if header.width * header.height > max_pixels:
        raise BadImageError("too_large", f"{header.width}×{header.height} pixels are more than {max_pixels}")
    stored_CHW = _png_pixels(data) if header.format == "PNG" else _pixels(data)
    if tuple(stored_CHW.shape) != (3, header.height, header.width):
        raise BadImageError(
            "undecodable",
            f"its header declares {header.width}×{header.height}, its pixels are {list(stored_CHW.shape)}",
        )
    return _upright(stored_CHW, header.orientation)


def _header(data: bytes) -> _Header:
    if not data:
        raise BadImageError("empty", "0 bytes")
    return _plain_jpeg_header(data) or _plain_png_header(data) or _pillow_header(data)


def _plain_png_header(data: bytes) -> _Header | None:
    size = plain_png_size(data)
    return None if size is None else _Header(_PLAIN_PNG, *size, 1)


def _plain_jpeg_header(data: bytes) -> _Header | None:
    """The header of a JPEG without an orientation. None: Pillow has to read it.

    Pillow takes longer for the header than for the pixels of a thumbnail, with the GIL held. This function walks the
    same segments up to the scan (ITU-T T.81, B.1.1). It returns None at metadata that may hold an orientation, and at
    any malformed segment.
    """
    if data[:2] != _JPEG_START:
        return None
    frame, offset = None, 2
    while offset + 10 <= len(data) and data[offset] == 0xFF:
        marker, length = data[offset + 1], data[offset + 2] << 8 | data[offset + 3]
        if marker == _JPEG_SCAN:
            return frame
        if marker in _JPEG_FRAMES:
            bits, channels = data[offset + 4], data[offset + 9]
            height, width = data[offset + 5] << 8 | data[offset + 6], data[offset + 7] << 8 | data[offset + 8]
            is_valid = frame is None and height and width and bits == 8 and channels in (1, 3, 4)
            frame = _Header("JPEG", width, height, 1)
        else:
            is_valid = marker in _JPEG_SEGMENTS
        if not is_valid or length < 2:
            return None
        offset += 2 + length
    return None


def _pillow_header(data: bytes) -> _Header:
    try:
        with _exclusive_pillow(), _open(data) as image:
            return _Header(image.format, *image.size, _orientation(image))
    # Pillow's parsers raise many types: OSError, SyntaxError, struct.error, KeyError …
    except Exception as error:
        raise BadImageError("undecodable", _reason(error, data)) from error


def _reason(error: Exception, data: bytes) -> str:
    kind = file_kind(data)
    if kind not in _FORMATS:
        return f"not a JPEG, PNG or WebP image, but {kind}"
    # The text of Pillow's UnidentifiedImageError is a memory address.
    return f"its {kind} header is damaged" if isinstance(error, UnidentifiedImageError) else f"damaged {kind}: {error}"


def _open(data: bytes) -> Image.Image:
    """Opens the image with as much of its metadata as possible: all, those that may hold an orientation, or none."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception:
        for with_orientation in (True, False) if data.startswith(_PNG_START) else ():
            stripped = _without_metadata(data, with_orientation=with_orientation)
            with contextlib.suppress(Exception):
                return Image.open(io.BytesIO(stripped), formats=_FORMATS)
        raise


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 if the metadata have none or are damaged."""
    try:
        # PngImageFile.getexif would decode the image to find metadata behind the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _without_metadata(png: bytes, *, with_orientation: bool) -> bytes:
    """The same PNG without chunks that no pixel depends on.

    Args:
        with_orientation: leave in the chunks that may hold an orientation.
    """
    chunks, offset = [_PNG_START], len(_PNG_START)
    while offset + 8 <= len(png):
        # Length, type, data, CRC.
        end = offset + 12 + int.from_bytes(png[offset : offset + 4], "big")
        kind, content = png[offset + 4 : offset + 8], png[offset + 8 : offset + 8 + _MAX_KEYWORD_BYTES]
        may_rotate = kind == b"eXIf" or (kind in _PNG_TEXT and content.startswith(_PNG_ORIENTATION_KEYWORDS))
        if kind not in _PNG_METADATA or (with_orientation and may_rotate):
            chunks.append(png[offset:end])
        offset = end
    return b"".join(chunks)


@contextlib.contextmanager
def _exclusive_pillow() -> Generator[None]:
    """Pillow without warnings and without its own pixel limit, so that a status depends on neither.

    Both are process-wide, and so is the lock. Parsing a header holds the GIL in any case.
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
        # The operator itself: torchvision's Python wrapper warns at every call from 0.29 on, and warning filters are
        # not thread-safe. The wrapper also applies no orientation to WebP, so this module does.
        stored: Tensor = torch.ops.image.decode_image(encoded, _RGB, False)
    except RuntimeError as error:
        raise BadImageError("undecodable", first_line(error)) from error
    return stored


def _png_pixels(data: bytes) -> Tensor:
    """[3,H,W] uint8 as stored, not rotated."""
    try:
        image = _load_png(data)
    except Exception:
        try:
            # Metadata behind the pixels may be damaged too.
            image = _load_png(_without_metadata(data, with_orientation=False))
        except Exception as error:
            raise BadImageError("undecodable", _reason(error, data)) from error
    # With this entry, the conversion of a palette warns that its alpha is lost.
    image.info.pop("transparency", None)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _load_png(data: bytes) -> Image.Image:
    with _exclusive_pillow():
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image


def _upright(stored_CHW: Tensor, orientation: int) -> Tensor:
    """Undoes an EXIF orientation (CIPA DC-008, tag 0x0112): mirrored sides first, then the swapped axes."""
    mirrored = [axis for axis, orientations in ((1, (3, 4, 7, 6)), (2, (2, 3, 7, 8))) if orientation in orientations]
    upright = stored_CHW.flip(mirrored) if mirrored else stored_CHW
    return upright.transpose(1, 2) if orientation >= 5 else upright
