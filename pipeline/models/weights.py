"""Weights from a URL: checked, read without running any code, and loaded only where every name and shape fits."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import ModelError
from pipeline.fingerprint import digest
from pipeline.models.source import cause

_TORCH = (".pt", ".pth")
_SUFFIXES = (".safetensors", *_TORCH)
# Training loops put the state dict under one of these, beside the optimiser's.
_NESTINGS = ("state_dict", "model", "student")
_SHOWN = 4
_ZIP, _OF_TORCHSCRIPT, _BYTEARRAY = b"PK\x03\x04", "/constants.pkl", b"\nbytearray\n"


def read_state(url: str, *, sha256: str | None, where: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors``, ``.pt`` or ``.pth`` object, on the CPU.

    A checkpoint that nests them under ``state_dict``, ``model`` or ``student`` is opened; the ``module.`` that DDP
    puts before every name is taken off.

    Args:
        sha256: of the object, 64 hex characters; checked on the very bytes that are then parsed.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: another suffix or digest, an object that is damaged, or one that holds code.
        StorageInputError: the URL is refused, missing or not readable.
    """
    suffix = _suffix(url, where)
    data = storage.read(url)
    _check_digest(data, sha256, url, where)
    content = _unpickled(data, url, where) if suffix in _TORCH else _safetensors(data, url, where)
    return _without_ddp_prefix(_tensors(content, url, where))


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, source: str, where: str) -> None:
    """Copies every tensor into the network; nothing may be missing, left over or of another shape.

    Args:
        source: what the tensors came from, for the message.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: what does not fit, by count and the first few names.
    """
    own = network.state_dict()
    misshaped = [
        f"{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and own[name].shape != tensor.shape
    ]
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    if not misshaped:
        # Not strict: modules mend the names of their own older versions here, and what is left is judged below.
        missing, unexpected = network.load_state_dict(dict(state), strict=False)
    misfits = [
        *_summary(missing, "missing"),
        *_summary(unexpected, "unexpected"),
        *_summary(misshaped, "of another shape"),
    ]
    if misfits:
        raise ModelError(
            "the weights do not fit the network",
            where=f"{where}: {source}",
            got="; ".join(misfits),
            wanted=f"exactly the {len(own)} tensors of this architecture",
            next_step="check model, kwargs and data.num_classes against those that these weights were trained with",
        )


def _suffix(url: str, where: str) -> str:
    suffix = PurePosixPath(storage.redact(url)).suffix.lower()
    if suffix not in _SUFFIXES:
        raise ModelError(
            "weights of this kind are not read",
            where=where,
            got=storage.redact(url),
            wanted=f"pretrained, random, or a URL that ends in {', '.join(_SUFFIXES)}",
        )
    return suffix


def _check_digest(data: bytes, sha256: str | None, url: str, where: str) -> None:
    if sha256 is None or digest(data) == sha256:
        return
    raise ModelError(
        "the weights are not the ones the config names: their sha256 differs",
        where=f"{where}: {storage.redact(url)}",
        got=digest(data),
        wanted=sha256,
        next_step="restore the file, or correct sha256 if the change was meant",
    )


def _safetensors(data: bytes, url: str, where: str) -> object:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _unreadable(url, where, error) from error


def load_pickled(data: bytes) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors and plain values, in about as much memory as the file is long.

    Raises:
        UnpicklingError: it holds code.
        Exception: whatever torch's reader stumbles over in a damaged archive.
    """
    if data.startswith(_ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
        if any(record.filename.endswith(_OF_TORCHSCRIPT) for record in records):
            raise pickle.UnpicklingError("a TorchScript archive")
        # torch.save compresses nothing; a reader that inflates, or reads the same bytes again and again, has no end.
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or sum(record.file_size for record in records) > len(data):
            raise ValueError("its records are compressed, or are larger than the file")
    # The one thing that torch lets a pickle call with a size that nothing in the file bounds.
    if _BYTEARRAY in data:
        raise pickle.UnpicklingError("Unsupported GLOBAL builtins.bytearray")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpickled(data: bytes, url: str, where: str) -> object:
    try:
        return load_pickled(data)
    except pickle.UnpicklingError as error:
        raise ModelError(
            "the file holds more than tensors: pickled code is never run",
            where=f"{where}: {storage.redact(url)}",
            got=_refused_global(error),
            wanted="a state dict: names and tensors alone",
            next_step="save model.state_dict() by itself, best as .safetensors",
        ) from error
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        raise _unreadable(url, where, error) from error


def _refused_global(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0]


def _unreadable(url: str, where: str, error: BaseException) -> ModelError:
    return ModelError(
        "the weights cannot be read; the file is damaged or of another format",
        where=f"{where}: {storage.redact(url)}",
        got=cause(error),
        wanted="what safetensors' or torch's own save function writes",
        next_step="copy the file again, or save it anew",
    )


def _tensors(content: object, url: str, where: str) -> dict[str, Tensor]:
    named = _opened(content)
    strange = [f"{name}: {type(value).__name__}" for name, value in named.items() if not isinstance(value, Tensor)]
    if not named or strange:
        raise ModelError(
            "the file does not hold a state dict",
            where=f"{where}: {storage.redact(url)}",
            got="; ".join(_summary(strange, "not a tensor")) or f"an empty or unnamed {type(content).__name__}",
            wanted=f"names to tensors, at the top or under {', '.join(_NESTINGS)}",
        )
    return {str(name): value for name, value in named.items() if isinstance(value, Tensor)}


def _opened(content: object) -> Mapping[object, object]:
    """The innermost mapping of names to values; empty where there is none."""
    if not isinstance(content, Mapping):
        return {}
    for nesting in _NESTINGS:
        if isinstance(content.get(nesting), Mapping):
            return content[nesting]
    return content


def _without_ddp_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module."
    if not all(name.startswith(prefix) for name in state):
        return state
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _summary(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    rest = ", …" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{rest})"]
