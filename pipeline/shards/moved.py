"""Shards that are no longer where they were: one error, which names the option that gives their new place."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from pipeline import storage
from pipeline.core.errors import StillroomError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.shards.names import shard_ids
from pipeline.shards.patterns import brace_patterns

_MAX_LOOK_UPS = 1000
_THREADS = 16
_NUM_NAMED = 3


@contextmanager
def report_moved(urls: Sequence[str], place: str) -> Generator[None]:
    """Turns a missing file among ``urls`` inside a ``with`` into an error that counts the missing ones.

    Args:
        urls: of all shards that are read in the ``with``; at most 1,000 of them are looked up.
        place: how a user gives the new place of the shards, ``{}``, such as ``append data.shards={}``.

    Raises:
        StorageInputError: one of them is missing.
    """
    try:
        yield
    except StorageInputError as error:
        if error.code != storage.MISSING_FILE or error.where not in [redact(url) for url in urls]:
            raise
        looked_up = urls[:_MAX_LOOK_UPS]
        with ThreadPoolExecutor(_THREADS) as pool:
            num_missing = sum(pool.map(_is_missing, looked_up))
        among = f"the first {len(looked_up)} of {len(urls)}" if len(urls) > len(looked_up) else str(len(urls))
        raise StorageInputError(
            "shards are missing",
            code="data.shards-moved",
            where=error.where,
            got=f"{max(num_missing, 1)} of {among} shards are not where they are expected",
            next_step=f"{place.format(new_place(urls))}, or restore the shards",
        ) from error


def _is_missing(url: str) -> bool:
    try:
        return not storage.exists(url)
    except StillroomError:
        return False


def new_place(urls: Iterable[str]) -> str:
    """``'NEW_FOLDER/train-{00..09}.tar'``: shards of these names in another folder, as a user gives them; quoted, since
    a shell would expand the braces."""
    patterns = brace_patterns(shard_ids(urls))
    if len(patterns) == 1:
        return f"'NEW_FOLDER/{patterns[0]}.tar'"
    return f"'NEW_FOLDER/{{{','.join([*patterns[:_NUM_NAMED], *(['…'] if len(patterns) > _NUM_NAMED else [])])}}}.tar'"
