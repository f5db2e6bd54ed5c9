"""Writes scenes for segmentation and detection: `python examples/scenes.py OUT --size 128x256 --train 2000 --val 400`.

A scene is a plane of Voronoi cells, each filled with one of 18 materials, and scikit-learn's digits pasted on them.
Each sample of OUT/train-*.tar and OUT/val-*.tar has

    jpg       the image
    mask.png  palette indices: 0 to 17 the material, 18 a digit, 255 a seam between two cells
    json      {"boxes": [[x, y, width, height], ...], "labels": [...], "crowd": [...]}, in pixels; labels are the digits

Colours, contrast and light are sampled independently of the material. 16 materials are a carrier (noise, stripes, grid,
dots) in an arrangement: its frequency is constant, or changes in bands, in blocks, or in blobs. The carrier shows
within a few pixels, the arrangement only within about 40. The other two are clouds and a mosaic; with `--photographs
FOLDER`, patches of the images in that folder (files, or members of .tar files) replace the mosaic.

A box is the extent of a digit's visible pixels. A box with crowd = 1 is a heap of small digits of one class.

The splits have different digits, photographs and random numbers, for every seed. A scene is a function of the seed, the
split and its number, so that any number of processes writes the same bytes. OUT/classes.json has the names of the
classes.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import multiprocessing
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from scene_materials import MATERIALS, TILE, tones

MOSAIC = MATERIALS.index("mosaic")
DIGIT, SEAM = len(MATERIALS), 255
NUM_DIGITS = 10
SPLITS = ("train", "val")
NUM_VAL_DIGITS = 500  # of 1,797
CELL_AREA, OBJECT_AREA = 3000, 4500  # pixels per cell, and per object on average
DIGIT_SIDES = (14, 34)
MIN_VISIBLE = 0.7  # of the pixels of each object
CROWD_SHARE = 0.08
_PHOTOGRAPH_SIDE = 192  # the shorter side to which photographs are scaled
_JPEG_QUALITY = 90
_MAX_LEVEL = 16  # scikit-learn's digits have 17 gray levels

Random = np.random.Generator
Integers = NDArray[np.int64]
Pixels = NDArray[np.uint8]
Flags = NDArray[np.bool_]
Sample = tuple[str, dict[str, bytes]]


@dataclass(frozen=True)
class Plan:
    """Everything that a scene depends on, except its number. ``size`` is height, width."""

    split: str
    size: tuple[int, int]
    seed: int = 0
    photographs: Path | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """An image uint8 [H,W,3] with its mask uint8 [H,W] and its N boxes (x, y, width, height)."""

    image_HWC: Pixels
    mask_HW: Pixels
    boxes_N4: list[list[int]]
    labels_N: list[int]
    crowd_N: list[int]


@dataclass(frozen=True, eq=False)
class Object:
    """The pixels of a digit or of a heap of digits: bool [h,w], with some in each row and column at the edges."""

    ink_hw: Flags
    label: int
    crowd: bool = False


def main(out: Path, plans: Sequence[tuple[Plan, int]], *, shard_size: int = 500, processes: int = 1) -> None:
    """Writes this number of scenes of each plan."""
    from pipeline.shards.writer import pack_shards  # imports torch, which the processes that render do without

    out.mkdir(parents=True, exist_ok=True)
    for plan, num_scenes in plans:
        pack_shards(samples(plan, num_scenes, processes), f"{out}/{plan.split}-%05d.tar", shard_size=shard_size)
        (out / "classes.json").write_text(json.dumps({"mask.png": class_names(plan), "json": [*"0123456789"]}))


def class_names(plan: Plan) -> list[str]:
    """The names of the 19 classes of masks."""
    return [*MATERIALS[:MOSAIC], "photograph" if plan.photographs else MATERIALS[MOSAIC], "digit"]


def samples(plan: Plan, num_scenes: int, processes: int) -> Iterator[Sample]:
    """The first scenes of a plan, in order."""
    if processes == 1:
        yield from map(partial(sample, plan), range(num_scenes))
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(partial(sample, plan), range(num_scenes), chunksize=8)


def sample(plan: Plan, number: int) -> Sample:
    """A scene as its key and members."""
    scene = build_scene(plan, number)
    image, mask = io.BytesIO(), io.BytesIO()
    Image.fromarray(scene.image_HWC).save(image, "JPEG", quality=_JPEG_QUALITY)
    indices = Image.fromarray(scene.mask_HW)
    indices.putpalette(palette())
    indices.save(mask, "PNG")
    boxes = json.dumps({"boxes": scene.boxes_N4, "labels": scene.labels_N, "crowd": scene.crowd_N})
    members = {"jpg": image.getvalue(), "mask.png": mask.getvalue(), "json": boxes.encode()}
    return f"{plan.split}{number:06d}", members


@cache
def palette() -> list[int]:
    """A colour for each class, black for the digits, and white for the seams."""
    colours = [colorsys.hsv_to_rgb(k * 7 / DIGIT % 1, 0.45 + 0.5 * (k % 2), 1 - 0.2 * (k % 3)) for k in range(DIGIT)]
    bytes_256C = np.full((256, 3), 255)
    bytes_256C[:DIGIT] = np.array(colours) * 255
    bytes_256C[DIGIT] = 0
    return bytes_256C.ravel().tolist()


@cache
def digits_of(split: str) -> list[Pixels]:
    """The images of each digit in a split, uint8 [N,8,8]; for every seed the same."""
    from sklearn.datasets import load_digits

    loaded = cast("Any", load_digits())
    order = np.random.default_rng(0).permutation(len(loaded.target))
    rows = order[:NUM_VAL_DIGITS] if split == "val" else order[NUM_VAL_DIGITS:]
    levels_N88 = (loaded.images[rows] * (255 / _MAX_LEVEL)).round().astype(np.uint8)
    return [levels_N88[loaded.target[rows] == digit] for digit in range(NUM_DIGITS)]


@cache
def photographs_of(split: str, folder: Path) -> list[Pixels]:
    """The photographs of a split, uint8 [h,w,3]: of a quarter by digest, so that copies are in one split.

    Raises:
        ValueError: the split has none.
    """
    images: list[Pixels] = []
    for data in image_files(folder):
        if (hashlib.sha256(data).digest()[0] % 4 == 0) == (split == "val"):
            with Image.open(io.BytesIO(data)) as image:
                width, height = (round(side * _PHOTOGRAPH_SIDE / min(image.size)) for side in image.size)
                images.append(np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)))
    if not images:
        raise ValueError(f"{folder} has no .jpg, .jpeg or .png for the split {split}")
    return images


def image_files(folder: Path) -> Iterator[bytes]:
    suffixes = {".jpg", ".jpeg", ".png"}
    for path in sorted(folder.iterdir()):
        if path.suffix in suffixes:
            yield path.read_bytes()
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    if member.isfile() and Path(member.name).suffix in suffixes:
                        yield cast("io.BufferedReader", tar.extractfile(member)).read()


def build_scene(plan: Plan, number: int) -> Scene:
    """Equal versions of the libraries build equal scenes: floats are neither summed nor passed to libm."""
    rng = np.random.default_rng([plan.seed, SPLITS.index(plan.split), number])
    photographs = photographs_of(plan.split, plan.photographs) if plan.photographs else None
    height, width = plan.size
    num_cells = max(2, height * width // CELL_AREA)
    site_N2 = np.stack([rng.integers(side, size=num_cells) for side in plan.size], axis=1)
    image_HWC, mask_HW = background(plan.size, site_N2, rng.integers(DIGIT, size=num_cells), photographs, rng)
    num_objects = rng.integers(2 * height * width // OBJECT_AREA + 1)
    objects = [sampled_object(digits_of(plan.split), rng) for _ in range(num_objects)]
    owner_HW, pasted = paste(objects, plan.size, rng)
    for index in range(len(pasted)):
        tint(image_HWC, owner_HW == index, rng)
    mask_HW[owner_HW >= 0] = DIGIT
    return Scene(
        exposed(image_HWC, rng),
        mask_HW,
        [extent(owner_HW == index) for index in range(len(pasted))],
        [item.label for item in pasted],
        [int(item.crowd) for item in pasted],
    )


def background(
    size: tuple[int, int], site_N2: Integers, material_N: Integers, photographs: list[Pixels] | None, rng: Random
) -> tuple[Pixels, Pixels]:
    """The image uint8 [H,W,3] and the mask uint8 [H,W] of cells with these sites (row, column) and materials."""
    cell_HW = nearest(site_N2, size)
    tile = rng.random((TILE, TILE), np.float32)
    image_HWC = np.empty((*size, 3), np.float32)
    for cell, material in enumerate(material_N.tolist()):
        row_P, column_P = np.nonzero(cell_HW == cell)
        if material == MOSAIC and photographs:
            image_HWC[row_P, column_P] = patch(photographs, row_P, column_P, rng)
            continue
        tone_P = tones(material, np.stack([column_P, row_P]), tile, rng)
        base_C, share_C = rng.uniform(70, 185, 3), rng.uniform(0.5, 1.2, 3)
        contrast_C = (share_C * rng.uniform(25, 65)).astype(np.float32)
        image_HWC[row_P, column_P] = base_C.astype(np.float32) + contrast_C * tone_P[:, None]
    mask_HW = material_N.astype(np.uint8)[cell_HW]
    mask_HW[seams(cell_HW)] = SEAM
    return to_bytes(image_HWC), mask_HW


def nearest(site_N2: Integers, size: tuple[int, int]) -> Integers:
    """The index [H,W] of the site (row, column) nearest to each pixel; of equally near ones the first."""
    row_H, column_W = (np.arange(side) for side in size)
    squares_NHW = (row_H - site_N2[:, :1])[:, :, None] ** 2 + (column_W - site_N2[:, 1:])[:, None, :] ** 2
    return squares_NHW.argmin(axis=0)


def seams(cell_HW: Integers) -> Flags:
    """The pixels that have a pixel of another cell above, below, to the left or to the right."""
    seam_HW = np.zeros(cell_HW.shape, bool)
    below_HW, right_HW = cell_HW[1:] != cell_HW[:-1], cell_HW[:, 1:] != cell_HW[:, :-1]
    seam_HW[1:] |= below_HW
    seam_HW[:-1] |= below_HW
    seam_HW[:, 1:] |= right_HW
    seam_HW[:, :-1] |= right_HW
    return seam_HW


def patch(photographs: list[Pixels], row_P: Integers, column_P: Integers, rng: Random) -> Pixels:
    """Pixels [P,3] of a photograph at a random place; it is mirrored at its edges."""
    photograph = photographs[rng.integers(len(photographs))]
    row_P, column_P = (
        np.abs((place_P + rng.integers(2 * side)) % (2 * side) - side + 0.5).astype(np.int64)
        for place_P, side in zip((row_P, column_P), photograph.shape, strict=False)
    )
    return photograph[row_P, column_P]


def sampled_object(digits: list[Pixels], rng: Random) -> Object:
    label = int(rng.integers(NUM_DIGITS))
    if rng.random() >= CROWD_SHARE:
        return Object(stamp(digits[label], int(rng.integers(*DIGIT_SIDES)), rng), label)
    heap_hw = np.zeros((48, 48), bool)
    for _ in range(rng.integers(4, 8)):
        ink_hw = stamp(digits[label], DIGIT_SIDES[0], rng)
        top, left = (int(rng.integers(full - side + 1)) for full, side in zip(heap_hw.shape, ink_hw.shape, strict=True))
        heap_hw[top : top + ink_hw.shape[0], left : left + ink_hw.shape[1]] |= ink_hw
    return Object(cropped(heap_hw), label, crowd=True)


def stamp(images_N88: Pixels, side: int, rng: Random) -> Flags:
    """The ink of one of the images at this size, turned by up to 25 degrees."""
    image = Image.fromarray(images_N88[rng.integers(len(images_N88))]).resize((side, side), Image.Resampling.BICUBIC)
    image = image.rotate(int(rng.integers(-25, 26)), Image.Resampling.BICUBIC, expand=True)
    return cropped(np.asarray(image) > 110)


def cropped(ink_hw: Flags) -> Flags:
    x, y, width, height = extent(ink_hw)
    return ink_hw[y : y + height, x : x + width]


def extent(ink_hw: Flags) -> list[int]:
    """x, y, width and height of the smallest box around these pixels."""
    row_P, column_P = np.nonzero(ink_hw)
    x, y = int(column_P.min()), int(row_P.min())
    return [x, y, int(column_P.max()) - x + 1, int(row_P.max()) - y + 1]


def paste(objects: Sequence[Object], size: tuple[int, int], rng: Random) -> tuple[Integers, list[Object]]:
    """Objects at random places, later ones in front.

    Returns:
        The index of the visible object of each pixel [H,W], -1 without one; and the objects without those for which 8
        places were too small or would have hidden too much of another.
    """
    owner_HW, pasted = np.full(size, -1), list[Object]()
    for item in objects:
        height, width = item.ink_hw.shape
        if height > size[0] or width > size[1]:
            continue
        for _ in range(8):
            top, left = rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)
            tried_HW = owner_HW.copy()
            tried_HW[top : top + height, left : left + width][item.ink_hw] = len(pasted)
            visible_N = np.bincount(tried_HW[tried_HW >= 0], minlength=len(pasted))
            if all(visible_N[k] >= MIN_VISIBLE * other.ink_hw.sum() for k, other in enumerate(pasted)):
                owner_HW = tried_HW
                pasted.append(item)
                break
    return owner_HW, pasted


def tint(image_HWC: Pixels, visible_HW: Flags, rng: Random) -> None:
    """Gives these pixels one colour that is brighter or darker than their mean."""
    pixels_PC = image_HWC[visible_HW].astype(np.int64)
    mean_C = pixels_PC.sum(axis=0) / len(pixels_PC)
    sign = 1 if rng.uniform(0, 255) > mean_C[1] else -1
    image_HWC[visible_HW] = to_bytes(mean_C + sign * rng.uniform(50, 110, 3))


def exposed(image_HWC: Pixels, rng: Random) -> Pixels:
    """The image in uneven light, out of focus by up to 0.8 pixels, with noise of up to 20 levels."""
    height, width, _ = image_HWC.shape
    slope_y, slope_x = rng.uniform(-0.4, 0.4, 2)
    y_H, x_W = np.arange(height) / height - 0.5, np.arange(width) / width - 0.5
    gain_HW = rng.uniform(0.8, 1.1) + slope_y * y_H[:, None] + slope_x * x_W
    lit = Image.fromarray(to_bytes(image_HWC * gain_HW[..., None]))
    blurred_HWC = np.asarray(lit.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.8))))
    level = int(rng.integers(4, 21))
    return to_bytes(blurred_HWC + rng.integers(-level, level, image_HWC.shape, np.int16, endpoint=True))


def to_bytes(values: NDArray[Any]) -> Pixels:
    return values.round().clip(0, 255).astype(np.uint8)


def height_width(text: str) -> tuple[int, int]:
    height, width = map(int, text.split("x"))
    return height, width


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Writes scenes for segmentation and detection.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--size", type=height_width, default=(128, 256), metavar="HEIGHTxWIDTH")
    parser.add_argument("--train", type=int, default=2000, help="number of scenes")
    parser.add_argument("--val", type=int, default=400, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--photographs", type=Path, metavar="FOLDER")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--shard-size", type=int, default=500)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parsed()
    by_split = {split: Plan(split, options.size, options.seed, options.photographs) for split in SPLITS}
    sets = [(by_split["train"], options.train), (by_split["val"], options.val)]
    main(options.out, sets, shard_size=options.shard_size, processes=options.processes)
