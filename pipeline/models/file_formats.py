"""The format of a weights file, detected from its first bytes and not from its name."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from pipeline.core.errors import ModelError
from pipeline.core.redaction import redact

Format = Literal["safetensors", "zip", "pickle"]

ZIP = b"PK\x03\x04"
# The magic number of the older format of torch.save, as a pickle of protocol 2.
_LEGACY_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_PICKLE = b"\x80"
HEADER_BYTES = 8  # the length of the JSON of a safetensors file
_NUM_QUOTED_BYTES = 40


class _ForeignFormat(NamedTuple):
    """A format that cannot be read as weights, and the step that leads to a readable file."""

    code: str
    description: str
    next_step: str


_EMPTY = _ForeignFormat(
    "weights.empty-file", "empty: damaged or not completely copied", "copy or download the file again"
)
_LFS = _ForeignFormat(
    "weights.git-lfs-pointer",
    "a Git LFS pointer: the text that stands for the file in a repository",
    "run git lfs pull in that repository, then copy the file again",
)
_HTML = _ForeignFormat(
    "weights.html-page",
    "an HTML page, such as an error, a quota notice or the page around a download link",
    "download the file itself: on GitHub its raw link, on Hugging Face resolve/ instead of blob/ in the URL",
)
_CONVERT = "use a file that torch.save or safetensors wrote; convert other formats with the library that wrote them"


def _compressed(kind: str, command: str) -> _ForeignFormat:
    return _ForeignFormat("weights.compressed-file", f"a {kind} file", f"decompress it first: {command} FILE")


def _unknown(description: str) -> _ForeignFormat:
    return _ForeignFormat("weights.unknown-format", description, _CONVERT)


_BY_START: tuple[tuple[bytes, _ForeignFormat], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"\x1f\x8b", _compressed("gzip", "gunzip")),
    (b"BZh", _compressed("bzip2", "bunzip2")),
    (b"\xfd7zXZ\x00", _compressed("xz", "unxz")),
    (b"\x28\xb5\x2f\xfd", _compressed("zstd", "unzstd")),
    (b"\x89HDF\r\n\x1a\n", _unknown("an HDF5 file (Keras)")),
    (b"\x93NUMPY", _unknown("a NumPy array")),
    (b"GGUF", _unknown("a GGUF file")),
)
_HTML_START = re.compile(rb"\s*<(?:!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)


def detect_format(data: bytes, url: str, where: str) -> Format:
    """The format of a weights file.

    Args:
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: it is empty, a Git LFS pointer, an HTML page, compressed, or of a format without a reader here.
    """
    if data.startswith(ZIP):
        return "zip"
    if _is_safetensors(data):
        return "safetensors"
    if data.startswith(_PICKLE):
        return "pickle"
    foreign = _detect_foreign(data)
    raise ModelError(
        f"the weights file is {foreign.description}",
        code=foreign.code,
        where=f"{where}: {redact(url)}",
        got=f"{len(data)} bytes" + (f" that begin with {data[:_NUM_QUOTED_BYTES]!r}" if data else ""),
        expected="a file of torch.save or safetensors, under any name",
        next_step=foreign.next_step,
    )


def _is_safetensors(data: bytes) -> bool:
    """JSON after its length. The length may begin like a pickle; zero bytes, which every real length has, decide."""
    length = data[:HEADER_BYTES]
    is_length = length.endswith(b"\0\0\0") or (b"\0" in length and not data.startswith(_PICKLE))
    return is_length and data[HEADER_BYTES : HEADER_BYTES + 1] == b"{"


def is_plain_pickle(data: bytes) -> bool:
    """Whether ``pickle.dump`` wrote the file, and not ``torch.save`` in either of its formats."""
    return data.startswith(_PICKLE) and not data.startswith(_LEGACY_TORCH)


def _detect_foreign(data: bytes) -> _ForeignFormat:
    if not data:
        return _EMPTY
    for start, foreign in _BY_START:
        if data.startswith(start):
            return foreign
    if _HTML_START.match(data[:256]):
        return _HTML
    if data[257:262] == b"ustar":
        return _unknown("a tar archive")
    is_text = all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in data[:_NUM_QUOTED_BYTES])
    return _unknown("a text file" if is_text else "damaged or of an unknown format")
