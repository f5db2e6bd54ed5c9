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
    split_folders,
)


def pack(
    source_url: str,
    out_url: str,
    settings: PackSettings,
    *,
    classes_url: str | None = None,
    links_out: bool = False,
    bad_images: BadImages = "fail",
    omissions: Omissions | None = None,
) -> Packing:
    """Packs a folder tree. An interrupted packing resumes.

    Raises:
        ShardError: there is nothing to pack, the classes are unusable, or images cannot be decoded under ``fail``.
        StorageInputError: ``out_url`` contains other files, or a link leads out of the tree without ``links_out``.
    """
    classes = None if classes_url is None else _read_classes(classes_url)
    packing = plan_packing(source_url, settings, out_url=out_url, classes=classes, links_out=links_out)
    if not packing.classes and (splits := split_folders(packing.paths)):
        warn(f"pack: the images of {', '.join(splits)} go into the same shards; pack each folder to separate them")
    if packing.skipped.counts:
        warn(f"pack: skipped {', '.join(packing.skipped.lines())}")
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
    return "\n".join([*lines, f"  num_classes: {len(packing.classes)}" if packing.classes else "  label: null"])


def _pattern(stem: str, num_shards: int) -> str:
    return f"{stem}-{{00000..{num_shards - 1:05d}}}.tar" if num_shards > 1 else f"{stem}-00000.tar"
