"""Recognises small PNG images that libpng decodes without an error, whatever their bytes are.

torchvision decodes a thumbnail in a fifth of Pillow's time, but its PNG decoder crashes the process at errors of
libpng. Here every condition that libpng checks is checked before: the chunks and their CRCs, the whole deflated stream,
its length and the filter of each row. Images that do not pass are not necessarily damaged; Pillow decodes them.
"""

from __future__ import annotations

import struct
import zlib

_START = b"\x89PNG\r\n\x1a\n"
_IHDR_BYTES = 13
# Length, type and CRC of a chunk.
_CHUNK_BYTES = 12
_IEND = b"\0\0\0\0IEND\xaeB`\x82"
_CHANNELS = {0: 1, 2: 3}
"""By colour type: grayscale, RGB."""
_MAX_BYTES = 1 << 15
"""Of the inflated stream. Larger images gain nothing, since the stream is inflated twice; every distance that deflate
allows lies in the largest window."""
_MAX_FILTER = 4


def plain_png_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a complete PNG of 8-bit grayscale or RGB, without interlacing or any other chunks.

    None: it is something else, larger, or damaged.
    """
    if not (data.startswith(_START) and data.endswith(_IEND)):
        return None
    chunks = _chunks(data)
    if chunks is None or len(chunks[0]) != _IHDR_BYTES:
        return None
    width, height, bits, color_type, *methods = struct.unpack(">IIBBBBB", chunks[0])
    if not (width and height and bits == 8 and color_type in _CHANNELS and methods == [0, 0, 0]):
        return None
    row_bytes = 1 + width * _CHANNELS[color_type]
    if row_bytes * height > _MAX_BYTES:
        return None
    rows = _inflated(chunks[1], row_bytes * height)
    # The first byte of each row is its filter.
    return None if rows is None or max(rows[::row_bytes]) > _MAX_FILTER else (width, height)


def _chunks(data: bytes) -> tuple[bytes, bytes] | None:
    """The content of IHDR, and the contents of all IDAT chunks together; None: other chunks, or a wrong CRC."""
    contents, offset, end = list[bytes](), len(_START), len(data) - len(_IEND)
    while offset < end:
        (length,) = struct.unpack_from(">I", data, offset)
        stop = offset + _CHUNK_BYTES + length
        kind = b"IDAT" if contents else b"IHDR"
        if stop > end or data[offset + 4 : offset + 8] != kind:
            return None
        if zlib.crc32(data[offset + 4 : stop - 4]) != int.from_bytes(data[stop - 4 : stop], "big"):
            return None
        contents.append(data[offset + 8 : stop - 4])
        offset = stop
    return (contents[0], b"".join(contents[1:])) if contents else None


def _inflated(stream: bytes, num_bytes: int) -> bytes | None:
    """A complete zlib stream of so many bytes; None: it is damaged, longer or shorter, or has bytes behind its end."""
    # libpng inflates row by row, in the window that the stream declares: that must hold every distance.
    if not stream or 1 << (stream[0] >> 4) + 8 < num_bytes:
        return None
    inflater = zlib.decompressobj()
    try:
        rows = inflater.decompress(stream, num_bytes + 1)
    except zlib.error:
        return None
    return rows if inflater.eof and not inflater.unused_data and len(rows) == num_bytes else None
