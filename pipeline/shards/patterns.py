"""From what a user gives as shards to their URLs; a folder or a glob is refused with the pattern to give instead."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

from pipeline import storage
from pipeline.core.errors import ShardError, StillroomError
from pipeline.core.redaction import redact

# The last number of a name; braces expand ASCII digits alone.
_NUMBERED = re.compile(r"(.*?)([0-9]+)([^0-9]*)", re.DOTALL)
_GLOB = re.compile(r"[*?\[]")
_SPECIAL = re.compile(r"[{},]")
_VALIDATION = re.compile(r"(val|valid|validation|test|eval)[-_.0-9]", re.IGNORECASE)
_IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_MAX_PATTERNS = 8


def shard_urls(patterns: str | Sequence[str], *, key: str = "data.shards") -> list[str]:
    """The URLs of brace patterns, in the order written.

    Args:
        key: the configuration key or option that holds the patterns, for messages.

    Raises:
        StorageInputError: a URL is refused, or a brace is not closed.
        ShardError: a pattern is a glob or names a folder.
    """
    urls = storage.expand(patterns if isinstance(patterns, str) else tuple(patterns))
    for url in urls:
        _check_no_glob(url, key)
    # The first alone, since it is refused anyway, and each costs a listing.
    if (other := next((url for url in urls if not redact(url).endswith(".tar")), None)) is not None:
        _check_no_folder(other, key)
    return urls


def _check_no_glob(url: str, key: str) -> None:
    folder, _, name = url.rpartition("/")
    # A file may have such a name. A query, which is not part of it, is not in the redacted URL.
    if not _GLOB.search(redact(url)) or _exists(url):
        return
    names = [found for found in _tars_in(folder or ".") if fnmatchcase(found, name)]
    raise ShardError(
        "globs are not expanded",
        code="data.glob",
        where=key,
        got=redact(url),
        expected="a brace pattern or a list of URLs, so that every run reads the same shards",
        next_step=_suggestion(folder, names, key) or "no file matches; write braces, as in train-{00000..00009}.tar",
    )


def _check_no_folder(url: str, key: str) -> None:
    if not (found := _names_in(url)):
        return
    if names := [name for name in found if name.endswith(".tar")]:
        next_step = _suggestion(url.rstrip("/"), names, key)
    elif any(name.lower().endswith(_IMAGES) for name in found):
        next_step = f"make shards of its images: stillroom shards pack {redact(url)} OUT"
    else:
        next_step = "name the shards in it; no .tar lies right in this folder"
    raise ShardError(
        "this is a folder, not a shard",
        code="data.folder",
        where=key,
        got=redact(url),
        expected="a brace pattern or a list of URLs, so that every run reads the same shards",
        next_step=next_step,
    )


def _exists(url: str) -> bool:
    try:
        return storage.exists(url)
    except StillroomError:
        return False


def _tars_in(folder_url: str) -> list[str]:
    return [name for name in _names_in(folder_url) if name.endswith(".tar")]


def _names_in(folder_url: str) -> list[str]:
    """Files and folders right in a folder; none where it is absent or cannot be listed, since this helps a message."""
    if storage.protocol(folder_url) not in storage.WRITABLE:
        return []
    try:
        files = [name for name in storage.sizes_right_below(folder_url) if not name.startswith(".")]
        folders = storage.folders(folder_url)
    except (StillroomError, OSError):
        return []
    # An object store lists an object as the only content of a folder of its name.
    return [] if files == [storage.last_name(folder_url)] and not folders else sorted(files) + folders


def _suggestion(folder_url: str, names: Iterable[str], key: str) -> str | None:
    """``use: data.shards=…``, with validation shards under their own key; None without names."""
    by_key: defaultdict[str, list[str]] = defaultdict(list)
    for name in (names := list(names)):
        is_other = key == "data.shards" and _VALIDATION.match(name) and not all(map(_VALIDATION.match, names))
        by_key["data.val_shards" if is_other else key].append(name)
    lines = [
        f"{found}={_value(folder_url, brace_patterns(group), is_option=found.startswith('--'))}"
        for found, group in sorted(by_key.items())
    ]
    return "use (quoted, on a command line): " + ", ".join(lines) if lines else None


def _value(folder_url: str, patterns: Sequence[str], *, is_option: bool) -> str:
    """A URL, a list of them as YAML, or one pattern for an option, which takes no list."""
    base = redact(folder_url)
    urls = [f"{base}/{pattern}" if base else pattern for pattern in patterns]
    if len(urls) == 1:
        return urls[0]
    if is_option:
        return f"{base}/{{{','.join([*patterns[:_MAX_PATTERNS], *(['…'] if len(patterns) > _MAX_PATTERNS else [])])}}}"
    more = [f"… {len(urls) - _MAX_PATTERNS} more"] if len(urls) > _MAX_PATTERNS else []
    return f"[{', '.join([*(repr(url) for url in urls[:_MAX_PATTERNS]), *more])}]"


def brace_patterns(names: Iterable[str]) -> list[str]:
    """Few brace patterns that expand to exactly these names, such as ``train-{00000..00009}.tar``."""
    # Numbers with leading zeros expand by their width, and are never in one range with numbers of another width.
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
    breaks = [place for place, (left, right) in enumerate(pairwise(numbers), start=1) if right != left + 1]
    for start, stop in pairwise([0, *breaks, len(numbers)]):
        yield numbers[start], numbers[stop - 1]
