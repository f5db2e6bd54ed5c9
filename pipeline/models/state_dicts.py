"""The state dict inside a checkpoint: which key holds it, and which prefixes its names have.

docs/config.md lists the forms that are read.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

# In the order of choice. Averaged weights come last: they are an addition to the trained weights beside them.
TRAINED_KEYS = ("state_dict", "model", "student", "model_state_dict", "model_state", "net", "network", "weights")
AVERAGED_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "teacher")
_KEYS = (*TRAINED_KEYS, *AVERAGED_KEYS)
_MAX_DEPTH = 3
_COMPILED = "_orig_mod"  # torch.compile wraps whole networks and single submodules
_COUNTER = "n_averaged"  # of torch's AveragedModel, next to its network's tensors


class Opened(NamedTuple):
    """``key`` is the path to ``content``, empty at the top level; ``others`` hold state dicts that were not chosen."""

    content: Mapping[Any, Any]
    key: str
    others: tuple[str, ...]


def open_checkpoint(content: object) -> Opened:
    """The innermost mapping of names to values; an empty one where there is none."""
    path: list[str] = []
    others: list[str] = []
    mapping = _mapping(content)
    for _ in range(_MAX_DEPTH):
        nested = [key for key in _KEYS if isinstance(mapping.get(key), Mapping)]
        if not nested:
            break
        with_tensors = [key for key in nested if _has_tensors(mapping[key], _MAX_DEPTH)]
        others += [".".join([*path, key]) for key in with_tensors[1:]]
        path.append((with_tensors or nested)[0])
        mapping = _mapping(mapping[path[-1]])
    return Opened(mapping, ".".join(path), tuple(others))


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _has_tensors(value: object, depth: int) -> bool:
    """At the top or under a known key; no deeper than ``depth``, since a pickle's mapping may hold itself."""
    mapping = _mapping(value)
    if any(isinstance(item, Tensor) for item in mapping.values()):
        return True
    return depth > 0 and any(_has_tensors(mapping.get(key), depth - 1) for key in _KEYS)


def rename_to_match(state: Mapping[str, Tensor], names: Collection[str]) -> OrderedDict[str, Tensor]:
    """The tensors under the names of a network, without the prefixes that wrappers put before all of them.

    ``_orig_mod.`` (torch.compile) is removed wherever it is, then as many first parts that all names share (``module.``
    of DDP, ``model.`` of Lightning) as give the most names of the network. The versions of modules that torch stores in
    ``_metadata`` move along.

    Args:
        names: those of the network's own state dict.
    """
    best = _renamed(state, lambda name: name)
    if _COUNTER not in names:
        best.pop(_COUNTER, None)
    if not any(_COMPILED in name.split(".") for name in names):
        best = _renamed(best, lambda name: ".".join(part for part in name.split(".") if part != _COMPILED))
    known = set(names)
    stripped = best
    while prefix := _shared_prefix(stripped):
        stripped = _renamed(stripped, _remover(prefix))
        if len(known & stripped.keys()) > len(known & best.keys()):
            best = stripped
    return best


def _shared_prefix(state: Mapping[str, Tensor]) -> str:
    """The first part of every name, with its dot; empty where they differ or a name has one part alone."""
    firsts = {name.partition(".")[:2] for name in state}
    first, dot = firsts.pop() if len(firsts) == 1 else ("", "")
    return first + dot if dot else ""


def _remover(prefix: str) -> Callable[[str], str | None]:
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def _renamed(state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> OrderedDict[str, Tensor]:
    """With other names, also in the metadata, whose names are those of modules; None leaves a module out."""
    renamed: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in state.items():
        new = rename(name)
        assert new is not None, "all names share the prefix"
        renamed[new] = tensor
    versions: Any = module_versions(state)
    if versions is not None:
        moved = ((rename(f"{module}.".lstrip(".")), version) for module, version in versions.items())
        set_module_versions(renamed, {module.rstrip("."): version for module, version in moved if module is not None})
    return renamed


def module_versions(state: Mapping[Any, Any]) -> dict[str, dict[str, int]] | None:
    """Versions of modules by their names, as torch stores them with a state dict; None where a file has none.

    Nothing else is taken from there: other keys change how ``Module.load_state_dict`` works.
    """
    versions = getattr(state, "_metadata", None)
    if not isinstance(versions, Mapping):
        return None
    return {
        str(module): {"version": facts["version"]}
        for module, facts in versions.items()
        if isinstance(facts, Mapping) and isinstance(facts.get("version"), int)
    }


def set_module_versions(state: OrderedDict[str, Tensor], versions: Mapping[str, Any] | None) -> None:
    """Where ``Module.load_state_dict`` looks for them."""
    state._metadata = versions  # pyright: ignore[reportAttributeAccessIssue]
