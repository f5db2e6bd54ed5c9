from __future__ import annotations

import json
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from pipeline import storage
from pipeline.core.errors import ShardError, StillroomError, StorageInputError
from pipeline.shards.pack import BadImages, write_packing
from pipeline.shards.pack_plan import PackSettings, plan_packing
from pipeline.shards.split_folders import split_folders
from tests.errors import raises
from tests.pipeline.shards.tars import image_bytes, webdataset_samples

NUM_IMAGES = {"ant": 30, "bee": 20, "cat": 10}
IMAGE = image_bytes(size=(8, 9))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Three classes of distinct images in separate folders, some of them in a subfolder."""
    for name, count in NUM_IMAGES.items():
        for row in range(count):
            path = tmp_path / "tree" / name / ("deep" if row % 5 == 0 else "") / f"{name}.{row:02}.{_extension(row)}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(image_bytes("JPEG" if row % 2 else "PNG", size=(8 + row, 9)) + name.encode())
    return tmp_path / "tree"


def _extension(row: int) -> str:
    return ("png", "JPEG")[row % 2]


def packed(
    tree: Path | str,
    out: Path | str,
    classes: dict[str, int] | None = None,
    links_out: bool = False,
    bad_images: BadImages = "fail",
    **settings: Any,
) -> list[str]:
    """The shards' names."""
    packing = plan_packing(str(tree), PackSettings(**settings), classes=classes, links_out=links_out)
    assert sum(write_packing(packing, str(out), bad_images=bad_images)) == packing.num_images
    return list(packing.shards)


def tree_of(folder: Path, paths: list[str], image: bytes = IMAGE) -> str:
    """Files with this image and their own path behind it. A path with a final slash is a folder."""
    for path in paths:
        target = folder / path
        (target if path.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not path.endswith("/"):
            target.write_bytes(image + path.encode())
    return str(folder)


def read_all(out: Path, pattern: str = "*.tar") -> list[dict[str, Any]]:
    """The samples that webdataset reads from the shards."""
    return [sample for path in sorted(out.glob(pattern)) for sample in webdataset_samples(path)]


def image_of(sample: dict[str, Any]) -> bytes:
    return sample.get("png") or sample["jpeg"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_image_is_once_byte_for_byte_with_its_class_in_shuffled_shards(tree: Path, tmp_path: Path) -> None:
    names = packed(tree, tmp_path / "out", shard_size=16)
    assert names == [f"train-{number:05}.tar" for number in range(4)]
    shards = [read_all(tmp_path / "out", name) for name in names]
    assert [len(shard) for shard in shards] == [16, 16, 16, 12]
    # 30, 20 and 10 of 60 spread over shards: sorted ones would have one or two classes each.
    assert all(len({sample["cls"] for sample in shard}) == 3 for shard in shards)
    samples = [sample for shard in shards for sample in shard]
    expected = {path.read_bytes(): path.relative_to(tree).parts[0] for path in tree.rglob("*.*") if path.is_file()}
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())
    assert classes == {"ant": 0, "bee": 1, "cat": 2}
    assert {image_of(sample): int(sample["cls"]) for sample in samples} == {
        data: classes[name] for data, name in expected.items()
    }
    assert len(samples) == len({sample["__key__"] for sample in samples}) == 60
    assert all(sample["__key__"].split("/")[0] == expected[image_of(sample)] for sample in samples)


def test_the_same_tree_and_seed_have_the_same_bytes_and_another_seed_another_order(tree: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        packed(tree, tmp_path / name, seed=seed)
    keys = {name: [sample["__key__"] for sample in read_all(tmp_path / name)] for name in "abc"}
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert keys["a"] != keys["c"]
    assert sorted(keys["a"]) == sorted(keys["c"])


def test_a_new_image_does_not_change_the_order_of_the_others(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "a")
    (tree / "bee" / "new.png").write_bytes(image_bytes())
    packed(tree, tmp_path / "b")
    first, second = ([sample["__key__"] for sample in read_all(tmp_path / name)] for name in "ab")
    assert [key for key in second if key != "bee/new"] == first


def test_a_shard_has_at_most_shard_bytes_unless_one_image_is_larger(tree: Path, tmp_path: Path) -> None:
    (tree / "ant" / "large.png").write_bytes(b"x" * 30_000)
    packed(tree, tmp_path / "out", bad_images="pack", shard_bytes=20_000)
    shards = {path: webdataset_samples(path) for path in (tmp_path / "out").glob("*.tar")}
    assert len(shards) > 5
    for path, samples in shards.items():
        # Two blocks end an archive, which is then filled to 10,240 bytes.
        assert path.stat().st_size <= 20_000 + 1024 + 10_240 or len(samples) == 1


def test_a_share_of_every_class_goes_into_validation_shards(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "out", val_share=0.2)
    train, val = (read_all(tmp_path / "out", f"{name}-*.tar") for name in ("train", "val"))
    assert Counter(sample["cls"] for sample in val) == {b"0": 6, b"1": 4, b"2": 2}
    assert not {sample["__key__"] for sample in train} & {sample["__key__"] for sample in val}
    assert len(train) + len(val) == 60


def test_names_that_would_be_one_sample_get_distinct_keys(tmp_path: Path) -> None:
    source = tree_of(tmp_path / "tree", [f"x/{name}" for name in ("a.jpg", "a.png", "a.b.png", "a_b.png", "A.PNG")])
    packed(source, tmp_path / "out", labels="none")
    names = {sample["__key__"]: sample.get("png") or sample["jpg"] for sample in read_all(tmp_path / "out")}
    assert {key: data.rpartition(b"x/")[2] for key, data in names.items()} == {
        "x/A": b"A.PNG",
        "x/a_b": b"a.b.png",
        "x/a": b"a.jpg",
        "x/a-2": b"a.png",
        "x/a_b-2": b"a_b.png",
    }


def test_files_that_are_no_images_are_listed_and_the_images_are_packed(tree: Path) -> None:
    for name in ("notes.txt", "ant/x.gif", "ant/.hidden.png", "ant/README", "loose.png", "ant/empty.png"):
        (tree / name).write_bytes(b"" if "empty" in name else b"x")
    packing = plan_packing(str(tree), PackSettings())
    assert packing.num_images == 60
    assert packing.skipped.examples == {
        ".gif": ["ant/x.gif"],
        ".txt": ["notes.txt"],
        "empty": ["ant/empty.png"],
        "hidden": ["ant/.hidden.png"],
        "in no class folder": ["loose.png"],
        "no extension": ["ant/README"],
    }


def test_linked_images_and_class_folders_are_packed(tree: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    (linked / "ant").mkdir(parents=True)
    for path in (tree / "ant").rglob("*.*"):
        (linked / "ant" / path.name).symlink_to(path)
    for name in ("bee", "cat"):
        (linked / name).symlink_to(tree / name)
    with raises("storage.link-out"):
        packed(linked, tmp_path / "out")
    packed(linked, tmp_path / "out", links_out=True)
    assert {image_of(sample) for sample in read_all(tmp_path / "out")} == {
        path.read_bytes() for path in tree.rglob("*.*") if path.is_file()
    }


def test_trees_and_shards_may_have_any_url(tree: Path, tmp_path: Path) -> None:
    for path in tree.rglob("*.*"):
        if path.is_file():
            storage.write(f"memory://{tmp_path.name}/tree/{path.relative_to(tree)}", path.read_bytes())
    packed(f"memory://{tmp_path.name}/tree", f"memory://{tmp_path.name}/out", shard_size=40)
    packed(tree, tmp_path / "out", shard_size=40)
    base = f"memory://{tmp_path.name}/out"
    assert {name: storage.read(storage.join(base, name)) for name in storage.listing(base)} == files_of(
        tmp_path / "out"
    )


def test_a_killed_packing_resumes_and_ends_with_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    packed(tree, tmp_path / "whole", shard_size=16)
    writing = write_packing(plan_packing(str(tree), PackSettings(shard_size=16)), str(tmp_path / "out"))
    next(writing), next(writing)
    writing.close()
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert len(stamps) == 2
    packed(tree, tmp_path / "out", shard_size=16)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}


def test_a_folder_with_other_files_is_refused_and_unchanged(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with raises("pack.out-not-empty", StorageInputError) as caught:
        packed(tree, tmp_path / "out")
    assert caught.value.got == "mine"
    assert caught.value.next_step == f"run: stillroom shards pack {tree} {tmp_path}/out/shards"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("change", ["seed", "image"])
def test_another_packing_into_the_same_folder_is_refused(tree: Path, tmp_path: Path, change: str) -> None:
    packed(tree, tmp_path / "out")
    before = files_of(tmp_path / "out")
    if change == "image":
        (tree / "ant" / "new.png").write_bytes(image_bytes())
    got = "settings.seed: 0 -> 1" if change == "seed" else "num_images: 60 -> 61"
    with raises("pack.other-packing", StorageInputError, got=got) as caught:
        packed(tree, tmp_path / "out", seed=int(change == "seed"))
    # The printed command works.
    command = shlex.split(str(caught.value.next_step).removeprefix("run: "))
    assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert len(read_all(tmp_path / "out-2")) == 60 + (change == "image")
    assert files_of(tmp_path / "out") == before


def test_an_image_that_changes_while_it_is_packed_stops_the_packing(tree: Path, tmp_path: Path) -> None:
    packing = plan_packing(str(tree), PackSettings())
    next(tree.glob("cat/*.png")).write_bytes(b"shorter")
    with raises("pack.image-changed", ShardError):
        list(write_packing(packing, str(tmp_path / "out")))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["packing.json"]


def test_indexes_of_another_tree_are_used_even_if_a_class_is_missing(tree: Path, tmp_path: Path) -> None:
    classes = {"aardvark": 0, "ant": 1, "bee": 2, "cat": 3, "dog": 4}
    packed(tree, tmp_path / "out", classes=classes)
    assert Counter(sample["cls"] for sample in read_all(tmp_path / "out")) == {b"1": 30, b"2": 20, b"3": 10}
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == classes
    with raises("pack.unknown-class", ShardError, got="cat"):
        packed(tree, tmp_path / "other", classes={"ant": 0, "bee": 1})


BAD_TREES: dict[str, tuple[list[str], str, str]] = {
    "missing": ([], "pack.no-images", "no files at all"),
    "no images": (["a/x.txt", "b/y.gif"], "pack.no-images", "1 .gif (b/y.gif), 1 .txt (a/x.txt)"),
    "no folders": (["x.png", "y.png"], "pack.no-images", "2 in no class folder (x.png, y.png)"),
    "one class": (["a/x.png"], "pack.one-class", "a"),
    "a class without images": (["a/x.png", "b/y.png", "c/z.txt"], "pack.empty-class", "c"),
    "an empty folder": (["a/x.png", "b/y.png", "c/"], "pack.empty-class", "c"),
    "metadata": (["__a__/x.png", "b/y.png"], "shard.member-name", "None"),
}


@pytest.mark.parametrize("name", BAD_TREES)
def test_a_tree_that_cannot_be_packed_is_refused_before_anything_is_written(name: str, tmp_path: Path) -> None:
    paths, code, got = BAD_TREES[name]
    with raises(code, ShardError) as caught:
        packed(tree_of(tmp_path / "tree", paths), tmp_path / "out")
    assert str(caught.value.got) == got
    assert not (tmp_path / "out").exists()


def test_without_labels_any_tree_is_packed(tmp_path: Path) -> None:
    packed(tree_of(tmp_path / "tree", ["x.png", "a/y.png", "a/b/z.png"]), tmp_path / "out", labels="none")
    samples = read_all(tmp_path / "out")
    assert {sample["__key__"] for sample in samples} == {"x", "a/y", "a/b/z"}
    assert all(sample["png"].endswith(f"{sample['__key__']}.png".encode()) for sample in samples)
    assert not any("cls" in sample for sample in samples)
    assert not (tmp_path / "out" / "classes.json").exists()


def spoil(tree: Path) -> None:
    """Truncates two images, and replaces one by a page of a server."""
    for name in ("ant/ant.01.JPEG", "bee/bee.02.png"):
        path = tree / name
        path.write_bytes(path.read_bytes()[:60])
    (tree / "cat" / "cat.01.JPEG").write_bytes(b"<html>not found</html>")


def test_all_undecodable_images_are_named_and_the_other_shards_stay(tree: Path, tmp_path: Path) -> None:
    spoil(tree)
    packing = plan_packing(str(tree), PackSettings(shard_size=4))
    with raises("pack.bad-images", ShardError) as caught:
        list(write_packing(packing, str(tmp_path / "out")))
    got = str(caught.value.got)
    assert got.startswith("3 images that cannot be decoded (")
    for path, reason in (("ant/ant.01.JPEG", ""), ("bee/bee.02.png", "damaged PNG"), ("cat/cat.01.JPEG", "but HTML")):
        assert f"{path}: " in got
        assert reason in got
    assert "--bad-images skip" in str(caught.value.next_step)
    bad = {"ant/ant_01", "bee/bee_02", "cat/cat_01"}
    whole = {name for name, images in packing.shards.items() if not {image.key for image in images} & bad}
    written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    assert {*written} == whole
    assert 0 < len(whole) < len(packing.shards)
    # The command in the message resumes.
    result = CliRunner().invoke(
        app, ["shards", "pack", str(tree), str(tmp_path / "out"), "--shard-size", "4", "--bad-images", "skip"]
    )
    assert result.exit_code == 0, result.output
    assert "# 57 images in 15 shards" in result.output
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in written} == written
    keys = [sample["__key__"] for sample in read_all(tmp_path / "out")]
    assert sorted(keys) == sorted({image.key for images in packing.shards.values() for image in images} - bad)


def test_bad_images_are_copied_without_checks(tree: Path, tmp_path: Path) -> None:
    spoil(tree)
    packed(tree, tmp_path / "out", bad_images="pack")
    assert len(read_all(tmp_path / "out")) == 60


def test_a_shard_of_only_bad_images_is_refused_also_under_skip(tmp_path: Path) -> None:
    source = tree_of(tmp_path / "tree", ["a/x.png", "b/y.png"], image=b"")
    with raises("pack.bad-images", ShardError):
        packed(source, tmp_path / "out", bad_images="skip")
    assert not list((tmp_path / "out").glob("*.tar"))


SPLITS = {
    "train and val": (["train/ant/a.png", "train/bee/b.png", "val/ant/c.png"], ["train", "val"]),
    "three": (["test/ant/a.png", "training/bee/b.png", "validation/ant/c.png"], ["training", "test", "validation"]),
    "capitals": (["Train/ant/a.png", "Valid/ant/c.png"], ["Train", "Valid"]),
    "years": (["train2017/ant/a.png", "val2017/ant/c.png"], ["train2017", "val2017"]),
    "no classes": (["train/a.png", "test/b.png"], ["train", "test"]),
    "one": (["train/ant/a.png", "train/bee/b.png"], ["train"]),
    "with another folder": (["train/ant/a.png", "val/ant/b.png", "extra/x/c.png"], ["train", "val"]),
    "a vehicle": (["train/a.png", "car/b.png", "bus/c.png"], []),
    "a vehicle with kinds": (["train/steam/a.png", "car/b.png"], []),
    "a vehicle and an exam": (["train/steam/a.png", "test/oral/b.png", "car/c.png"], []),
    "other names": (["trainer/a.png", "valley/b.png"], []),
    "a single class so far": (["train/a.png"], []),
}


@pytest.mark.parametrize("name", SPLITS)
def test_folders_are_splits_only_in_the_layout_of_splits(name: str) -> None:
    paths, splits = SPLITS[name]
    assert split_folders(paths) == splits


def commands_of(error: StillroomError) -> list[list[str]]:
    return [shlex.split(line) for line in str(error.next_step).splitlines()[1:]]


def test_splits_are_refused_with_the_commands_that_pack_them(tmp_path: Path) -> None:
    paths = [f"{split}/{name}/{row}.png" for split in ("train", "val") for name in ("ant", "bee") for row in range(3)]
    source, out = tree_of(tmp_path / "my images", [*paths[:-3], "val/zoo.txt"]), str(tmp_path / "out")
    (Path(source) / "annotations").mkdir()
    with raises("pack.splits-as-classes", ShardError) as caught:
        plan_packing(source, PackSettings(shard_size=2), out_url=out)
    assert caught.value.got == "train/, val/"
    for command in commands_of(caught.value):
        result = CliRunner().invoke(app, command[1:])
        assert result.exit_code == 0, result.output
    # The validation images lack class bee, and ant has its index of training.
    assert Counter(sample["cls"] for sample in read_all(tmp_path / "out" / "train")) == {b"0": 3, b"1": 3}
    assert Counter(sample["cls"] for sample in read_all(tmp_path / "out" / "val")) == {b"0": 3}
    assert sorted(path.name for path in (tmp_path / "out" / "val").glob("*.tar")) == ["val-00000.tar", "val-00001.tar"]


def test_splits_without_classes_are_refused_with_commands_without_labels(tmp_path: Path) -> None:
    source = tree_of(tmp_path / "tree", ["train/a.png", "train/b.png", "test/c.png"])
    with raises("pack.splits-as-classes", ShardError) as caught:
        plan_packing(source, PackSettings(), out_url=str(tmp_path / "out"))
    for command in commands_of(caught.value):
        assert CliRunner().invoke(app, command[1:]).exit_code == 0
    assert [len(read_all(tmp_path / "out" / name)) for name in ("train", "test")] == [2, 1]
