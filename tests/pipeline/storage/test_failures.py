"""Failures of storage libraries become errors with codes; transient ones are retried."""

from __future__ import annotations

import errno
import http.server
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import botocore.exceptions
import fsspec
import pytest
import tenacity
from fsspec.asyn import AsyncFileSystem
from s3fs.errors import translate_boto_error

from pipeline import storage
from pipeline.cache.format.files import read_file
from pipeline.core.errors import (
    InputError,
    StillroomError,
    StorageError,
    StorageInputError,
    TransientStorageError,
)
from pipeline.storage.config_files import load_config
from tests.errors import raises

# Protocols of stores whose package may be missing, and the extra that has it.
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}


PACKAGES = {"s3": "s3fs", "gcs": "gcsfs", "azure": "adlfs", "hf": "huggingface_hub"}


@pytest.fixture
def no_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without any optional store: importing one fails as it does where it is not installed."""
    for name in PACKAGES.values():
        monkeypatch.setitem(sys.modules, name, None)
    for protocol in EXTRAS:
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, protocol, raising=False)


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("protocol", EXTRAS)
def test_a_missing_package_is_named_with_the_command_that_installs_it(protocol: str, tmp_path: Path) -> None:
    url = f"{protocol}://container@account/a" if protocol.startswith("abfs") else f"{protocol}://bucket/a/b"
    calls = (
        storage.read,
        storage.size,
        lambda url: storage.local_copy(url, tmp_path),
        load_config,
        lambda url: read_file(url, "header.json"),
    )
    for call in calls:
        with raises("storage.missing-package", InputError) as caught:
            call(url)
        # Callers handle that as a missing file.
        assert not isinstance(caught.value, StorageInputError)
        assert str(caught.value.next_step).startswith(f"pip install 'stillroom[{EXTRAS[protocol]}]'")


@pytest.mark.usefixtures("no_packages")
@pytest.mark.parametrize("protocol", ["gs", "az"])
def test_an_unsupported_create_is_refused_without_the_package_of_the_store(protocol: str) -> None:
    with raises("storage.no-create-if-absent"):
        storage.create(f"{protocol}://bucket/a", b"")


def test_every_extra_in_a_message_is_an_extra_of_the_package() -> None:
    extras = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    for extra, package in PACKAGES.items():
        (requirement,) = extras["optional-dependencies"][extra]
        assert requirement.partition(">")[0].replace("-", "_") == package


class FailingStore(AsyncFileSystem):
    """A remote store that fails ``num_failures`` times, has every file, and has a stale listing."""

    failure: Exception | None = None
    num_failures = float("inf")
    num_requests = 0
    cachable = False

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        self.num_requests += 1
        if self.failure is not None and self.num_requests <= self.num_failures:
            raise self.failure
        if self._parent(path) in self.dircache:
            raise FileNotFoundError(path)
        return {"name": path, "size": 1, "type": "file"}

    async def _cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        del start, end
        await self._info(path)
        return b"x"

    async def _find(self, path: str, **_: Any) -> dict[str, Any]:
        try:
            return {path: await self._info(path)}
        except FileNotFoundError:
            return {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self.dircache.pop(path, None)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> FailingStore:
    filesystem = FailingStore()
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda url: (filesystem, url.partition("://")[2]))
    return filesystem


def status_error(status: int) -> aiohttp.ClientResponseError:
    info = aiohttp.RequestInfo("https://host/a?token=hidden", "GET", None)  # pyright: ignore[reportArgumentType]
    return aiohttp.ClientResponseError(info, (), status=status, message="no")


def test_a_new_object_is_seen_past_a_cached_listing(store: FailingStore) -> None:
    store.dircache["bucket"] = []
    assert storage.exists("s3://bucket/a")


def client_error(code: str, status: int) -> OSError:
    """The error of s3fs for a response of S3."""
    response: Any = {"Error": {"Code": code, "Message": "message"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return translate_boto_error(botocore.exceptions.ClientError(response, "GetObject"))


FAILURES: list[tuple[type[StillroomError], str, list[Exception]]] = [
    (
        TransientStorageError,
        "storage.transient",
        [
            *(client_error(code, 503) for code in ("SlowDown", "ServiceUnavailable", "503")),
            *(client_error(code, 400) for code in ("RequestTimeout", "BadDigest")),
            client_error("InternalError", 500),
            client_error("ConditionalRequestConflict", 409),
            client_error("NoSuchUpload", 404),
            client_error("429", 429),
            *(status_error(status) for status in (429, 500, 503)),
            aiohttp.ServerDisconnectedError(),
            aiohttp.ClientPayloadError(),
            botocore.exceptions.ReadTimeoutError(endpoint_url="http://x"),
            botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
            fsspec.exceptions.FSTimeoutError(),
            ConnectionResetError(),
            *(OSError(number, "a text") for number in (errno.ESTALE, errno.EBUSY)),
        ],
    ),
    (
        TransientStorageError,
        "storage.no-connection",
        [botocore.exceptions.EndpointConnectionError(endpoint_url="http://x"), ConnectionRefusedError()],
    ),
    (
        StorageInputError,
        "storage.no-credentials",
        [
            botocore.exceptions.NoCredentialsError(),
            botocore.exceptions.PartialCredentialsError(provider="env", cred_var="x"),
            botocore.exceptions.CredentialRetrievalError(provider="x", error_msg="x"),
        ],
    ),
    (
        StorageInputError,
        "storage.permission-denied",
        [status_error(403), client_error("AccessDenied", 403), PermissionError("403")],
    ),
    (
        StorageInputError,
        "storage.missing-file",
        [client_error("NoSuchKey", 404), client_error("NoSuchBucket", 404), FileNotFoundError("bucket/a")],
    ),
    (StorageInputError, "storage.file-in-path", [FileExistsError(), NotADirectoryError()]),
    (StorageInputError, "storage.is-folder", [IsADirectoryError()]),
    (StorageInputError, "storage.read-only-file-system", [OSError(errno.EROFS, "read-only")]),
    (StorageError, "storage.disk-full", [OSError(number, "full") for number in (errno.ENOSPC, errno.EDQUOT)]),
    (
        StorageError,
        "storage.failed",
        [
            client_error("InvalidRequest", 400),
            client_error("NotImplemented", 501),
            status_error(404),
            aiohttp.InvalidURL("x"),
            OSError(errno.EINVAL, "invalid"),
        ],
    ),
]


@pytest.mark.parametrize(
    ("kind", "code", "failure"),
    [(kind, code, failure) for kind, code, failures in FAILURES for failure in failures],
    ids=lambda value: f"{type(value).__name__} {value}"[:40] if isinstance(value, Exception) else None,
)
def test_a_failure_has_a_code_and_only_a_transient_one_is_retried_a_bounded_number_of_times(
    store: FailingStore, kind: type[StillroomError], code: str, failure: Exception
) -> None:
    store.failure = failure
    is_transient = kind is TransientStorageError
    with raises(code, kind, where="s3://bucket/a") as caught:
        storage.size("s3://bucket/a")
    assert isinstance(caught.value, TransientStorageError) == is_transient
    assert store.num_requests == (5 if is_transient else 1)
    assert "hidden" not in str(caught.value)
    # Only a file that the store reports as missing is absent.
    for call in (storage.exists, storage.listing, storage.read_if_exists):
        if isinstance(failure, FileNotFoundError):
            assert not call("s3://bucket/a")
        elif not isinstance(failure, NotADirectoryError):
            with raises(code, kind, where="s3://bucket/a"):
                call("s3://bucket/a")


def test_a_retry_that_succeeds_ends_the_retries(store: FailingStore) -> None:
    store.failure, store.num_failures = ConnectionResetError(), 4
    assert storage.size("s3://bucket/a") == 1
    assert store.num_requests == 5


def test_retries_end_within_a_minute(store: FailingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that advances 40 s per attempt."""
    ticks = iter(range(0, 4000, 40))
    monkeypatch.setattr(tenacity, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    store.failure = ConnectionResetError()
    with pytest.raises(TransientStorageError):
        storage.read("s3://bucket/a")
    assert store.num_requests == 2


def test_a_name_that_a_store_refuses_is_bad_input(store: FailingStore) -> None:
    store.failure = ValueError("Failed to list path")
    store.failure.__context__ = botocore.exceptions.ParamValidationError(report="Invalid bucket name")
    with raises("storage.refused-name"):
        storage.exists("s3://a bucket/a")


def test_bugs_stay_bugs(store: FailingStore) -> None:
    store.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError):
        storage.size("s3://bucket/a")


class StatusServer(http.server.BaseHTTPRequestHandler):
    """Responds with the status in the path."""

    def do_GET(self) -> None:
        self.send_response(int(self.path[1:4]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """No log."""


@pytest.fixture
def host() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), StatusServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_over_http_only_a_404_is_a_missing_file(host: str, tmp_path: Path) -> None:
    reads = (storage.read, storage.size, lambda url: storage.local_copy(url, tmp_path))
    assert not storage.exists(f"{host}/404")
    for call in reads:
        with raises("storage.missing-file"):
            call(f"{host}/404")
    for call in (storage.exists, *reads):
        with raises("storage.permission-denied"):
            call(f"{host}/403")
        with raises("storage.transient") as caught:
            call(f"{host}/503?token=hidden")
        assert "hidden" not in str(caught.value)


def test_a_refused_connection_is_not_a_missing_file(tmp_path: Path) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), StatusServer) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/a"
    for call in (storage.exists, storage.read, storage.size, lambda gone: storage.local_copy(gone, tmp_path)):
        with raises("storage.no-connection"):
            call(url)


@pytest.mark.parametrize("endpoint", ["localhost:9000", "minio.local", "//minio:9000", "http://"])
def test_an_endpoint_that_is_no_url_is_bad_input(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    fsspec.filesystem("s3").clear_instance_cache()
    try:
        with raises("storage.endpoint") as caught:
            storage.exists("s3://bucket/a")
    finally:
        fsspec.filesystem("s3").clear_instance_cache()
    assert (caught.value.where, caught.value.got) == ("s3://bucket/a", endpoint)
    assert "AWS_ENDPOINT_URL" in str(caught.value.next_step)
