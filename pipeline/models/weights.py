"""Weights from a URL: checked, read without running any code, and loaded only where every name and shape fits."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import shlex
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from pipeline import storage
from pipeline.core.errors import ModelError, cause
from pipeline.core.hashing import digest
from pipeline.core.redaction import redact
from pipeline.models.file_formats import HEADER_BYTES, ZIP, detect_format, is_plain_pickle
from pipeline.models.sources.base import WeightsFile
from pipeline.models.state_dicts import (
    AVERAGED_KEYS,
    TRAINED_KEYS,
    module_versions,
    open_checkpoint,
    rename_to_match,
    set_module_versions,
)

_SHOWN = 4
# Keys that files of Stillroom alone have: an exported student, a checkpoint of a run.
_STILLROOM = ("run_config_sha256", "projectors")
_TORCHSCRIPT_MEMBER, _BYTEARRAY = "/constants.pkl", b"\nbytearray\n"


class TorchScriptError(pickle.UnpicklingError):
    """An archive that holds a program."""


class _Unused:
    """Stands for a NumPy value in a checkpoint, such as its best accuracy, which is no weight: nothing is built."""

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
    """Reads a file of safetensors or ``torch.save``, whatever its name.

    Checkpoints of training loops are opened: see ``open_checkpoint``.

    Args:
        sha256: of the object, 64 hex characters; checked on the very bytes that are then parsed.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: another digest, a file of another format, damaged, or with pickled code.
        StorageInputError: the URL is refused, missing or not readable.
    """
    _check_name(url, where)
    data = storage.read(url)
    _check_digest(data, sha256, url, where)
    if detect_format(data, url, where) == "safetensors":
        content, facts = _safetensors(data, url, where), _metadata(data)
    else:
        content = facts = _unpickled(data, url, where)
    return replace(_opened(content, url, where), transform_input=stored_transform_input(facts))


def stored_transform_input(facts: object) -> bool | None:
    """Whether a student of Stillroom transforms its input, by the facts next to its weights; None for other files.

    Args:
        facts: a checkpoint's content, or the metadata of an exported file. Those of older versions lack the key, and
            students did not transform their input then.
    """
    if not isinstance(facts, Mapping) or not any(key in facts for key in _STILLROOM):
        return None
    return facts.get("transform_input") in (True, "true")


def load_state(network: nn.Module, state: Mapping[str, Tensor], *, source: str, where: str) -> None:
    """Copies every tensor into the network; nothing may be missing, left over or of another shape.

    Prefixes that wrappers put before all names are removed first.

    Args:
        source: what the tensors came from, for the message.
        where: YAML key, such as ``teacher.weights``.

    Raises:
        ModelError: what does not fit, by count and the first few names.
    """
    own = network.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    fitted = rename_to_match(state, own)
    misfits = _load(network, fitted, shapes, module_versions(own))
    if misfits:
        raise ModelError(
            "the weights do not fit the network",
            code="weights.misfit",
            where=f"{where}: {source}",
            got="; ".join(misfits),
            expected=f"exactly the {len(own)} tensors of this architecture",
            next_step="check model, kwargs and data.num_classes against those that these weights were trained with",
        )


def _load(
    network: nn.Module,
    state: OrderedDict[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    current: Mapping[str, Any] | None,
) -> list[str]:
    """What does not fit. Some modules rename or add tensors of their older versions, and some refuse files without any.

    Files are read as the versions that they state, then as of unknown versions, then as of the current ones.
    """
    stated = module_versions(state)
    first: list[str] = []
    for versions in (stated, None, current) if stated is not None else (None, current):
        # load_state_dict of some modules renames tensors in the mapping that it is given.
        copy = OrderedDict(state)
        set_module_versions(copy, versions)
        misfits = _misfits(network, copy, shapes)
        if not misfits:
            return []
        first = first or misfits
    return first


def _misfits(network: nn.Module, state: OrderedDict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    try:
        # Not strict: modules mend the names of their older versions here, and what is left is judged below.
        missing, unexpected = network.load_state_dict(state, strict=False)
    except Exception as error:  # what a module's own hook raises, such as MNASNet for a file without versions
        misshaped = [
            f"{name} {tuple(tensor.shape)} for {shapes[name]}"
            for name, tensor in state.items()
            if name in shapes and shapes[name] != tuple(tensor.shape)
        ]
        return _summary(misshaped, "of another shape") or [cause(error)]
    return [*_summary(missing, "missing"), *_summary(unexpected, "unexpected")]


def _check_name(url: str, where: str) -> None:
    """A file may have any name, so a misspelt word would else be a file that is missing."""
    if url.isalnum() and not storage.exists(url):
        raise ModelError(
            "this is neither a word for weights nor a file",
            code="weights.unknown-name",
            where=where,
            got=url,
            expected="pretrained, random, or the URL of a file of safetensors or torch.save",
            next_step="correct the word, or give the path of the file",
        )


def _check_digest(data: bytes, sha256: str | None, url: str, where: str) -> None:
    if sha256 is None or digest(data) == sha256:
        return
    raise ModelError(
        "the weights are not the ones the config names: their sha256 differs",
        code="weights.sha256-mismatch",
        where=f"{where}: {redact(url)}",
        got=digest(data),
        expected=sha256,
        next_step="restore the file, or correct sha256 if the change was meant",
    )


def _safetensors(data: bytes, url: str, where: str) -> object:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise _unreadable(url, where, error) from error


def _metadata(data: bytes) -> object:
    """Texts by name from the header of a safetensors file that is whole."""
    size = int.from_bytes(data[:HEADER_BYTES], "little")
    return json.loads(data[HEADER_BYTES : HEADER_BYTES + size]).get("__metadata__")


def load_pickled(data: bytes) -> Any:
    """What ``torch.save`` wrote, on the CPU: tensors and plain values, in about as much memory as the file is long.

    Raises:
        UnpicklingError: it holds code.
        Exception: whatever torch's reader stumbles over in a damaged archive.
    """
    if data.startswith(ZIP):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
        if any(record.filename.endswith(_TORCHSCRIPT_MEMBER) for record in records):
            raise TorchScriptError("a TorchScript archive")
        # torch.save compresses nothing; a reader that inflates, or reads the same bytes again and again, has no end.
        packed = any(record.compress_type != zipfile.ZIP_STORED for record in records)
        if packed or sum(record.file_size for record in records) > len(data):
            raise ValueError("its records are compressed, or are larger than the file")
    # The one thing that torch lets a pickle call with a size that nothing in the file bounds.
    if _BYTEARRAY in data:
        raise pickle.UnpicklingError("Unsupported GLOBAL builtins.bytearray")
    with safe_globals(_NUMPY):
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _unpickled(data: bytes, url: str, where: str) -> object:
    if is_plain_pickle(data):
        read = 'import pickle, torch; c = pickle.load(open(%s, "rb"))'
        raise _pickled_code("a pickle that torch.save did not write", read, data, url, where)
    try:
        return load_pickled(data)
    except TorchScriptError as error:
        read = 'import torch; c = torch.jit.load(%s, map_location="cpu")'
        raise _pickled_code(str(error), read, data, url, where) from error
    except pickle.UnpicklingError as error:
        read = 'import torch; c = torch.load(%s, map_location="cpu", weights_only=False)'
        raise _pickled_code(_refused_global(error), read, data, url, where) from error
    except Exception as error:  # a damaged archive raises whatever its reader stumbles over
        raise _unreadable(url, where, error) from error


def _pickled_code(got: str, read: str, data: bytes, url: str, where: str) -> ModelError:
    return ModelError(
        "the file holds more than tensors: pickled code is never run",
        code="weights.pickled-code",
        where=f"{where}: {redact(url)}",
        got=got,
        expected="a state dict: names and tensors, and next to it plain values alone",
        next_step=f"where you trust the file, for this runs its code: {_conversion(read, data, url)}",
    )


def _conversion(read: str, data: bytes, url: str) -> str:
    """A command that writes the state dict alone, from the key that the pickle seems to have for it.

    Args:
        read: Python that binds ``c`` to the content of ``%s``.
    """
    path = PurePosixPath(storage.local_path(url) or storage.last_name(redact(url)))
    target = path.with_name(f"{path.name.split('.')[0]}-weights.pt")
    texts = _texts(data)
    keys = [key for key in (*TRAINED_KEYS, *AVERAGED_KEYS) if key in texts]
    chosen = (
        f"c = next((c[k] for k in {json.dumps(keys)} if k in c), c) if isinstance(c, dict) else c; " if keys else ""
    )
    saved = f"torch.save(c if isinstance(c, dict) else c.state_dict(), {json.dumps(str(target))})"
    return f"python -c {shlex.quote(f'{read % json.dumps(str(path))}; {chosen}{saved}')}"


def _texts(data: bytes) -> set[str]:
    """The texts of a pickle, as far as it can be read; nothing in it is run."""
    texts: set[str] = set()
    try:
        if data.startswith(ZIP):
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
        stream = io.BytesIO(data)
        # The older format is several pickles, one after another.
        while stream.tell() < len(data):
            texts.update(argument for _, argument, _ in pickletools.genops(stream) if isinstance(argument, str))
    except Exception:
        return texts
    return texts


def _refused_global(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    named = [line for line in lines if "Unsupported" in line or "GLOBAL" in line]
    return (named or lines or [type(error).__name__])[0]


def _unreadable(url: str, where: str, error: BaseException) -> ModelError:
    return ModelError(
        "the weights cannot be read; the file is damaged or of another format",
        code="weights.damaged",
        where=f"{where}: {redact(url)}",
        got=cause(error),
        expected="what safetensors' or torch's own save function writes",
        next_step="copy the file again, or save it anew",
    )


def _opened(content: object, url: str, where: str) -> WeightsFile:
    opened = open_checkpoint(content)
    strange = [
        f"{name}: {type(value).__name__}" for name, value in opened.content.items() if not isinstance(value, Tensor)
    ]
    if not opened.content or strange:
        raise ModelError(
            "the file does not hold a state dict",
            code="weights.no-state-dict",
            where=f"{where}: {redact(url)}",
            got="; ".join(_summary(strange, "not a tensor")) or f"an empty or unnamed {type(content).__name__}",
            expected=f"names to tensors, at the top or under one of {', '.join((*TRAINED_KEYS, *AVERAGED_KEYS))}",
            next_step="save model.state_dict() by itself: torch.save(model.state_dict(), FILE)",
        )
    state = OrderedDict((str(name), value) for name, value in opened.content.items() if isinstance(value, Tensor))
    set_module_versions(state, module_versions(opened.content))
    note = f"{where}: the state dict under {opened.key} was loaded; the file also has {', '.join(opened.others)}"
    return WeightsFile(state, (note,) if opened.others else ())


def _summary(names: Sequence[str], what: str) -> list[str]:
    if not names:
        return []
    rest = ", …" if len(names) > _SHOWN else ""
    return [f"{len(names)} {what} ({', '.join(names[:_SHOWN])}{rest})"]
