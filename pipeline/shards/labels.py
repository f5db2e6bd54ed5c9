"""Counts of labels and domains, and the errors and warnings for a key of ``data`` that names the wrong member."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from pipeline.core.errors import ShardError
from pipeline.core.redaction import quoted
from pipeline.core.threads import map_ordered
from pipeline.shards.index import ShardIndex
from pipeline.shards.members import count_text, image_extensions
from pipeline.shards.shard_head import ShardHead
from pipeline.tasks import DOMAIN, Targets, Task, task_of
from schemas.config import DataConfig

T = TypeVar("T")
_READ_THREADS = 16
NUM_INDEXES_READ = 64
_DATA_LABEL = "data.label="
_NUM_POSSIBLE = 3


@dataclass(frozen=True, slots=True)
class LabelCount:
    """How many usable images of some shards have a label: a target of the task.

    Attributes:
        num_shards: number of these shards.
        members: how often each extension of a member occurs in the samples, most frequent first; None: not read.
        readable: values of ``data.label`` under which all members with the extension hold a target.
        num_without_domain: images in no domain; 0 without ``data.domain``.
    """

    num_labelled: int
    num_images: int
    num_shards: int
    members: Mapping[str, int] | None = None
    readable: tuple[str, ...] = ()
    num_without_domain: int = 0

    @classmethod
    def of(
        cls,
        targets: Sequence[tuple[Task, Targets]],
        members: Iterable[tuple[Counter[str], Counter[str]]] | None = None,
    ) -> LabelCount:
        """
        Args:
            targets: of the usable images of each shard.
            members: of some of these shards: ``ShardHead.members``.
        """
        labelled = [task.has_target(columns) for task, columns in targets]
        num_labelled = sum(int(labelled_N.sum()) for labelled_N in labelled)
        num_images = sum(map(len, labelled))
        num_without = sum(columns[DOMAIN].tolist().count(None) for _, columns in targets if DOMAIN in columns)
        if members is None:
            return cls(num_labelled, num_images, len(labelled), num_without_domain=num_without)
        counts, options = Counter[str](), Counter[str]()
        for shard_counts, shard_options in members:
            counts += shard_counts
            options += shard_options
        ordered = dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
        always = [option for option, count in options.items() if count == counts[option.partition(":")[0]]]
        readable = tuple(option for name in ordered for option in always if option.partition(":")[0] == name)
        return cls(num_labelled, num_images, len(labelled), ordered, readable, num_without)

    @classmethod
    def of_heads(cls, heads: Sequence[ShardHead], data: DataConfig) -> LabelCount:
        task = task_of(data)
        return cls.of([(task, head.targets) for head in heads], [head.members for head in heads])

    def __str__(self) -> str:
        """``0 of 60; members seen: 60 jpg, 58 json``"""
        members = "" if self.members is None else f"; members seen: {count_text(self.members)}"
        return f"{self.num_labelled} of {self.num_images}{members}"


def count_labels(shards: Sequence[T], read: Callable[[T], ShardIndex]) -> LabelCount:
    """Labels of the usable images in the indexes of these shards, or of an evenly spaced sample of many shards.

    Args:
        read: returns the index of a shard; called in threads.
    """
    indexes = map_ordered(read, evenly_spaced(shards, NUM_INDEXES_READ), threads=_READ_THREADS)
    return LabelCount.of([(index.task, index.ok_targets) for index in indexes])


def evenly_spaced(shards: Sequence[T], max_shards: int) -> list[T]:
    """At most ``max_shards`` of these, evenly spaced."""
    count = min(max_shards, len(shards))
    return [shards[(2 * number + 1) * len(shards) // (2 * count)] for number in range(count)]


def check_label_member(count: LabelCount, data: DataConfig, *, where: str, option: str = _DATA_LABEL) -> None:
    """Refuses a ``data.label`` that no sample has, unless labels may be missing (``data.missing_labels: ignore``): no
    member has the extension, or no JSON has a label in the field.

    Shards outside the count may have labels, so callers check this at the start of the work, before a teacher runs.

    Args:
        option: how the user passes the member.

    Raises:
        ShardError: no counted image has a label, and no member has the extension or field ``data.label``.
    """
    task = task_of(data)
    is_absent = (
        (task.trains_on_targets or option != _DATA_LABEL)
        and task.members
        and count.num_images
        and not count.num_labelled
        and count.members is not None
        and (set(task.members).isdisjoint(count.members) or _lacks_field(count, data))
    )
    if not is_absent or data.missing_labels == "ignore":
        return
    if option == _DATA_LABEL:
        alternatives = "data.missing_labels=ignore if only other shards have labels, or data.label=null for none"
        next_step = f"set {_candidates(count) or _possible(count, data)}{alternatives}"
    else:
        next_step = f"append {' or '.join(f'{option}{name}' for name in count.readable or ('MEMBER',))}"
    raise ShardError(
        f"no sample has a label: data.label is {data.label}, and no member has this name, or none has this field",
        code="data.label-not-found",
        where=where,
        got=f"labels: {count}",
        expected=f"members <key>.{task.default_member} with {task.member_content}, or the name of the member that has "
        "it",
        next_step=next_step,
    )


def _lacks_field(count: LabelCount, data: DataConfig) -> bool:
    """Whether labels are read from JSON, and not from a field that a label may be in."""
    member, colon, path = (data.label or "").partition(":")
    return member.lower().endswith("json") and f"{member.lower()}{colon}{path}" not in count.readable


def label_warning(count: LabelCount, data: DataConfig, *, finished_cache: str | None = None) -> str | None:
    """The warning for images without a label: for all of them, or under ``missing_labels: refuse`` for some.

    Args:
        finished_cache: URL of a finished cache with these labels, whose ``data.label`` can no longer change.
    """
    task = task_of(data)
    if not task.members or not count.num_images or count.num_labelled == count.num_images:
        return None
    if not count.num_labelled and not task.trains_on_targets:
        return None
    num_missing = count.num_images - count.num_labelled
    if count.num_labelled:
        if data.missing_labels == "ignore":
            return None
        return f"labels: {num_missing} of {count.num_images} images have none (data.label is {data.label})"
    if finished_cache is None:
        next_step = f"set {_candidates(count)}data.label=null for none"
    else:
        # An existing member, so that the command can be copied; without one the user has to name it.
        member = count.readable[0] if count.readable else "MEMBER"
        next_step = f"run: stillroom cache relabel {quoted(finished_cache)} --label {member}"
    return (
        f"labels: {count}, so losses and class means that need labels cannot use them (data.label is {data.label}); "
        f"{next_step}"
    )


def domain_warning(count: LabelCount, data: DataConfig) -> str | None:
    """The warning for images in no domain, which no figure of a domain includes."""
    if not count.num_without_domain:
        return None
    setting = data.domain if isinstance(data.domain, str) else "a mapping of shards"
    return f"domains: {count.num_without_domain} of {count.num_images} images are in none (data.domain is {setting})"


def _possible(count: LabelCount, data: DataConfig) -> str:
    """Members that may have names of classes."""
    if data.is_dense:
        return ""
    others = [name for name in count.members or () if name not in image_extensions(data) and not name.endswith("json")]
    return "".join(f"data.label={name} with data.classes if it holds names, or " for name in others[:_NUM_POSSIBLE])


def _candidates(count: LabelCount) -> str:
    return "".join(f"data.label={name}, or " for name in count.readable[:_NUM_POSSIBLE])
