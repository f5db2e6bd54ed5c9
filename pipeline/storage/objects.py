"""Whole objects and ranges of them by URL: read, listed, published, created, removed, copied to local files."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Generator
from pathlib import Path

from filelock import FileLock

from pipeline.core.errors import StorageError, StorageInputError, TransientStorageError
from pipeline.core.redaction import redact
from pipeline.storage.failures import root_error, translated_errors, with_retries
from pipeline.storage.local import local_path, scratch_folder
from pipeline.storage.local_store import LocalStore, temporary_sibling
from pipeline.storage.s3_store import S3Store
from pipeline.storage.stores import Entry, MemoryStore, Store
from pipeline.storage.urls import WRITABLE, join, protocol, short_name

NAMES_PER_PAGE = 1000
"""Names with their sizes in one response to a listing."""
# Limits of files that are read whole. A header of 100,000 classes has 8 MB. The table of parts of 100,000 shards with
# 100 views, and class means of 100,000 classes with 4,096 numbers, have about 1 GB.
MAX_RECORD_BYTES = 32 * 2**20
MAX_TABLE_BYTES = 4 * 2**30
_STORES: dict[str, type[Store]] = {"file": LocalStore, "memory": MemoryStore, "s3": S3Store}


@contextlib.contextmanager
def _open(url: str, action: str, *, writes: bool = False) -> Generator[Store]:
    """The store of a URL. Errors of its library inside the ``with`` become errors of the project."""
    if writes:
        _check_protocol_writable(url)
    store = _STORES.get(protocol(url), Store)(url)
    with translated_errors(url, action):
        yield store


def _check_protocol_writable(url: str) -> None:
    if protocol(url) not in WRITABLE:
        raise StorageInputError(
            "this protocol is read-only",
            code="storage.read-only-protocol",
            where=redact(url),
            got=protocol(url),
            expected=f"one of {', '.join(WRITABLE)}",
        )


def check_writable(url: str) -> None:
    """Checks a URL without a write.

    Raises:
        StorageInputError: the URL is refused, or its protocol is read-only.
    """
    with _open(url, "write", writes=True):
        pass


@with_retries
def exists(url: str) -> bool:
    """Whether the file exists now. A store that fails to report it is an error, never an absent file."""
    with _open(url, "look for") as store:
        info = store.info()
        return info is not None and info["type"] == "file"


@with_retries
def stamp(url: str) -> str:
    """The store's metadata of a file as text, with its ETag and times: it differs after the file is replaced."""
    with _open(url, "stat") as store:
        store.filesystem.invalidate_cache(store.path.rpartition("/")[0])
        return str(sorted(store.filesystem.info(store.path).items()))


@with_retries
def size(url: str) -> int:
    """Size in bytes."""
    with _open(url, "stat") as store:
        return store.size()


@with_retries
def read(url: str, *, max_bytes: int | None = None) -> bytes:
    """The whole object.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    with _open(url, "read") as store:
        try:
            return store.read(max_bytes)
        except FileNotFoundError:
            # An object store has no folders, and reports a prefix as missing.
            if store.filesystem.isdir(store.path):
                raise IsADirectoryError(store.path) from None
            raise


@with_retries
def read_if_exists(url: str, *, max_bytes: int | None = None) -> bytes | None:
    """The whole object, or None if it is absent: one request, where ``exists`` and ``read`` are two or three.

    Raises:
        TooLargeError: it is larger than ``max_bytes``.
    """
    with _open(url, "read") as store:
        try:
            return store.read(max_bytes)
        except (FileNotFoundError, NotADirectoryError) as error:
            if root_error(error) is not error:
                raise
            return None


@with_retries
def read_range(url: str, offset: int, size_bytes: int) -> bytes:
    """Exactly ``size_bytes`` from ``offset``.

    Raises:
        StorageError: the object ends before that.
    """
    with _open(url, "read") as store:
        data = store.read_range(offset, size_bytes)
        is_short = len(data) != size_bytes
        is_truncated = is_short and store.size() >= offset + size_bytes
    if is_truncated:
        raise TransientStorageError(
            "the response was truncated",
            code="storage.truncated-response",
            where=redact(url),
            got=f"{len(data)} of {size_bytes} bytes",
        )
    if is_short:
        raise StorageError(
            "the object is shorter than its commit declares",
            code="storage.object-too-short",
            where=redact(url),
            got=f"{len(data)} bytes from {offset}",
            expected=f"{size_bytes} bytes",
        )
    return data


@with_retries
def entries(url: str) -> list[Entry]:
    """Every object below ``url`` by path, leftovers of killed writers included; empty if the folder is absent."""
    with _open(url, "list") as store:
        return sorted(store.entries(), key=lambda entry: entry.path)


def listing(url: str) -> list[str]:
    """Paths relative to ``url`` of every published object below it, sorted; empty if the folder is absent."""
    return [entry.path for entry in entries(url) if not entry.is_temporary]


def sizes(url: str, *, links_out: bool = False) -> dict[str, int]:
    """Bytes of every object below ``url`` by its relative path, sorted; empty if the folder is absent.

    Local links are followed, also to folders, because image trees are often made of links.

    Args:
        links_out: also follow links out of the folder. An untrusted folder could link to any file of the user.

    Raises:
        StorageInputError: a link leads out of the folder, or to a folder that contains it.
    """
    with _open(url, "list") as store:
        if isinstance(store, LocalStore):
            return dict(sorted(store.sizes(links_out=links_out).items()))
    return {entry.path: entry.size_bytes for entry in entries(url)}


def is_listing_cheaper(url: str, num_names: int) -> bool:
    """Whether ``sizes_in_folder`` needs fewer requests than the size of each of ``num_names`` objects."""
    return num_names >= NAMES_PER_PAGE and protocol(url) in WRITABLE and protocol(url) != "file"


@with_retries
def sizes_in_folder(url: str) -> dict[str, int]:
    """Bytes of every object right below ``url`` by its name; empty if the folder is absent."""
    with _open(url, "list") as store:
        return store.sizes_in_folder()


def folders(url: str) -> list[str]:
    """Names of the folders right below ``url``, sorted. A file system also has empty ones."""
    with _open(url, "list") as store:
        return sorted(store.folders())


@with_retries
def put(local: Path, url: str) -> None:
    """Publishes a closed local file under ``url``: one replace on a file system, one upload on an object store."""
    with _open(url, "write", writes=True) as store:
        store.put(local)


def write(url: str, data: bytes) -> None:
    """Publishes bytes under ``url``. An existing object is replaced."""
    with scratch_folder() as folder:
        local = folder / "object"
        local.write_bytes(data)
        put(local, url)


@with_retries
def create(url: str, data: bytes) -> bool:
    """Publishes bytes only if the object is absent. Returns whether the object has these bytes.

    A writer that finds its own bytes has succeeded: either the response to its first request was lost, or another
    writer created the same bytes. The two cases are indistinguishable, and readers see no difference.

    Raises:
        StorageInputError: a conditional create is not implemented for this store.
    """
    _check_protocol_writable(url)
    if not _STORES.get(protocol(url), Store).can_create:
        raise StorageInputError(
            "create-if-absent is not implemented for this store",
            code="storage.no-create-if-absent",
            where=redact(url),
            got=protocol(url),
            expected="file, memory or s3 for caches and runs",
            next_step="write to one of these; reading from it works",
        )
    with _open(url, "create") as store:
        if store.create(data):
            return True
        try:
            return store.read(None) == data
        except FileNotFoundError as error:
            raise TransientStorageError(
                "the object was removed while it was created", code="storage.removed-meanwhile", where=redact(url)
            ) from error


def probe(url: str) -> None:
    """Checks before any work that files below ``url`` can be created, are protected from a second create, and can be
    removed.

    Raises:
        StorageInputError: one of these fails. No file is left behind.
    """
    folder_url = url
    if (path := local_path(url)) is not None:
        # The deepest existing folder, so that the probe leaves no new one.
        folder_url = str(next(folder for folder in (path, *path.parents) if folder.exists()))
    target = join(folder_url, f".tmp-probe-{uuid.uuid4().hex}")
    if not create(target, b"first"):
        raise StorageError(
            "an object with a newly generated random name already exists",
            code="storage.probe-name-taken",
            where=redact(target),
        )
    try:
        is_exclusive = not create(target, b"second")
    finally:
        delete(target)
    if not is_exclusive:
        raise StorageInputError(
            "this store ignores create-if-absent: two builders would overwrite each other's work",
            code="storage.create-not-exclusive",
            where=redact(url),
            got="a second create of the same object that succeeded",
            next_step="use a store or a version of it with conditional writes (If-None-Match)",
        )


@with_retries
def delete(url: str) -> None:
    """Removes one object. An absent one is no error, because another builder may have removed it."""
    with _open(url, "delete", writes=True) as store, contextlib.suppress(FileNotFoundError):
        store.remove()


@with_retries
def local_copy(url: str, folder: Path) -> Path:
    """A local path with the object's bytes: the file itself if it is local, else a copy in ``folder``.

    Safe among processes of a node: one downloads under a lock, the others wait for its copy.
    """
    with _open(url, "read") as store:
        size_bytes = store.size()
    if isinstance(store, LocalStore):
        return Path(store.path)
    name = hashlib.sha256(f"{url}\n{size_bytes}".encode()).hexdigest()[:24]
    target = folder / f"{name}-{short_name(store.path.rsplit('/', 1)[-1])}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(target) + ".lock"):
        if not target.exists():
            with temporary_sibling(target) as scratch:
                _fetch(url, scratch, size_bytes)
                scratch.replace(target)
    return target


@with_retries
def download(url: str, target: Path, size_bytes: int) -> None:
    """Fills a local file with the object's bytes, in place.

    Raises:
        TransientStorageError: the object has another size.
    """
    _fetch(url, target, size_bytes)


def _fetch(url: str, target: Path, size_bytes: int) -> None:
    with _open(url, "fetch") as store:
        store.fetch(target)
    if target.stat().st_size != size_bytes:
        raise TransientStorageError(
            "the download was truncated",
            code="storage.truncated-download",
            where=redact(url),
            expected=f"{size_bytes} bytes",
        )
