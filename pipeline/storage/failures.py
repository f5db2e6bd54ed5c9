"""Errors of storage libraries as errors of the project, and retries of the transient ones."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Generator
from typing import ParamSpec, TypeVar

from tenacity import (
    before_sleep_log,
    retry,
    retry_if_exception_type,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from pipeline.core.errors import StillroomError, StorageError, StorageInputError, TransientStorageError
from pipeline.core.redaction import redact
from pipeline.storage.urls import NAME_TOO_LONG

P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)
MISSING_FILE = "storage.missing-file"
"""Code of the error for a read of an absent file."""
# Packages that raise errors which are seldom OSErrors.
_LIBRARIES = (
    *("botocore", "aiobotocore", "s3fs", "google", "gcsfs", "azure", "adlfs", "huggingface_hub"),
    *("aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"),
)
_NO_CREDENTIALS = re.compile(
    r"Credential|Authentication|TokenRetrieval|TokenLoad|SSOToken|ProfileNotFound|RefreshError"
)
_NO_CONNECTION = re.compile(
    r"Connector|ConnectionRefused|EndpointConnection|ProxyConnection|ConnectTimeout|ConnectError"
)
# botocore, of an endpoint without a scheme or host.
_BAD_ENDPOINT = re.compile(r"Invalid endpoint: (.*)|Custom endpoint `(.*)` was not a valid URI")
# S3 returns these with a status that elsewhere means a wrong request. NoSuchUpload: the response to the end of a
# multipart upload was lost, and the retry finds no upload. A new upload is right.
_TRANSIENT_CODES = frozenset(
    {
        *("BadDigest", "ConditionalRequestConflict", "IncompleteBody", "NoSuchUpload", "OperationAborted"),
        *("RequestTimeout", "SlowDown", "Throttling", "ThrottlingException", "XAmzContentSHA256Mismatch"),
    }
)
_TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504, 507, 509, 529})
_TRANSIENT_ERRNO = frozenset(
    {
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.EIO, errno.ESTALE, errno.EREMOTEIO, errno.ENOLCK),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    }
)
DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_MAX_ATTEMPTS = 5
_MAX_RETRY_S = 60
# Full jitter: many tasks that were throttled together retry at different times.
PAUSE = wait_random_exponential(multiplier=0.2, max=8)


def with_retries(operation: Callable[P, R]) -> Callable[P, R]:
    """Retries transient failures, with growing random pauses.

    Args:
        operation: idempotent, and never run inside another retried operation.
    """
    return retry(
        retry=retry_if_exception_type(TransientStorageError),
        stop=stop_after_attempt(_MAX_ATTEMPTS) | stop_before_delay(_MAX_RETRY_S),
        wait=PAUSE,
        before_sleep=before_sleep_log(_log, logging.INFO),
        reraise=True,
    )(operation)


@contextlib.contextmanager
def translated_errors(url: str, action: str) -> Generator[None]:
    """Turns errors of a storage library inside a ``with`` into errors of the project, with the URL in them."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        translated = _translated(root_error(error), url, action)
        if translated is None:
            raise
        raise translated from error


def root_error(error: Exception) -> Exception:
    """The error itself, or its cause: fsspec raises FileNotFoundError for any failure over HTTP."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    failed = _package(cause) == "aiohttp" or (_package(cause) == "builtins" and isinstance(cause, OSError))
    missing = isinstance(cause, FileNotFoundError) or _status(cause) == 404
    return cause if failed and not missing else error


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _is_of_library(error: BaseException | None) -> bool:
    return error is not None and _package(error) in _LIBRARIES


def _status(error: BaseException) -> int | None:
    """The HTTP status. Each library has a different name for it."""
    values = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in values if isinstance(status, int)), None)


def _translated(error: Exception, url: str, action: str) -> StorageError | StorageInputError | None:
    """The project's error for an error of a storage library; None for any other error, which is a bug."""
    where, name, got = redact(url), type(error).__name__, f"{type(error).__name__}: {error}"
    is_refused_argument = isinstance(error, ValueError) and _is_of_library(error.__cause__ or error.__context__)
    if (endpoint := _BAD_ENDPOINT.fullmatch(str(error))) is not None:
        return StorageInputError(
            "the endpoint of this store is not a URL",
            code="storage.endpoint",
            where=where,
            got=endpoint[1] or endpoint[2],
            expected="http://HOST:PORT or https://HOST",
            next_step="set AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or endpoint_url of ~/.aws/config to such a URL",
        )
    if not (_is_of_library(error) or is_refused_argument or isinstance(error, OSError)):
        return None
    if s3_error_code(error) in _TRANSIENT_CODES:
        return TransientStorageError(f"cannot {action}", code="storage.transient", where=where, got=got)
    if _is_of_library(error) and _NO_CREDENTIALS.search(name):
        return StorageInputError(
            f"cannot {action}: no valid credentials",
            code="storage.no-credentials",
            where=where,
            got=got,
            next_step="set the credentials of this store in the environment or in its configuration file",
        )
    if isinstance(error, PermissionError) or (_is_of_library(error) and _status(error) in (401, 403)):
        return StorageInputError(f"cannot {action}: permission denied", code="storage.permission-denied", where=where)
    if _NO_CONNECTION.search(name):
        kind = TransientStorageError if _is_transient(error) else StorageError
        return kind(f"cannot {action}: could not connect", code="storage.no-connection", where=where, got=got)
    if (reason := _path_error(error)) is not None:
        code, text = reason
        return StorageInputError(f"cannot {action}: {text}", code=code, where=where, next_step=_glob_hint(error, where))
    if is_refused_argument:
        return StorageInputError(
            f"cannot {action}: the store refuses this name", code="storage.refused-name", where=where, got=got
        )
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return disk_full(error, where, action)
    if _is_transient(error):
        return TransientStorageError(f"cannot {action}", code="storage.transient", where=where, got=got)
    return StorageError(f"cannot {action}", code="storage.failed", where=where, got=got)


def s3_error_code(error: BaseException) -> str | None:
    """The code in the response of S3, which s3fs stores in the cause."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: a timeout, a lost connection, an overloaded store."""
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    response = getattr(error.__cause__, "response", None)
    status = response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(response, dict) else _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if _is_of_library(error):
        # Bad certificates and URLs are ValueErrors. The others are lost connections and partial responses.
        return not isinstance(error, ValueError)
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def disk_full(error: OSError, where: str, action: str) -> StorageError:
    return StorageError(
        f"cannot {action}: no space is left",
        code="storage.disk-full",
        where=where,
        got=f"{type(error).__name__}: {error}",
        next_step="free some space (or set TMPDIR, if it is the scratch folder) and run the command again; it resumes",
    )


def _path_error(error: Exception) -> tuple[str, str] | None:
    """Code and text for a path that cannot be used."""
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, FileNotFoundError):
        return MISSING_FILE, "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "storage.is-folder", "this is a folder"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return "storage.file-in-path", "a part of this path is a file"
    if number == errno.EROFS:
        return "storage.read-only-file-system", "this file system is read-only"
    if number == errno.ENAMETOOLONG:
        return NAME_TOO_LONG, "a name in this path is too long for this file system (most allow 255 bytes)"
    return None


def _glob_hint(error: Exception, path: str) -> str | None:
    if isinstance(error, FileNotFoundError) and re.search(r"[*?\[]", path):
        return "globs are not expanded; use braces, as in {00000..00009}"
    return None
