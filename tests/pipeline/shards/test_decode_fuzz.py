"""Thousands of damaged images in a separate process, which detects a crash of a decoder."""

from __future__ import annotations

import multiprocessing
import random
import zlib
from functools import cache
from multiprocessing.sharedctypes import Synchronized

import pytest
import torch

from pipeline.shards.decode import BadImageError, decode, image_size
from tests.pipeline.shards.tars import image_bytes
from tests.pipeline.shards.test_decode import IMAGES, translucent
from tests.pipeline.shards.test_plain_png import ROWS, STREAM, header, png

MAX_PIXELS = 20_000
PLAIN = "PNG with right CRCs"
NUM_DAMAGED = 12_000
# Where decoders switch tables, and where sizes and lengths are largest.
EDGES = (b"\0", b"\xff", b"\x7f", b"\x80", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1")


@cache
def seeds(form: str) -> list[bytes]:
    """Intact images of a format: small ones of every kind, and larger ones with many blocks."""
    large = [image_bytes(form, size=(120, 90)), image_bytes(form, mode="L", size=(64, 65))]
    small = [data for name, data in IMAGES.items() if name.startswith(form.lower())]
    return [*small, *large, *([] if form == "JPEG" else [translucent(form)])]


def damaged(data: bytes, generator: random.Random) -> bytes:
    """Changes, removes, repeats or inserts bytes one to four times, and sometimes truncates the result."""
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        # Headers and tables are short and have the most influence.
        position = generator.randrange(min(len(out), generator.choice([64, 700, len(out)])))
        length = generator.choice([1, 1, 2, 4, 16])
        match generator.randrange(5):
            case 0:
                out[position : position + 1] = bytes([generator.randrange(256)])
            case 1:
                edge = generator.choice(EDGES)
                out[position : position + len(edge)] = edge
            case 2:
                del out[position : position + length]
            case 3:
                out[position:position] = out[position : position + length * 8]
            case _:
                out[position] ^= 1 << generator.randrange(8)
        out = out or bytearray(b"\0")
    return bytes(out[: generator.randrange(1, len(out) + 1)] if generator.random() < 0.1 else out)


def case(form: str, number: int) -> bytes:
    """The damaged image with this number, which a failure names."""
    generator = random.Random(f"{form}/{number}")
    if form == PLAIN:
        return damaged_plain(generator)
    return damaged(generator.choice(seeds(form)), generator)


def damaged_plain(generator: random.Random) -> bytes:
    """A small PNG whose header, rows or stream is damaged; its CRCs are right."""
    parts = {"ihdr": header(), "rows": ROWS, "stream": b""}
    part = generator.choice([*parts])
    if part == "stream":
        return png(damaged(STREAM, generator))
    parts[part] = damaged(parts[part], generator)
    return png(zlib.compress(parts["rows"]), ihdr=parts["ihdr"])


def decode_many(form: str, reached: Synchronized[int]) -> None:
    num_decoded = 0
    for number in range(NUM_DAMAGED):
        reached.value = number
        data = case(form, number)
        try:
            pixels_CHW = decode(data, max_pixels=MAX_PIXELS)
        except BadImageError:
            continue
        num_decoded += 1
        width, height = image_size(data)
        assert pixels_CHW.dtype == torch.uint8
        assert tuple(pixels_CHW.shape) == (3, height, width)
        assert width * height <= MAX_PIXELS
    # Some damaged images decode, and some do not.
    assert NUM_DAMAGED / 50 < num_decoded < NUM_DAMAGED


@pytest.mark.slow
@pytest.mark.parametrize("form", ["JPEG", "PNG", PLAIN, "WEBP"])
def test_no_damaged_image_crashes_hangs_or_raises_another_error(form: str) -> None:
    context = multiprocessing.get_context("spawn")
    reached: Synchronized[int] = context.Value("q", -1)
    process = context.Process(target=decode_many, args=(form, reached))
    process.start()
    process.join(timeout=300)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert (process.exitcode, hangs) == (0, False), f"the failure is in case({form!r}, {reached.value})"
