"""Tars for tests, written by the standard library, and the webdataset reader as the oracle."""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from schemas.config import DataConfig

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
BLOCK = 512
# A part of the path that begins with a dot, other than . and .. themselves.
_HIDDEN = re.compile(r"(^|/)\.(?!/|$|\./|\.$)")


def data_config(**keys: Any) -> DataConfig:
    return DataConfig.model_validate(keys)


def make_tar(
    members: Iterable[tuple[str, bytes | str | None]],
    *,
    form: int = tarfile.PAX_FORMAT,
    kind: bytes = tarfile.LNKTYPE,
) -> bytes:
    """Files; links of this kind if the content is the name of a target; folders if it is None."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                info.size = len(content)
            elif content is None:
                info.type = tarfile.DIRTYPE
            else:
                info.type, info.linkname = kind, content
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def webdataset_samples(path: Path) -> list[dict[str, Any]]:
    """The samples that the library reads from a tar, with the usual predicate against hidden files."""
    with path.open("rb") as stream:
        source = [{"url": str(path), "stream": stream}]
        return list(group_by_keys(tar_file_expander(source, select_files=lambda name: not _HIDDEN.search(name))))


def image_bytes(form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (7, 5), **options: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def real_shard(name: str) -> Path:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"needs the real shards in {DATA}")
    return path
