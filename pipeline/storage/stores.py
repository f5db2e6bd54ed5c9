"""The interface of a store: its operations on the object or folder at one URL.

``Store`` implements them with fsspec. A store with faster or safer requests derives from it, and its protocol is
registered in ``objects``.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import fsspec

from pipeline.core.errors import InputError, TooLargeError
from pipeline.core.redaction import redact
from pipeline.storage.failures import root_error, translated_errors
from pipeline.storage.urls import expand_home, protocol

_EXTRA = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}


def open_filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        StorageInputError: the URL is refused.
        InputError: the package of the store is not installed.
    """
    name = protocol(url)
    try:
        with translated_errors(url, "open"):
            filesystem, path = fsspec.core.url_to_fs(expand_home(url))
            if name == "s3":
                # botocore repeats requests (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE), and ``repeated`` repeats operations.
                # Retries of s3fs would multiply both.
                filesystem.retries = 1
    except (ImportError, ValueError) as error:
        # fsspec does not know the protocol abfss without its package.
        if isinstance(error, ValueError) and "Protocol not known" not in str(error):
            raise
        package = f"'stillroom[{_EXTRA[name]}]'" if name in _EXTRA else "aiohttp"
        # No StorageInputError, which some callers handle as a missing file.
        raise InputError(
            f"{name}:// needs a package that is not installed",
            code="storage.missing-package",
            where=redact(url),
            got=str(error),
            next_step=f"pip install {package} (on every node that reads or writes such URLs)",
        ) from error
    return filesystem, path


@dataclass(frozen=True, slots=True)
class Entry:
    """One object below a folder."""

    path: str
    """Relative to the folder."""
    size_bytes: int
    modified_s: float | None
    """Seconds since 1970 by the store's clock; None if the store has no such time."""

    @property
    def is_temporary(self) -> bool:
        """Whether a killed writer left it. Published files never have such a name."""
        return self.path.rsplit("/", 1)[-1].startswith(".tmp-")


class Store:
    """The object or folder at one URL. Every method is idempotent.

    The methods raise the errors of fsspec and of the store's library; ``objects`` translates them and repeats the
    operations that may succeed later.

    Raises:
        StorageInputError: the URL is refused.
        InputError: the package of the store is not installed.
    """

    can_create: ClassVar[bool] = False
    """Whether ``create`` is implemented."""

    def __init__(self, url: str) -> None:
        self.where = redact(url)
        self.filesystem, self.path = open_filesystem(url)

    def info(self) -> dict[str, Any] | None:
        """fsspec's info of the object or folder now, bypassing any cached listing; None if it is absent."""
        # fsspec's own exists and isfile return False for every exception, also for a refused or throttled request.
        self.filesystem.invalidate_cache(self.path.rstrip("/").rpartition("/")[0])
        try:
            return dict(self.filesystem.info(self.path))
        except (FileNotFoundError, NotADirectoryError) as error:
            if root_error(error) is not error:
                raise
            return None

    def size(self) -> int:
        """Size of the object in bytes."""
        info = self.filesystem.info(self.path)
        if info["type"] == "directory":
            raise IsADirectoryError(self.path)
        if info["type"] != "file":
            raise FileNotFoundError(self.path)
        if info["size"] is None:
            raise OSError("the server reports no size")
        return int(info["size"])

    def read(self, max_bytes: int | None) -> bytes:
        """The whole object.

        Raises:
            TooLargeError: it is larger than ``max_bytes``. The limit is checked before the object fills the memory.
        """
        if max_bytes is not None:
            self.check_size(int(self.filesystem.info(self.path)["size"] or 0), max_bytes)
        return bytes(self.filesystem.cat_file(self.path))

    def check_size(self, size_bytes: int, max_bytes: int) -> None:
        if size_bytes > max_bytes:
            raise TooLargeError(
                "this file is above the size limit of its kind",
                code="storage.too-large",
                where=self.where,
                got=f"{size_bytes} bytes",
                expected=f"at most {max_bytes} bytes",
            )

    def read_range(self, offset: int, size_bytes: int) -> bytes:
        """At most ``size_bytes`` from ``offset``: fewer if the object ends before, or if the response is truncated."""
        return bytes(self.filesystem.cat_file(self.path, start=offset, end=offset + size_bytes))

    def fetch(self, target: Path) -> None:
        """Fills a local file with the object's bytes."""
        self.filesystem.get_file(self.path, str(target))

    def put(self, local: Path) -> None:
        """Publishes a closed local file in one step: readers see the old object or the new one."""
        self.filesystem.put_file(str(local), self.path)

    def create(self, data: bytes) -> bool:
        """Publishes bytes if and only if the object is absent, atomically. Returns whether it did."""
        raise NotImplementedError

    def remove(self) -> None:
        self.filesystem.rm_file(self.path)

    def entries(self) -> list[Entry]:
        """Every object below the folder; empty if the folder is absent."""
        # A search that walks a tree skips what it may not read, even the folder itself.
        return [] if self.info() is None else self._find()

    def _find(self) -> list[Entry]:
        self.filesystem.invalidate_cache(self.path)
        base = self.path.rstrip("/") + "/"
        return [
            Entry(name[len(base) :], int(info["size"] or 0), _modified_s(info))
            for name, info in self.filesystem.find(self.path, detail=True).items()
            if name.startswith(base)
        ]

    def sizes_in_folder(self) -> dict[str, int]:
        """Bytes of every object right in the folder, by its name; empty if the folder is absent."""
        try:
            infos = self._list()
        except FileNotFoundError as error:
            if root_error(error) is not error:
                raise
            return {}
        finally:
            # fsspec would use its cached listing for later requests of a size, which may have changed by then.
            self.filesystem.invalidate_cache(self.path)
        return {info["name"].rsplit("/", 1)[-1]: int(info["size"]) for info in infos if info["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the folders right in the folder."""
        return [info["name"].rstrip("/").rsplit("/", 1)[-1] for info in self._list() if info["type"] == "directory"]

    def _list(self) -> list[dict[str, Any]]:
        self.filesystem.invalidate_cache(self.path)
        return self.filesystem.ls(self.path, detail=True)


def _modified_s(info: Mapping[str, Any]) -> float | None:
    """The time of the last change. Each store has a different name for it."""
    names = ("mtime", "LastModified", "last_modified", "updated", "created")
    time = next((info[name] for name in names if info.get(name) is not None), None)
    if isinstance(time, str):
        time = dt.datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, dt.datetime) else time


class MemoryStore(Store):
    """``memory://``: objects of this process."""

    can_create = True
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def create(self, data: bytes) -> bool:
        with self._lock:
            if self.filesystem.exists(self.path):
                return False
            self.filesystem.pipe_file(self.path, data)
            return True
