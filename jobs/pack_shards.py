"""Pack a folder tree of images into shuffled shards. ``stillroom shards pack SRC OUT``."""

from __future__ import annotations

import json
from collections.abc import Mapping

from jobs.observability.log import warn, warn_of_omissions
from jobs.observability.progress import ProgressView
from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.omissions import Omissions
from pipeline.shards.pack import BadImages, write_packing
from pipeline.shards.pack_plan import (
    CLASSES,
    Packing,
    PackSettings,
    plan_packing,
    some_of,
)
from pipeline.shards.pack_targets import TargetSource
from pipeline.shards.split_folders import split_folders


def pack(
    source_url: str,
    out_url: str,
    settings: PackSettings,
    *,
    classes_url: str | None = None,
    links_out: bool = False,
    bad_images: BadImages = "fail",
    omissions: Omissions | None = None,
    targets: TargetSource | None = None,
) -> Packing:
    """Packs a folder tree. An interrupted packing resumes.

    Raises:
        ShardError: there is nothing to pack, the classes are unusable, or images cannot be decoded under ``fail``.
        StorageInputError: ``out_url`` contains other files, or a link leads out of the tree without ``links_out``.
    """
    classes = None if classes_url is None else _read_classes(classes_url)
    packing = plan_packing(source_url, settings, out_url=out_url, classes=classes, links_out=links_out, targets=targets)
    if settings.labels == "none" and (splits := split_folders(packing.paths)):
        warn(f"pack: the images of {', '.join(splits)} go into the same shards; pack each folder to separate them")
    if packing.skipped.counts:
        warn(f"pack: skipped {', '.join(packing.skipped.lines())}")
    if targets is not None and (paths := packing.without_target):
        warn(f"pack: {len(paths)} of {packing.num_images} images have no {targets.noun} ({some_of(paths)})")
    omissions = Omissions() if omissions is None else omissions
    with ProgressView("pack", packing.num_images) as progress:
        for num_images in write_packing(packing, out_url, bad_images=bad_images, omissions=omissions):
            progress.update(progress.done + num_images)
    warn_of_omissions("pack", [omissions])
    return packing


def _read_classes(url: str) -> Mapping[str, int]:
    try:
        classes = json.loads(storage.read(url, max_bytes=storage.MAX_RECORD_BYTES))
        is_valid = sorted(classes.values()) == list(range(len(classes)))
    except (ValueError, RecursionError, AttributeError, TypeError):
        classes, is_valid = {}, False
    if not is_valid:
        raise ShardError(
            "these are not the classes of a packing",
            code="pack.bad-classes-file",
            where=redact(url),
            expected=f"{CLASSES} as another packing wrote it: names with indexes 0, 1, 2 …",
        )
    return classes


def describe(packing: Packing, out_url: str, *, num_left_out: int = 0) -> str:
    """The number of images, and the section ``data`` of a config for the shards."""
    names: dict[str, list[str]] = {}
    for name in packing.shards:
        names.setdefault(name.rpartition("-")[0], []).append(name)
    lines = [f"# {packing.num_images - num_left_out} images in {len(packing.shards)} shards", "data:"]
    for stem, shards in names.items():
        key = "val_shards" if stem == "val" else "shards"
        lines.append(f'  {key}: "{storage.join(out_url, _pattern(stem, len(shards)))}"')
    return "\n".join([*lines, *_target_lines(packing, out_url)])


def _target_lines(packing: Packing, out_url: str) -> list[str]:
    """Task and classes."""
    if packing.targets is None:
        return [f"  num_classes: {len(packing.classes)}" if packing.classes else "  label: null"]
    if packing.targets.kind == "coco":
        names = some_of([json.dumps(name) for name in packing.classes])
        return [
            "  task: detection",
            f'  classes: "{storage.join(out_url, CLASSES)}"  # {len(packing.classes)}: {names}',
        ]
    # A PNG is not the default image of the task.
    extensions = sorted({image.extension for images in packing.shards.values() for image in images})
    image = [f"  image: {';'.join(extensions)}"] if "png" in extensions else []
    return ["  task: segmentation", *image, "  num_classes:  # how many classes the masks have"]


def _pattern(stem: str, num_shards: int) -> str:
    return f"{stem}-{{00000..{num_shards - 1:05d}}}.tar" if num_shards > 1 else f"{stem}-00000.tar"
