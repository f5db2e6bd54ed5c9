"""Renders cached views again from the images of a shard, and compares canaries."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from pipeline import storage
from pipeline.augment.params import EVAL_VIEW
from pipeline.augment.pixels import pixel_digest, pixel_mean
from pipeline.augment.stored_pixels import other_encoder
from pipeline.cache.verify.part import Canary
from pipeline.cache.verify.report import Findings, Problem
from pipeline.core.errors import ShardError
from pipeline.core.redaction import redact
from pipeline.shards.index import ShardIndex
from pipeline.shards.tar import Sample
from pipeline.teacher.numerics import numeric_env
from pipeline.teacher.rendering import GroupViews, Rendering, read_groups
from schemas.cache_format import Commit, Header, ViewBlock
from schemas.config import ViewsConfig


@dataclass(frozen=True, slots=True)
class ShardImages:
    """The images of a shard by their index. Rows are ordinals among the ok rows of the shard."""

    url: str
    index: ShardIndex
    header: Header
    plan: ViewsConfig
    decoders: ThreadPoolExecutor

    def render(self, ordinals: Sequence[int], block: ViewBlock) -> GroupViews:
        """The views of a block of these rows, mixed like the first rows of a shard: at most ``mix_group`` rows.

        Raises:
            ShardError: an image was changed after it was indexed, or cannot be decoded.
        """
        teacher = self.header.teacher
        rendering = Rendering(
            shard_id=self.index.shard_id,
            plan=self.plan,
            block=block,
            size=self.header.input_size,
            interpolation=teacher["interpolation"],
            task=self.index.task,
            max_pixels=int(self.header.data["max_pixels"]),
        )
        return next(read_groups(map(self._sample, ordinals), rendering, self.decoders, builder=None))

    def key(self, ordinal: int) -> str:
        return self.index.keys[int(self.index.ok[ordinal])].as_py()

    def _sample(self, ordinal: int) -> Sample:
        row, key = int(self.index.ok[ordinal]), self.key(ordinal)
        offset, size = int(self.index.offset[row]), int(self.index.size[row])
        data = storage.read_range(self.url, offset, size)
        if xxhash.xxh3_64_intdigest(data) != int(self.index.content_hash[row]):
            raise ShardError(
                "an image was changed after it was indexed",
                code="shard.image-changed",
                where=f"key {key!r}",
                next_step="restore the shard",
            )
        # Views do not depend on targets.
        return Sample(row, key, "ok", None, offset, size, data)


def single_view(view: int) -> ViewBlock:
    """A block of this view only."""
    if view == EVAL_VIEW:
        return ViewBlock(start=0, stop=1, is_eval=True)
    return ViewBlock(start=view, stop=view + 1)


def check_canaries(
    images: ShardImages, commit: Commit, canaries: Sequence[Canary], findings: Findings, *, allowed_levels: int = 0
) -> None:
    """Compares all canaries of a part. The first row is a canary under each view: it is decoded once for all."""

    def compare(canary: Canary, pixels_CHW: torch.Tensor) -> None:
        findings.checked["canaries"] += 1
        if pixel_digest(pixels_CHW) == canary.digest:
            return
        stored, rendered = (np.frombuffer(mean, np.uint8).astype(int) for mean in (canary.mean, pixel_mean(pixels_CHW)))
        levels = int(np.abs(stored - rendered).max())
        if max(levels, 1) <= allowed_levels:
            findings.drift[levels] += 1
            return
        if canary.view != EVAL_VIEW and (reason := other_encoder(commit.environment)) is not None:
            # The stored view was decoded and compared with the same digest.
            findings.not_checked[f"canaries: {reason}"] += 1
            return
        here = _versions(numeric_env(torch.device("cpu"), batch_size=1))
        findings.add(
            Problem(
                commit.part.path,
                "this machine renders pixels that differ from the teacher's input",
                got=f"block means differ by up to {levels} of 255; here: {here}",
                expected=f"the part was built with {_versions(commit.environment)}",
                shard=commit.shard_id,
                view=canary.view,
                key=images.key(canary.ordinal),
                rows=1,
            )
        )

    of_first_row = [canary for canary in canaries if canary.ordinal == 0]
    with findings.capture(redact(images.url), shard=commit.shard_id):
        if len(of_first_row) == len(commit.views):
            group = images.render([0], commit.block)
            for position, canary in enumerate(of_first_row):
                compare(canary, group.pixels_VNCHW[position, 0])
        for canary in canaries:
            if canary.ordinal:
                group = images.render([canary.ordinal], single_view(canary.view))
                compare(canary, group.pixels_VNCHW[0, 0])


def _versions(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {environment.get(name, 'unknown')}" for name in ("torchvision", "pillow", "torch"))
