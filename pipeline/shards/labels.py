"""Which samples have a label, and what a config that names the wrong member should name instead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import ShardError
from pipeline.core.redaction import quoted
from pipeline.shards.index import NO_LABEL, ShardIndex
from schemas.config import DataConfig

T = TypeVar("T")
_READ_THREADS = 16
NUM_INDEXES_READ = 64


@dataclass(frozen=True, slots=True)
class LabelCount:
    """Labels of the images that were looked at.

    Attributes:
        num_shards: of how many shards these images are.
        members: extensions of the samples' members, most frequent first; None: not looked at.
        readable: those of them whose every text is a class index.
    """

    num_labelled: int
    num_images: int
    num_shards: int
    members: tuple[str, ...] | None = None
    readable: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, labels: Sequence[NDArray[np.int32]], members: Iterable[tuple[Counter[str], Counter[str]]] | None = None
    ) -> LabelCount:
        """
        Args:
            labels: of the images of each shard.
            members: of some of these shards how often each extension occurs, and how often its text is a class index.
        """
        num_labelled = sum(int((label_N != NO_LABEL).sum()) for label_N in labels)
        num_images = sum(map(len, labels))
        if members is None:
            return cls(num_labelled, num_images, len(labels))
        seen, indexes = Counter[str](), Counter[str]()
        for of_shard, with_index in members:
            seen += of_shard
            indexes += with_index
        ordered = tuple(sorted(seen, key=lambda name: (-seen[name], name)))
        readable = tuple(name for name in ordered if indexes[name] == seen[name])
        return cls(num_labelled, num_images, len(labels), ordered, readable)

    def over(self, found: LabelCount) -> LabelCount:
        """The counts of ``found`` with the members seen here."""
        return replace(found, members=self.members, readable=self.readable)

    def __str__(self) -> str:
        """``0 of 60; members seen: jpg, json``"""
        seen = "" if self.members is None else f"; members seen: {', '.join(self.members)}"
        return f"{self.num_labelled} of {self.num_images}{seen}"


def count_labels(shards: Sequence[T], read: Callable[[T], ShardIndex]) -> LabelCount:
    """Labels of the images that can be used, in the indexes of these shards; of many shards, of some spread over them.

    Args:
        read: the index of a shard; called in threads.
    """
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return LabelCount.of([index.label[index.ok] for index in pool.map(read, spread(shards, NUM_INDEXES_READ))])


def spread(shards: Sequence[T], num_most: int) -> list[T]:
    """A few of these, evenly spread; all of them where there are no more."""
    num_taken = min(num_most, len(shards))
    return [shards[(2 * number + 1) * len(shards) // (2 * num_taken)] for number in range(num_taken)]


def check_label_member(found: LabelCount, data: DataConfig, *, where: str, option: str = "data.label=") -> None:
    """Refuses a ``data.label`` that no sample has, unless labels may be missing (``data.missing_labels: ignore``).

    Shards that were not looked at may have labels, so this is for the start of work, before a teacher is run.

    Args:
        option: how the user names the member.

    Raises:
        ShardError: no image that was looked at has a label, and no member has the extension ``data.label``.
    """
    if not _is_absent(found, data) or data.missing_labels == "ignore":
        return
    if option == "data.label=":
        others = "data.missing_labels=ignore if only other shards have labels, or data.label=null for none"
        next_step = f"set {_candidates(found)}{others}"
    else:
        next_step = f"append {' or '.join(f'{option}{name}' for name in found.readable or ('MEMBER',))}"
    raise ShardError(
        f"no sample has a label: data.label is {data.label}, and no member is called so",
        code="data.label-not-found",
        where=where,
        got=f"labels: {found}",
        expected="members <key>.cls with a class index as text, or the name of the member that holds it",
        next_step=next_step,
    )


def label_warning(found: LabelCount, data: DataConfig, *, finished_cache: str | None = None) -> str | None:
    """What is logged where no label was found, or some are missing that may not be (``missing_labels: refuse``).

    Args:
        finished_cache: URL of the cache that the labels are of, once it is finished: ``data.label`` cannot change then.
    """
    if data.label is None or not found.num_images or found.num_labelled == found.num_images:
        return None
    missing = found.num_images - found.num_labelled
    if found.num_labelled:
        if data.missing_labels == "ignore":
            return None
        return f"labels: {missing} of {found.num_images} images have none (data.label is {data.label})"
    if finished_cache is None:
        next_step = f"set {_candidates(found)}data.label=null for none"
    else:
        # One that exists, so that the command can be copied; else the user has to name it.
        member = found.readable[0] if found.readable else "MEMBER"
        next_step = f"run: stillroom cache relabel {quoted(finished_cache)} --label {member}"
    return (
        f"labels: {found}, so losses and class means that need labels cannot use them (data.label is {data.label}); "
        f"{next_step}"
    )


def _is_absent(found: LabelCount, data: DataConfig) -> bool:
    if data.label is None or found.num_labelled or not found.num_images or found.members is None:
        return False
    return data.label.lower() not in found.members


def _candidates(found: LabelCount) -> str:
    return "".join(f"data.label={name}, or " for name in found.readable)
