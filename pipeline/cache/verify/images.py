"""Views of some rows of a shard, made anew from its images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import xxhash

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.augment.pixels import pixel_digest, pixel_mean
from pipeline.cache.verify.part import Canary
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.index import NO_LABEL, ShardIndex
from pipeline.shards.tar import Sample
from pipeline.teacher.numerics import numeric_env
from pipeline.teacher.rendering import GroupViews, Rendering, read_groups
from schemas.cache_format import Commit, Header, ViewBlock
from schemas.config import ViewsConfig


@dataclass(frozen=True, slots=True)
class ShardImages:
    """One shard and its index; ``decoders`` render. Rows are named by their ordinal among the shard's ok rows."""

    url: str
    index: ShardIndex
    header: Header
    plan: ViewsConfig
    decoders: ThreadPoolExecutor

    def groups(self, ordinals: Sequence[int], block: ViewBlock) -> Iterator[GroupViews]:
        """The views of a block of these rows, in groups of the plan's ``mix_group``; mixed as if they were a shard.

        Raises:
            ShardError: an image is not the one that was indexed, or cannot be decoded.
        """
        teacher = self.header.teacher
        rendering = Rendering(
            plan=self.plan, block=block, size=int(teacher["size"]), interpolation=teacher["interpolation"]
        )
        yield from read_groups(
            (self._sample(ordinal) for ordinal in ordinals),
            rendering,
            self.decoders,
            shard_id=self.index.shard_id,
            max_pixels=int(self.header.data["max_pixels"]),
            builder=None,
        )

    def _sample(self, ordinal: int) -> Sample:
        at = int(self.index.ok[ordinal])
        offset, size, label = int(self.index.offset[at]), int(self.index.size[at]), int(self.index.label[at])
        key = self.index.keys[at].as_py()
        data = storage.read_range(self.url, offset, size)
        if xxhash.xxh3_64_intdigest(data) != int(self.index.content_hash[at]):
            raise ShardError("this image is not the one that was indexed", where=f"key {key!r}")
        return Sample(at, key, "ok", None if label == NO_LABEL else label, offset, size, data)


def block_of(view: int) -> ViewBlock:
    """The block of this view alone."""
    if view == EVAL_VIEW:
        return ViewBlock(start=0, stop=1, is_eval=True)
    return ViewBlock(start=view, stop=view + 1)


def check_canaries(
    images: ShardImages, commit: Commit, canaries: Sequence[Canary], findings: Findings, *, allowed_levels: int = 0
) -> None:
    """Makes the pixels of every canary of a part anew; of its first row, all views from one decoding."""
    compare = partial(_compare, images, commit, findings, allowed_levels)
    first = [canary for canary in canaries if canary.ordinal == 0]
    with findings.told(redact(images.url), shard=commit.shard_id):
        if len(first) == len(commit.views):
            group = next(images.groups([0], commit.block))
            for position, canary in enumerate(first):
                compare(canary, group.pixels_VNCHW[position, 0])
        for canary in canaries:
            if canary.ordinal:
                group = next(images.groups([canary.ordinal], block_of(canary.view)))
                compare(canary, group.pixels_VNCHW[0, 0])


def _compare(
    images: ShardImages,
    commit: Commit,
    findings: Findings,
    allowed_levels: int,
    canary: Canary,
    pixels_CHW: torch.Tensor,
) -> None:
    findings.checked["canaries"] += 1
    if pixel_digest(pixels_CHW) == canary.digest:
        return
    stored, made = (np.frombuffer(data, np.uint8).astype(int) for data in (canary.mean, pixel_mean(pixels_CHW)))
    levels = int(np.abs(stored - made).max())
    if max(levels, 1) <= allowed_levels:
        findings.drift[levels] += 1
        return
    findings.add(
        Problem(
            commit.part.path,
            "these are not the pixels that the teacher saw",
            got=f"block means differ by up to {levels} of 255; here: {_versions(_here())}",
            expected=f"the part was built with {_versions(commit.environment)}",
            shard=commit.shard_id,
            view=canary.view,
            key=images.index.keys[int(images.index.ok[canary.ordinal])].as_py(),
            rows=1,
        )
    )


def _here() -> dict[str, object]:
    return numeric_env(torch.device("cpu"), batch_size=1)


def _versions(environment: dict[str, object]) -> str:
    return ", ".join(f"{name} {environment.get(name, 'unknown')}" for name in ("torchvision", "pillow", "torch"))
