"""Files of a run's folder: config, copies of the caches' manifests, checkpoints, summary."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pipeline import storage
from pipeline.cache.read.reader import open_cache
from pipeline.core.config_loading import build_config
from pipeline.core.errors import CacheError, ConfigError, cause
from pipeline.core.hashing import differences, seal, unseal
from pipeline.core.redaction import redact, redact_text
from pipeline.models.weights import load_pickled
from pipeline.shards.shard_urls import shard_ids, shard_urls
from schemas.config import Config

CONFIG = "config.json"
MANIFEST = "manifest.json"
LAST = "checkpoints/last.pt"
BEST = "checkpoints/best.pt"
METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"
EVALUATIONS = "evaluations.jsonl"
SUMMARY = "summary.json"

# Place and speed of a run may change between its starts; what it computes may not.
_MAY_CHANGE = {
    "ray": True,
    "run": True,
    # The id of the sample order covers the training samples; the rules for validation samples may change.
    "data": {"val_shards", "bad_samples", "max_bad_share", "local_dir", "local_bytes"},
    "train": {
        "num_workers",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "keep_every_epochs",
        "tensorboard",
        "eval_agreement",
        "eval_reference",
        "best",
        # Rounds differently, but may avoid a crash.
        "channels_last",
    },
}


_PINNED = re.compile(r"(manifest|moments)(-\d+)?\.json")


def claim_run(run_url: str, config: Config) -> None:
    """Writes the config of a new run, or checks that a resumed run has the same config. Any rank may be first.

    Credentials in URLs are not written, and changed credentials do not make a different config.

    Raises:
        ConfigError: the run was started with another config; ``got`` lists the differences.
    """
    if not storage.create(storage.join(run_url, CONFIG), seal(_without_credentials(config.model_dump(mode="json")))):
        check_same_config(run_url, config)


def has_begun(run_url: str) -> bool:
    """Whether the folder has a run, which this or another config began."""
    return storage.exists(storage.join(run_url, CONFIG))


def check_same_config(run_url: str, config: Config) -> None:
    """
    Raises:
        ConfigError: there is a run with another config; ``got`` lists the differences.
    """
    if not has_begun(run_url):
        return
    stored = read_config(run_url)
    began, now = _comparable(stored), _comparable(config)
    if _has_moved(run_url, stored, config):
        now["data"]["shards"] = began["data"]["shards"]
    changed = differences(began, now)
    if changed:
        is_saved = storage.exists(storage.join(run_url, LAST)) or storage.exists(storage.join(run_url, SUMMARY))
        raise ConfigError(
            "this run was started with another config" + ("" if is_saved else ", and no checkpoint is saved in it"),
            code="run.other-config",
            where=redact(run_url),
            got="; ".join(changed),
            next_step="choose another run.url, or undo the change to continue this run"
            if is_saved
            # An active training may not have saved its first checkpoint yet, so nothing is replaced here.
            else f"if no training of this run is active, {_removal(run_url)}; else choose another run.url",
        )


def _removal(run_url: str) -> str:
    """How another config can begin the run: remove its config and its pinned manifests."""
    names = [name for name in storage.sizes_in_folder(run_url) if name == CONFIG or _PINNED.fullmatch(name)]
    urls = [redact(storage.join(run_url, name)) for name in sorted(names)]
    if storage.protocol(run_url) != "file":
        return f"remove {', '.join(urls)}, and run this command again"
    return f"run: rm {shlex.join(urls)}, and then this command again"


def _has_moved(run_url: str, began: Config, now: Config) -> bool:
    """Whether the config names the same shards in the same order, at another place."""
    if began.data.shards == now.data.shards:
        return False
    ids = _shard_ids(run_url, began)
    return ids is not None and ids == _shard_ids(run_url, now)


def _shard_ids(run_url: str, config: Config) -> list[str] | None:
    """Ids of the shards of a run, those of its first cache if the config names none; None: unknown."""
    if config.data.shards is not None:
        return shard_ids(shard_urls(config.data.shards))
    if config.teacher.mode != "cache" or not config.data.caches:
        return None
    try:
        cache = open_cache(config.data.caches[0], manifest_bytes=pinned_manifests(run_url, 1)[0])
        return [shard.shard_id for shard in cache.shards]
    except CacheError:
        return None


def read_config(run_url: str) -> Config:
    """The config that a run was started with. Keys with their default value count as not set.

    The file has every key, so that a later default changes no run, but not which keys the user set. A key that was
    left to the cache must stay unset, and a key that was set to its default agreed with the cache when the run began.

    Raises:
        ConfigError: there is no run, or its config is invalid.
        CacheError: the file was changed.
    """
    url = storage.join(run_url, CONFIG)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        raise ConfigError(
            "there is no run here",
            code="run.not-found",
            where=redact(run_url),
            next_step="correct the URL, or run: stillroom train CONFIG",
        )
    body = unseal(data, where=redact(url))
    body.pop("digest")
    where = redact(url)
    config = build_config(body, where=where)
    return build_config(config.model_dump(mode="json", exclude_defaults=True), where=where)


def _comparable(config: Config) -> dict[str, Any]:
    tree = _without_credentials(config.model_dump(mode="json", exclude=_MAY_CHANGE))
    # Runs of earlier versions stored their default for a teacher that was named without weights, or not at all.
    for teacher in (tree["teacher"], *tree["teacher"]["others"]):
        teacher["weights"] = teacher["weights"] or "random"
    return tree


def _without_credentials(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_credentials(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_credentials(item) for item in value]
    return redact_text(value) if isinstance(value, str) else value


def pin_manifests(run_url: str, manifests: Sequence[bytes]) -> tuple[bytes, ...]:
    """Copies the manifests of the caches into the run at its first start, so that extending a cache does not change
    the run. Returns the copies to use, which an earlier start or another rank may have written."""
    return tuple(_pin(_manifest_url(run_url, number), data) for number, data in enumerate(manifests))


def pinned_manifests(run_url: str, num_caches: int) -> tuple[bytes | None, ...]:
    """One for each cache, in the order of ``data.cache``; None: not pinned yet."""
    urls = [_manifest_url(run_url, number) for number in range(num_caches)]
    return tuple(storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES) for url in urls)


def pin_moments(run_url: str, records: Mapping[int, bytes]) -> dict[int, bytes]:
    """The same for the records of the moments with which targets are standardised, by the number of the teacher."""
    return {number: _pin(_moments_url(run_url, number), data) for number, data in records.items()}


def pinned_moments(run_url: str, number: int) -> bytes | None:
    """Of one teacher; None: not pinned yet."""
    return storage.read_if_exists(_moments_url(run_url, number), max_bytes=storage.MAX_RECORD_BYTES)


def _manifest_url(run_url: str, number: int) -> str:
    """``manifest.json`` of the first cache, ``manifest-1.json`` of the next."""
    return storage.join(run_url, f"manifest-{number}.json" if number else MANIFEST)


def _moments_url(run_url: str, number: int) -> str:
    return storage.join(run_url, f"moments-{number}.json" if number else "moments.json")


def _pin(url: str, data: bytes) -> bytes:
    return data if storage.create(url, data) else storage.read(url, max_bytes=storage.MAX_RECORD_BYTES)


def epoch_checkpoint(epoch: int) -> str:
    """Name of the permanent checkpoint after this number of epochs."""
    return f"checkpoints/epoch-{epoch:04d}.pt"


def save(run_url: str, name: str, state: dict[str, Any]) -> None:
    """Writes a checkpoint. A reader sees the old file or the new one, never a part."""
    sink = io.BytesIO()
    torch.save(state, sink)
    storage.write(storage.join(run_url, name), sink.getvalue())


def load(run_url: str, name: str) -> dict[str, Any] | None:
    """A checkpoint's state on the CPU; None: there is none. Its code is never run (``weights_only``).

    Raises:
        CacheError: the file is damaged.
    """
    url = storage.join(run_url, name)
    data = storage.read_if_exists(url)
    if data is None:
        return None
    try:
        return load_pickled(data)
    except Exception as error:
        raise CacheError(
            "this checkpoint is damaged",
            code="run.damaged-checkpoint",
            where=redact(url),
            got=cause(error),
            next_step="remove it to start the run again",
        ) from error


def write_summary(run_url: str, summary: dict[str, Any]) -> None:
    storage.write(storage.join(run_url, SUMMARY), json.dumps(summary, indent=2).encode() + b"\n")


def read_summary(run_url: str) -> dict[str, Any] | None:
    """The summary of a finished run; None: it is not finished.

    Raises:
        CacheError: the file is damaged.
    """
    url = storage.join(run_url, SUMMARY)
    data = storage.read_if_exists(url, max_bytes=storage.MAX_RECORD_BYTES)
    if data is None:
        return None
    try:
        return json.loads(data)
    except ValueError as error:
        raise CacheError(
            "this summary is damaged",
            code="run.damaged-summary",
            where=redact(url),
            got=str(error),
            next_step="remove it and run the training again: it continues from its last checkpoint",
        ) from error
