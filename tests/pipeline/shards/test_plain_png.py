from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.shards.decode import decode, image_size
from pipeline.shards.plain_png import plain_png_size
from tests.pipeline.shards.tars import image_bytes
from tests.pipeline.shards.test_decode import PLENTY, chunk, gray_png, pillow, status, translucent

START, END = b"\x89PNG\r\n\x1a\n", chunk(b"IEND", b"")
ROWS = b"".join(bytes([number % 5]) + bytes(range(number, number + 9)) for number in range(8))
"""Of 3 × 8 RGB pixels, with every filter."""
STREAM = zlib.compress(ROWS)


def header(width: int = 3, height: int = 8, *rest: int) -> bytes:
    """Content of an IHDR: bits, colour type, compression, filters, interlacing follow the size."""
    return struct.pack(">IIBBBBB", width, height, *(rest or (8, 2, 0, 0, 0)))


def png(*streams: bytes, ihdr: bytes | None = None, extra: bytes = b"") -> bytes:
    return START + chunk(b"IHDR", ihdr or header()) + extra + b"".join(chunk(b"IDAT", one) for one in streams) + END


@settings(max_examples=60)
@given(data=st.data(), mode=st.sampled_from(["L", "RGB"]))
def test_pixels_of_plain_images_are_those_of_pillow(data: st.DataObject, mode: str) -> None:
    width, height = data.draw(st.tuples(st.integers(1, 64), st.integers(1, 64)))
    values_HWC = np.random.default_rng(data.draw(st.integers(0, 9))).integers(0, 256, (height, width, 3), np.uint8)
    smooth = Image.fromarray(values_HWC[:4, :4]).resize((width, height))
    buffer = io.BytesIO()
    image = data.draw(st.sampled_from([Image.fromarray(values_HWC), smooth]))
    image.convert(mode).save(buffer, "PNG", compress_level=data.draw(st.integers(0, 9)))
    assert plain_png_size(buffer.getvalue()) == (width, height) == image_size(buffer.getvalue())
    np.testing.assert_array_equal(decode(buffer.getvalue(), max_pixels=PLENTY).numpy(), pillow(buffer.getvalue()))


@pytest.mark.parametrize("streams", [(STREAM,), (STREAM[:5], b"", STREAM[5:])], ids=["one chunk", "three chunks"])
def test_every_filter_and_any_number_of_chunks_is_plain(streams: tuple[bytes, ...]) -> None:
    assert plain_png_size(png(*streams)) == (3, 8)
    np.testing.assert_array_equal(decode(png(*streams), max_pixels=PLENTY).numpy(), pillow(png(*streams)))


def test_a_plain_image_above_the_pixel_limit_is_too_large() -> None:
    assert [status(png(STREAM), max_pixels=pixels) for pixels in (23, 24)] == ["too_large", "ok"]


OTHERS = {
    "alpha": translucent("PNG"),
    "a palette": image_bytes(mode="P"),
    "4 bits": gray_png(4),
    "interlaced": png(STREAM, ihdr=header(3, 8, 8, 2, 0, 0, 1)),
    "another chunk": png(STREAM, extra=chunk(b"pHYs", bytes(9))),
    "large": image_bytes(size=(128, 128)),
}


@pytest.mark.parametrize("data", OTHERS.values(), ids=OTHERS)
def test_other_images_are_not_plain(data: bytes) -> None:
    assert plain_png_size(data) is None


def _small_window() -> bytes:
    """Declares a window of 256 bytes, and copies from further behind, which some inflaters accept."""
    rows = np.random.default_rng(0).integers(0, 256, 299, np.uint8).tobytes()
    deflater = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflater.compress(b"\0" + rows + b"\0" + rows) + deflater.flush()
    return b"\x08\x1d" + body + zlib.adler32(b"\0" + rows + b"\0" + rows).to_bytes(4, "big")


DAMAGED = {
    "no pixels": png(),
    "an unknown filter": png(zlib.compress(b"\5" + ROWS[1:])),
    "a row too few": png(zlib.compress(ROWS[:-10])),
    "a byte too many": png(zlib.compress(ROWS + b"\0")),
    "bytes behind the stream": png(STREAM + b"\0"),
    "a truncated stream": png(STREAM[:-1]),
    "a wrong checksum of the stream": png(STREAM[:-1] + bytes([STREAM[-1] ^ 1])),
    "a wrong block": png(STREAM[:2] + b"\xff" + STREAM[3:]),
    "a stream with a dictionary": png(b"\x78\x20" + STREAM[2:]),
    "a wrong CRC": png(STREAM).replace(b"IDAT", b"IDAt"),
    "a chunk beyond the end": png(STREAM).replace(b"\0\0\0\x0dIHDR", b"\xff\0\0\x0dIHDR"),
    "a short header": png(STREAM, ihdr=header()[:12]),
    "no width": png(STREAM, ihdr=header(0)),
    "no end": png(STREAM)[: -len(END)],
    "no chunks": START + END,
    "the start alone": START,
    "a small window": png(_small_window(), ihdr=header(299, 2, 8, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_image_is_not_plain(data: bytes) -> None:
    """Pillow decides what becomes of it: torchvision does not see it."""
    assert plain_png_size(data) is None
