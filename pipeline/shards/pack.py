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
from pipeline.shards.writer import Members, write_shard
from pipeline.tasks.classification import Classification
from schemas.config import DataConfig

BadImages = Literal["fail", "skip", "pack"]

_RECORD = "packing.json"
_READ_THREADS = 16
_READ_AHEAD = 64  # images in memory
_BAD_IMAGES = "images that cannot be decoded"
_MAX_PIXELS = DataConfig.model_validate({}).max_pixels


def write_packing(
    packing: Packing, out_url: str, *, bad_images: BadImages = "fail", omissions: Omissions | None = None
) -> Iterator[int]:
    """Writes the missing shards, then ``classes.json``. Yields the number of images of each shard after it is written.

    Args:
        bad_images: what to do with an image that cannot be decoded. fail: write all shards that have none, then raise;
            skip: leave it out; pack: decode nothing, and copy every image.
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
        if name not in present and not _write(packing.source_url, images, url, bad_images, omissions):
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
    source_url: str, images: Sequence[SourceImage], url: str, bad_images: BadImages, omissions: Omissions
) -> bool:
    """Whether the shard was written: not if it has a bad image under ``fail``, nor if all its images are bad."""

    def usable() -> Iterator[tuple[str, Members]]:
        num_bad = 0
        read = partial(_read, source_url, decodes=bad_images != "pack")
        for image, (data, reason) in zip(
            images, map_ordered(read, images, threads=_READ_THREADS, ahead=_READ_AHEAD, name="pack"), strict=True
        ):
            if reason is not None:
                omissions.add(_BAD_IMAGES, f"{image.path}: {reason}")
                num_bad += 1
            elif not num_bad or bad_images == "skip":
                label = {} if image.label is None else Classification().encode(image.label)
                yield image.key, {image.extension: data, **label}
        # At the end, so that one run reports all bad images.
        if num_bad and (bad_images == "fail" or num_bad == len(images)):
            raise _UnusableShardError

    try:
        write_shard(usable(), url)
    except _UnusableShardError:
        return False
    return True


def _bad_images_error(source_url: str, omissions: Omissions, *, is_all_of_shard: bool) -> ShardError:
    what = f"{omissions.counts[_BAD_IMAGES]} images cannot be used"
    return ShardError(
        f"{what}, among them all of a shard" if is_all_of_shard else what,
        code="pack.bad-images",
        where=redact(source_url),
        got=", ".join(omissions.lines()),
        expected="whole JPEG, PNG or WebP images",
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
            next_step=f"run: {pack_command(packing.source_url, storage.join(out_url, 'shards'), packing.settings)}",
        )
    if not storage.create(url, packing.record()) and (stored := storage.read(url)) != packing.record():
        raise StorageInputError(
            "this folder has a packing of different images, or with different options",
            code="pack.other-packing",
            where=redact(out_url),
            got=_changes(stored, packing.record()),
            expected="a separate folder for each packing, or the images and options that this one began with",
            next_step=f"run: {pack_command(packing.source_url, _next_folder(out_url), packing.settings)}",
        )
    return present


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


def _read(source_url: str, image: SourceImage, *, decodes: bool) -> tuple[bytes, str | None]:
    """The bytes of an image, and the reason if it ``decodes`` them and they are no image.

    Raises:
        ShardError: the size of the image differs from the listing.
    """
    url = storage.join(source_url, image.path)
    data = storage.read(url)
    if len(data) != image.size_bytes:
        raise ShardError(
            "an image changed while it was packed",
            code="pack.image-changed",
            where=redact(url),
            got=f"{len(data)} bytes",
            expected=f"{image.size_bytes} bytes",
            next_step="pack into another folder once the images no longer change",
        )
    try:
        if decodes:
            decode(data, max_pixels=_MAX_PIXELS)
    except BadImageError as error:
        return data, error.reason
    return data, None
