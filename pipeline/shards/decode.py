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
- metadata that are damaged or too large count as absent: without a readable orientation the pixels stay as stored;
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
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from pipeline.core.errors import first_line
from pipeline.shards.file_kinds import file_kind

BadStatus = Literal["undecodable", "empty", "too_large"]

_FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_START, _JPEG_SCAN = b"\xff\xd8", 0xDA
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
# Tables, restart interval, comment and application data, but for APP1, which holds EXIF and XMP.
_JPEG_SEGMENTS = frozenset({0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xF0)})
# Chunks of a PNG that no pixel depends on. APNG's are not among them: they say where the first picture ends.
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_TEXT = frozenset({b"tEXt", b"zTXt", b"iTXt"})
_PNG_METADATA = _PNG_TEXT | {
    *(b"iCCP", b"sRGB", b"gAMA", b"cHRM", b"cICP", b"mDCV", b"cLLI", b"mDCv", b"cLLi", b"sBIT", b"pHYs", b"tIME"),
    *(b"bKGD", b"hIST", b"sPLT", b"eXIf", b"oFFs", b"pCAL", b"sCAL", b"sTER", b"dSIG"),
}
_PNG_ORIENTATION_KEYWORDS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
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
        with _pillow_alone(), _open(data) as image:
            return _Header(image.format, *image.size, _orientation(image))
    # Pillow's parsers raise whatever they fail with: OSError, SyntaxError, struct.error, KeyError …
    except Exception as error:
        raise BadImageError("undecodable", _reason(error, data)) from error


def _reason(error: Exception, data: bytes) -> str:
    kind = file_kind(data)
    if kind not in _FORMATS:
        return f"not a JPEG, PNG or WebP image, but {kind}"
    # The text of Pillow's UnidentifiedImageError is a memory address.
    return f"its {kind} header is damaged" if isinstance(error, UnidentifiedImageError) else f"damaged {kind}: {error}"


def _open(data: bytes) -> Image.Image:
    """The header, from as much of the metadata as can be read: all, those that may hold an orientation, or none."""
    try:
        return Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception:
        for keep_orientation in (True, False) if data.startswith(_PNG_START) else ():
            bare = _without_metadata(data, keep_orientation=keep_orientation)
            with contextlib.suppress(Exception):
                return Image.open(io.BytesIO(bare), formats=_FORMATS)
        raise


def _orientation(image: Image.Image) -> int:
    """1 to 8; 1 where metadata name none, or are damaged."""
    try:
        # Pillow's own getexif of a PNG decodes it, to look behind the pixels too.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if orientation in range(1, 9) else 1


def _without_metadata(png: bytes, *, keep_orientation: bool) -> bytes:
    """The same PNG without chunks that no pixel depends on.

    Args:
        keep_orientation: keeps those in which an orientation may stand.
    """
    parts, at = [_PNG_START], len(_PNG_START)
    while at + 8 <= len(png):
        # Length, type, data, CRC.
        end = at + 12 + int.from_bytes(png[at : at + 4], "big")
        kind, content = png[at + 4 : at + 8], png[at + 8 : at + 8 + max(map(len, _PNG_ORIENTATION_KEYWORDS))]
        may_turn = kind == b"eXIf" or (kind in _PNG_TEXT and content.startswith(_PNG_ORIENTATION_KEYWORDS))
        if kind not in _PNG_METADATA or (keep_orientation and may_turn):
            parts.append(png[at:end])
        at = end
    return b"".join(parts)


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
        raise BadImageError("undecodable", first_line(error)) from error
    return stored


def _png_pixels(data: bytes) -> Tensor:
    """[3,H,W] uint8 as stored, not rotated."""
    try:
        image = _load_png(data)
    except Exception:
        try:
            # Also metadata that stand behind the pixels may be damaged.
            image = _load_png(_without_metadata(data, keep_orientation=False))
        except Exception as error:
            raise BadImageError("undecodable", _reason(error, data)) from error
    # Where this stays, converting a palette warns that its alpha is lost, which is the rule here.
    image.info.pop("transparency", None)
    if image.mode == "I;16":
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _load_png(data: bytes) -> Image.Image:
    with _pillow_alone():
        image = Image.open(io.BytesIO(data), formats=("PNG",))
    image.load()
    return image


def _upright(stored_CHW: Tensor, orientation: int) -> Tensor:
    """Undoes an EXIF orientation (CIPA DC-008, tag 0x0112): mirrored sides first, then the swapped axes."""
    mirrored = [axis for axis, orientations in ((1, (3, 4, 7, 6)), (2, (2, 3, 7, 8))) if orientation in orientations]
    upright = stored_CHW.flip(mirrored) if mirrored else stored_CHW
    return upright.transpose(1, 2) if orientation >= 5 else upright
