"""``s3://``: conditional creates, uploads with checksums, and reads in as few requests as possible."""

from __future__ import annotations

import base64
import math
import zlib
from pathlib import Path

from pipeline.core.errors import TransientStorageError
from pipeline.storage.failures import s3_error_code
from pipeline.storage.stores import Entry, Store

CHUNK_BYTES = 32 * 2**20
"""An object below twice this size is uploaded in one request, else in parts, a few at a time: bounds the memory."""
_UPLOAD_CONCURRENCY = 4
# A larger object is fetched in chunks of this size, several at a time, after one request for its size.
_FETCH_BYTES = 50 * 2**20
# A CRC of the whole object. The store computes it from the received bytes and refuses the upload if it differs. Of the
# algorithms that botocore has without a native extension, S3 combines only this one over the parts of an upload.
_CHECKSUM = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
_BLOCK_BYTES = 2**20


class S3Store(Store):
    can_create = True

    def read(self, max_bytes: int | None) -> bytes:
        # By default s3fs first requests the size, to fetch a large object in chunks.
        if max_bytes is None:
            return bytes(self.filesystem.cat_file(self.path, max_concurrency=1))
        try:
            data = self.read_range(0, max_bytes + 1)
        except FileNotFoundError:
            raise
        except OSError:
            # An empty object has no range.
            if self.filesystem.info(self.path)["size"] != 0:
                raise
            return b""
        self.check_size(len(data), max_bytes)
        return data

    def fetch(self, target: Path) -> None:
        self.filesystem.get_file(self.path, str(target), chunksize=_FETCH_BYTES)

    def put(self, local: Path) -> None:
        """Uploads with a checksum, and compares the stored object: not every store checks the checksum."""
        self.filesystem.put_file(
            str(local), self.path, chunksize=CHUNK_BYTES, max_concurrency=_UPLOAD_CONCURRENCY, **_CHECKSUM
        )
        bucket, key, _ = self.filesystem.split_path(self.path)
        stored = self.filesystem.call_s3("head_object", Bucket=bucket, Key=key, ChecksumMode="ENABLED")
        expected = {"size": local.stat().st_size, "crc32": _crc32(local)}
        # A store without checksums returns none.
        got = {"size": stored["ContentLength"], "crc32": stored.get("ChecksumCRC32", expected["crc32"])}
        if got != expected:
            raise TransientStorageError(
                "the stored object differs from the uploaded file",
                code="storage.upload-mismatch",
                where=self.where,
                got=got,
                expected=expected,
            )

    def create(self, data: bytes) -> bool:
        try:
            # s3fs turns this mode into PutObject with If-None-Match: *, which the store decides atomically.
            self.filesystem.pipe_file(self.path, data, mode="create", **_CHECKSUM)
        except FileExistsError:
            return False
        except OSError as error:
            # Not every store names the failed condition, as s3fs expects.
            if s3_error_code(error) == "PreconditionFailed":
                return False
            raise
        return True

    def entries(self) -> list[Entry]:
        # An absent prefix is an empty listing.
        return self._find()


def num_puts(size_bytes: float) -> int:
    """Requests in which an object is uploaded: one, or the start, the parts and the end of a multipart upload."""
    return 1 if size_bytes < 2 * CHUNK_BYTES else 2 + math.ceil(size_bytes / CHUNK_BYTES)


def num_gets(size_bytes: float) -> int:
    """Requests in which an object is copied to a local file, after the request for its size."""
    return 1 if size_bytes <= _FETCH_BYTES else 1 + math.ceil(size_bytes / _FETCH_BYTES)


def _crc32(path: Path) -> str:
    """In the encoding of S3: base64 of the big-endian word."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            value = zlib.crc32(block, value)
    return base64.b64encode(value.to_bytes(4, "big")).decode()
