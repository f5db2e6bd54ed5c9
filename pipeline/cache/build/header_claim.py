"""Who writes to a cache: its fingerprint and header. A builder that differs in any of it stops before it writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline import storage
from pipeline.augment.params import sample_keys
from pipeline.augment.random_bits import philox4x64
from pipeline.cache.build.commit import is_unused
from pipeline.cache.build.imported_means import ImportedMeans
from pipeline.cache.format import layout
from pipeline.cache.format.codec import outputs_of
from pipeline.cache.format.header import find_header, read_header, views_body, views_id
from pipeline.core.errors import CacheError, ModelError
from pipeline.core.hashing import differences, seal, short, weights_digest
from pipeline.core.redaction import quoted, redact
from pipeline.models import LoadedModel, load_untrained
from pipeline.shards.index import index_settings
from pipeline.teacher.inference import Teacher
from schemas.cache_format import Header
from schemas.config import CacheConfig, Config, DataConfig, Precision, ViewsConfig

_NUM_PROBES = 4
MAX_DRIFT = {"fp32": 1e-2, "bf16": 0.15, "fp16": 0.05}
"""How far logits may move, as a share of their standard deviation: hardware and libraries round differently, another
network differs by whole logits."""


def teacher_body(
    loaded: LoadedModel, *, weights: str, precision: Precision, plan: ViewsConfig, cache: CacheConfig, class_means: str
) -> dict[str, Any]:
    """What decides the words of the teacher; with the views id, its hash is the fingerprint.

    Args:
        weights: their ``weights_digest``.
    """
    spec = loaded.input
    return {
        "architecture": loaded.architecture,
        "weights": weights,
        "size": spec.size,
        "interpolation": spec.interpolation,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "precision": precision,
        "logits": cache.logits,
        "embeddings": cache.embeddings,
        "class_means": class_means,
        "views_id": views_id(plan),
    }


def make_header(
    teacher: Teacher,
    *,
    plan: ViewsConfig,
    cache: CacheConfig,
    data: DataConfig,
    imported: ImportedMeans | None = None,
) -> Header:
    """The header that this config, these weights and these imported class means would write.

    Raises:
        ModelError: the teacher answers the probe images with NaN or infinity.
    """
    body = teacher_body(
        teacher.loaded,
        weights=weights_digest(teacher.state()),
        precision=teacher.precision,
        plan=plan,
        cache=cache,
        class_means=cache.class_means if imported is None else imported.mode,
    )
    module = teacher.module
    return Header(
        views_id=views_id(plan),
        views=views_body(plan),
        fingerprint=short(body),
        teacher=body,
        data=index_settings(data),
        num_classes=module.num_classes,
        embedding_dim=module.embedding_dim,
        outputs=outputs_of(cache, num_classes=module.num_classes, embedding_dim=module.embedding_dim),
        probe_logits=tuple(tuple(float(value) for value in row) for row in _probe(teacher)),
    )


def _probe(teacher: Teacher) -> NDArray[np.float32]:
    """Logits on four fixed noise images: what notices code that changed behind unchanged weights."""
    size = teacher.loaded.input.size
    num_blocks = -(-3 * size * size // 32)
    keys = np.repeat(sample_keys(0, [f"probe/{number}" for number in range(_NUM_PROBES)]), num_blocks, axis=0)
    counters = np.zeros((len(keys), 4), np.uint64)
    counters[:, 0] = np.tile(np.arange(num_blocks, dtype=np.uint64), _NUM_PROBES)
    noise = philox4x64(keys, counters).astype("<u8").view(np.uint8).reshape(_NUM_PROBES, -1)
    pixels = torch.from_numpy(noise[:, : 3 * size * size].reshape(_NUM_PROBES, 3, size, size).copy())
    logits_NK = teacher.infer(pixels).logits_NK
    if not np.isfinite(logits_NK).all():
        raise ModelError(
            "the teacher answers images of plain noise with NaN or infinity",
            where="teacher",
            next_step="use teacher.precision=fp32, or check the weights",
        )
    return logits_NK


def claim(cache_url: str, header: Header) -> Header:
    """Writes the header if there is none; else checks that it says the same.

    Raises:
        CacheError: the cache belongs to another teacher, transform, plan or encoding; the difference is spelled out.
    """
    # Looked for first: every part asks, and an attempt to create costs a local disk 12 ms, a look 0.05.
    found = find_header(cache_url)
    if found is None:
        if storage.create(storage.join(cache_url, layout.HEADER), seal(header.model_dump(mode="json"))):
            return header
        found = read_header(cache_url)
    check_same(found, header, cache_url)
    return found


def check_same(found: Header, expected: Header, cache_url: str) -> None:
    """
    Raises:
        CacheError: a cache with the header ``found`` is not one that ``expected`` would be written to.
    """
    _check_bodies(found, expected.views, expected.teacher, expected.data, cache_url)
    old, new = np.array(found.probe_logits), np.array(expected.probe_logits)
    drift = float(np.abs(old - new).max() / max(float(old.std()), 1e-6))
    tolerance = MAX_DRIFT[str(expected.teacher["precision"])]
    if drift > tolerance:
        raise CacheError(
            "the teacher's weights are unchanged, but it answers the four probe images differently",
            code="cache.other-probe-logits",
            where=redact(cache_url),
            got=f"logits differ by {drift:.3g} of their standard deviation",
            expected=f"at most {tolerance}",
            next_step="model code or a library changed; build into another cache.url",
        )


def check_without_weights(found: Header, config: Config) -> None:
    """Compares a header with all of a config but the numbers of its teacher, which are not loaded.

    Raises:
        CacheError: a build with this config would write another header.
        ConfigError, ModelError: the teacher's network cannot be built.
    """
    teacher, cache = config.teacher, config.cache
    assert cache is not None
    assert config.data.num_classes is not None
    size = config.views.size
    body = teacher_body(
        load_untrained(
            teacher,
            num_classes=config.data.num_classes,
            size=size,
            likely_size=size or int(str(found.teacher["size"])),
        ),
        weights=str(found.teacher["weights"]),
        precision=teacher.precision,
        plan=config.views,
        cache=cache,
        # The header has the digest of an imported file, which may be gone like the weights.
        class_means=cache.class_means if cache.class_means_url is None else str(found.teacher["class_means"]),
    )
    _check_bodies(found, views_body(config.views), body, index_settings(config.data), cache.url)


def _check_bodies(
    found: Header, views: dict[str, Any], teacher: dict[str, Any], data: dict[str, Any], cache_url: str
) -> None:
    changed = [
        *differences(found.views, views, "views."),
        *differences(found.teacher, teacher, "teacher."),
        *differences(found.data, data, "data."),
    ]
    if changed:
        raise _other_header(cache_url, got="; ".join(changed), expected=f"fingerprint {found.fingerprint}")


def _other_header(cache_url: str, *, got: str, expected: str) -> CacheError:
    """A header is never replaced by a build: another builder may be at work that has not committed anything yet."""
    where = redact(cache_url)
    if is_unused(cache_url):
        return CacheError(
            "this cache was begun by another config or another teacher, and nothing is committed to it",
            code="cache.unused-header",
            where=where,
            got=got,
            expected=expected,
            next_step=f"if that build has ended, run: stillroom cache gc {quoted(cache_url)} --unused-header; "
            "else build into another cache.url",
        )
    return CacheError(
        "this cache was begun by another config or another teacher",
        code="cache.other-header",
        where=where,
        got=got,
        expected=expected,
        next_step="build into another cache.url, or restore what changed",
    )
