"""Claims a cache for a build: creates its header, or checks the existing one, before anything is written."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline import storage
from pipeline.augment.params import sample_keys
from pipeline.augment.random_bits import philox4x64
from pipeline.cache.build.commit import CommitSummary, check_fingerprint, is_unused, publish_commit, revoke
from pipeline.cache.build.encodings import resolve
from pipeline.cache.build.imported_means import ImportedMeans
from pipeline.cache.build.linear_head import linear_head
from pipeline.cache.format import layout
from pipeline.cache.format.codec import LinearHead, stored_outputs
from pipeline.cache.format.head_file import head_sha256
from pipeline.cache.format.header import (
    find_header,
    planned_views,
    read_header,
    stored_views,
    views_body,
    views_id,
)
from pipeline.core.errors import CacheError, ModelError
from pipeline.core.hashing import differences, digest, seal, short_digest, weights_digest
from pipeline.core.redaction import quoted, redact
from pipeline.models import LoadedModel, load_untrained
from pipeline.models.maps import to_grid
from pipeline.shards.index import index_settings
from pipeline.tasks import OutputSpec, planned_outputs, task_of
from pipeline.teacher.inference import Teacher
from pipeline.teacher.tokens import TokenPlan, TokenRequest
from schemas.cache_format import Commit, Header
from schemas.config import CacheConfig, Config, DataConfig, Precision, ViewsConfig, height_width, size_json

_NUM_PROBES = 4
_MAP_NDIM, _PROBE_REGIONS = 4, (4, 4)
MAX_DRIFT = {"fp32": 1e-2, "bf16": 0.15, "fp16": 0.05}
"""How far logits may differ, as a share of their standard deviation: hardware and libraries round differently, while
another network differs by whole logits."""


def teacher_body(
    loaded: LoadedModel,
    *,
    weights: str,
    precision: Precision,
    plan: ViewsConfig,
    cache: CacheConfig,
    class_means: str,
    tokens: TokenPlan | None,
    head: str | None = None,
    grid: int | None = None,
) -> dict[str, Any]:
    """Everything that decides the teacher's outputs: its hash is the fingerprint.

    Args:
        weights: the ``weights_digest``.
        class_means: as the header names them: ``none``, ``eval``, ``view0`` or ``imported:`` with a digest.
        head: SHA-256 of the file of the linear head, under ``cache.logits: head``.
        grid: ``Task.grid``.
    """
    spec = loaded.input
    return {
        "architecture": loaded.architecture,
        "weights": weights,
        "size": size_json(spec.size),
        "interpolation": spec.interpolation,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "precision": precision,
        "logits": cache.logits,
        "embeddings": cache.embeddings,
        "class_means": class_means,
        "views_id": views_id(plan, size=spec.size, interpolation=spec.interpolation),
        # Only with tokens, so that the fingerprints of all other caches stay.
        **({} if tokens is None else _tokens_body(cache, tokens)),
        **({} if head is None else {"head": head}),
        **({} if grid is None else {"grid": grid}),
    }


def _tokens_body(cache: CacheConfig, tokens: TokenPlan) -> dict[str, Any]:
    return {"tokens": cache.tokens, "tokens_layer": tokens.feature_map.layer, "tokens_grid": tokens.grid}


def token_request(config: Config) -> TokenRequest | None:
    """The patch tokens that a build with this config stores; None: it stores none."""
    cache, teacher = config.cache, config.teacher
    if cache is None or cache.tokens == "none":
        return None
    return TokenRequest(teacher.tokens_layer, cache.tokens_grid, "teacher.tokens_layer", "cache.tokens_grid")


def make_header(
    teacher: Teacher,
    *,
    plan: ViewsConfig,
    cache: CacheConfig,
    data: DataConfig,
    imported: ImportedMeans | None = None,
    head: LinearHead | None = None,
) -> Header:
    """The header that this config, these weights and these imported class means would write.

    Args:
        head: ``head_of`` this teacher.

    Raises:
        ModelError: the teacher's logits on the probe images are NaN or infinite.
    """
    task, widths, spec = task_of(data), teacher.module.widths, teacher.loaded.input
    body = teacher_body(
        teacher.loaded,
        weights=weights_digest(teacher.state()),
        precision=teacher.precision,
        plan=plan,
        cache=cache,
        class_means=cache.class_means if imported is None else imported.mode,
        tokens=teacher.tokens,
        head=None if head is None else digest(head.to_bytes()),
        grid=task.grid(cache.grid),
    )
    specs = _specs(teacher, cache, data)
    return Header(
        views_id=str(body["views_id"]),
        views=views_body(plan, size=spec.size, interpolation=spec.interpolation),
        fingerprint=short_digest(body),
        teacher=body,
        data=index_settings(data),
        num_classes=task.num_classes,
        embedding_dim=0 if task.embedding is None else widths[task.embedding],
        outputs=stored_outputs(specs),
        probe_logits=tuple(tuple(float(value) for value in row) for row in _probe(teacher, specs[0].name)),
        pixels=None if plan.pixels == "none" else plan.pixels,
    )


def head_of(teacher: Teacher, cache: CacheConfig, data: DataConfig) -> LinearHead | None:
    """The linear head that computes the cache's logits, compared with the teacher on the probe images; None: logits are
    stored, or there are none.

    Raises:
        ModelError: no single linear layer computes the logits from the embedding.
    """
    if cache.logits != "head":
        return None
    logits, embedding = stored_outputs(_specs(teacher, cache, data))[:2]
    return linear_head(teacher, logits.name, embedding, _probe_pixels(teacher), key="cache.logits: head")


def _specs(teacher: Teacher, cache: CacheConfig, data: DataConfig) -> tuple[OutputSpec, ...]:
    shape = None if teacher.tokens is None else teacher.tokens.shape
    size = teacher.loaded.input.size
    return planned_outputs(task_of(data), cache, teacher.module.widths, tokens=shape, size=size)


def _probe_pixels(teacher: Teacher) -> Tensor:
    """Four fixed noise images: uint8 [4,3,H,W]."""
    height, width = height_width(teacher.loaded.input.size)
    num_blocks = -(-3 * height * width // 32)
    keys = np.repeat(sample_keys(0, [f"probe/{number}" for number in range(_NUM_PROBES)]), num_blocks, axis=0)
    counters = np.zeros((len(keys), 4), np.uint64)
    counters[:, 0] = np.tile(np.arange(num_blocks, dtype=np.uint64), _NUM_PROBES)
    noise = philox4x64(keys, counters).astype("<u8").view(np.uint8).reshape(_NUM_PROBES, -1)
    return torch.from_numpy(noise[:, : 3 * height * width].reshape(_NUM_PROBES, 3, height, width).copy())


def _probe(teacher: Teacher, name: str) -> NDArray[np.float32]:
    """An output for the probe images, [4,M]: it shows that the model changed while its weights did not. Of a map, the
    means of 4 × 4 regions."""
    values = teacher.infer(_probe_pixels(teacher))[name]
    if values.ndim == _MAP_NDIM:
        values = to_grid(torch.from_numpy(values), _PROBE_REGIONS).flatten(1).numpy()
    if not np.isfinite(values).all():
        raise ModelError(
            "the teacher produces NaN or infinity on images of noise",
            code="model.not-finite",
            where="teacher",
            next_step="use teacher.precision=fp32, or check the weights",
        )
    return values


def claim(cache_url: str, header: Header) -> Header:
    """Writes the header if there is none. Otherwise checks the header in the cache, and returns it.

    Raises:
        CacheError: the cache is of another teacher, transform, plan or encoding, or was derived from other caches; the
            error names the difference.
    """
    # Reads first, because every part claims: an attempt to create takes 12 ms on a local disk, a read 0.05 ms.
    stored = find_header(cache_url)
    if stored is None:
        if storage.create(storage.join(cache_url, layout.HEADER), seal(header.model_dump(mode="json"))):
            return header
        stored = read_header(cache_url)
    check_same(stored, header, cache_url)
    _check_derived(stored, header, cache_url)
    return stored


def publish_under_header(cache_url: str, header: Header, commit: Commit) -> Commit:
    """``publish_commit``. A commit counts only under its header: ``gc --unused-header`` may have removed this header
    while there was no commit, and another builder may have claimed the cache since.

    Raises:
        CacheError: the cache is another one now.
    """
    published = publish_commit(cache_url, commit)
    check_fingerprint(published, header.fingerprint, cache_url)
    try:
        claim(cache_url, header)
    except CacheError as error:
        if published is commit and error.code in ("cache.other-header", "cache.derived"):
            revoke(cache_url, [CommitSummary.of(commit)])
        raise
    return published


def _check_derived(stored: Header, expected: Header, cache_url: str) -> None:
    """A teacher adds nothing to a derived cache, and another derivation neither, even with equal outputs: its header
    describes what it was made from."""
    before, after = (header.derived and header.derived.model_dump(mode="json") for header in (stored, expected))
    if before != after:
        raise CacheError(
            "this cache was derived from other caches" if before else "this cache was built by its teacher",
            code="cache.derived",
            where=redact(cache_url),
            got="; ".join(differences(before or {}, after or {}, "derived.")),
            expected="the same command on the same state of the same caches",
            next_step="choose another URL; to add views or shards, extend the sources and derive again",
        )


def check_same(stored: Header, expected: Header, cache_url: str) -> None:
    """
    Raises:
        CacheError: a build with the header ``expected`` may not write to a cache with the header ``stored``.
    """
    _check_bodies(stored, stored_views(expected), expected.teacher, expected.data, cache_url)
    old, new = np.array(stored.probe_logits), np.array(expected.probe_logits)
    drift = float(np.abs(old - new).max() / max(float(old.std()), 1e-6))
    tolerance = MAX_DRIFT[str(expected.teacher["precision"])]
    if drift > tolerance:
        raise CacheError(
            "the teacher's weights are unchanged, but its logits on the four probe images differ",
            code="cache.other-probe-logits",
            where=redact(cache_url),
            got=f"logits differ by {drift:.3g} of their standard deviation",
            expected=f"at most {tolerance}",
            next_step="the model's code or a library changed; build into another cache.url",
        )


def check_without_weights(stored: Header, config: Config) -> None:
    """Compares a header with a config, except for the teacher's weights, which are not loaded.

    Raises:
        CacheError: a build with this config would write another header.
        ConfigError, ModelError: the teacher's network cannot be built.
    """
    assert config.cache is not None
    teacher, cache = config.teacher, resolve(config, config.cache, stored)
    size, tokens, task = config.views.size, token_request(config), task_of(config.data)
    loaded = load_untrained(
        teacher,
        widths=task.widths,
        size=size,
        likely_size=size or stored.input_size,
    )
    body = teacher_body(
        loaded,
        weights=str(stored.teacher["weights"]),
        precision=teacher.precision,
        plan=config.views,
        cache=cache,
        # The header has the digest of an imported file, which may be missing like the weights.
        class_means=cache.class_means if cache.class_means_url is None else str(stored.teacher["class_means"]),
        tokens=None if tokens is None else tokens.plan(loaded),
        # The head consists of weights.
        head=head_sha256(stored) if cache.logits == "head" else None,
        grid=task.grid(cache.grid),
    )
    _check_bodies(stored, planned_views(config.views), body, index_settings(config.data), cache.url)


def _check_bodies(
    stored: Header, views: dict[str, Any], teacher: dict[str, Any], data: dict[str, Any], cache_url: str
) -> None:
    changed = [
        *differences(stored_views(stored), views, "views."),
        *differences(stored.teacher, teacher, "teacher."),
        *differences(stored.data, data, "data."),
    ]
    if not changed:
        return
    # A build never replaces a header: another builder may be running that has not committed a part yet.
    unused = is_unused(cache_url)
    raise CacheError(
        "this cache was started with a different config or teacher"
        + (", and nothing is committed to it" if unused else ""),
        code="cache.unused-header" if unused else "cache.other-header",
        where=redact(cache_url),
        got="; ".join(changed),
        expected=f"fingerprint {stored.fingerprint}",
        next_step=f"if that build has ended, run: stillroom cache gc {quoted(cache_url)} --unused-header; "
        "otherwise build into another cache.url"
        if unused
        else "build into another cache.url, or restore what changed",
    )
