"""The header of a cache: which teacher and which views its outputs come from, and in which encodings it stores them."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.augment.random_bits import RNG_VERSION
from pipeline.augment.stored_pixels import jpeg_settings
from pipeline.cache.format import layout
from pipeline.cache.format.codec import check_encodings
from pipeline.cache.format.files import parse_record
from pipeline.core.errors import CacheError
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.tasks import output_roles, task_of
from schemas.cache_format import Header, Output
from schemas.config import Interpolation, Size, ViewsConfig, size_json


def views_body(
    plan: ViewsConfig, *, size: Size | None = None, interpolation: Interpolation | None = None
) -> dict[str, Any]:
    """Every key that decides the pixels of a view, except the teacher's input size, of which only boxes of eval views
    depend, if it is no square: the hash is the views id.

    Args:
        size, interpolation: of the teacher's input. They decide the pixels of views that are encoded with loss, and
            have no effect on the body of others.
    """
    body = plan.model_dump(mode="json", exclude=plan.keys_outside_id, exclude_none=True)
    if plan.jpeg_quality is not None:
        stored_size = None if size is None else size_json(size)
        body["pixels"] = {**jpeg_settings(plan.jpeg_quality), "size": stored_size, "interpolation": interpolation}
    if plan.box_size is not None:
        body["size"] = size_json(plan.box_size)
    # Plans that are older than this key have the id of its default.
    if plan.mix_repeat == 1:
        del body["mix_repeat"]
    return {**body, "rng_version": RNG_VERSION}


def views_id(plan: ViewsConfig, *, size: Size | None = None, interpolation: Interpolation | None = None) -> str:
    return short_digest(views_body(plan, size=size, interpolation=interpolation))


def stored_views(header: Header) -> dict[str, Any]:
    """``Header.views``, with how the parts store the views: what a config can differ in."""
    return {**header.views, "pixels": header.pixels or "none"}


def planned_views(plan: ViewsConfig) -> dict[str, Any]:
    """``stored_views`` of a cache that is built by this plan."""
    return {**views_body(plan), "pixels": plan.pixels}


def plan_of(header: Header) -> ViewsConfig:
    """The plan of a cache's views, without their count and size."""
    keys = {key: value for key, value in stored_views(header).items() if key != "rng_version"}
    return ViewsConfig.model_validate(keys)


def replayable_plan(header: Header) -> ViewsConfig:
    """``plan_of``, for callers that sample the views again.

    Raises:
        CacheError: this version samples views from the plan that differ from those of the builder.
    """
    if header.views.get("rng_version") != RNG_VERSION:
        raise CacheError(
            "another version sampled the views of this cache",
            code="cache.other-rng-version",
            got=f"rng_version {header.views.get('rng_version')}",
            expected=RNG_VERSION,
            next_step="read it with the version that wrote it",
        )
    try:
        return plan_of(header)
    except ValidationError as error:
        raise CacheError(
            "the views of this header are not a valid plan",
            code="cache.invalid-views",
            got=str(error.errors()[0]["loc"]),
            next_step="read it with the version that wrote it",
        ) from error


def read_header(cache_url: str) -> Header:
    """
    Raises:
        CacheError: there is no header, it is damaged, or has another format version.
    """
    header = find_header(cache_url)
    if header is None:
        raise no_cache(cache_url)
    return header


def no_cache(cache_url: str) -> CacheError:
    """The error for a URL without a header."""
    return CacheError(
        "there is no cache here",
        code="cache.missing",
        where=redact(cache_url),
        next_step="check the URL, or run: stillroom cache build CONFIG",
    )


def find_header(cache_url: str) -> Header | None:
    """The header, or None if there is none yet.

    Raises:
        CacheError: it is damaged, or has another format version.
    """
    url = storage.join(cache_url, layout.HEADER)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    return None if data is None else parse_header(data, where=redact(url))


def parse_header(data: bytes, *, where: str) -> Header:
    header = parse_record(Header, data, where=where)
    try:
        task_of(header.data)
    except ValueError as error:
        raise CacheError(
            "this version does not know the task of this cache",
            code="cache.unknown-task",
            where=where,
            got=str(error),
            next_step="read it with the version that wrote it",
        ) from error
    check_encodings(read_outputs(header))
    return header


def decoded_from(header: Header, key: str) -> tuple[str, ...]:
    """The lossy encodings from which outputs were decoded before they were stored in this cache, first to last; empty:
    they are the teacher's.

    Args:
        key: of the ``cache`` section, such as ``logits``.
    """
    return tuple(header.teacher.get("decoded_from", {}).get(key, ()))


def read_outputs(header: Header) -> tuple[Output, ...]:
    """The outputs that this version reads; it ignores all others."""
    roles = output_roles(task_of(header.data))
    return tuple(output for output in header.outputs if output.name in roles)
