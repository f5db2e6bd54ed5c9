"""URLs of shards: brace patterns of a config to URLs and shard ids; errors suggest the right pattern."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import pairwise

from pipeline import storage
from pipeline.core.errors import ShardError, StillroomError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.core.threads import map_ordered

# The last number of a name. Braces expand ASCII digits only.
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
_GLOB = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"[{},]")
_VALIDATION = re.compile(r"(val|valid|validation|test|eval)[-_.0-9]", re.IGNORECASE)
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_PATTERNS, _MAX_PLACE_PATTERNS = 8, 3
MAX_LOOK_UPS = 1000
_LOOK_UP_THREADS = 16
_REPRODUCIBLE = "a brace pattern or a list of URLs, so that every run reads the same shards"


def shard_id(url: str) -> str:
    """``train-00012`` for ``s3://bucket/train-00012.tar?versionId=…``.

    Raises:
        ShardError: the file is not called ``<stem>.tar``. A compressed tar has no byte ranges to read samples by.
    """
    name = redact(url).rsplit("/", 1)[-1]
    stem = name.removesuffix(".tar")
    if stem == name or stem in {"", ".", ".."}:
        raise ShardError(
            "this is not the name of a shard",
            code="shard.name",
            where=redact(url),
            got=repr(name),
            expected="<name>.tar, not compressed",
            next_step="unpack a compressed tar (gunzip, zstd -d): samples are read by byte range",
        )
    return stem


def shard_ids(urls: Iterable[str]) -> list[str]:
    """The id of every URL, in order.

    Raises:
        ShardError: ``shard_id`` refuses a name, or two URLs have the same id.
    """
    urls_by_id: dict[str, str] = {}
    for url in urls:
        name = shard_id(url)
        if name in urls_by_id:
            raise ShardError(
                f"two shards are called {name!r}",
                code="shard.same-name",
                where=redact(url),
                got=f"also {redact(urls_by_id[name])}",
                expected="a unique file stem for every shard, because sample ids begin with it",
                next_step="rename one shard, or list it once",
            )
        urls_by_id[name] = url
    return list(urls_by_id)


def shard_urls(patterns: str | Sequence[str], *, key: str = "data.shards") -> list[str]:
    """Expands brace patterns to URLs, in the order written.

    Args:
        key: the configuration key or option that holds the patterns, for messages.

    Raises:
        StorageInputError: a URL is refused, or a brace is not closed.
        ShardError: a pattern is a glob or names a folder.
    """
    urls = storage.expand(patterns if isinstance(patterns, str) else tuple(patterns))
    for url in urls:
        _check_no_glob(url, key)
    # Only the first name that is not a shard: it is refused in any case, and each check costs a listing.
    if (suspect := next((url for url in urls if not redact(url).endswith(".tar")), None)) is not None:
        _check_no_folder(suspect, key)
    return urls


def urls_by_id(patterns: str | Sequence[str], *, key: str = "data.shards") -> dict[str, str]:
    """The expanded URLs by shard id, in the order written.

    Raises:
        StillroomError: as ``shard_urls`` and ``shard_ids`` do.
    """
    urls = shard_urls(patterns, key=key)
    return dict(zip(shard_ids(urls), urls, strict=True))


def _check_no_glob(url: str, key: str) -> None:
    folder, _, pattern = url.rpartition("/")
    # A file may have such a name. A query is not part of the name, and the redacted URL has none.
    if not _GLOB.search(redact(url)) or _exists(url):
        return
    names = [name for name in _names_in(folder or ".") if name.endswith(".tar") and fnmatchcase(name, pattern)]
    raise ShardError(
        "globs are not expanded",
        code="data.glob",
        where=key,
        got=redact(url),
        expected=_REPRODUCIBLE,
        next_step=_suggestion(folder, names, key) or "no file matches; write braces, as in train-{00000..00009}.tar",
    )


def _check_no_folder(url: str, key: str) -> None:
    if not (names := _names_in(url)):
        return
    if shards := [name for name in names if name.endswith(".tar")]:
        next_step = _suggestion(url.rstrip("/"), shards, key)
    elif any(name.lower().endswith(_IMAGE_SUFFIXES) for name in names):
        next_step = f"make shards of its images: stillroom shards pack {redact(url)} OUT"
    else:
        next_step = "name the shards in it; no .tar lies right in this folder"
    raise ShardError(
        "this is a folder, not a shard",
        code="data.folder",
        where=key,
        got=redact(url),
        expected=_REPRODUCIBLE,
        next_step=next_step,
    )


def _exists(url: str, *, if_unreachable: bool = False) -> bool:
    try:
        return storage.exists(url)
    except StillroomError:
        return if_unreachable


def _names_in(folder_url: str) -> list[str]:
    """Files and folders right in a folder. Empty if it is absent or cannot be listed: this only improves a message."""
    if storage.protocol(folder_url) not in storage.WRITABLE:
        return []
    try:
        files = [name for name in storage.sizes_in_folder(folder_url) if not name.startswith(".")]
        folders = storage.folders(folder_url)
    except (StillroomError, OSError):
        return []
    # An object store lists an object as the only content of a folder of its name.
    return [] if files == [storage.last_name(folder_url)] and not folders else sorted(files) + folders


def _suggestion(folder_url: str, names: Iterable[str], key: str) -> str | None:
    """``use: data.shards=…``, with validation shards under their own key; None without names."""
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for name in (names := list(names)):
        is_validation = key == "data.shards" and _VALIDATION.match(name) and not all(map(_VALIDATION.match, names))
        by_key["data.val_shards" if is_validation else key].append(name)
    lines = [
        f"{option}={_value(folder_url, brace_patterns(group), is_option=option.startswith('--'))}"
        for option, group in sorted(by_key.items())
    ]
    return "use (quoted, on a command line): " + ", ".join(lines) if lines else None


def _value(folder_url: str, patterns: Sequence[str], *, is_option: bool) -> str:
    """A URL, a YAML list of URLs, or one pattern for a command-line option, which takes no list."""
    base = redact(folder_url)
    urls = [f"{base}/{pattern}" if base else pattern for pattern in patterns]
    if len(urls) == 1:
        return urls[0]
    if is_option:
        return f"{base}/{_alternatives(patterns, _MAX_PATTERNS)}"
    more = [f"… {len(urls) - _MAX_PATTERNS} more"] if len(urls) > _MAX_PATTERNS else []
    return f"[{', '.join([*(repr(url) for url in urls[:_MAX_PATTERNS]), *more])}]"


def _alternatives(patterns: Sequence[str], max_patterns: int) -> str:
    """``{a,b,…}``"""
    return f"{{{','.join([*patterns[:max_patterns], *(['…'] if len(patterns) > max_patterns else [])])}}}"


def brace_patterns(names: Iterable[str]) -> list[str]:
    """Few brace patterns that expand to exactly these names, such as ``train-{00000..00009}.tar``."""
    # Numbers with leading zeros expand by their width, and never share a range with numbers of another width.
    groups: defaultdict[tuple[str, str, int | None], list[int]] = defaultdict(list)
    patterns: list[str] = []
    names = {*names}
    numbered = {name: match for name in names if (match := _NUMBERED.fullmatch(name)) and not _SPECIAL.search(name)}
    padded = {(match[1], match[3], len(match[2])) for match in numbered.values() if re.match("0.", match[2])}
    for name in names:
        if (match := numbered.get(name)) is None:
            patterns.append(name)
        else:
            before, number, after = match.groups()
            width = len(number) if (before, after, len(number)) in padded else None
            groups[before, after, width].append(int(number))
    for (before, after, width), numbers in groups.items():
        for first, last in _runs(sorted(numbers)):
            texts = [f"{number:0{width or 1}d}" for number in (first, last)]
            patterns.append(f"{before}{texts[0] if first == last else f'{{{texts[0]}..{texts[1]}}}'}{after}")
    return sorted(patterns)


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run of consecutive numbers."""
    breaks = [position for position, (left, right) in enumerate(pairwise(numbers), start=1) if right != left + 1]
    for start, stop in pairwise([0, *breaks, len(numbers)]):
        yield numbers[start], numbers[stop - 1]


@contextmanager
def report_moved(urls: Sequence[str], place: str) -> Generator[None]:
    """Turns a missing file among ``urls`` inside a ``with`` into an error that counts the missing ones.

    Args:
        urls: all shards that are read in the ``with``. At most ``MAX_LOOK_UPS`` of them are looked up.
        place: how a user passes the new location of the shards, ``{}``, such as ``append data.shards={}``.

    Raises:
        StorageInputError: one of them is missing.
    """
    try:
        yield
    except StorageInputError as error:
        if error.code != storage.MISSING_FILE or error.where not in [redact(url) for url in urls]:
            raise
        looked_up = urls[:MAX_LOOK_UPS]
        exists = map_ordered(lambda url: _exists(url, if_unreachable=True), looked_up, threads=_LOOK_UP_THREADS)
        num_missing = len(looked_up) - sum(exists)
        among = f"the first {len(looked_up)} of {len(urls)}" if len(urls) > len(looked_up) else str(len(urls))
        raise StorageInputError(
            "shards are missing",
            code="data.shards-moved",
            where=error.where,
            got=f"{max(num_missing, 1)} of {among} shards are not where they are expected",
            next_step=f"{place.format(new_place(urls))}, or restore the shards",
        ) from error


def new_place(urls: Iterable[str]) -> str:
    """``'NEW_FOLDER/train-{00..09}.tar'``: shards of these names in another folder, as a user passes them. The result
    is quoted because a shell would expand the braces."""
    patterns = brace_patterns(shard_ids(urls))
    stem = patterns[0] if len(patterns) == 1 else _alternatives(patterns, _MAX_PLACE_PATTERNS)
    return f"'NEW_FOLDER/{stem}.tar'"
