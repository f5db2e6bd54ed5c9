"""All reads and writes of the project by URL: allowed URLs, whole objects, create-if-absent.

Writes are never streamed to their final name, because an exception inside an fsspec or Arrow output stream publishes
the bytes written so far. A writer creates a local temporary file, closes it, and ``put`` publishes it in one step.

Every operation is idempotent, so transient failures (throttling, a lost connection, a short response) are retried a few
times within a minute; a caller sees only errors that persist. See ``failures.with_retries``.
"""

from pipeline.storage.failures import MISSING_FILE
from pipeline.storage.local import check_names, local_folder, local_path, on_disk, scratch_folder
from pipeline.storage.objects import (
    MAX_RECORD_BYTES,
    MAX_TABLE_BYTES,
    NAMES_PER_PAGE,
    check_writable,
    create,
    delete,
    download,
    entries,
    exists,
    folders,
    is_listing_cheaper,
    listing,
    local_copy,
    probe,
    put,
    read,
    read_if_exists,
    read_range,
    size,
    sizes,
    sizes_in_folder,
    stamp,
    write,
)
from pipeline.storage.s3_store import num_gets, num_puts
from pipeline.storage.stores import Entry
from pipeline.storage.urls import (
    WRITABLE,
    absolute,
    absolute_patterns,
    expand,
    expand_home,
    join,
    last_name,
    protocol,
    short_name,
)

__all__ = [
    "MAX_RECORD_BYTES",
    "MAX_TABLE_BYTES",
    "MISSING_FILE",
    "NAMES_PER_PAGE",
    "WRITABLE",
    "Entry",
    "absolute",
    "absolute_patterns",
    "check_names",
    "check_writable",
    "create",
    "delete",
    "download",
    "entries",
    "exists",
    "expand",
    "expand_home",
    "folders",
    "is_listing_cheaper",
    "join",
    "last_name",
    "listing",
    "local_copy",
    "local_folder",
    "local_path",
    "num_gets",
    "num_puts",
    "on_disk",
    "probe",
    "protocol",
    "put",
    "read",
    "read_if_exists",
    "read_range",
    "scratch_folder",
    "short_name",
    "size",
    "sizes",
    "sizes_in_folder",
    "stamp",
    "write",
]
