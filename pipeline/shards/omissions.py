"""What a pass over shards omits: counts with examples, for reports. No index and no cache stores them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

_NUM_EXAMPLES = 3


@dataclass(slots=True)
class Omissions:
    """Counts by kind, with the first examples of each. A kind is a plural noun phrase, such as ``hidden members``."""

    counts: Counter[str] = field(default_factory=Counter[str])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])

    def add(self, kind: str, example: str) -> None:
        self.counts[kind] += 1
        if len(examples := self.examples.setdefault(kind, [])) < _NUM_EXAMPLES:
            examples.append(example)

    def include(self, omissions: Omissions) -> None:
        self.counts.update(omissions.counts)
        for kind, examples in omissions.examples.items():
            self.examples[kind] = (self.examples.get(kind, []) + examples)[:_NUM_EXAMPLES]

    def lines(self) -> list[str]:
        """``12 hidden members (train/._a.jpg, train/._b.jpg, train/._c.jpg, …)`` for each kind, in order of name."""
        return [
            f"{count} {kind} ({', '.join(self.examples[kind])}{', …' if count > len(self.examples[kind]) else ''})"
            for kind, count in sorted(self.counts.items())
        ]


def merged(several: Iterable[Omissions]) -> Omissions:
    """The sums, with the examples of the first ones."""
    total = Omissions()
    for omissions in several:
        total.include(omissions)
    return total
