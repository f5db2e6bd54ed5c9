"""The first bytes of a shard: how dense its samples are, and which targets they have. Nothing is decoded."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipeline import storage
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.file_kinds import file_kind, not_a_tar
from pipeline.shards.members import ByteRange, LinkTable, count_text, image_extensions, is_hidden, split_name
from pipeline.shards.shard_urls import shard_id
from pipeline.shards.tar_headers import BAD_HEADER
from pipeline.tasks import Targets, Task, task_of
from schemas.config import DataConfig

_FIRST_BYTES = 8 << 20
_IMAGE_KINDS, _KIND_BYTES = ("JPEG", "PNG", "WEBP"), 16


@dataclass(frozen=True, slots=True)
class ShardHead:
    """Samples at the beginning of a shard.

    Attributes:
        covered_bytes: where the last whole sample ends; the size of the shard if the head covers all of it.
        num_samples: of those with an image.
        targets: target columns of these samples, which may not be valid under the config.
        members: how often each extension occurs, and for how many each value of ``data.label`` reads a target.
    """

    covered_bytes: int
    num_samples: int
    targets: Targets
    members: tuple[Counter[str], Counter[str]]


@dataclass(slots=True)
class _Member:
    """One member's name and position; its text, if it is short; the kind of file that its bytes begin."""

    key: str
    extension: str
    offset: int
    text: bytes = field(repr=False)
    kind: str


def read_shard_head(url: str, data: DataConfig, *, size_bytes: int, first_bytes: int = _FIRST_BYTES) -> ShardHead:
    """One range read of at most ``first_bytes``, unless a single sample is larger than that.

    Raises:
        ShardError: this is no tar, or there is no sample with an image.
    """
    task = task_of(data).of_shard(shard_id(url))
    head = storage.read_range(url, 0, min(size_bytes, first_bytes))
    is_complete = len(head) == size_bytes
    if not (infos := _headers(head)) and (is_complete or file_kind(head) not in ("a tar", "unknown bytes")):
        raise not_a_tar(head, redact(url))
    groups = [
        list(group)
        for _, group in groupby(_members(head, infos, max_bytes=task.max_bytes), key=lambda member: member.key)
    ]
    # The next key proves that a sample is complete.
    complete = groups if is_complete else groups[:-1]
    if with_image := [group for group in complete if _has_image(group, data)]:
        covered = size_bytes if is_complete else groups[-1][0].offset
        targets = task.rows(_target(group, task, data) for group in with_image)
        return ShardHead(covered, len(with_image), targets, _count_members(complete, task))
    if is_complete:
        members = [member for group in complete for member in group]
        counts = Counter(member.extension for member in members)
        images = Counter(member.extension for member in members if member.kind in _IMAGE_KINDS)
        raise ShardError(
            "this shard has no sample with an image",
            code="shard.no-samples",
            where=redact(url),
            got=f"{len(complete)} samples; members seen: {count_text(dict(counts.most_common()))}",
            expected=f"members called <key>.{{{','.join(image_extensions(data))}}}",
            next_step=f"set {' or '.join(f'data.image={name}' for name, _ in images.most_common())}"
            if images
            else None,
        )
    return read_shard_head(url, data, size_bytes=size_bytes, first_bytes=8 * first_bytes)


def first_images(url: str, data: DataConfig, *, size_bytes: int, count: int) -> list[bytes]:
    """The encoded images of the first samples, as far as one range read of the first bytes has them whole."""
    head, images = storage.read_range(url, 0, min(size_bytes, _FIRST_BYTES)), list[bytes]()
    for info in _headers(head):
        name, end = split_name(info.name), info.offset_data + info.size
        if name is not None and name[1] in image_extensions(data) and info.isreg() and end <= len(head):
            images.append(head[info.offset_data : end])
    return images[:count]


def _headers(head: bytes) -> list[tarfile.TarInfo]:
    """Members whose headers lie in these bytes, which may end anywhere."""
    infos: list[tarfile.TarInfo] = []
    try:
        with tarfile.TarFile(fileobj=io.BytesIO(head), encoding="utf-8", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                infos.append(info)
    except BAD_HEADER:
        pass
    return infos


def _members(head: bytes, infos: list[tarfile.TarInfo], *, max_bytes: int) -> Iterator[_Member]:
    """Members of samples, as in ``read_samples``, except links to a target behind these bytes."""
    links: LinkTable | None = None
    for info in infos:
        is_link = info.islnk() or info.issym()
        name = split_name(info.name)
        if name is None or is_hidden(info.name) or not (info.isreg() or is_link):
            continue
        data: ByteRange | str = ByteRange(info.offset_data, info.size)
        if is_link:
            links = links or LinkTable(lambda: infos)
            data = links.resolve(info)
        if isinstance(data, ByteRange):
            text = head[data.offset : data.offset + data.size] if data.size <= max_bytes else b""
            yield _Member(*name, info.offset, text, file_kind(head[data.offset : data.offset + _KIND_BYTES]))


def _count_members(groups: list[list[_Member]], task: Task) -> tuple[Counter[str], Counter[str]]:
    members = [member for group in groups for member in group]
    options = (option for member in members for option in task.label_options(member.extension, member.text))
    return Counter(member.extension for member in members), Counter(options)


def _has_image(group: list[_Member], data: DataConfig) -> bool:
    return not {member.extension for member in group}.isdisjoint(image_extensions(data))


def _target(group: list[_Member], task: Task, data: DataConfig) -> Any | None:
    # The first one of repeated members counts.
    texts = {member.extension: member.text for member in reversed(group)}
    image = next(name for name in image_extensions(data) if name in texts)
    members = [name for name in task.read_members if name in texts and name != image]
    return task.try_parse({name: texts[name] for name in members})
