"""Packs a folder tree of images into shuffled shards. The images are copied byte for byte.

``packing.json``, created first, records what is packed and how, so a packing that was killed resumes where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count
from typing import Literal

from pipeline import storage
from pipeline.core.errors import ShardError, StorageInputError
from pipeline.core.hashing import differences
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered
from pipeline.shards.decode import BadImageError, decode
from pipeline.shards.omissions import Omissions
from pipeline.shards.pack_plan import CLASSES, Packing, SourceImage, pack_command, some_of
from pipeline.shards.pack_targets import MAX_PIXELS, target_problem
from pipeline.shards.writer import Members, write_shard
from pipeline.tasks.classification import Classification

BadImages = Literal["fail", "skip", "pack"]

_RECORD = "packing.json"
_READ_THREADS = 16
_READ_AHEAD = 64  # images in memory
_BAD_IMAGES, _BAD_TARGETS = "images that cannot be decoded", "images whose mask or boxes cannot be used"


def write_packing(
    packing: Packing, out_url: str, *, bad_images: BadImages = "fail", omissions: Omissions | None = None
) -> Iterator[int]:
    """Writes the missing shards, then ``classes.json``. Yields the number of images of each shard after it is written.

    Args:
        bad_images: what to do with an image that cannot be decoded, or whose mask or boxes cannot be used. fail: write
            all shards that have none, then raise; skip: leave it out; pack: decode nothing, and copy every image.
        omissions: filled with the images that are left out.

    Raises:
        StorageInputError: ``out_url`` has other files.
        ShardError: images cannot be decoded, under ``fail``, or no image of a shard can. The other shards are written,
            and stay.
    """
    present = _begin(packing, out_url)
    omissions = Omissions() if omissions is None else omissions
    unwritten = False
    for name, images in packing.shards.items():
        url = storage.join(out_url, name)
        if name not in present and not _write(packing, images, url, bad_images, omissions):
            unwritten = True
        yield len(images)
    if bad_images == "fail" and omissions.counts:
        raise _bad_images_error(packing.source_url, omissions, is_all_of_shard=False)
    if unwritten:
        raise _bad_images_error(packing.source_url, omissions, is_all_of_shard=True)
    if packing.classes:
        storage.write(storage.join(out_url, CLASSES), json.dumps(packing.classes, indent=0).encode() + b"\n")


class _UnusableShardError(Exception):
    """Ends the writing of a shard, so that nothing of it is published."""


def _write(
    packing: Packing, images: Sequence[SourceImage], url: str, bad_images: BadImages, omissions: Omissions
) -> bool:
    """Whether the shard was written: not if it has a bad image under ``fail``, nor if all its images are bad."""

    def usable() -> Iterator[tuple[str, Members]]:
        num_bad = 0
        read = partial(_read, packing, decodes=bad_images != "pack")
        for image, (members, reason) in zip(
            images, map_ordered(read, images, threads=_READ_THREADS, ahead=_READ_AHEAD, name="pack"), strict=True
        ):
            if reason is not None:
                omissions.add(*reason)
                num_bad += 1
            elif not num_bad or bad_images == "skip":
                label = {} if image.label is None else Classification().encode(image.label)
                yield image.key, {**members, **label}
        # At the end, so that one run reports all bad images.
        if num_bad and (bad_images == "fail" or num_bad == len(images)):
            raise _UnusableShardError

    try:
        write_shard(usable(), url)
    except _UnusableShardError:
        return False
    return True


def _bad_images_error(source_url: str, omissions: Omissions, *, is_all_of_shard: bool) -> ShardError:
    what = f"{omissions.counts.total()} images cannot be used"
    return ShardError(
        f"{what}, among them all of a shard" if is_all_of_shard else what,
        code="pack.bad-images",
        where=redact(source_url),
        got=", ".join(omissions.lines()),
        expected="whole JPEG, PNG or WebP images, with masks or boxes that fit them",
        next_step="repair or remove them and pack into a new folder"
        if is_all_of_shard
        else "run the command again with --bad-images skip to leave them out (it resumes), "
        "or repair them and pack into a new folder",
    )


def _begin(packing: Packing, out_url: str) -> set[str]:
    """Names of the files that an earlier run of the same packing has written."""
    present, url = set(storage.listing(out_url)), storage.join(out_url, _RECORD)
    if present and _RECORD not in present:
        raise StorageInputError(
            "this folder is not empty",
            code="pack.out-not-empty",
            where=redact(out_url),
            got=some_of(sorted(present)),
            expected="a new or empty folder",
            next_step=_command(packing, storage.join(out_url, "shards")),
        )
    if not storage.create(url, packing.record()) and (stored := storage.read(url)) != packing.record():
        raise StorageInputError(
            "this folder has a packing of different images, or with different options",
            code="pack.other-packing",
            where=redact(out_url),
            got=_changes(stored, packing.record()),
            expected="a separate folder for each packing, or the images and options that this one began with",
            next_step=_command(packing, _next_folder(out_url)),
        )
    return present


def _command(packing: Packing, out_url: str) -> str:
    return f"run: {pack_command(packing.source_url, out_url, packing.settings, targets=packing.targets)}"


def _changes(stored: bytes, record: bytes) -> str:
    """``settings.seed: 0 -> 1; …`` from the stored packing to this one."""
    try:
        old, new = json.loads(stored), json.loads(record)
        del old["digest"], new["digest"]
        changed = differences(old, new)
    except (ValueError, TypeError, KeyError, RecursionError):
        return f"{_RECORD} that is damaged"
    # A digest of names and sizes alone is useless to a reader.
    readable = [text for text in changed if not text.startswith("source")]
    return "; ".join(readable) if readable else "images of other names or sizes"


def _next_folder(out_url: str) -> str:
    """``out-2`` for ``out``, or the first number that is free."""
    base = out_url.rstrip("/")
    return next(url for url in (f"{base}-{number}" for number in count(2)) if not storage.listing(url))


def _read(packing: Packing, image: SourceImage, *, decodes: bool) -> tuple[Members, tuple[str, str] | None]:
    """Image and target by extension, and the kind and text of an omission if it ``decodes`` them and cannot.

    Raises:
        ShardError: the size of a file differs from the listing.
    """
    url = storage.join(packing.source_url, image.path)
    data, target = storage.read(url), image.target
    _check_size(data, image.size_bytes, url)
    members = {image.extension: data}
    if target is not None:
        members[target.extension] = target.read()
        _check_size(members[target.extension], target.size_bytes, target.url or url)
    if not decodes:
        return members, None
    try:
        _, height, width = decode(data, max_pixels=MAX_PIXELS).shape
    except BadImageError as error:
        return members, (_BAD_IMAGES, f"{image.path}: {error.reason}")
    if target is not None:
        num_classes = len(packing.classes)
        if reason := target_problem(target, members[target.extension], width, height, num_classes=num_classes):
            return members, (_BAD_TARGETS, f"{image.path}: {reason}")
    return members, None


def _check_size(data: bytes, size_bytes: int, url: str) -> None:
    if len(data) != size_bytes:
        raise ShardError(
            "a file changed while it was packed",
            code="pack.image-changed",
            where=redact(url),
            got=f"{len(data)} bytes",
            expected=f"{size_bytes} bytes",
            next_step="pack into another folder once the files no longer change",
        )
