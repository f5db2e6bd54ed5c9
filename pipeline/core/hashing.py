"""Canonical bytes and digests: equal values have equal bytes, and any flipped byte is detected."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import CacheError

# Of values in messages.
_NUM_LISTED, _MAX_CHARACTERS = 10, 400


def canonical_json(value: object) -> bytes:
    """One byte string per value: sorted keys, no spaces, UTF-8, no NaN."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def digest(data: bytes) -> str:
    """SHA-256, 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def short_digest(value: object) -> str:
    """16 hex characters of the digest of a JSON value: a short id for messages and file names."""
    return digest(canonical_json(value))[:16]


def shuffle_key(seed: int, name: str) -> bytes:
    """The sort key of a shuffled order, in which two names have an order that depends on no other name."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest()


def seal(body: Mapping[str, Any]) -> bytes:
    """A JSON document with the digest of its other fields."""
    content = {key: value for key, value in body.items() if key != "digest"}
    return canonical_json({**content, "digest": digest(canonical_json(content))}) + b"\n"


def unseal(data: bytes, *, where: str) -> dict[str, Any]:
    """The document of bytes that ``seal`` wrote.

    Raises:
        CacheError: the bytes are not canonical JSON, or the digest does not match the content.
    """
    try:
        body = json.loads(data)
        intact = isinstance(body, dict) and seal(body) == data
    except (ValueError, RecursionError):
        body, intact = {}, False
    if not intact:
        raise CacheError(
            "this file was changed after it was written: its digest does not match its content",
            code="cache.record-changed",
            where=where,
            next_step="restore the file, or remove it and run the build again",
        )
    return body


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted name, dtype, shape and bytes of a state dict: the same for any file format of the weights."""
    hasher = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        hasher.update(canonical_json([name, str(tensor.dtype), list(tensor.shape)]))
        hasher.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """``a.b: old -> new`` for every leaf that differs, in key order."""
    changes: list[str] = []
    for key in sorted({*old, *new}):
        path = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            changes.extend(differences(before, after, f"{path}."))
        elif isinstance(before, list) and isinstance(after, list) and min(len(before), len(after)) > _NUM_LISTED:
            changes.extend(_list_differences(before, after, path))
        elif before != after:
            changes.append(f"{path}: {_short(before)} -> {_short(after)}")
    return changes


def _list_differences(before: list[Any], after: list[Any], path: str) -> list[str]:
    """The first item that differs, and the number of those that do."""
    pairs = enumerate(zip_longest(before, after))
    changed = [f"{path}.{number}: {old} -> {new}" for number, (old, new) in pairs if old != new]
    return [f"{changed[0]} ({len(changed)} of {len(after)} differ)"] if changed else []


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]}…"
