from __future__ import annotations

import io
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image, ImageCms, ImageOps

from pipeline.shards.decode import BadImageError, decode, image_size
from pipeline.shards.tar import read_samples
from tests.pipeline.shards.tars import data_config, image_bytes, real_shard

PLENTY = 1_000_000
_PNG = b"\x89PNG\r\n\x1a\n"
# A profile in which the same numbers are other colours.
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
ROTATED_BY_XMP = (
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="6"/></x:xmpmeta>'
)


def exif_of(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


def oriented(form: str, orientation: int) -> bytes:
    return image_bytes(form, exif=exif_of(orientation))


def pillow(data: bytes) -> np.ndarray[Any, Any]:
    """Pillow's pixels, [3,H,W]."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
        return np.asarray(upright.convert("RGB")).transpose(2, 0, 1)


def status(data: bytes, *, max_pixels: int = PLENTY) -> str:
    """``ok``, or the status of the error."""
    try:
        decode(data, max_pixels=max_pixels)
    except BadImageError as error:
        return error.status
    return "ok"


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of(rows: list[bytes], *, width: int, bits: int, color_type: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    return _PNG + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def sixteen_bit_png(values_HWC: np.ndarray[Any, Any], color_type: int) -> bytes:
    rows = [row.astype(">u2").tobytes() for row in values_HWC]
    return png_of(rows, width=values_HWC.shape[1], bits=16, color_type=color_type)


def gray_png(bits: int) -> bytes:
    """All levels of this bit depth in one row."""
    levels = range(2**bits)
    row = int("".join(f"{level:0{bits}b}" for level in levels), 2).to_bytes(len(levels) * bits // 8, "big")
    return png_of([row], width=len(levels), bits=bits, color_type=0)


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """The JPEG with a further segment after the start of the image."""
    return jpeg[:2] + bytes([0xFF, marker]) + (len(content) + 2).to_bytes(2, "big") + content + jpeg[2:]


def adobe_transform(jpeg: bytes, transform: int) -> bytes:
    """The same stored channels under another transform: 0 is CMYK, 2 is YCCK."""
    offset = jpeg.index(b"Adobe") + 11
    return jpeg[:offset] + bytes([transform]) + jpeg[offset + 1 :]


def without_adobe(jpeg: bytes) -> bytes:
    offset = jpeg.index(b"\xff\xee")
    return jpeg[:offset] + jpeg[offset + 2 + int.from_bytes(jpeg[offset + 2 : offset + 4], "big") :]


def several(form: str, **options: Any) -> tuple[bytes, Image.Image]:
    """Three images in one file, and the first of them."""
    pixels = np.random.default_rng(3).integers(0, 256, (3, 6, 9, 3), dtype=np.uint8)
    first, *rest = (Image.fromarray(picture) for picture in pixels)
    buffer = io.BytesIO()
    first.save(buffer, form, save_all=True, append_images=rest, **options)
    return buffer.getvalue(), first


def translucent(form: str, **options: Any) -> bytes:
    pixels_HWC = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC, "RGBA").save(buffer, form, **options)
    return buffer.getvalue()


IMAGES = {
    "jpeg": image_bytes("JPEG"),
    "jpeg grayscale": image_bytes("JPEG", "L"),
    "jpeg cmyk": image_bytes("JPEG", "CMYK"),
    "jpeg progressive": image_bytes("JPEG", progressive=True),
    "jpeg 4:4:4": image_bytes("JPEG", subsampling=0),
    "jpeg 4:2:2": image_bytes("JPEG", subsampling=1, size=(17, 9)),
    "jpeg 4:2:0, odd": image_bytes("JPEG", subsampling=2, size=(19, 33)),
    "jpeg without a transform": image_bytes("JPEG", keep_rgb=True),
    "jpeg with restart markers": image_bytes("JPEG", size=(40, 40), restart_marker_rows=1),
    "jpeg with a profile": image_bytes("JPEG", icc_profile=PROFILE),
    "jpeg cmyk without a marker": without_adobe(image_bytes("JPEG", "CMYK")),
    "jpeg ycck": adobe_transform(image_bytes("JPEG", "CMYK"), 2),
    "jpeg of one pixel": image_bytes("JPEG", size=(1, 1)),
    "jpeg rotated by XMP": with_segment(image_bytes("JPEG"), 0xE1, ROTATED_BY_XMP),
    **{f"jpeg in orientation {number}": oriented("JPEG", number) for number in range(1, 9)},
    "png": image_bytes(),
    "png grayscale": image_bytes(mode="L"),
    "png grayscale and alpha": image_bytes(mode="LA"),
    "png palette": image_bytes(mode="P"),
    "png palette, one entry transparent": image_bytes(mode="P", transparency=3),
    "png palette, every entry with its alpha": image_bytes(mode="P", transparency=bytes(range(256))),
    "png one bit": image_bytes(mode="1"),
    "png two bits": gray_png(2),
    "png four bits": gray_png(4),
    "png, one colour transparent": image_bytes(transparency=(1, 2, 3)),
    "png grayscale, one level transparent": image_bytes(mode="L", transparency=7),
    "png with a profile": image_bytes(icc_profile=PROFILE),
    "png on its side": oriented("PNG", 8),
    "webp": image_bytes("WEBP"),
    "webp lossless": image_bytes("WEBP", lossless=True),
    "webp with a profile": image_bytes("WEBP", icc_profile=PROFILE),
    "webp on its side": oriented("WEBP", 5),
}


@pytest.mark.parametrize("data", IMAGES.values(), ids=IMAGES)
def test_pixels_and_size_are_those_of_pillow(data: bytes) -> None:
    expected_CHW = pillow(data)
    decoded_CHW = decode(data, max_pixels=PLENTY)
    assert decoded_CHW.dtype == torch.uint8
    np.testing.assert_array_equal(decoded_CHW.numpy(), expected_CHW)
    assert image_size(data) == (expected_CHW.shape[2], expected_CHW.shape[1])


@pytest.mark.parametrize("name", ["imagenet-samples/sample-00001.tar", "cifar10/val-00000.tar"])
def test_real_images_decode_as_pillow_decodes_them(name: str) -> None:
    for sample, _ in zip(read_samples(real_shard(name), data_config(), where=name), range(40), strict=False):
        np.testing.assert_array_equal(decode(sample.data, max_pixels=PLENTY).numpy(), pillow(sample.data))


# (row, column) of the stored top-left pixel of a 2×3 image after each orientation, by CIPA DC-008.
CORNERS = {1: (0, 0), 2: (0, 1), 3: (2, 1), 4: (2, 0), 5: (0, 0), 6: (0, 2), 7: (1, 2), 8: (1, 0)}


@pytest.mark.parametrize("form", ["PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "corner"), CORNERS.items())
def test_each_orientation_moves_the_first_pixel_to_its_corner(
    form: str, orientation: int, corner: tuple[int, int]
) -> None:
    stored = Image.new("RGB", (2, 3))
    stored.putpixel((0, 0), (255, 255, 255))
    buffer = io.BytesIO()
    stored.save(buffer, form, exif=exif_of(orientation), lossless=True)
    upright_HW = decode(buffer.getvalue(), max_pixels=6)[0]
    assert tuple(upright_HW.shape) == ((3, 2) if orientation < 5 else (2, 3))
    assert upright_HW.nonzero().tolist() == [list(corner)]


@pytest.mark.parametrize(
    ("color_type", "channels"),
    [(0, [0, 0, 0]), (2, [0, 1, 2]), (4, [0, 0, 0]), (6, [0, 1, 2])],
    ids=["L", "RGB", "LA", "RGBA"],
)
def test_sixteen_bit_channels_become_their_high_byte(color_type: int, channels: list[int]) -> None:
    num_channels = {0: 1, 2: 3, 4: 2, 6: 4}[color_type]
    values_HWC = np.random.default_rng(2).integers(0, 65_536, (3, 4, num_channels))
    values_HWC[0, 0], values_HWC[0, 1], values_HWC[0, 2] = 255, 256, 65_535
    decoded_CHW = decode(sixteen_bit_png(values_HWC, color_type), max_pixels=12)
    np.testing.assert_array_equal(decoded_CHW.numpy(), (values_HWC // 256)[..., channels].transpose(2, 0, 1))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_levels_of_low_bit_depths_are_scaled_from_black_to_white(bits: int) -> None:
    levels = decode(gray_png(bits) if bits > 1 else image_bytes(mode="1"), max_pixels=PLENTY)
    assert set(levels.flatten().tolist()) == {level * 255 // (2**bits - 1) for level in range(2**bits)}


def flat_cmyk(cmyk: tuple[int, int, int, int], transform: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("CMYK", (8, 8), cmyk).save(buffer, "JPEG", quality=100)
    return adobe_transform(buffer.getvalue(), transform)


@pytest.mark.parametrize("ink", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (20, 90, 200, 60), (0, 0, 0, 255)])
def test_cmyk_is_inverted_ink_times_inverted_black(ink: tuple[int, int, int, int]) -> None:
    black = 255 - ink[3]
    expected = [(255 - channel) * black / 255 for channel in ink[:3]]
    for data in (flat_cmyk(ink, 0), without_adobe(flat_cmyk(ink, 0))):
        # The inks of a flat block are decoded within one level.
        assert decode(data, max_pixels=64)[:, 3, 3].tolist() == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("stored", [(255, 128, 128, 255), (150, 90, 200, 255), (120, 160, 110, 100)])
def test_ycck_is_ycc_converted_to_inks_by_the_jfif_formula(stored: tuple[int, int, int, int]) -> None:
    # Pillow inverts the channels that it writes, so the file has these values.
    data = flat_cmyk((255 - stored[0], 255 - stored[1], 255 - stored[2], 255 - stored[3]), 2)
    luma, blue, red = stored[0], stored[1] - 128, stored[2] - 128
    inks = (luma + 1.402 * red, luma - 0.344136 * blue - 0.714136 * red, luma + 1.772 * blue)
    # libjpeg returns 255 minus each, the inverted inks of Adobe's files.
    expected = [min(max(255 - ink, 0), 255) * stored[3] / 255 for ink in inks]
    assert decode(data, max_pixels=64)[:, 3, 3].tolist() == pytest.approx(expected, abs=3)


@pytest.mark.parametrize("default_image", [False, True])
def test_an_animated_png_is_its_first_image(default_image: bool) -> None:
    data, first = several("PNG", default_image=default_image)
    np.testing.assert_array_equal(decode(data, max_pixels=PLENTY).permute(1, 2, 0).numpy(), np.asarray(first))


def test_a_multi_picture_jpeg_is_its_first_image() -> None:
    data, first = several("MPO")
    np.testing.assert_array_equal(decode(data, max_pixels=PLENTY).numpy(), pillow(data))
    assert image_size(data) == first.size


def test_an_animated_webp_is_undecodable() -> None:
    assert status(several("WEBP")[0]) == "undecodable"


@pytest.mark.parametrize(
    "data", [translucent("PNG"), translucent("WEBP", lossless=True, exact=True)], ids=["png", "webp"]
)
def test_alpha_is_dropped_and_the_stored_colour_stays(data: bytes) -> None:
    stored_HWC = np.random.default_rng(1).integers(0, 256, (5, 7, 4), dtype=np.uint8)
    np.testing.assert_array_equal(decode(data, max_pixels=PLENTY).numpy(), stored_HWC[..., :3].transpose(2, 0, 1))


@pytest.mark.parametrize("name", ["jpeg", "jpeg progressive", "jpeg grayscale", "webp", "webp lossless"])
def test_an_image_truncated_anywhere_is_undecodable(name: str) -> None:
    data = IMAGES[name]
    assert {status(data[:length]) for length in range(1, len(data))} == {"undecodable"}


def test_a_truncated_png_is_undecodable_unless_it_has_every_pixel() -> None:
    data = IMAGES["png"]
    whole_CHW = decode(data, max_pixels=PLENTY)
    num_whole = 0
    for length in range(1, len(data)):
        try:
            assert torch.equal(decode(data[:length], max_pixels=PLENTY), whole_CHW)
            num_whole += 1
        except BadImageError:
            continue
    # The end marker, and the checksums of chunk and stream before it.
    assert num_whole < 12 + 4 + 4 + 5


@pytest.mark.parametrize(
    "data", [b"", b"x", b"not an image" * 9, image_bytes("GIF"), image_bytes("BMP"), image_bytes("TIFF")]
)
def test_no_bytes_are_empty_and_other_formats_undecodable(data: bytes) -> None:
    with pytest.raises(BadImageError) as caught:
        image_size(data)
    assert status(data) == caught.value.status == ("undecodable" if data else "empty")


def test_the_pixel_limit_is_the_largest_size_that_decodes() -> None:
    data = image_bytes(size=(7, 5))
    assert (status(data, max_pixels=35), status(data, max_pixels=34)) == ("ok", "too_large")


def bomb() -> bytes:
    """A JPEG header of 65,000 × 65,000 pixels with the data of a few pixels."""
    data = bytearray(image_bytes("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    return bytes(data)


def test_a_bomb_is_too_large_by_max_pixels_and_without_a_warning() -> None:
    assert status(bomb(), max_pixels=64_000_000) == "too_large"
    assert image_size(bomb()) == (65_000, 65_000)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_an_image_with_broken_metadata_decodes_without_a_warning() -> None:
    data = IMAGES["jpeg"]
    broken = with_segment(data, 0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    np.testing.assert_array_equal(decode(broken, max_pixels=PLENTY).numpy(), pillow(data))


PNG_IDAT_OFFSET = IMAGES["png"].index(b"IDAT") - 4
PLAIN = {"PNG": IMAGES["png"], "WEBP": IMAGES["webp lossless"], "JPEG": IMAGES["jpeg"]}


def with_chunk(kind: bytes, content: bytes, *, offset: int = PNG_IDAT_OFFSET, png: bytes = IMAGES["png"]) -> bytes:
    """The PNG with a further chunk, by default before its pixels."""
    return png[:offset] + chunk(kind, content) + png[offset:]


def wrong_crc(png: bytes, kind: bytes) -> bytes:
    offset = png.index(kind)
    end = offset + 4 + int.from_bytes(png[offset - 4 : offset], "big")
    return png[:end] + bytes([png[end] ^ 1]) + png[end + 1 :]


LARGE = zlib.compress(bytes(2 << 20))
DAMAGED_METADATA = {
    "PNG, EXIF": with_chunk(b"eXIf", b"garbage!"),
    "PNG, EXIF without bytes": with_chunk(b"eXIf", b""),
    "PNG, EXIF as text that is not hexadecimal": with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 12\nzz"),
    "PNG, EXIF as text that is too short": with_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n 2\n4578"),
    "PNG, large ICC profile": with_chunk(b"iCCP", b"icc\0\0" + LARGE),
    "PNG, ICC profile that is not compressed": with_chunk(b"iCCP", b"icc\0\0not zlib"),
    "PNG, ICC profile of another compression": with_chunk(b"iCCP", b"icc\0\7" + LARGE),
    "PNG, large text": with_chunk(b"zTXt", b"k\0\0" + LARGE),
    "PNG, large international text": with_chunk(b"iTXt", b"k\0\1\0\0\0" + LARGE),
    "PNG, large text behind the pixels": with_chunk(b"zTXt", b"k\0\0" + LARGE, offset=len(IMAGES["png"]) - 12),
    "PNG, XMP that is not UTF-8": with_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0\xff\xfe"),
    "PNG, truncated resolution": with_chunk(b"pHYs", b"\0"),
    "PNG, gamma without bytes": with_chunk(b"gAMA", b""),
    "PNG, truncated primaries": with_chunk(b"cHRM", b"\0\1"),
    "PNG, text with a wrong checksum": wrong_crc(with_chunk(b"tEXt", b"k\0value"), b"tEXt"),
    "WEBP, EXIF": image_bytes("WEBP", lossless=True, exif=b"garbage!"),
    "WEBP, EXIF and XMP": image_bytes("WEBP", lossless=True, exif=b"Exif\0\0II*\0\xff\xff\xff\xff", xmp=b"\xff<"),
    "JPEG, EXIF": with_segment(IMAGES["jpeg"], 0xE1, b"Exif\0\0garbage!"),
    # Pillow reads the EXIF of a JPEG without a resolution, and ignores errors in it.
    "JPEG, EXIF behind a resolution": with_segment(image_bytes("JPEG", dpi=(72, 72)), 0xE1, b"Exif\0\0garbage!"),
}


@pytest.mark.parametrize("name", DAMAGED_METADATA)
def test_damaged_or_large_metadata_do_not_change_the_pixels(name: str) -> None:
    data, plain = DAMAGED_METADATA[name], PLAIN[name.partition(",")[0]]
    assert torch.equal(decode(data, max_pixels=PLENTY), decode(plain, max_pixels=PLENTY))
    assert image_size(data) == (7, 5)


def test_an_orientation_is_applied_even_if_other_metadata_are_too_large() -> None:
    rotated = oriented("PNG", 6)
    offset = rotated.index(b"eXIf") - 4
    for extra in (chunk(b"iCCP", b"icc\0\0" + LARGE), chunk(b"pHYs", b"\0")):
        data = rotated[:offset] + extra + rotated[offset:]
        assert torch.equal(decode(data, max_pixels=PLENTY), decode(rotated, max_pixels=PLENTY))
        assert image_size(data) == (5, 7)


def wrong_stream(png: bytes) -> bytes:
    offset = png.index(b"IDAT") + 12
    return png[:offset] + bytes([png[offset] ^ 255]) + png[offset + 1 :]


@pytest.mark.parametrize(
    "png",
    [wrong_crc(IMAGES["png"], b"IHDR"), wrong_crc(image_bytes(mode="P"), b"PLTE"), wrong_stream(IMAGES["png"])],
    ids=["header", "palette", "pixels"],
)
def test_damage_to_chunks_that_pixels_depend_on_is_not_taken_for_metadata(png: bytes) -> None:
    tagged = with_chunk(b"eXIf", b"garbage!", png=png, offset=png.index(b"IDAT") - 4)
    assert status(png) == status(tagged) == "undecodable"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (image_bytes("GIF"), "not a JPEG, PNG or WebP image, but a GIF image"),
        (b"\n<!DOCTYPE html><html>", "not a JPEG, PNG or WebP image, but HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "not a JPEG, PNG or WebP image, but a Git LFS pointer"),
        (b"\0\5\x16\7" + bytes(20), "not a JPEG, PNG or WebP image, but an AppleDouble file of macOS"),
        (bytes(30), "not a JPEG, PNG or WebP image, but unknown bytes"),
        (IMAGES["png"][:20], "damaged PNG: Truncated File Read"),
        (wrong_crc(IMAGES["png"], b"IHDR"), "its PNG header is damaged"),
        (IMAGES["png"][:-30], "damaged PNG: image file is truncated"),
        (IMAGES["jpeg"][:-30], "truncated"),
    ],
)
def test_a_reason_is_deterministic_and_names_the_cause(data: bytes, reason: str) -> None:
    texts: set[str] = set()
    for _ in range(2):
        with pytest.raises(BadImageError) as caught:
            decode(data, max_pixels=PLENTY)
        texts.add(caught.value.reason)
    (text,) = texts
    assert reason in text


def test_an_exif_segment_after_other_segments_rotates_the_image() -> None:
    rotated = oriented("JPEG", 6)
    for marker, content in (
        (0xE2, b"ICC_PROFILE\0\1\1" + PROFILE),
        (0xFE, b"a comment"),
        (0xEE, b"Adobe\0d\0\0\0\0\0"),
    ):
        np.testing.assert_array_equal(
            decode(with_segment(rotated, marker, content), max_pixels=PLENTY).numpy(),
            pillow(with_segment(rotated, marker, content)),
        )
    frame = (plain := image_bytes("JPEG", size=(9, 4))).index(b"\xff\xc0")
    segment = with_segment(b"\xff\xd8", 0xE1, exif_of(6))[2:]
    after = frame + 2 + int.from_bytes(plain[frame + 2 : frame + 4], "big")
    late = plain[:after] + segment + plain[after:]
    assert image_size(late) == (4, 9)
    np.testing.assert_array_equal(decode(late, max_pixels=PLENTY).numpy(), pillow(late))


JPEGS = {name: data for name, data in IMAGES.items() if name.startswith("jpeg")}


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(JPEGS)), data=st.data())
def test_the_header_of_a_jpeg_agrees_with_pillow(name: str, data: st.DataObject) -> None:
    """Also with damaged segments before the scan, if Pillow reads the header."""
    damaged = bytearray(JPEGS[name])
    scan = damaged.index(b"\xff\xda") + 2
    for position in data.draw(st.lists(st.integers(2, scan), max_size=3)):
        damaged[position] = data.draw(st.integers(0, 255))
    try:
        size = image_size(bytes(damaged))
    except BadImageError:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(io.BytesIO(damaged), formats=("JPEG",))
        except Exception:
            return
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
    assert size == (image.size[::-1] if rotated else image.size)


@settings(max_examples=100)
@given(name=st.sampled_from(sorted(IMAGES)), data=st.data())
def test_damaged_bytes_decode_to_the_size_in_their_header_or_are_refused(name: str, data: st.DataObject) -> None:
    damaged = bytearray(IMAGES[name])
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=4)):
        damaged[position] = data.draw(st.integers(0, 255))
    try:
        _, height, width = decode(bytes(damaged), max_pixels=PLENTY).shape
    except BadImageError:
        return
    assert image_size(bytes(damaged)) == (width, height)


def test_threads_decode_the_same_pixels_as_one_thread() -> None:
    many = [*IMAGES.values(), IMAGES["jpeg"][:-9], b""] * 8

    def outcome(data: bytes) -> object:
        return decode(data, max_pixels=PLENTY).tolist() if status(data) == "ok" else status(data)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(outcome, many)) == [outcome(data) for data in many]
