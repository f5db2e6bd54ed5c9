"""A look at the first bytes of a shard: how dense its samples are, and which labels they have. Nothing is decoded."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.errors import ShardError
from pipeline.shards.index import NO_LABEL
from pipeline.shards.tar import BAD_HEADER, image_extensions, split_name
from schemas.config import DataConfig

_FIRST_BYTES = 8 << 20
_MAX_LABEL_BYTES = 64


@dataclass(frozen=True, slots=True)
class Peek:
    """Samples at the beginning of a shard.

    Attributes:
        covered_bytes: where the last whole sample ends; the size of the shard where all of it was seen.
        label_N: int32, of the samples with an image; ``NO_LABEL`` where there is none that can be read.
    """

    covered_bytes: int
    label_N: NDArray[np.int32]

    @property
    def num_samples(self) -> int:
        return len(self.label_N)


@dataclass(slots=True)
class _Seen:
    """One member's name and place; its text, if it is short."""

    key: str
    extension: str
    offset: int
    text: bytes = field(repr=False)


def peek(url: str, data: DataConfig, *, size_bytes: int, first_bytes: int = _FIRST_BYTES) -> Peek:
    """One range read of at most ``first_bytes``, unless a single sample is larger than that.

    Raises:
        ShardError: there is no sample with an image.
    """
    head = storage.read_range(url, 0, min(size_bytes, first_bytes))
    whole = len(head) == size_bytes
    groups = [list(group) for _, group in groupby(_members(head), key=lambda member: member.key)]
    # The next key proves that a sample is whole.
    kept = groups if whole else groups[:-1]
    labels = [_label(group, data) for group in kept if _has_image(group, data)]
    if labels:
        covered = size_bytes if whole else groups[-1][0].offset
        return Peek(covered, np.array(labels, np.int32))
    if whole:
        raise ShardError(
            "this shard holds no sample with an image",
            where=storage.redact(url),
            got=f"{len(groups)} samples",
            wanted=f"members called <key>.{{{','.join(image_extensions(data))}}}",
        )
    return peek(url, data, size_bytes=size_bytes, first_bytes=8 * first_bytes)


def _members(head: bytes) -> Iterator[_Seen]:
    """Members whose headers lie in these bytes; the end of them may be cut anywhere."""
    try:
        with tarfile.TarFile(fileobj=io.BytesIO(head), encoding="utf-8", errors="surrogateescape") as archive:
            while (info := archive.next()) is not None:
                if info.isreg() and (name := split_name(info.name)) is not None:
                    text = (
                        head[info.offset_data : info.offset_data + info.size] if info.size <= _MAX_LABEL_BYTES else b""
                    )
                    yield _Seen(*name, info.offset, text)
    except BAD_HEADER:
        return


def _has_image(group: list[_Seen], data: DataConfig) -> bool:
    return not {member.extension for member in group}.isdisjoint(image_extensions(data))


def _label(group: list[_Seen], data: DataConfig) -> int:
    wanted = None if data.label is None else data.label.lower()
    text = next((member.text.strip() for member in group if member.extension == wanted), b"")
    return int(text) if text.isdigit() and int(text) < 2**31 else NO_LABEL
