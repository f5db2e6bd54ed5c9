"""The result of a verification: problems, counts of what was checked, and reasons for what was not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.core.errors import StillroomError
from schemas.cache_format import Derived

MAX_PROBLEMS = 200
"""Further problems are counted, and not stored."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault of a file. ``rows`` counts the rows that share it; shard, view and key are those of the first row.

    Attributes:
        code: of the error that ended the check of this file; None if the check continued.
    """

    file: str
    what: str
    got: str | None = None
    expected: str | None = None
    shard: str | None = None
    view: int | None = None
    key: str | None = None
    rows: int | None = None
    code: str | None = None

    def __str__(self) -> str:
        place = {"shard": self.shard, "view": self.view, "key": self.key, "rows": self.rows}
        where = ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)
        lines = [f"{self.file}: {self.what}" + (f" ({where})" if where else "")]
        lines += [
            f"  {name + ':':<10}{text}" for name, text in (("got", self.got), ("expected", self.expected)) if text
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Findings:
    """The problems and counts of one step of a verification; ``merge`` adds those of another step.

    Attributes:
        checked: how many objects of each kind were checked, with or without a problem.
        not_checked: reasons, and how often each occurred.
        drift: canaries whose pixels differ within the allowed drift, by the largest difference of their block means in
            levels of 255.
    """

    checked: Counter[str] = field(default_factory=Counter[str])
    not_checked: Counter[str] = field(default_factory=Counter[str])
    problems: list[Problem] = field(default_factory=list[Problem])
    num_problems: int = 0
    drift: Counter[int] = field(default_factory=Counter[int])

    def add(self, problem: Problem) -> None:
        self.num_problems += 1
        if len(self.problems) < MAX_PROBLEMS:
            self.problems.append(problem)

    def expect(self, file: str, what: str, got: object, expected: object, *, shard: str | None = None) -> bool:
        """Adds a problem unless ``got == expected``; returns whether they are equal."""
        if got != expected:
            self.add(Problem(file, what, got=_truncated(got), expected=_truncated(expected), shard=shard))
        return got == expected

    @contextmanager
    def capture(
        self, file: str, kind: str | None = None, *, shard: str | None = None, view: int | None = None
    ) -> Generator[None]:
        """Turns an error inside a ``with`` into a problem of this file, so that the verification continues.

        Args:
            kind: counted as checked.
        """
        if kind is not None:
            self.checked[kind] += 1
        try:
            yield
        except StillroomError as error:
            what = error.what if error.where is None else f"{error.what} ({error.where})"
            got, expected = (None if value is None else _truncated(value) for value in (error.got, error.expected))
            self.add(Problem(file, what, got=got, expected=expected, shard=shard, view=view, code=error.code))

    def merge(self, other: Findings) -> None:
        self.checked.update(other.checked)
        self.not_checked.update(other.not_checked)
        self.drift.update(other.drift)
        self.num_problems += other.num_problems
        self.problems.extend(other.problems[: MAX_PROBLEMS - len(self.problems)])


def _truncated(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """The comparison of stored outputs with new outputs of the teacher.

    Attributes:
        same_environment: rows of parts that were built in the current numeric environment: their bits must be equal.
        identical: rows with equal bits.
        largest_difference: as a share of the standard deviation of all new outputs.
    """

    rows: int = 0
    same_environment: int = 0
    identical: int = 0
    largest_difference: float = 0.0

    def __add__(self, other: Recomputed) -> Recomputed:
        return Recomputed(
            self.rows + other.rows,
            self.same_environment + other.same_environment,
            self.identical + other.identical,
            max(self.largest_difference, other.largest_difference),
        )


@dataclass(slots=True, kw_only=True)
class VerifyReport(Findings):
    """The result for a screen or for ``--json``. ``problems`` are the first of ``num_problems``.

    Attributes:
        derived: of the header.
        unnamed: the first of ``num_unnamed`` files that no record names, and that killed writers left. They are
            harmless, and ``stillroom cache gc`` removes them.
        recomputed: the result of ``recompute``, if that was called.
    """

    url: str
    fingerprint: str | None = None
    derived: Derived | None = None
    num_unnamed: int = 0
    unnamed: tuple[str, ...] = ()
    recomputed: Recomputed | None = None

    @property
    def ok(self) -> bool:
        return self.num_problems == 0

    def as_dict(self) -> dict[str, Any]:
        counts = {name: dict(getattr(self, name)) for name in ("checked", "not_checked", "drift")}
        return {
            "ok": self.ok,
            **asdict(replace(self, checked=Counter(), not_checked=Counter(), drift=Counter(), derived=None)),
            "derived": self.derived and self.derived.model_dump(mode="json"),
            **counts,
        }
