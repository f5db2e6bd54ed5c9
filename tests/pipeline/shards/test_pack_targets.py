"""Masks and boxes that are packed with images, read again by webdataset and by the index."""

from __future__ import annotations

import hashlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from jobs.cli import app
from jobs.pack_shards import describe
from pipeline.core.errors import ShardError
from pipeline.shards.index import STATUSES, index_shard
from pipeline.shards.omissions import Omissions
from pipeline.shards.pack import BadImages, write_packing
from pipeline.shards.pack_plan import Packing, PackSettings, plan_packing
from pipeline.shards.pack_targets import TargetSource
from pipeline.storage.config_files import load_config
from tests.errors import raises
from tests.pipeline.shards.tars import image_bytes, webdataset_samples

WIDTH, HEIGHT = 9, 6
PATHS = ["a/x.1.jpg", "a/x.2.JPEG", "b/y.webp", "b/z.png"]
CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 90, "name": "Ä: {eel}"}]


def mask_png(values: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, files: dict[str, bytes]) -> str:
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return str(folder)


@pytest.fixture
def images(tmp_path: Path) -> str:
    forms = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "png": "PNG"}
    return write(
        tmp_path / "images",
        {path: image_bytes(forms[path.rpartition(".")[2].lower()], size=(WIDTH, HEIGHT)) for path in PATHS},
    )


@pytest.fixture
def masks() -> dict[str, bytes]:
    """By path: of all images but the last one."""
    return {
        f"{path.rpartition('.')[0]}.png": mask_png(np.full((HEIGHT, WIDTH), at)) for at, path in enumerate(PATHS[:3])
    }


def coco(**changes: Any) -> dict[str, Any]:
    """Of all images but the last one; the third one has no annotation."""
    return {
        "images": [{"id": 10 + at, "file_name": path, "width": 1, "height": 1} for at, path in enumerate(PATHS[:3])],
        "categories": CATEGORIES,
        "annotations": [
            {"id": 0, "image_id": 11, "category_id": 90, "bbox": [0.5, 1, 3, 2.25], "iscrowd": 1},
            {"id": 1, "image_id": 10, "category_id": 7, "bbox": [0, 0, 9, 6], "iscrowd": 0},
            {"id": 2, "image_id": 11, "category_id": 3, "bbox": [1, 2, 3, 4], "segmentation": [[1, 2, 3]]},
        ],
        **changes,
    }


def coco_file(tmp_path: Path, **changes: Any) -> TargetSource:
    (tmp_path / "coco.json").write_text(json.dumps(coco(**changes)))
    return TargetSource("coco", str(tmp_path / "coco.json"))


def packed(
    images: str,
    out: Path,
    targets: TargetSource,
    bad_images: BadImages = "fail",
    classes: dict[str, int] | None = None,
    omissions: Omissions | None = None,
) -> tuple[Packing, dict[str, dict[str, bytes]]]:
    """The plan, and the members of each sample by key and extension."""
    settings = PackSettings(labels="none")
    packing = plan_packing(images, settings, targets=targets, classes=classes)
    list(write_packing(packing, str(out), bad_images=bad_images, omissions=omissions))
    samples = [sample for path in sorted(out.glob("*.tar")) for sample in webdataset_samples(path)]
    return packing, {
        sample["__key__"]: {name: data for name, data in sample.items() if not name.startswith("__")}
        for sample in samples
    }


def members_of(samples: dict[str, dict[str, bytes]]) -> dict[str, set[str]]:
    return {key: {*members} for key, members in samples.items()}


def test_images_are_packed_with_the_masks_of_the_same_paths(
    images: str, masks: dict[str, bytes], tmp_path: Path
) -> None:
    folder = write(tmp_path / "masks", {**masks, "b/none.png": b"", PATHS[0]: b"x", ".DS_Store": b"x"})
    packing, samples = packed(images, tmp_path / "out", TargetSource("masks", folder))
    assert members_of(samples) == {
        "a/x_1": {"jpg", "mask.png"},
        "a/x_2": {"jpeg", "mask.png"},
        "b/y": {"webp", "mask.png"},
        "b/z": {"png"},
    }
    assert [samples[key]["mask.png"] for key in ("a/x_1", "a/x_2", "b/y")] == [*masks.values()]
    assert samples["b/z"]["png"] == (Path(images) / "b/z.png").read_bytes()
    assert packing.without_target == ["b/z.png"]
    assert packing.skipped.counts == {"masks without an image": 1, "files that are no PNG": 1}
    assert packing.skipped.examples["masks without an image"] == ["b/none.png"]


def test_masks_may_lie_in_the_tree_of_the_images(images: str, masks: dict[str, bytes], tmp_path: Path) -> None:
    tree = Path(images)
    (tree / "b/z.png").unlink()
    write(tree / "a/deep/masks", masks)
    packing, samples = packed(images, tmp_path / "below", TargetSource("masks", f"{images}/a/deep/masks/"))
    assert (members_of(samples)["b/y"], len(samples), packing.without_target) == ({"webp", "mask.png"}, 3, [])
    write(tree, masks)
    (tree / "a/deep").rename(tmp_path / "deep")
    packing, samples = packed(images, tmp_path / "among", TargetSource("masks", images))
    assert (members_of(samples)["a/x_1"], len(samples), packing.without_target) == ({"jpg", "mask.png"}, 3, [])
    assert not packing.skipped.counts


def test_images_and_masks_may_end_differently(masks: dict[str, bytes], tmp_path: Path) -> None:
    """The layout of Cityscapes, and one folder of images and masks, both PNG."""
    mask, image = masks["a/x.1.png"], image_bytes(size=(WIDTH, HEIGHT))
    images = write(tmp_path / "leftImg8bit", {f"ulm/u_{at}_leftImg8bit.png": image for at in range(3)})
    names = ["0_gtFine_labelTrainIds.png", "1_gtFine_labelTrainIds.png", "2_gtFine_color.png", "0_gtFine_polygons.json"]
    folder = write(tmp_path / "gtFine", {f"ulm/u_{name}": mask for name in names})
    targets = TargetSource.of(
        masks=folder, coco=None, image_suffix="_leftImg8bit", mask_suffix="_gtFine_labelTrainIds.png"
    )
    assert targets is not None
    packing, samples = packed(images, tmp_path / "out", targets)
    assert [samples[f"ulm/u_{at}_leftImg8bit"].get("mask.png") for at in range(3)] == [mask, mask, None]
    assert packing.skipped.counts == {"PNGs without _gtFine_labelTrainIds": 1, "files that are no PNG": 1}
    (Path(images) / "ulm/more_leftImg8bit.png").write_bytes(image)
    with raises("pack.other-packing") as caught:
        packed(images, tmp_path / "out", targets)
    command = shlex.split(str(caught.value.next_step).removeprefix("run: "))
    command[4] = str(tmp_path / "again")
    result = CliRunner().invoke(app, command[1:])
    assert (result.exit_code, "2 of 4 images have no mask" in result.output) == (0, True)
    together = write(tmp_path / "together", {"a.png": image, "b.png": image, "a_mask.png": mask, "b_mask.png": mask})
    _, samples = packed(together, tmp_path / "one", TargetSource("masks", together, mask_suffix="_mask"))
    assert members_of(samples) == {"a": {"png", "mask.png"}, "b": {"png", "mask.png"}}


def test_boxes_have_class_indexes_in_the_order_of_category_ids(images: str, tmp_path: Path) -> None:
    targets = coco_file(tmp_path, images=[*coco()["images"], {"id": 5, "file_name": "gone.jpg"}])
    packing, samples = packed(images, tmp_path / "out", targets)
    assert {key: json.loads(members["json"]) for key, members in samples.items() if "json" in members} == {
        "a/x_1": {"boxes": [[0, 0, 9, 6]], "labels": [1], "crowd": [0]},
        "a/x_2": {"boxes": [[0.5, 1, 3, 2.25], [1, 2, 3, 4]], "labels": [2, 0], "crowd": [1, 0]},
        "b/y": {"boxes": [], "labels": [], "crowd": []},
    }
    assert json.loads((tmp_path / "out/classes.json").read_text()) == {"dog": 0, "cat": 1, "Ä: {eel}": 2}
    assert packing.without_target == ["b/z.png"]
    assert packing.skipped.counts == {"images of the file that are not in the folder": 1}
    # A second packing has the indexes of the first, also with fewer categories.
    fewer = coco_file(tmp_path, categories=CATEGORIES[:1], annotations=[coco()["annotations"][1]])
    _, samples = packed(images, tmp_path / "again", fewer, classes=packing.classes)
    assert json.loads(samples["a/x_1"]["json"])["labels"] == [1]
    with raises("pack.unknown-class", ShardError):
        packed(images, tmp_path / "unknown", fewer, classes={"dog": 0, "eel": 1})


WRONG_FILES: dict[str, Any] = {
    "no categories": {"categories": None},
    "unknown category": {"annotations": [{"image_id": 10, "category_id": 4, "bbox": [1, 1, 1, 1]}]},
    "unknown image": {"annotations": [{"image_id": 9, "category_id": 3, "bbox": [1, 1, 1, 1]}]},
    "no box": {"annotations": [{"image_id": 10, "category_id": 3, "caption": "a dog"}]},
    "two categories of a name": {"categories": [*CATEGORIES, {"id": 8, "name": "cat"}]},
    "two images of a name": {"images": [*coco()["images"], {"id": 5, "file_name": PATHS[0]}]},
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_of_another_form_is_refused(images: str, tmp_path: Path, name: str) -> None:
    with raises("pack.bad-coco", ShardError):
        packed(images, tmp_path / "out", coco_file(tmp_path, **WRONG_FILES[name]))
    assert not (tmp_path / "out").exists()


def test_a_folder_or_file_with_other_paths_is_refused(images: str, masks: dict[str, bytes], tmp_path: Path) -> None:
    for source in (
        TargetSource("masks", write(tmp_path / "masks", {f"deep/{path}": data for path, data in masks.items()})),
        TargetSource("masks", str(tmp_path / "nowhere")),
        coco_file(tmp_path, images=[{"id": 1, "file_name": "images/a/x.1.jpg"}], annotations=[]),
    ):
        with raises("pack.no-targets", ShardError):
            packed(images, tmp_path / "out", source)


BAD_BOXES: dict[str, Any] = {
    "outside": [0, 0, 11, 3],
    "no area": [1, 1, 0, 3],
    "nan": [1, 1, float("nan"), 3],
    "three numbers": [1, 1, 3],
    "texts": ["1", "1", "3", "3"],
}


def bad_masks() -> dict[str, bytes]:
    return {
        "smaller": mask_png(np.zeros((HEIGHT - 1, WIDTH))),
        "of the rotated image": mask_png(np.zeros((WIDTH, HEIGHT))),
        "colours": image_bytes("PNG", size=(WIDTH, HEIGHT)),
        "a JPEG": image_bytes("JPEG", size=(WIDTH, HEIGHT)),
        "damaged": mask_png(np.zeros((HEIGHT, WIDTH)))[:45],
        "empty": b"",
    }


@pytest.mark.parametrize("name", [*BAD_BOXES, *bad_masks()])
def test_bad_masks_and_boxes_stop_a_packing_are_left_out_or_copied(
    images: str, masks: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    if name in BAD_BOXES:
        wrong = {"image_id": 10, "category_id": 3, "bbox": BAD_BOXES[name]}
        targets = coco_file(tmp_path, annotations=[*coco()["annotations"], wrong])
    else:
        targets = TargetSource("masks", write(tmp_path / "masks", {**masks, "a/x.1.png": bad_masks()[name]}))
    with raises("pack.bad-images", ShardError) as caught:
        packed(images, tmp_path / "out", targets)
    assert str(caught.value.got).startswith("1 images whose mask or boxes cannot be used (a/x.1.jpg: ")
    omissions = Omissions()
    _, samples = packed(images, tmp_path / "out", targets, "skip", omissions=omissions)
    assert ({*samples}, omissions.counts.total()) == ({"a/x_2", "b/y", "b/z"}, 1)
    _, samples = packed(images, tmp_path / "copied", targets, "pack")
    assert len(samples) == 4
    # The index finds what was not checked here.
    (tar,) = (tmp_path / "copied").glob("*.tar")
    keys = {
        "task": "segmentation" if name in bad_masks() else "detection",
        "image": "jpg;jpeg;webp;png",
        "num_classes": 3,
    }
    document = tmp_path / "config.yaml"
    document.write_text(yaml.safe_dump({"data": {**keys, "bad_samples": "skip"}}))
    index = index_shard(tar, load_config(str(document)).data, where=str(tar))
    statuses = {str(key): STATUSES[status] for key, status in zip(index.keys.to_pylist(), index.status, strict=True)}
    assert statuses == {**dict.fromkeys(samples, "ok"), "a/x_1": "bad_target"}


def test_a_packing_of_other_targets_is_another_packing(images: str, masks: dict[str, bytes], tmp_path: Path) -> None:
    targets = coco_file(tmp_path)
    packed(images, tmp_path / "out", targets)
    packed(images, tmp_path / "out", targets)
    for other in (
        coco_file(tmp_path, annotations=[]),
        TargetSource("masks", write(tmp_path / "masks", masks)),
    ):
        with raises("pack.other-packing") as caught:
            packed(images, tmp_path / "out", other)
        command = shlex.split(str(caught.value.next_step).removeprefix("run: "))
        assert command[1:] == [
            "shards",
            "pack",
            images,
            f"{tmp_path}/out-2",
            "--labels",
            "none",
            f"--{other.kind}",
            other.url,
        ]
    # Without targets the record has the bytes of earlier versions.
    plain = plan_packing(images, PackSettings(labels="none"))
    (packed_images,) = plain.shards.values()
    source = json.dumps([[each.key, each.extension, each.size_bytes] for each in packed_images], separators=(",", ":"))
    assert json.loads(plain.record())["source"] == hashlib.sha256(source.encode()).hexdigest()


@pytest.mark.parametrize("kind", ["masks", "coco"])
def test_the_printed_section_indexes_the_shards(
    images: str, masks: dict[str, bytes], tmp_path: Path, kind: str
) -> None:
    source = coco_file(tmp_path) if kind == "coco" else TargetSource("masks", write(tmp_path / "masks", masks))
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["shards", "pack", images, str(out), f"--{kind}", source.url])
    assert result.exit_code == 0, result.output
    assert "1 of 4 images have no" in result.output
    section = describe(plan_packing(images, PackSettings(labels="none"), targets=source), str(out))
    assert section in result.output
    (tmp_path / "config.yaml").write_text(section)
    data = load_config(str(tmp_path / "config.yaml"), ["data.num_classes=3"]).data
    (tar,) = out.glob("*.tar")
    index = index_shard(tar, data, where=str(tar))
    assert (index.num_ok, int(index.task.has_target(index.targets).sum())) == (4, 3)


@pytest.mark.parametrize(
    "options",
    [
        "--masks M --coco C",
        "--coco C --mask-suffix _m",
        "--image-suffix _i",
        "--masks M --labels folder",
        "--masks M --classes C",
        "--labels none --classes C",
    ],
)
def test_options_that_exclude_each_other_are_refused(images: str, tmp_path: Path, options: str) -> None:
    (tmp_path / "classes.json").write_text('{"a": 0, "b": 1}')
    given = options.replace("--classes C", f"--classes {tmp_path}/classes.json").split()
    result = CliRunner().invoke(app, ["shards", "pack", images, str(tmp_path / "out"), *given])
    assert result.exit_code == 2
    assert "[pack.conflicting-options]" in result.output
