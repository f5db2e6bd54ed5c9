"""Masks and boxes that are packed with the images of a folder tree: masks from another tree, boxes from a COCO file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline import storage
from pipeline.core.errors import ShardError, first_line
from pipeline.core.redaction import redact
from pipeline.shards.omissions import Omissions
from pipeline.tasks.boxes import BadBoxesError, check_boxes, parse_boxes
from pipeline.tasks.masks import BadMaskError, check_mask, decode_mask
from schemas.config import DataConfig

TargetKind = Literal["masks", "coco"]

_MASK, _BOXES = "mask.png", "json"
# Of 16 bits.
_NUM_MASK_VALUES = 1 << 16
MAX_PIXELS = DataConfig.model_validate({}).max_pixels
"""Of an image, or a mask, that is decoded."""


@dataclass(frozen=True, slots=True)
class TargetSource:
    """Where masks or boxes are: the folder of masks, or the JSON of COCO.

    Attributes:
        image_suffix, mask_suffix: how the names of an image and its mask end before the extension, where they differ.
    """

    kind: TargetKind
    url: str
    image_suffix: str = ""
    mask_suffix: str = ""

    @classmethod
    def of(
        cls, *, masks: str | None, coco: str | None, image_suffix: str = "", mask_suffix: str = ""
    ) -> TargetSource | None:
        """
        Raises:
            ShardError: both are given, or suffixes without masks.
        """
        if masks is not None and coco is not None:
            raise _conflict("--masks, --coco", expected="one of them")
        if masks is not None:
            return cls("masks", masks, image_suffix, mask_suffix.removesuffix(".png"))
        if image_suffix or mask_suffix:
            raise _conflict("--image-suffix or --mask-suffix", expected="these with --masks")
        return None if coco is None else cls("coco", coco)

    @property
    def options(self) -> dict[str, str]:
        """Of the command, by name."""
        suffixes = {"--image-suffix": self.image_suffix, "--mask-suffix": self.mask_suffix}
        return {f"--{self.kind}": redact(self.url), **{name: suffix for name, suffix in suffixes.items() if suffix}}

    def is_mask(self, path: str) -> bool:
        return _is_png(path) and _stem(path).endswith(self.mask_suffix)

    def mask_stem(self, path: str) -> str:
        """The path of the mask of an image, without its extension."""
        return _stem(path).removesuffix(self.image_suffix) + self.mask_suffix

    @property
    def noun(self) -> str:
        """What an image has there."""
        return "mask" if self.kind == "masks" else "entry in the COCO file"


@dataclass(frozen=True, slots=True)
class SourceTarget:
    """The mask or the boxes of one image.

    Attributes:
        extension: of the member in the shard.
        url: of a mask; boxes are in ``data``.
    """

    extension: str
    size_bytes: int
    url: str | None = None
    data: bytes = b""

    def read(self) -> bytes:
        return self.data if self.url is None else storage.read(self.url)


@dataclass(frozen=True, slots=True)
class FoundTargets:
    """
    Attributes:
        by_path: of the image below its tree.
        classes: index by name; empty for masks, which have none.
        unused: what belongs to no image.
    """

    by_path: dict[str, SourceTarget]
    classes: dict[str, int] = field(default_factory=dict[str, int])
    unused: Omissions = field(default_factory=Omissions)


def check_options(labels: str, source: TargetSource | None, *, has_classes: bool) -> None:
    """
    Args:
        labels: ``PackSettings.labels``.
        has_classes: whether class indexes of another packing are given.

    Raises:
        ShardError: these options exclude each other.
    """
    option = "" if source is None else f", --{source.kind}"
    if source is not None and labels != "none":
        raise _conflict(f"--labels {labels}{option}", expected="images with masks or boxes have no other labels")
    if has_classes and labels == "none" and (source is None or source.kind == "masks"):
        raise _conflict(f"--classes, --labels {labels}{option}", expected="classes of folders, or of --coco")


def _conflict(got: str, *, expected: str) -> ShardError:
    return ShardError(
        "these options exclude each other",
        code="pack.conflicting-options",
        where="options",
        got=got,
        expected=expected,
    )


def find_targets(
    source: TargetSource,
    tree_url: str,
    paths: Sequence[str],
    *,
    classes: Mapping[str, int] | None = None,
    links_out: bool = False,
) -> FoundTargets:
    """
    Args:
        paths: of the images below ``tree_url``.
        classes: the index of every class of boxes; by default categories are numbered in the order of their ids.

    Raises:
        ShardError: no image has a mask or an entry, or the file has another form.
        StorageInputError: the file cannot be read, or a link leads out of the folder.
    """
    if source.kind == "masks":
        found = _find_masks(source, tree_url, paths, storage.sizes(source.url, links_out=links_out))
    else:
        found = _find_boxes(source.url, {*paths}, classes)
    if not found.by_path:
        raise ShardError(
            f"no image has {'a mask' if source.kind == 'masks' else 'an entry in this file'}",
            code="pack.no-targets",
            where=redact(source.url),
            got=", ".join(found.unused.lines()) or "none",
            expected=f"such as {source.mask_stem(paths[0])}.png for the image {paths[0]} of {redact(tree_url)}"
            if source.kind == "masks"
            else f"file_name below {redact(tree_url)}, such as {paths[0]}",
            next_step="name the folder whose paths are those of the images, with --image-suffix and --mask-suffix "
            "where names end differently"
            if source.kind == "masks"
            else "name the folder of images to which the names in this file are relative",
        )
    return found


def without_masks(source: TargetSource | None, tree_url: str, paths: Iterable[str]) -> list[str]:
    """Of files below a tree those that are no masks, which may lie in the same tree: in a folder, where all files are
    masks, or among the images, where the PNGs with their suffix are."""
    if source is None or source.kind != "masks":
        return [*paths]
    tree, masks = _folder(tree_url), _folder(source.url)
    if not masks.startswith(tree):
        return [*paths]
    folder = masks.removeprefix(tree)
    return [path for path in paths if not (path.startswith(folder) if folder else source.is_mask(path))]


def _folder(url: str) -> str:
    return f"{storage.absolute(url).rstrip('/')}/"


def _is_png(path: str) -> bool:
    return path.lower().endswith(".png")


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _find_masks(source: TargetSource, tree_url: str, paths: Sequence[str], sizes: Mapping[str, int]) -> FoundTargets:
    """The mask of ``a/b.jpg`` is ``a/b.png``, without suffixes."""
    unused = Omissions()
    masks = {_stem(path): path for path in sizes if _is_png(path)}
    by_path = {
        path: SourceTarget(_MASK, sizes[mask], storage.join(source.url, mask))
        for path in paths
        if (mask := masks.get(source.mask_stem(path))) is not None
    }
    used = {masks[source.mask_stem(path)] for path in by_path}
    if _folder(source.url) == _folder(tree_url):
        used |= {*paths}
    for path in sizes:
        if path not in used and not any(part.startswith(".") for part in path.split("/")):
            other = f"PNGs without {source.mask_suffix}" if _is_png(path) else "files that are no PNG"
            unused.add("masks without an image" if source.is_mask(path) else other, path)
    return FoundTargets(by_path, unused=unused)


def _find_boxes(url: str, paths: set[str], classes: Mapping[str, int] | None) -> FoundTargets:
    """The boxes of an image are empty if the file has the image, and no annotation of it."""
    try:
        document = json.loads(storage.read(url))
        names = {category["id"]: str(category["name"]) for category in document["categories"]}
        file_names = {image["id"]: str(image["file_name"]) for image in document["images"]}
        if len({*names.values()}) < len(document["categories"]):
            raise ValueError("categories with the same id or name")
        if len({*file_names.values()}) < len(document["images"]):
            raise ValueError("images with the same id or file_name")
        indexes = {names[number]: index for index, number in enumerate(sorted(names))} if classes is None else classes
        _check_known(names.values(), indexes, where=redact(url))
        by_image = defaultdict[Any, list[tuple[Any, int, Any]]](list)
        for annotation in document["annotations"]:
            label = indexes[names[annotation["category_id"]]]
            by_image[annotation["image_id"]].append((annotation["bbox"], label, annotation.get("iscrowd", 0)))
        if unknown := by_image.keys() - file_names.keys():
            raise ValueError(f"annotations of the image {min(unknown, key=str)}, which images lacks")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(
            "this is no COCO file of boxes",
            code="pack.bad-coco",
            where=redact(url),
            got=f"no key {error}" if isinstance(error, KeyError) else first_line(error),
            expected="JSON of images [{id, file_name}], annotations [{image_id, category_id, bbox, iscrowd}] and "
            "categories [{id, name}]",
        ) from error
    found = FoundTargets({}, dict(indexes))
    for number, path in file_names.items():
        if path in paths:
            boxes, labels, crowd = zip(*by_image[number], strict=True) if by_image[number] else ((), (), ())
            data = json.dumps({"boxes": boxes, "labels": labels, "crowd": crowd}, separators=(",", ":")).encode()
            found.by_path[path] = SourceTarget(_BOXES, len(data), data=data)
        else:
            found.unused.add("images of the file that are not in the folder", path)
    return found


def _check_known(names: Iterable[str], indexes: Mapping[str, int], *, where: str) -> None:
    if unknown := sorted({*names} - {*indexes}):
        raise ShardError(
            "some categories are not among the classes",
            code="pack.unknown-class",
            where=where,
            got=", ".join(unknown[:3]),
            expected=f"categories called {', '.join(sorted(indexes)[:3])}, …",
            next_step="pass the classes.json of the packing that has them",
        )


def target_problem(target: SourceTarget, data: bytes, width: int, height: int, *, num_classes: int) -> str | None:
    """Why this mask, or these boxes, are not those of an upright image of this size; None: they are.

    Args:
        num_classes: of boxes. Any index may stand in a mask: its classes are not known here.
    """
    try:
        if target.extension == _BOXES:
            return check_boxes(parse_boxes(data), width, height, num_classes=num_classes)
        mask_HW = decode_mask(data, max_pixels=MAX_PIXELS)
        return check_mask(mask_HW, width, height, num_classes=_NUM_MASK_VALUES, ignore=0)
    except (BadBoxesError, BadMaskError) as error:
        return str(error)
