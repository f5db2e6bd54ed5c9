"""Every byte that is read or written goes through here: allowed URLs, whole objects, create-if-absent.

Writes are never streamed into their final name: an exception inside an fsspec or Arrow output stream publishes what
was written so far. A writer makes a local temporary file, closes it, and ``put`` publishes it in one step.

Every operation may be repeated, so temporary failures (throttling, a lost connection, a short response) are tried
again here, a few times within a minute; an error that a caller sees has lasted. See ``failures.repeated``.
"""

from pipeline.storage.create import create, probe
from pipeline.storage.failures import MISSING_FILE
from pipeline.storage.filesystems import check_writable
from pipeline.storage.local import check_names, local_folder, local_path, on_disk, scratch_folder
from pipeline.storage.objects import (
    MAX_RECORD_BYTES,
    MAX_TABLE_BYTES,
    NAMES_A_PAGE,
    Entry,
    delete,
    download,
    entries,
    exists,
    folders,
    is_listed,
    listing,
    local_copy,
    num_gets,
    num_puts,
    put,
    read,
    read_if_there,
    read_range,
    size,
    sizes,
    sizes_right_below,
    stamp,
    write,
)
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
    "NAMES_A_PAGE",
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
    "is_listed",
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
    "read_if_there",
    "read_range",
    "scratch_folder",
    "short_name",
    "size",
    "sizes",
    "sizes_right_below",
    "stamp",
    "write",
]
