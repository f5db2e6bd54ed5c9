"""The header of a cache: whose outputs of which views it holds, in which encodings."""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.augment.random_bits import RNG_VERSION
from pipeline.cache.format import layout
from pipeline.cache.format.codec import check_encodings
from pipeline.cache.format.files import parse_record
from pipeline.core.errors import CacheError
from pipeline.core.hashing import short
from pipeline.core.redaction import redact
from schemas.cache_format import Header
from schemas.config import ViewsConfig


def views_body(plan: ViewsConfig) -> dict[str, Any]:
    """What decides the pixels of a view, less the teacher's size: its hash is the views id."""
    body = plan.model_dump(mode="json", exclude={"count", "size"}, exclude_none=True)
    return {**body, "rng_version": RNG_VERSION}


def views_id(plan: ViewsConfig) -> str:
    return short(views_body(plan))


def plan_of(header: Header) -> ViewsConfig:
    """The plan of a cache's views; its count and size are not in it."""
    return ViewsConfig.model_validate({key: value for key, value in header.views.items() if key != "rng_version"})


def drawable_plan(header: Header) -> ViewsConfig:
    """``plan_of``, for those who draw its views again.

    Raises:
        CacheError: this version does not draw as the builder did.
    """
    if header.views.get("rng_version") != RNG_VERSION:
        raise CacheError(
            "the views of this cache were drawn by another version",
            got=f"rng_version {header.views.get('rng_version')}",
            expected=RNG_VERSION,
            next_step="read it with the version that wrote it",
        )
    try:
        return plan_of(header)
    except ValidationError as error:
        raise CacheError("the views of this header are no plan", got=str(error.errors()[0]["loc"])) from error


def read_header(cache_url: str) -> Header:
    """
    Raises:
        CacheError: there is no cache here, it is damaged, or of another format.
    """
    found = find_header(cache_url)
    if found is None:
        raise no_cache(cache_url)
    return found


def no_cache(cache_url: str) -> CacheError:
    """The error for a place without a header."""
    return CacheError(
        "there is no cache here",
        code="cache.missing",
        where=redact(cache_url),
        next_step="check the URL, or run: stillroom cache build CONFIG",
    )


def find_header(cache_url: str) -> Header | None:
    """The header, or None while there is none.

    Raises:
        CacheError: it is damaged, or of another format.
    """
    url = storage.join(cache_url, layout.HEADER)
    data = storage.read_if_there(url, max_bytes=storage.MAX_RECORD_BYTES)
    return None if data is None else parse_header(data, where=redact(url))


def parse_header(data: bytes, *, where: str) -> Header:
    header = parse_record(Header, data, where=where)
    check_encodings(header.outputs)
    return header
