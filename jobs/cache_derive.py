"""Caches that are derived from other caches, without a teacher: by Ray tasks or by a plain loop."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from jobs.build_cache import sum_in_tasks
from jobs.observability.log import counted, emit
from jobs.observability.progress import ProgressView
from jobs.ray.address import announce
from jobs.ray.cluster import cluster, cpus_only
from jobs.ray.fan_out import fan_out
from pipeline import storage
from pipeline.cache.build.statistics import mean_fidelity
from pipeline.cache.derive.average import AverageRequest, average, left_out
from pipeline.cache.derive.convert import convert
from pipeline.cache.derive.derivation import Item, Run, open_source
from pipeline.cache.derive.merge import merge
from pipeline.cache.format.header import decoded_from
from pipeline.cache.read.reader import open_cache
from pipeline.core.config_loading import build_section, parse_config
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.shards.shard_urls import urls_by_id
from schemas.cache_format import Commit, Header, Manifest, Statistics
from schemas.config import CacheConfig, RayConfig


def ray_section(overrides: Sequence[str], command: str) -> RayConfig:
    """The ray section of a command without a config; ``ray.address`` is ``none`` by default.

    Raises:
        ConfigError: an override is of another section.
    """
    others = [override for override in overrides if not override.startswith("ray.")]
    if others:
        raise ConfigError(
            "this command takes keys of the ray section alone",
            code="config.only-ray-keys",
            where=command,
            got=" ".join(others),
            expected="such as ray.address=auto ray.cpus_per_task=4",
        )
    return parse_config("{}", ["ray.address=none", *overrides], where=command).ray


def tasks_of(ray: RayConfig, destination: str, what: str) -> Run:
    """Derives blocks in tasks of this ray section. Progress goes to standard error."""

    def run(work: Callable[[Item], Commit], items: Sequence[Item]) -> Iterator[tuple[Item, Commit]]:
        with ProgressView(what, len(items)) as progress:
            name = partial(_name, redact(destination))
            for done, result in enumerate(
                fan_out(work, items, cpus_only(ray), what=f"a cache {what} task", name=name), 1
            ):
                yield result
                progress.update(done, "blocks")

    return run


def _name(where: str, item: Item) -> str:
    shard, block = item
    return f"{block.name} of {shard} in {where}"


def parse_views(views: str | None) -> int | None:
    """The number of views of ``0-9``.

    Raises:
        ConfigError: the first view is not 0, or the text is no range.
    """
    if views is None:
        return None
    match = re.fullmatch(r"0-(\d{1,5})", views)
    if match is None:
        raise ConfigError(
            "these views do not start at view 0",
            code="config.views-range",
            where="--views",
            got=views,
            expected="0-LAST, such as 0-9 for the first ten views",
        )
    return int(match[1]) + 1


def convert_cache(
    source_url: str,
    destination_url: str,
    ray: RayConfig,
    *,
    encodings: Mapping[str, str],
    views: str | None = None,
    shards: str | None = None,
) -> Manifest:
    """The manifest of the converted cache.

    Args:
        encodings: by key of the ``cache`` section.
        views: such as ``0-9``.
        shards: their file names, with ``{a..b}`` braces.

    Raises:
        StillroomError: as ``convert`` does; an option is wrong; or no node could run a task.
    """
    build_section(CacheConfig, {"url": destination_url, **encodings}, where="stillroom cache convert")
    if "auto" in encodings.values():
        raise ConfigError(
            "auto is the encoding of the existing cache",
            code="config.nothing-to-convert",
            where="stillroom cache convert",
            got="auto",
            expected="an encoding by name",
            next_step="leave out the option to keep the encoding",
        )
    ids = None if shards is None else [*urls_by_id(shards, key="--shards")]
    # Ray's workers run in other directories.
    source_url, destination_url = storage.absolute(source_url), storage.absolute(destination_url)
    with cluster(ray):
        return convert(
            source_url,
            destination_url,
            encodings=encodings,
            num_views=parse_views(views),
            shard_ids=ids,
            run=tasks_of(ray, destination_url, "convert"),
            add_up=partial(sum_in_tasks, ray),
        )


def merge_caches(source_urls: Sequence[str], destination_url: str, ray: RayConfig) -> Manifest:
    """The manifest of the merged cache.

    Raises:
        StillroomError: as ``merge`` does; or no node could run a task.
    """
    destination_url = storage.absolute(destination_url)
    with cluster(ray):
        run, add_up = tasks_of(ray, destination_url, "merge"), partial(sum_in_tasks, ray)
        return merge([storage.absolute(url) for url in source_urls], destination_url, run=run, add_up=add_up)


def average_caches(
    source_urls: Sequence[str],
    destination_url: str,
    ray: RayConfig,
    *,
    weights: Sequence[float] = (),
    temperature: float | None = None,
    logits: str = "fp16",
) -> Manifest:
    """The manifest of the cache with the average.

    Args:
        weights: of the sources; empty: equal ones.
        temperature: of the probabilities whose mean is stored; None: the mean of the logits.
        logits: encoding of the result, as in ``cache.logits``.

    Raises:
        StillroomError: as ``average`` does; or no node could run a task.
    """
    build_section(CacheConfig, {"url": destination_url, "logits": logits}, where="stillroom cache average")
    destination_url = storage.absolute(destination_url)
    request = AverageRequest(tuple(weights) or (1.0,) * len(source_urls), temperature, logits)
    with cluster(ray):
        run = tasks_of(ray, destination_url, "average")
        return average([storage.absolute(url) for url in source_urls], destination_url, request, run=run)


def average_main(
    arguments: Sequence[str],
    destination_url: str,
    *,
    weights: str | None,
    probabilities: bool,
    temperature: float | None,
    logits: str,
) -> None:
    """``stillroom cache average``. Keys of the ray section may be among the URLs."""
    ray, sources = _split(arguments, "stillroom cache average")
    if probabilities != (temperature is not None):
        raise ConfigError(
            "the mean of probabilities is that at one temperature",
            code="config.average-temperature",
            where="stillroom cache average",
            got=f"--temperature {temperature:g}" if temperature else "--probabilities",
            expected="--probabilities --temperature T, or neither",
        )
    announce(ray.address)
    shares = [] if weights is None else _weights(weights)
    manifest = average_caches(sources, destination_url, ray, weights=shares, temperature=temperature, logits=logits)
    for name, count in left_out([open_source(url) for url in sources]).items():
        text = f"average: left out {name} of {counted(count, 'cache')}"
        emit(text, event="omitted", level=logging.WARNING, kind=name, count=count)
    report(destination_url, manifest)


def _weights(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            "these weights are not numbers",
            code="config.average-weights",
            where="--weights",
            got=text,
            expected="one for each cache, such as 2,1",
        ) from None


def _split(arguments: Sequence[str], command: str) -> tuple[RayConfig, list[str]]:
    """The ray section and the URLs among the arguments of a command."""
    overrides = [argument for argument in arguments if argument.startswith("ray.")]
    return ray_section(overrides, command), [argument for argument in arguments if argument not in overrides]


def describe_derived(header: Header, manifest: Manifest) -> str:
    """The lines at the end of a derivation."""
    assert header.derived is not None
    changes = [f"{key} {old} -> {new}" for key, (old, new) in header.derived.encodings.items()]
    lines = [f"cache: {header.derived.kind}" + (f" {', '.join(changes)}" if changes else "")]
    lines += [f"  {text}" for text in _fidelity(header, manifest.statistics)]
    lines.append(
        f"  {manifest.num_ok} images x {manifest.num_views} views in {manifest.num_shards} shards, "
        f"{manifest.size_bytes / 1e6:.1f} MB, fingerprint {manifest.fingerprint}"
    )
    return "\n".join(lines)


def _fidelity(header: Header, statistics: Statistics) -> Iterator[str]:
    means, derived = mean_fidelity(header, statistics), header.derived
    assert derived is not None
    temperature = float(header.teacher.get("average", {}).get("temperature") or 1)
    measured = ("logits",) if derived.kind == "average" else derived.encodings
    for key, name, value in (
        ("logits", f"KL at T = {temperature:g}, nats", means["kl_nats"].get(str(temperature))),
        ("logits", "total variation", means["total_variation"]),
        ("logits", "argmax flips", means["argmax_flips"]),
        ("embeddings", "embedding cosine", means["embedding_cosine"]),
        ("tokens", "token cosine", means["token_cosine"]),
    ):
        if key in measured and value is not None:
            yield f"{name}: {value:.4g} against {_unencoded(header, key)}"


def _unencoded(header: Header, key: str) -> str:
    """What the encoding of an output is compared with."""
    if "average" in header.teacher:
        return "the mean before it was encoded"
    kinds = decoded_from(header, key)
    return f"the decoded {' -> '.join(kinds)} outputs" if kinds else "the teacher"


def main(
    source_url: str,
    destination_url: str,
    overrides: Sequence[str],
    *,
    encodings: Mapping[str, str],
    views: str | None,
    shards: str | None,
) -> None:
    """``stillroom cache convert``."""
    ray = ray_section(overrides, "stillroom cache convert")
    announce(ray.address)
    manifest = convert_cache(source_url, destination_url, ray, encodings=encodings, views=views, shards=shards)
    report(destination_url, manifest)


def merge_main(arguments: Sequence[str], destination_url: str) -> None:
    """``stillroom cache merge``. Keys of the ray section may be among the URLs."""
    ray, sources = _split(arguments, "stillroom cache merge")
    announce(ray.address)
    report(destination_url, merge_caches(sources, destination_url, ray))


def report(destination_url: str, manifest: Manifest) -> None:
    header = open_cache(destination_url).header
    emit(describe_derived(header, manifest), event="end", **manifest.model_dump(mode="json"))
