"""What a pass over shards left out: counts with examples, for reports. No index and no cache stores it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_NUM_EXAMPLES = 3


@dataclass(slots=True)
class Omissions:
    """Counts by kind, a noun phrase in the plural, such as ``hidden members``; the first examples of each."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, kind: str, example: str, count: int = 1) -> None:
        self.counts[kind] += count
        if len(examples := self.examples.setdefault(kind, [])) < _NUM_EXAMPLES:
            examples.append(example)

    def include(self, other: Omissions) -> None:
        self.counts.update(other.counts)
        for kind, examples in other.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + examples)[:_NUM_EXAMPLES]

    def lines(self) -> list[str]:
        """``12 hidden members (train/._a.jpg, train/._b.jpg, train/._c.jpg, …)`` for each kind, in order of name."""
        return [
            f"{count} {kind} ({', '.join(self.examples[kind])}{', …' if count > len(self.examples[kind]) else ''})"
            for kind, count in sorted(self.counts.items())
        ]


def merged(several: Iterable[Omissions]) -> Omissions:
    """The sums, with the first examples of the first."""
    whole = Omissions()
    for omissions in several:
        whole.include(omissions)
    return whole
