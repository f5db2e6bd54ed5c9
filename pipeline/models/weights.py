"""Weights from a URL: checked, read without running code, and loaded only if every name and shape fits."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from pipeline import storage
from pipeline.core.errors import ModelError, StorageInputError, cause
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.models.file_formats import HEADER_BYTES, ZIP, detect_format, is_plain_pickle
from pipeline.models.sources.base import WeightsFile
from pipeline.models.state_dicts import (
    AVERAGED_KEYS,
    TRAINED_KEYS,
    find_state,
    module_versions,
    rename_to_match,
    set_module_versions,
)

_NUM_QUOTED_NAMES = 4
# Keys that only files of Stillroom have: an exported student, a checkpoint of a run.
_STILLROOM_KEYS = ("run_config_sha256", "projectors")
_CHECKPOINTS = ("checkpoints/best.pt", "checkpoints/last.pt")
_TORCHSCRIPT_MEMBER, _BYTEARRAY = "/constants.pkl", b"\nbytearray\n"


class TorchScriptError(pickle.UnpicklingError):
    """An archive that contains a program."""


class _Unused:
    """Replaces NumPy values of a checkpoint, such as its best accuracy, which are not weights."""

    def __init__(self, *_args: object) -> None: ...

    def __setstate__(self, _state: object) -> None: ...


_NUMPY: list[Any] = [
    (_Unused, f"numpy.{name}")
    for name in (
        "dtype",
        "ndarray",
        *(f"{core}.multiarray.{function}" for core in ("_core", "core") for function in ("scalar", "_reconstruct")),
    )
]


def read_state(url: str, *, sha256: str | None, where: str) -> WeightsFile:
    """Reads a file of safetensors or ``torch.save``, under any name. Finds the state dict of a checkpoint.

    Args:
        sha256: digest of the file, 64 hex characters; checked on the bytes that are parsed.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: the file has another digest or format, is damaged, or contains pickled code.
        StorageInputError: the URL is refused, missing or not readable.
    """
    _check_name(url, where)
    data = storage.read(url)
    check_digest(data, sha256, url, where)
    if detect_format(data, url, where) == "safetensors":
        content, metadata = _load_safetensors(data, url, where), safetensors_metadata(data)
    else:
        content = metadata = _unpickle(data, url, where)
    return replace(_as_weights_file(content, url, where), transform_input=stored_transform_input(metadata))


def student_of_run(url: str) -> str:
    """The URL of the checkpoint of a run: its best one, else its last; other URLs are returned as they are."""
    if PurePosixPath(redact(url)).suffix:
        return url
    checkpoints = (storage.join(url, name) for name in _CHECKPOINTS)
    return next((checkpoint for checkpoint in checkpoints if storage.exists(checkpoint)), url)


@contextlib.contextmanager
def weights_read_errors(url: str, *, where: str) -> Generator[None]:
    """Adds the YAML key ``where`` and a next step to errors of storage."""
    try:
        yield
    except StorageInputError as error:
        raise StorageInputError(
            "the weights cannot be read",
            code="weights.unreadable",
            where=f"{where}: {redact(url)}",
            got=error.what if error.got is None else f"{error.what}: {error.got}",
            expected=error.expected,
            next_step=error.next_step or f"restore the file, or append {where}=URL of a copy",
        ) from error


def stored_transform_input(metadata: object) -> bool | None:
    """Whether a student of Stillroom transforms its input, from the values stored with its weights; else None.

    Args:
        metadata: content of a checkpoint, or metadata of an exported file. Older versions lack the key, and their
            students did not transform the input.
    """
    if not isinstance(metadata, Mapping) or not any(key in metadata for key in _STILLROOM_KEYS):
        return None
    return metadata.get("transform_input") in (True, "true")


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, source: str, where: str) -> None:
    """Copies all tensors into the network, without prefixes that wrappers add to all names.

    Args:
        source: origin of the tensors, for messages.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: tensors are missing, unexpected or of another shape; it has their counts and first names.
    """
    expected = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    misfits = _load(network, rename_to_match(state, expected), shapes, module_versions(expected))
    if misfits:
        raise ModelError(
            "the weights do not fit the network",
            code="weights.misfit",
            where=f"{where}: {source}",
            got="; ".join(misfits),
            expected=f"exactly the {len(expected)} tensors of this architecture",
            next_step="check model, kwargs and data.num_classes against those that these weights were trained with",
        )


def _load(
    network: nn.Module,
    state: OrderedDict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    current: Mapping[str, Any] | None,
) -> list[str]:
    """Returns misfits. Tries the module versions of the file, then unknown versions, then the current ones.

    Some modules rename or add tensors of their older versions, and some refuse files without versions.
    """
    stored = module_versions(state)
    first: list[str] = []
    for versions in (stored, None, current) if stored is not None else (None, current):
        # load_state_dict of some modules renames tensors in its argument.
        copy = OrderedDict(state)
        set_module_versions(copy, versions)
        misfits = _misfits(network, copy, shapes)
        if not misfits:
            return []
        first = first or misfits
    return first


def _misfits(network: nn.Module, state: OrderedDict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    try:
        # Not strict: modules rename tensors of their older versions first, and the caller checks the rest.
        missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # hooks of modules raise anything, such as MNASNet for a file without versions
        misshaped = [
            f"{name} {tuple(tensor.shape)} for {shapes[name]}"
            for name, tensor in state.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ]
        return _summary(misshaped, "of another shape") or [cause(error)]
    return [*_summary(missing, "missing"), *_summary(unexpected, "unexpected")]


def _check_name(url: str, where: str) -> None:
    """Reports a misspelt keyword, which would otherwise look like the name of a missing file."""
    if url.isalnum() and not storage.exists(url):
        raise ModelError(
            "this is neither a keyword of weights nor a file",
            code="weights.unknown-name",
            where=where,
            got=url,
            expected="pretrained, random, or the URL of a file of safetensors or torch.save",
            next_step="correct the keyword, or give the path of the file",
        )


def check_digest(data: bytes, sha256: str | None, url: str, where: str) -> None:
    """
    Raises:
        ModelError: ``sha256`` is not None, and not the digest of the file.
    """
    if sha256 is None or digest(data) == sha256:
        return
    raise ModelError(
        "the sha256 of the weights differs from that in the config",
        code="weights.sha256-mismatch",
        where=f"{where}: {redact(url)}",
        got=digest(data),
        expected=sha256,
        next_step="restore the file, or correct sha256 if the change was intended",
    )


def _load_safetensors(data: bytes, url: str, where: str) -> object:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _unreadable(url, where, error) from error


def safetensors_metadata(data: bytes) -> object:
    """The metadata in the header of an undamaged safetensors file."""
    size = int.from_bytes(data[:HEADER_BYTES], "little")
    return json.loads(data[HEADER_BYTES : HEADER_BYTES + size]).get("__metadata__")


def load_pickled(data: bytes) -> Any:
    """Content of a ``torch.save`` file, on the CPU: tensors and plain values, in about as much memory as its size.

    Raises:
        UnpicklingError: the file contains code.
        Exception: any error of torch's reader for a damaged archive.
    """
    if data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.infolist()
        if any(member.filename.endswith(_TORCHSCRIPT_MEMBER) for member in members):
            raise TorchScriptError("a TorchScript archive")
        # torch.save does not compress. Compressed or overlapping members could need unbounded memory.
        compressed = any(member.compress_type != zipfile.ZIP_STORED for member in members)
        if compressed or sum(member.file_size for member in members) > len(data):
            raise ValueError("its records are compressed, or are larger than the file")
    # torch lets a pickle call bytearray with a size that the file does not bound.
    if _BYTEARRAY in data:
        raise pickle.UnpicklingError("Unsupported GLOBAL builtins.bytearray")
    with safe_globals(_NUMPY):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpickle(data: bytes, url: str, where: str) -> object:
    if is_plain_pickle(data):
        read = 'import pickle, torch; c = pickle.load(open(%s, "rb"))'
        raise _pickled_code("a pickle that torch.save did not write", read, url, where)
    try:
        return load_pickled(data)
    except TorchScriptError as error:
        read = 'import torch; c = torch.jit.load(%s, map_location="cpu")'
        raise _pickled_code(str(error), read, url, where) from error
    except pickle.UnpicklingError as error:
        read = 'import torch; c = torch.load(%s, map_location="cpu", weights_only=False)'
        raise _pickled_code(_refused_global(error), read, url, where) from error
    except Exception as error:  # the reader raises anything for a damaged archive
        raise _unreadable(url, where, error) from error


def _pickled_code(got: str, read: str, url: str, where: str) -> ModelError:
    return ModelError(
        "the file contains more than tensors: pickled code is never run",
        code="weights.pickled-code",
        where=f"{where}: {redact(url)}",
        got=got,
        expected="a state dict (names to tensors), with nothing but plain values next to it",
        next_step=f"if you trust the file, since this runs its code: {_conversion(read, url)}",
    )


def _conversion(read: str, url: str) -> str:
    """A command that writes only the state dict, from the first key of a checkpoint that has one.

    Args:
        read: Python code that binds ``c`` to the content of ``%s``.
    """
    path = PurePosixPath(storage.local_path(url) or storage.last_name(redact(url)))
    target = path.with_name(f"{path.name.split('.')[0]}-weights.pt")
    keys = " ".join((*TRAINED_KEYS, *AVERAGED_KEYS))
    select = f'c = next((c[k] for k in "{keys}".split() if k in c), c) if isinstance(c, dict) else c'
    save = f"torch.save(c if isinstance(c, dict) else c.state_dict(), {json.dumps(str(target))})"
    return f"python -c {shlex.quote(f'{read % json.dumps(str(path))}; {select}; {save}')}"


def _refused_global(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    globals_lines = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (globals_lines or lines or [type(error).__name__])[0]


def _unreadable(url: str, where: str, error: BaseException) -> ModelError:
    return ModelError(
        "the weights cannot be read; the file is damaged or has another format",
        code="weights.damaged",
        where=f"{where}: {redact(url)}",
        got=cause(error),
        expected="a file of safetensors.torch.save_file or torch.save",
        next_step="copy the file again, or save it again",
    )


def _as_weights_file(content: object, url: str, where: str) -> WeightsFile:
    checkpoint = find_state(content)
    non_tensors = [
        f"{name}: {type(value).__name__}" for name, value in checkpoint.state.items() if not isinstance(value, Tensor)
    ]
    if not checkpoint.state or non_tensors:
        raise ModelError(
            "the file does not contain a state dict",
            code="weights.no-state-dict",
            where=f"{where}: {redact(url)}",
            got="; ".join(_summary(non_tensors, "not a tensor")) or f"an empty or unnamed {type(content).__name__}",
            expected=f"names to tensors, at the top or under one of {', '.join((*TRAINED_KEYS, *AVERAGED_KEYS))}",
            next_step="save only the state dict: torch.save(model.state_dict(), FILE)",
        )
    state = OrderedDict((str(name), value) for name, value in checkpoint.state.items() if isinstance(value, Tensor))
    set_module_versions(state, module_versions(checkpoint.state))
    unused = ", ".join(checkpoint.unused_keys)
    note = f"{where}: the state dict under {checkpoint.key} was loaded; the file also has {unused}"
    return WeightsFile(state, (note,) if unused else ())


def _summary(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    rest = ", …" if len(names) > _NUM_QUOTED_NAMES else ""
    return [f"{len(names)} {what} ({', '.join(names[:_NUM_QUOTED_NAMES])}{rest})"]
