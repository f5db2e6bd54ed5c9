"""The kind of a file by its first bytes, for messages about a file that is not the expected tar or image."""

from __future__ import annotations

import re

from pipeline.core.errors import ShardError

_TAR_MAGIC_AT = 257
_SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\0", "a TIFF image"),
    (b"MM\0*", "a TIFF image"),
    (b"8BPS", "a Photoshop image"),
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "a zip archive"),
    (b"PK\x05\x06", "a zip archive"),
    (b"Rar!", "a RAR archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive"),
    (b"PAR1", "a Parquet file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\0\x05\x16\x07", "an AppleDouble file of macOS"),
    (b"version https://git-lfs.github.com/spec/", "a Git LFS pointer"),
)
_HTML = re.compile(rb"<(!doctype html|html|head|body)\b", re.IGNORECASE)


def file_kind(head: bytes) -> str:
    """``JPEG``, ``PNG``, ``WEBP``, ``gzip``, ``HTML`` … for the first bytes of a file; else ``unknown bytes``."""
    if not head:
        return "an empty file"
    # Checked first: a tar begins with the name of its first member, which may look like any signature.
    if head[_TAR_MAGIC_AT : _TAR_MAGIC_AT + 5] == b"ustar":
        return "a tar"
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:12] in (b"ftypavif", b"ftypavis", b"ftypheic", b"ftypmif1", b"ftypheix"):
        return "an AVIF or HEIC image"
    return _text_kind(head.removeprefix(b"\xef\xbb\xbf").lstrip()) or "unknown bytes"


def _text_kind(text: bytes) -> str | None:
    if _HTML.match(text):
        return "HTML"
    if text.startswith((b"<?xml", b"<Error>")):
        return "XML"
    if re.match(rb"(\.\./)*\.?git/annex/|/annex/objects/", text):
        return "a git-annex pointer"
    return "JSON" if text.startswith((b"{", b"[")) else None


_UNPACK = {"gzip": "gunzip -c", "zstd": "zstd -dc", "xz": "xz -dc", "bzip2": "bunzip2 -c", "lz4": "lz4 -dc"}
_FETCH_AGAIN = "check its address and the access to it, and fetch it again: a server sent this in its place"
_NEXT_STEPS = {
    "an empty file": "fetch or write this shard again",
    "HTML": _FETCH_AGAIN,
    "XML": _FETCH_AGAIN,
    "JSON": _FETCH_AGAIN,
    "a Git LFS pointer": "run: git lfs pull, in the repository that it is from",
    "a git-annex pointer": "run: git annex get, in the repository that it is from",
}


def not_a_tar(head: bytes, where: str, position: str = "") -> ShardError:
    """The error for a file that ``tarfile`` refuses. It names the kind of the file.

    Args:
        head: its first bytes, at least 512 unless it is shorter.
        where: its URL, without credentials.
        position: text after the URL in the message.
    """
    kind = file_kind(head)
    name = where.rpartition("/")[2]
    if kind in _UNPACK:
        next_step = f"unpack it: mkdir -p unpacked && {_UNPACK[kind]} {name} > unpacked/{name}"
    elif "image" in kind or kind in ("JPEG", "PNG", "WEBP") or "archive" in kind:
        next_step = "make shards of a folder of images: stillroom shards pack FOLDER OUT"
    else:
        next_step = _NEXT_STEPS.get(kind, "write or fetch this shard again")
    return ShardError(
        "this is not an uncompressed tar",
        code="shard.not-a-tar",
        where=where + position,
        got="a tar with a garbled first header" if kind == "a tar" else kind,
        expected="a tar of samples, not compressed: they are read by byte range",
        next_step=next_step,
    )
