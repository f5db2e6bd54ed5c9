"""JPEG decoders against Stillroom's: time, and whether pixels are equal; speed and error of scaled decoding."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module, util
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps

from pipeline.augment.params import eval_params, sample_keys, view_params
from pipeline.augment.pixels import apply_view
from pipeline.shards.decode import decode, image_size
from pipeline.shards.tar import read_samples
from schemas.config import DataConfig, ViewsConfig
from tests.benchmarks.timing import SHARED, Spread, interleaved, ratio

MAX_PIXELS = 64_000_000
CASES = {
    "imagenet-samples": ("imagenet-samples/sample-0000{}.tar", 2, 224, (224, 112, 56)),
    "cifar10": ("cifar10/train-0000{}.tar", 1, 32, ()),
}
ROUNDS = 5
Decoder = Callable[[bytes], torch.Tensor]
_SCALES = (8, 4, 2)


def _stillroom(data: bytes) -> torch.Tensor:
    return decode(data, max_pixels=MAX_PIXELS)


def _operator(data: bytes) -> torch.Tensor:
    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    pixels_CHW: torch.Tensor = torch.ops.image.decode_image(encoded, 3, False)
    return pixels_CHW


def _pillow(data: bytes) -> torch.Tensor:
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data), formats=("JPEG",)))
    return _to_chw(np.array(upright.convert("RGB")))


def _to_chw(pixels_HWC: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _decoders() -> dict[str, Decoder]:
    """Stillroom's first; the optional ones where they are installed."""
    found: dict[str, Decoder] = {"ours": _stillroom, "torchvision operator": _operator, "Pillow": _pillow}
    if util.find_spec("simplejpeg"):
        found["simplejpeg"] = _simplejpeg()
    if util.find_spec("cv2"):
        cv2: Any = import_module("cv2")
        cv2.setNumThreads(1)
        found["OpenCV"] = lambda data: _to_chw(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
    return found


def _simplejpeg(**keys: Any) -> Decoder:
    library: Any = import_module("simplejpeg")
    exact = {"colorspace": "RGB", "fastdct": False, "fastupsample": False}
    return lambda data: _to_chw(library.decode_jpeg(data, **exact, **keys))


def _read(pattern: str, shards: int) -> list[bytes]:
    names = [pattern.format(number) for number in range(shards)]
    return [sample.data for name in names for sample in read_samples(SHARED / name, DataConfig(), where=name)]


def run() -> None:
    torch.set_num_threads(1)
    decoders = _decoders()
    for title, (pattern, shards, size, scaled_sizes) in CASES.items():
        if not (SHARED / pattern.format(0)).exists():
            print(f"  {title}: skipped, {SHARED / pattern.format(0)} is absent")
            continue
        images = _read(pattern, shards)
        print(f"  {title}: {len(images)} images")
        for threads in (1, 2):
            _time(decoders, images, size, threads)
        _compare(decoders, dict(enumerate(images)))
        _shares(images, size)
        if "simplejpeg" in decoders:
            for scaled_size in scaled_sizes:
                _scaled(images, scaled_size)
    print("  made images")
    _compare(decoders, _synthetic())
    _guard(_bomb())


def _time(decoders: dict[str, Decoder], images: list[bytes], size: int, threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        alone = {name: lambda call=call: _drain(pool.map(call, images)) for name, call in decoders.items()}
        resized = {
            f"{name} + resize": lambda call=call: _drain(pool.map(lambda data: _eval_view(call(data), size), images))
            for name, call in decoders.items()
        }
        seconds = interleaved({**alone, **resized}, rounds=ROUNDS)
    for name, values in seconds.items():
        baseline = seconds["ours + resize" if name.endswith("resize") else "ours"]
        each = Spread.of([value / len(images) * 1e6 for value in values])
        print(f"    {threads} threads, {name:<30}{each} us an image, time / ours {ratio(values, baseline)}")


def _drain(results: Any) -> None:
    for _ in results:
        pass


def _eval_view(image_CHW: torch.Tensor, size: int) -> torch.Tensor:
    sides = (np.array([image_CHW.shape[axis]]) for axis in (2, 1))
    box = eval_params(ViewsConfig(kind="eval"), *sides).box_N4[0].tolist()
    return apply_view(image_CHW, box, False, size=size, interpolation="bicubic")


def _compare(decoders: dict[str, Decoder], images: dict[Any, bytes]) -> None:
    ours = {name: _stillroom(data) for name, data in images.items()}
    for decoder, call in decoders.items():
        reported = {name: _difference(call, data, ours[name]) for name, data in images.items()}
        other = {name: found for name, found in reported.items() if found}
        named = ", ".join(f"{name} {found}" for name, found in other.items() if isinstance(name, str))
        largest = max((found for found in other.values() if isinstance(found, int)), default=0)
        print(f"    pixels of {decoder:<22}{len(other)} of {len(images)} images differ, by up to {largest}; {named}")


def _difference(call: Decoder, data: bytes, ours_CHW: torch.Tensor) -> int | str:
    try:
        pixels_CHW = call(data)
    except Exception as error:
        return f"refused ({str(error).splitlines()[0]})"
    if pixels_CHW.shape != ours_CHW.shape:
        return "another shape"
    return int((pixels_CHW.int() - ours_CHW.int()).abs().max())


def _shares(images: list[bytes], size: int) -> None:
    """What decoding and headers are of a view that is cropped at random, of which V share one decode."""
    pixels = [_stillroom(data) for data in images]
    boxes = _boxes(ViewsConfig(kind="crop"), [image_size(data) for data in images])

    def views() -> None:
        for image, box in zip(pixels, boxes, strict=True):
            apply_view(image, box, False, size=size, interpolation="bicubic")

    parts = {
        "header": lambda: [image_size(data) for data in images],
        "decode": lambda: list(map(_stillroom, images)),
    }
    seconds = interleaved({**parts, "view": views}, rounds=ROUNDS)
    print(f"    a header is {ratio(seconds['header'], seconds['decode'])} of a decode")
    for num_views in (1, 5):
        whole = [a / num_views + b for a, b in zip(seconds["decode"], seconds["view"], strict=True)]
        share = ratio([value / num_views for value in seconds["decode"]], whole)
        print(f"    at {size}, {num_views} views a decode: decoding is {share} of a view")


def _boxes(plan: ViewsConfig, sizes: Sequence[tuple[int, int]]) -> list[list[int]]:
    keys = sample_keys(0, [str(number) for number in range(len(sizes))])
    widths, heights = np.array(sizes, np.int64).T
    boxes: list[list[int]] = view_params(plan, keys, np.zeros(len(sizes), np.int64), widths, heights).box_N4.tolist()
    return boxes


def _scaled(images: list[bytes], size: int) -> None:
    """Decoding at the least of 1/2, 1/4 and 1/8 that leaves every pixel of a crop at least one source pixel."""
    boxes = _boxes(ViewsConfig(kind="crop"), [image_size(data) for data in images])
    scales = [next((scale for scale in _SCALES if min(box[2:]) >= scale * size), 1) for box in boxes]
    jobs = [(data, box, scale) for data, box, scale in zip(images, boxes, scales, strict=True) if scale > 1]
    print(f"    scaled decoding for views at {size}: {len(jobs)} of {len(images)} crops are large enough")
    full_size = _simplejpeg()

    def full(data: bytes, box: list[int], _: int) -> torch.Tensor:
        return apply_view(full_size(data), box, False, size=size, interpolation="bicubic")

    def scaled(data: bytes, box: list[int], scale: int) -> torch.Tensor:
        width, height = (-(-side // scale) for side in image_size(data))
        pixels_CHW = _simplejpeg(min_factor=scale, min_width=width, min_height=height)(data)
        assert pixels_CHW.shape == (3, height, width)
        smaller = [round(side / scale) for side in box]
        return apply_view(pixels_CHW, smaller, False, size=size, interpolation="bicubic")

    variants = {"full": full, "scaled": scaled}
    seconds = interleaved(
        {name: lambda call=call: [call(*job) for job in jobs] for name, call in variants.items()}, rounds=ROUNDS
    )
    apart = [(full(*job).int() - scaled(*job).int()).abs() for job in jobs]
    mean = Spread.of([float(one.float().mean()) for one in apart])
    print(f"      full / scaled, decode and view: {ratio(seconds['full'], seconds['scaled'])}")
    print(f"      pixels differ by {mean} on average, by {max(int(one.max()) for one in apart)} at most")


def _synthetic() -> dict[str, bytes]:
    """Cases that photographs from one camera do not cover."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    cmyk = _jpeg(Image.fromarray(pixels, "CMYK"))
    adobe = cmyk.index(b"Adobe")
    rgb, exif = Image.fromarray(pixels[:, :, :3]), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    made = {f"subsampling {way}": _jpeg(rgb, subsampling=way) for way in range(3)}
    return {
        **made,
        "progressive": _jpeg(rgb, progressive=True),
        "restart markers": _jpeg(rgb, restart_marker_rows=1),
        "RGB without transform": _jpeg(rgb, keep_rgb=True),
        "grayscale": _jpeg(rgb.convert("L")),
        "one pixel": _jpeg(rgb.resize((1, 1))),
        "on its side": _jpeg(rgb, exif=exif),
        "CMYK": cmyk,
        # The marker's last byte names the transform; 2 is YCCK.
        "YCCK": cmyk[: adobe + 11] + b"\2" + cmyk[adobe + 12 :],
    }


def _jpeg(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


def _bomb() -> bytes:
    data = bytearray(_jpeg(Image.new("RGB", (64, 64))))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    return bytes(data) + os.urandom(1_000_000)


def _guard(bomb: bytes) -> None:
    def refused() -> None:
        try:
            decode(bomb, max_pixels=MAX_PIXELS)
        except Exception:
            return
        raise AssertionError("a bomb was decoded")

    seconds = interleaved({"guard": lambda: [refused() for _ in range(1000)]}, rounds=ROUNDS)["guard"]
    print(f"    a bomb of 65,000 x 65,000 is refused in {Spread.of([value * 1e3 for value in seconds])} us")
