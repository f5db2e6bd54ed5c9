"""The scenes of examples/scenes.py: exact masks and boxes, disjoint splits, the same bytes everywhere."""

from __future__ import annotations

import importlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NUM_TRAIN, NUM_VAL = 60, 20


def imported(name: str) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def scenes() -> Any:
    return imported("scenes")


@pytest.fixture(scope="module")
def materials() -> Any:
    return imported("scene_materials")


@pytest.fixture(scope="module")
def scene_shards(scenes: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    plans = [(scenes.Plan("train", (96, 128)), NUM_TRAIN), (scenes.Plan("val", (96, 128)), NUM_VAL)]
    scenes.main(folder, plans, shard_size=45)
    return folder


def members(folder: Path, split: str) -> dict[str, dict[str, bytes]]:
    """The members of each sample by extension, read with tarfile alone."""
    samples: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples.setdefault(key, {})[extension] = tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]
    return samples


def brute_cells(sites: list[tuple[int, int]], height: int, width: int) -> list[list[int]]:
    distances = [[[(y - a) ** 2 + (x - b) ** 2 for a, b in sites] for x in range(width)] for y in range(height)]
    return [[row.index(min(row)) for row in line] for line in distances]


def brute_box(is_inside: Callable[[int, int], bool], height: int, width: int) -> list[int]:
    inside = [(x, y) for y in range(height) for x in range(width) if is_inside(y, x)]
    left, top = (min(place[axis] for place in inside) for axis in (0, 1))
    right, bottom = (max(place[axis] for place in inside) for axis in (0, 1))
    return [left, top, right - left + 1, bottom - top + 1]


def test_a_mask_has_the_material_of_the_nearest_site_and_seams_between_cells(scenes: Any) -> None:
    height, width = 23, 31
    # Two sites at equal distance of many pixels, and two at the same place.
    sites = [(4, 6), (4, 20), (18, 3), (15, 25), (15, 25), (21, 14)]
    materials = [0, 16, 17, 5, 9, 12]
    image_HWC, mask_HW = scenes.background(
        (height, width), np.array(sites), np.array(materials), None, np.random.default_rng(0)
    )
    cells = brute_cells(sites, height, width)
    for y in range(height):
        for x in range(width):
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            others = {cells[b][a] for b, a in around if 0 <= b < height and 0 <= a < width}
            assert mask_HW[y, x] == (materials[cells[y][x]] if others <= {cells[y][x]} else 255)
    assert (image_HWC.shape, image_HWC.dtype) == ((height, width, 3), np.uint8)
    assert set(np.unique(mask_HW)) == {0, 16, 17, 5, 12, 255}


def test_the_image_shows_the_materials_of_the_mask(scenes: Any) -> None:
    def roughness(pixels_HWC: NDArray[np.uint8]) -> float:
        """The mean difference of neighbours, relative to the deviation: small for coarse patterns."""
        gray_HW = pixels_HWC.mean(axis=2)
        return float(np.abs(np.diff(gray_HW)).mean() / gray_HW.std())

    sites_N2 = np.array([[20, 20], [20, 60]])
    for seed in range(5):
        for materials in ([16, 0], [0, 16]):
            image_HWC, _ = scenes.background((40, 80), sites_N2, np.array(materials), None, np.random.default_rng(seed))
            halves = [roughness(image_HWC[:, start : start + 40]) for start in (0, 40)]
            assert 1.3 * halves[materials.index(16)] < halves[materials.index(0)]


def test_arrangements_change_the_frequency_in_bands_blocks_and_blobs(materials: Any) -> None:
    part = materials.is_second_part
    tile = np.random.default_rng(0).random((64, 64), np.float32)
    x_P, y_P = np.random.default_rng(1).uniform(0, 50, (2, 5000)).astype(np.float32)
    parts_A = [part(arrangement, x_P, y_P, tile) for arrangement in range(4)]
    assert not parts_A[0].any()
    assert all(0.4 < second_P.mean() < 0.6 for second_P in parts_A[1:])
    half_P = y_P + np.float32(0.5)
    assert (part(1, x_P, half_P, tile) == parts_A[1]).all()
    assert (part(2, x_P, half_P, tile) != parts_A[2]).all()
    assert 0.2 < (part(3, x_P, half_P, tile) != parts_A[3]).mean() < 0.8


def test_a_box_is_the_extent_of_the_visible_pixels(scenes: Any) -> None:
    height, width = 48, 64
    num_hidden = 0
    for seed in range(3):
        rng = np.random.default_rng(seed)
        objects = [scenes.sampled_object(scenes.digits_of("train"), rng) for _ in range(7)]
        owner_HW, pasted = scenes.paste(objects, (height, width), rng)
        image_HWC = rng.integers(90, 120, (height, width, 3), np.uint8)
        for index, item in enumerate(pasted):
            visible_HW = owner_HW == index
            tinted_HWC = image_HWC.copy()
            scenes.tint(tinted_HWC, visible_HW, rng)

            def is_changed(y: int, x: int, after: Any = tinted_HWC, before: Any = image_HWC) -> bool:
                return after[y, x].tolist() != before[y, x].tolist()

            assert scenes.extent(visible_HW) == brute_box(is_changed, height, width)
            assert 0.7 * item.ink_hw.sum() <= visible_HW.sum() <= item.ink_hw.sum()
            num_hidden += visible_HW.sum() < item.ink_hw.sum()
    assert num_hidden > 0


def test_the_only_digit_of_a_scene_fills_its_box(scenes: Any) -> None:
    plan = scenes.Plan("val", (96, 96), seed=3)
    built = [scenes.build_scene(plan, number) for number in range(12)]
    assert any(not scene.boxes_N4 for scene in built)
    alone = [scene for scene in built if len(scene.boxes_N4) == 1]
    assert len(alone) >= 2
    for scene in alone:
        assert scene.boxes_N4 == [brute_box(lambda y, x, mask=scene.mask_HW: mask[y, x] == 18, 96, 96)]
    for scene in built:
        outside_HW = scene.mask_HW == 18
        for x, y, box_width, box_height in scene.boxes_N4:
            outside_HW[y : y + box_height, x : x + box_width] = False
        assert not outside_HW.any()


def test_shards_have_all_classes_in_their_shares(scene_shards: Path) -> None:
    names = json.loads((scene_shards / "classes.json").read_text())
    assert [len(names["mask.png"]), len(set(names["mask.png"])), names["json"]] == [19, 19, [*"0123456789"]]
    assert [path.name for path in sorted(scene_shards.glob("*.tar"))] == [
        "train-00000.tar",
        "train-00001.tar",
        "val-00000.tar",
    ]
    samples = members(scene_shards, "train")
    assert len(samples) == NUM_TRAIN
    pixels, labels, num_crowds = Counter[int](), Counter[int](), 0
    for sample in samples.values():
        image, mask = (Image.open(io.BytesIO(sample[extension])) for extension in ("jpg", "mask.png"))
        assert (image.format, image.mode, mask.mode) == ("JPEG", "RGB", "P")
        assert image.size == mask.size == (128, 96)
        pixels.update(np.asarray(mask).ravel().tolist())
        target = json.loads(sample["json"])
        assert list(target) == ["boxes", "labels", "crowd"]
        for (x, y, width, height), label, crowd in zip(*target.values(), strict=True):
            assert x >= 0 < width <= 128 - x
            assert y >= 0 < height <= 96 - y
            labels[label] += 1
            num_crowds += crowd
    share = {value: count / pixels.total() for value, count in pixels.items()}
    assert set(share) == {*range(19), 255}
    assert all(0.02 < share[material] < 0.09 for material in range(18))
    assert 0.02 < share[18] < 0.06
    assert 0.02 < share[255] < 0.07
    assert set(labels) == set(range(10))
    assert 0 < num_crowds < 0.2 * labels.total()


def test_splits_have_different_digits_and_scenes(scenes: Any, scene_shards: Path) -> None:
    digits = [{image.tobytes() for images in scenes.digits_of(split) for image in images} for split in scenes.SPLITS]
    assert [len(images) for images in digits] == [1297, 500]
    assert not digits[0] & digits[1]
    images = [sample["jpg"] for split in scenes.SPLITS for sample in members(scene_shards, split).values()]
    images += [scenes.sample(scenes.Plan("train", (96, 128), seed=1), number)[1]["jpg"] for number in range(5)]
    assert len(set(images)) == len(images) == NUM_TRAIN + NUM_VAL + 5


def test_photographs_replace_the_mosaic_and_are_in_one_split(scenes: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(24):
        # Each photograph has one colour, and a copy in a tar file.
        image = Image.new("RGB", (30 + number, 20), tuple(rng.integers(256, size=3).tolist()))
        image.save(tmp_path / f"{number:02d}.png")
    with tarfile.open(tmp_path / "more.tar", "w") as tar:
        for path in sorted(tmp_path.glob("*.png")):
            tar.add(path, f"copy-{path.name}")
    (tmp_path / "notes.txt").write_text("no photograph")
    by_split = {split: scenes.photographs_of(split, tmp_path) for split in scenes.SPLITS}
    colours = {split: [tuple(image[0, 0]) for image in images] for split, images in by_split.items()}
    assert not set(colours["train"]) & set(colours["val"])
    assert len({*colours["train"], *colours["val"]}) == 24
    assert all({*Counter(found).values()} == {2} for found in colours.values())
    assert {min(image.shape[:2]) for image in by_split["val"]} == {192}

    image_HWC, mask_HW = scenes.background(
        (40, 80), np.array([[20, 20], [20, 60]]), np.array([17, 0]), by_split["val"], np.random.default_rng(0)
    )
    assert {tuple(pixel) for pixel in image_HWC[mask_HW == 17]} <= set(colours["val"])
    assert scenes.class_names(scenes.Plan("val", (40, 80), photographs=tmp_path))[17] == "photograph"
    with pytest.raises(ValueError, match="val"):
        scenes.photographs_of("val", EXAMPLES)


def test_a_patch_of_a_photograph_has_its_pixels_in_order(scenes: Any) -> None:
    photograph_HWC = np.arange(50 * 60 * 3).reshape(50, 60, 3)
    row_P, column_P = (places.ravel() for places in np.mgrid[:20, :20])
    for seed in range(10):
        patch_HWC = scenes.patch([photograph_HWC], row_P, column_P, np.random.default_rng(seed)).reshape(20, 20, 3)
        steps = {
            *np.abs(np.diff(patch_HWC[..., 0], axis=0)).ravel(),
            *np.abs(np.diff(patch_HWC[..., 0], axis=1)).ravel(),
        }
        # Neighbours are neighbours in the photograph, or equal where it is mirrored.
        assert steps <= {0, 3, 180}


@pytest.mark.long
def test_processes_on_an_older_processor_write_the_same_bytes(scene_shards: Path, tmp_path: Path) -> None:
    extensions: Any = np.show_config(mode="dicts")
    disabled = " ".join(extensions["SIMD Extensions"].get("found", []))
    env = {**os.environ, "NPY_DISABLE_CPU_FEATURES": disabled, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(EXAMPLES / "scenes.py"), str(tmp_path), "--size=96x128", "--processes=2"]
    command += [f"--train={NUM_TRAIN}", f"--val={NUM_VAL}", "--shard-size=45"]
    subprocess.run(command, env=env, check=True)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_bytes() for path in scene_shards.iterdir()}
