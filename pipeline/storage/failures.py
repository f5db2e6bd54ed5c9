"""What storage libraries raise, as errors of the project; what may pass is tried again."""

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
"""Code of the error of a file that is read and not there."""
# What these packages raise is seldom an OSError.
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
# S3 answers these with a status that elsewhere means a wrong request. NoSuchUpload: the answer to the end of a
# multipart upload was lost, and its repetition finds the upload gone; a new upload is right.
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
_MAX_REPEATING_S = 60
# Full jitter: many tasks that were throttled together come back apart.
PAUSE = wait_random_exponential(multiplier=0.2, max=8)


def repeated(operation: Callable[P, R]) -> Callable[P, R]:
    """Tries again what may pass, with growing random pauses. ``operation`` is idempotent, and never inside another."""
    return retry(
        retry=retry_if_exception_type(TransientStorageError),
        stop=stop_after_attempt(_MAX_ATTEMPTS) | stop_before_delay(_MAX_REPEATING_S),
        wait=PAUSE,
        before_sleep=before_sleep_log(_log, logging.INFO),
        reraise=True,
    )(operation)


@contextlib.contextmanager
def translated_errors(url: str, doing: str) -> Generator[None]:
    """Turns what a storage library raises into one of our errors, with the URL in it."""
    try:
        yield
    except StillroomError:
        raise
    except Exception as error:
        told = _translated(root_error(error), url, doing)
        if told is None:
            raise
        raise told from error


def root_error(error: Exception) -> Exception:
    """fsspec calls whatever fails over HTTP a missing file; its cause tells what happened."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or not isinstance(cause, Exception):
        return error
    failed = _package(cause) == "aiohttp" or (_package(cause) == "builtins" and isinstance(cause, OSError))
    missing = isinstance(cause, FileNotFoundError) or _status(cause) == 404
    return cause if failed and not missing else error


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _status(error: BaseException) -> int | None:
    """The HTTP status by whichever name this library gives it."""
    found = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((status for status in found if isinstance(status, int)), None)


def _translated(error: Exception, url: str, doing: str) -> StorageError | StorageInputError | None:
    """Our error for what a storage library raised; None where it is none of theirs, and so a bug of ours."""
    where, name = redact(url), type(error).__name__
    of_library = _package(error) in _LIBRARIES
    origin = error.__cause__ or error.__context__
    of_argument = isinstance(error, ValueError) and origin is not None and _package(origin) in _LIBRARIES
    if (endpoint := _BAD_ENDPOINT.fullmatch(str(error))) is not None:
        return StorageInputError(
            "the endpoint of this store is not a URL",
            code="storage.endpoint",
            where=where,
            got=endpoint[1] or endpoint[2],
            expected="http://HOST:PORT or https://HOST",
            next_step="set AWS_ENDPOINT_URL, AWS_ENDPOINT_URL_S3 or endpoint_url of ~/.aws/config to such a URL",
        )
    if not (of_library or of_argument or isinstance(error, OSError)):
        return None
    got = f"{name}: {error}"
    if s3_error_code(error) in _TRANSIENT_CODES:
        return TransientStorageError(f"cannot {doing}", where=where, got=got)
    if of_library and _NO_CREDENTIALS.search(name):
        next_step = "set the credentials of this store in the environment or in its configuration file, and try again"
        return StorageInputError(f"cannot {doing}: no valid credentials", where=where, got=got, next_step=next_step)
    if isinstance(error, PermissionError) or (of_library and _status(error) in (401, 403)):
        return StorageInputError(f"cannot {doing}: permission denied", where=where)
    if _NO_CONNECTION.search(name):
        kind = TransientStorageError if _is_transient(error) else StorageError
        return kind(f"cannot {doing}: could not connect", where=where, got=got)
    if (reason := _wrong_path(error)) is not None:
        code = MISSING_FILE if isinstance(error, FileNotFoundError) else None
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            code = NAME_TOO_LONG
        return StorageInputError(
            f"cannot {doing}: {reason}", code=code, where=where, next_step=_glob_hint(error, where)
        )
    if of_argument:
        return StorageInputError(f"cannot {doing}: the store does not take this name", where=where, got=got)
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return disk_full(error, where, doing)
    kind = TransientStorageError if _is_transient(error) else StorageError
    return kind(f"cannot {doing}", where=where, got=got)


def s3_error_code(error: BaseException) -> str | None:
    """The code in S3's answer; s3fs keeps that as the cause."""
    response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None


def _is_transient(error: Exception) -> bool:
    """Whether the same request may succeed later: a timeout, a lost connection, a store that is overloaded."""
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    response = getattr(error.__cause__, "response", None)
    status = response["ResponseMetadata"].get("HTTPStatusCode") if isinstance(response, dict) else _status(error)
    if status is not None:
        return status in _TRANSIENT_STATUS
    if _package(error) in _LIBRARIES:
        # Bad certificates and URLs are values; the rest is connections and half answers.
        return not isinstance(error, ValueError)
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNO


def disk_full(error: OSError, where: str, doing: str) -> StorageError:
    return StorageError(
        f"cannot {doing}: no space is left",
        where=where,
        got=f"{type(error).__name__}: {error}",
        next_step="free some space (or set TMPDIR, if it is the scratch folder) and run the command again; it resumes",
    )


def _wrong_path(error: Exception) -> str | None:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "this is a folder"
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return "a part of this path is a file"
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return "this file system is read-only"
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return "a name in this path is too long for this file system (most take 255 bytes)"
    return None


def _glob_hint(error: Exception, path: str) -> str | None:
    if isinstance(error, FileNotFoundError) and re.search(r"[*?\[]", path):
        return "globs are not expanded; use braces, as in {00000..00009}"
    return None
