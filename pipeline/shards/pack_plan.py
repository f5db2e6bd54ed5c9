"""Plans which images of a folder tree go into which shard, from one listing of names and sizes.

The same tree and settings give the same plan on every machine.
"""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.core.hashing import canonical_json, digest, seal, shuffle_key
from pipeline.core.redaction import redact
from pipeline.shards.omissions import Omissions
from pipeline.shards.pack_targets import (
    FoundTargets,
    SourceTarget,
    TargetSource,
    check_options,
    find_targets,
    without_masks,
)
from pipeline.shards.split_folders import split_folders
from pipeline.shards.writer import check_name

Labels = Literal["folder", "none"]

CLASSES = "classes.json"
_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
_VAL = "val"
_BLOCK_BYTES = 512
_NUM_NAMED = 3
_NO_CLASS = "in no class folder"


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How a tree becomes shards. A shard is full when it reaches the first of its two limits.

    Attributes:
        name: the shards are called ``<name>-00000.tar`` and so on.
        shard_size: images in a shard.
        shard_bytes: bytes of the tar, unless a single image is larger.
        val_share: share of each class that goes into the separate shards ``val-00000.tar`` and so on.
    """

    name: str = "train"
    shard_size: int = 10_000
    shard_bytes: int = 256 << 20
    seed: int = 0
    val_share: float = 0.0
    labels: Labels = "folder"


@dataclass(frozen=True, slots=True)
class SourceImage:
    """One image of the tree: its path below the source, its key and extension in the shard, its class index or its mask
    or boxes."""

    path: str
    key: str
    extension: str
    label: int | None
    size_bytes: int
    target: SourceTarget | None = None


@dataclass(frozen=True, slots=True)
class Packing:
    """The plan of all shards.

    Attributes:
        shards: images by file name, in order.
        classes: index by folder name, or by category of boxes; empty without labels.
        skipped: the files that are not packed, by reason.
        targets: of masks or boxes.
    """

    source_url: str
    settings: PackSettings
    shards: dict[str, list[SourceImage]]
    classes: dict[str, int]
    skipped: Omissions
    targets: TargetSource | None = None

    @property
    def without_target(self) -> list[str]:
        """Paths of images that have no mask, or no entry in the file of boxes."""
        images = [image for images in self.shards.values() for image in images] if self.targets else []
        return sorted(image.path for image in images if image.target is None)

    @property
    def num_images(self) -> int:
        return sum(map(len, self.shards.values()))

    @property
    def paths(self) -> list[str]:
        return [image.path for images in self.shards.values() for image in images]

    def record(self) -> bytes:
        """Equal for packings that write the same bytes."""
        source = [_record_of(image) for images in self.shards.values() for image in images]
        return seal(
            {
                "settings": asdict(self.settings),
                "classes": {_readable(name): index for name, index in self.classes.items()},
                "source": digest(canonical_json(source)),
                "num_images": self.num_images,
                "num_shards": len(self.shards),
            }
        )


def _record_of(image: SourceImage) -> list[Any]:
    target = image.target
    stored = [] if target is None else [target.extension, target.size_bytes, target.data.decode()]
    return [image.key, image.extension, image.size_bytes, *stored]


def plan_packing(
    source_url: str,
    settings: PackSettings,
    *,
    out_url: str = "OUT",
    classes: Mapping[str, int] | None = None,
    links_out: bool = False,
    targets: TargetSource | None = None,
) -> Packing:
    """Lists the tree. The class of an image is its first folder, as in torchvision's ``ImageFolder``.

    Args:
        out_url: where the shards will be written, for commands in messages.
        classes: the index of every class, given by another packing; by default the folders are numbered in name order,
            and categories of boxes in the order of their ids.
        links_out: also follow links that lead out of the tree.
        targets: masks or boxes to pack with images without labels.

    Raises:
        StorageInputError: a link leads out of the tree, or in a circle.
        ShardError: options exclude each other, no image has a mask or boxes, there is nothing to pack, the first
            folders are splits such as train and val instead of classes, a class has no image, or there are fewer than
            two classes.
    """
    if settings.val_share and settings.name == _VAL:
        raise ShardError(
            "training and validation shards would have the same names",
            code="pack.name-of-validation",
            where="name",
            got=settings.name,
            next_step="choose another --name, or leave out --val-share",
        )
    check_options(settings.labels, targets, has_classes=classes is not None)
    sizes = storage.sizes(source_url, links_out=links_out)
    sizes = {path: sizes[path] for path in without_masks(targets, source_url, sizes)}
    usable, skipped = _separate(sizes, settings.labels)
    where = redact(source_url)
    if not usable:
        raise _nothing_to_pack(where, skipped, settings.labels)
    found = FoundTargets({})
    if targets is not None:
        found = find_targets(targets, source_url, usable, classes=classes, links_out=links_out)
        skipped.include(found.unused)
    indexes = found.classes
    if settings.labels == "folder":
        _check_splits(usable, source_url, settings, out_url)
        indexes = _class_indexes(source_url, sorted({_class_of(path) for path in usable}), classes)
    keys = _keys(usable)
    images = [
        SourceImage(
            path,
            keys[path],
            _extension(path),
            None if settings.labels == "none" else indexes[_class_of(path)],
            sizes[path],
            found.by_path.get(path),
        )
        for path in usable
    ]
    for image in images:
        check_name(image.key, image.extension)
    return Packing(source_url, settings, _shards(images, settings), indexes, skipped, targets)


def _extension(path: str) -> str:
    """Lower case, without the dot; empty for a name without one."""
    stem, dot, extension = path.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot and stem else ""


def _class_of(path: str) -> str:
    return path.partition("/")[0]


def _separate(sizes: Mapping[str, int], labels: Labels) -> tuple[list[str], Omissions]:
    """The paths of images, and all other files by the reason to skip them."""
    usable, skipped = list[str](), Omissions()
    for path, size_bytes in sizes.items():
        if (reason := _reason_to_skip(path, size_bytes, labels)) is None:
            usable.append(path)
        else:
            skipped.add(reason, path)
    return usable, skipped


def _reason_to_skip(path: str, size_bytes: int, labels: Labels) -> str | None:
    extension = _extension(path)
    if any(part.startswith(".") for part in path.split("/")):
        return "hidden"
    if extension not in _EXTENSIONS:
        return f".{extension}" if extension else "no extension"
    if not size_bytes:
        return "empty"
    return _NO_CLASS if labels == "folder" and "/" not in path else None


def _nothing_to_pack(where: str, skipped: Omissions, labels: Labels) -> ShardError:
    has_loose_images = _NO_CLASS in skipped.counts
    return ShardError(
        "there are no images in class folders" if has_loose_images else "there are no images here",
        code="pack.no-images",
        where=where,
        got=", ".join(skipped.lines()) or "no files at all",
        expected=f"{'<class>/' if labels == 'folder' else ''}<name>.{{{','.join(_EXTENSIONS)}}}",
        next_step="pass --labels none to pack images without labels" if has_loose_images else None,
    )


def _check_splits(paths: Sequence[str], source_url: str, settings: PackSettings, out_url: str) -> None:
    """
    Raises:
        ShardError: the first folders are splits; the next step is one command for each.
    """
    splits = split_folders(paths)
    if not splits:
        return
    has_classes = any(path.startswith(f"{splits[0]}/") and path.count("/") > 1 for path in paths)
    commands = [
        pack_command(
            storage.join(source_url, folder),
            storage.join(out_url, folder),
            replace(
                settings,
                name=folder if number else settings.name,
                labels="folder" if has_classes else "none",
            ),
            classes_url=storage.join(out_url, splits[0], CLASSES) if number and has_classes else None,
        )
        for number, folder in enumerate(splits)
    ]
    raise ShardError(
        "these folders are splits, not classes",
        code="pack.splits-as-classes",
        where=redact(source_url),
        got=", ".join(f"{folder}/" for folder in splits),
        expected="a folder for each class",
        next_step="pack each split:\n" + "\n".join(f"{'':<10}{command}" for command in commands),
    )


def pack_command(
    source_url: str,
    out_url: str,
    settings: PackSettings,
    *,
    classes_url: str | None = None,
    targets: TargetSource | None = None,
) -> str:
    """The command that packs with these settings, quoted for a shell."""
    default = PackSettings()
    options = {
        f"--{name.replace('_', '-')}": str(value)
        for name, value in asdict(settings).items()
        if value != getattr(default, name)
    }
    if classes_url is not None:
        options["--classes"] = redact(classes_url)
    if targets is not None:
        options |= targets.options
    command = ["stillroom", "shards", "pack", redact(source_url), redact(out_url)]
    return shlex.join([*command, *(argument for option in options.items() for argument in option)])


def _class_indexes(source_url: str, names: list[str], given: Mapping[str, int] | None) -> dict[str, int]:
    """
    Args:
        names: the class folders with images, sorted.
        given: the index of every class, if another tree defines it.

    Raises:
        ShardError: a class folder has no image or no index, or there is only one class.
    """
    where = redact(source_url)
    empty = sorted({name for name in storage.folders(source_url) if not name.startswith(".")} - {*names})
    if empty:
        raise ShardError(
            f"{len(empty)} class folders have no images",
            code="pack.empty-class",
            where=where,
            got=some_of(empty),
            next_step="remove them, since they would take up class indexes; or fill them",
        )
    if given is not None and (unknown := [name for name in names if name not in given]):
        raise ShardError(
            "some class folders are not among the classes",
            code="pack.unknown-class",
            where=where,
            got=some_of(unknown),
            expected=f"folders called {some_of(sorted(given))}",
            next_step="rename these folders, or pass the classes.json of the packing that has them",
        )
    indexes = dict(given) if given is not None else {name: index for index, name in enumerate(names)}
    if len(indexes) < 2:
        raise ShardError(
            "there is only one class",
            code="pack.one-class",
            where=where,
            got=some_of(names),
            expected="a folder for each class",
            next_step=f"if the classes are the folders in it, name {storage.join(where, names[0])}; "
            "if it is one of several, name the folder above it; without classes pass --labels none",
        )
    return indexes


def some_of(names: Sequence[str]) -> str:
    """``a, b, c, …``"""
    return ", ".join(names[:_NUM_NAMED]) + (", …" if len(names) > _NUM_NAMED else "")


def _keys(paths: Sequence[str]) -> dict[str, str]:
    """A unique WebDataset key for each path: without the extension, and without dots in its last part.

    If the keys of two files would be equal (``a.jpg`` and ``a.png``, ``a.b.jpg`` and ``a_b.jpg``), the second one in
    the listing gets a number.
    """
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        folder, slash, name = _readable(path).rpartition("/")
        base = key = folder + slash + name.rpartition(".")[0].replace(".", "_")
        number = 1
        while key in taken:
            number += 1
            key = f"{base}-{number}"
        taken.add(key)
        keys[path] = key
    return keys


def _readable(path: str) -> str:
    """Valid UTF-8 for any file name."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _shards(images: list[SourceImage], settings: PackSettings) -> dict[str, list[SourceImage]]:
    """Shuffled shards by file name.

    Images are sorted by a hash of seed and path, so the order of two images depends neither on the other images nor on
    the order in which a store lists them.
    """
    shuffled = sorted(images, key=lambda image: shuffle_key(settings.seed, _readable(image.path)))
    val = _first_of_each_class(shuffled, settings.val_share)
    train = [image for image in shuffled if image.path not in val]
    splits = {_VAL: [image for image in shuffled if image.path in val], settings.name: train}
    return {
        f"{name}-{number:05d}.tar": shard
        for name, members in splits.items()
        for number, shard in enumerate(_fill_shards(members, settings))
    }


def _first_of_each_class(shuffled: list[SourceImage], share: float) -> set[str]:
    """Paths of this share of every class, rounded."""
    by_class: defaultdict[int | None, list[str]] = defaultdict(list)
    for image in shuffled:
        by_class[image.label].append(image.path)
    return {path for paths in by_class.values() for path in paths[: round(share * len(paths))]}


def _fill_shards(images: list[SourceImage], settings: PackSettings) -> Iterator[list[SourceImage]]:
    shard: list[SourceImage] = []
    size_bytes = 0
    for image in images:
        added = _tar_bytes(image)
        if shard and (len(shard) == settings.shard_size or size_bytes + added > settings.shard_bytes):
            yield shard
            shard, size_bytes = [], 0
        shard.append(image)
        size_bytes += added
    if shard:
        yield shard


def _tar_bytes(image: SourceImage) -> int:
    """A header and full blocks for the image, and the same for its label and its target."""
    label = [] if image.label is None else [1]
    target = [] if image.target is None else [image.target.size_bytes]
    sizes = [image.size_bytes, *label, *target]
    return sum(_BLOCK_BYTES + -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES for size_bytes in sizes)
