"""The state dict in a checkpoint: its key, and prefixes of names. docs/reference/config.md lists the accepted forms."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# In order of preference. Averaged weights come last, since such files hold the trained weights too.
TRAINED_KEYS = ("state_dict", "model", "student", "model_state_dict", "model_state", "net", "network", "weights")
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
_KEYS = (*TRAINED_KEYS, *AVERAGED_KEYS)
_MAX_DEPTH = 3
_COMPILED = "_orig_mod"  # torch.compile wraps whole networks and single submodules
_COUNTER = "n_averaged"  # torch's AveragedModel stores it with the tensors of its network


class CheckpointState(NamedTuple):
    """``key``: the path to ``state``, empty at the top level. ``unused_keys``: paths of the other state dicts."""

    state: Mapping[Any, Any]
    key: str
    unused_keys: tuple[str, ...]


def find_state(content: object) -> CheckpointState:
    """The innermost mapping of names to values; empty if there is none."""
    path: list[str] = []
    unused_keys: list[str] = []
    mapping = _mapping(content)
    for _ in range(_MAX_DEPTH):
        nested = [key for key in _KEYS if isinstance(mapping.get(key), Mapping)]
        if not nested:
            break
        with_tensors = [key for key in nested if _has_tensors(mapping[key], _MAX_DEPTH)]
        unused_keys += [".".join([*path, key]) for key in with_tensors[1:]]
        path.append((with_tensors or nested)[0])
        mapping = _mapping(mapping[path[-1]])
    return CheckpointState(mapping, ".".join(path), tuple(unused_keys))


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _has_tensors(value: object, depth: int) -> bool:
    """At the top or under one of the keys; no deeper than ``depth``, since a pickled mapping may contain itself."""
    mapping = _mapping(value)
    if any(isinstance(item, Tensor) for item in mapping.values()):
        return True
    return depth > 0 and any(_has_tensors(mapping.get(key), depth - 1) for key in _KEYS)


def rename_to_match(state: Mapping[str, Tensor], names: Collection[str]) -> OrderedDict[str, Tensor]:
    """The tensors under the names of a network, without the prefixes that wrappers add to all names.

    Removes ``_orig_mod.`` (torch.compile) everywhere, then as many shared first parts (``module.`` of DDP, ``model.``
    of Lightning) as match the most names of the network. Renames the module versions in ``_metadata`` as well.

    Args:
        names: those of the state dict of the network.
    """
    best = renamed(state, lambda name: name)
    if _COUNTER not in names:
        best.pop(_COUNTER, None)
    if not any(_COMPILED in name.split(".") for name in names):
        best = renamed(best, lambda name: ".".join(part for part in name.split(".") if part != _COMPILED))
    expected = set(names)
    stripped = best
    while prefix := _shared_prefix(stripped):
        stripped = renamed(stripped, _remover(prefix))
        if len(expected & stripped.keys()) > len(expected & best.keys()):
            best = stripped
    return best


def _shared_prefix(state: Mapping[str, Tensor]) -> str:
    """The first part of every name, with its dot; empty if they differ or a name has only one part."""
    firsts = {name.partition(".")[:2] for name in state}
    first, dot = firsts.pop() if len(firsts) == 1 else ("", "")
    return first + dot if dot else ""


def _remover(prefix: str) -> Callable[[str], str | None]:
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> OrderedDict[str, Tensor]:
    """Renames tensors, and modules in the metadata; ``rename`` returns None to drop one."""
    result: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state.items():
        new = rename(name)
        if new is not None:
            result[new] = tensor
    versions: Any = module_versions(state)
    if versions is not None:
        moved = ((rename(f"{module}.".lstrip(".")), version) for module, version in versions.items())
        set_module_versions(result, {module.rstrip("."): version for module, version in moved if module is not None})
    return result


def module_versions(state: Mapping[Any, Any]) -> dict[str, dict[str, int]] | None:
    """The module versions that torch stores with a state dict; None if there are none.

    Other metadata is ignored, because it changes how ``Module.load_state_dict`` works.
    """
    versions = getattr(state, "_metadata", None)
    if not isinstance(versions, Mapping):
        return None
    return {
        str(module): {"version": metadata["version"]}
        for module, metadata in versions.items()
        if isinstance(metadata, Mapping) and isinstance(metadata.get("version"), int)
    }


def set_module_versions(state: OrderedDict[str, Tensor], versions: Mapping[str, Any] | None) -> None:
    """Stores module versions where ``Module.load_state_dict`` reads them."""
    state._metadata = versions  # pyright: ignore[reportAttributeAccessIssue]
