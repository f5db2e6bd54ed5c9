"""fsspec file systems by URL, the one place that imports fsspec."""

from __future__ import annotations

from typing import Any

import fsspec

from pipeline.core.errors import MissingPackageError, StorageInputError
from pipeline.core.redaction import redact
from pipeline.storage.failures import translated_errors
from pipeline.storage.urls import WRITABLE, expand_home, protocol

_EXTRA = {"s3": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}


def filesystem_of(url: str) -> tuple[Any, str]:
    name = protocol(url)
    try:
        with translated_errors(url, "open"):
            filesystem, path = fsspec.core.url_to_fs(expand_home(url))
            if name == "s3":
                # botocore repeats single requests (AWS_MAX_ATTEMPTS, AWS_RETRY_MODE), we repeat operations. s3fs in
                # between would multiply both.
                filesystem.retries = 1
    except (ImportError, ValueError) as error:
        # abfss is not even a name to fsspec without its package.
        if isinstance(error, ValueError) and "Protocol not known" not in str(error):
            raise
        package = f"'stillroom[{_EXTRA[name]}]'" if name in _EXTRA else "aiohttp"
        raise MissingPackageError(
            f"{name}:// needs a package that is not installed",
            where=redact(url),
            got=str(error),
            next_step=f"pip install {package} (on every node that reads or writes such URLs)",
        ) from error
    return filesystem, path


def writable_filesystem(url: str) -> tuple[Any, str]:
    check_not_read_only(url)
    return filesystem_of(url)


def check_not_read_only(url: str) -> None:
    if protocol(url) not in WRITABLE:
        raise StorageInputError(
            "this protocol is read-only", where=redact(url), got=protocol(url), expected=f"one of {', '.join(WRITABLE)}"
        )


def check_writable(url: str) -> None:
    """What can be known without writing.

    Raises:
        StorageInputError: the URL is refused, or its protocol is read-only.
    """
    writable_filesystem(url)
