"""Folders that are splits of a data set, such as train and val, and not classes."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

_SPLIT = re.compile(
    r"(?P<role>train|val|test|dev|eval)(ing|id|idation|uation)?([-_]?(set|images|\d{4}))?", re.IGNORECASE
)


def split_folders(paths: Iterable[str]) -> list[str]:
    """The first folders of a tree of splits (``train``, ``val``, ``test`` …), training first; empty for classes.

    A class may also be called ``train``. The folders are splits only if no other folder has images, or if two different
    splits have a class of the same name.
    """
    classes: defaultdict[str, set[str]] = defaultdict(set)
    for path in paths:
        folder, slash, rest = path.partition("/")
        if slash:
            classes[folder].add(rest.partition("/")[0] if "/" in rest else "")
    roles = {folder: match["role"].lower() for folder in classes if (match := _SPLIT.fullmatch(folder))}
    shared = Counter(name for folder in roles for name in classes[folder] - {""})
    are_splits = len(roles) == len(classes) or (len({*roles.values()}) > 1 and max(shared.values(), default=0) > 1)
    # A single folder of images without subfolders may be the first class of a data set.
    if not are_splits or (len(roles) == 1 and not shared):
        return []
    return sorted(roles, key=lambda folder: (roles[folder] != "train", folder))
