"""What a verification found: every problem is counted, the first are kept, and what was not checked is said."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.core.errors import StillroomError

_KEPT_PROBLEMS = 200
_KEPT_NAMES = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. ``rows`` counts those that it is wrong of; shard, view and key are of the first."""

    file: str
    what: str
    got: str | None = None
    expected: str | None = None
    shard: str | None = None
    view: int | None = None
    key: str | None = None
    rows: int | None = None
    code: str | None = None
    """Of the error that ended the check, if one did; see ``StillroomError``."""

    def __str__(self) -> str:
        place = {"shard": self.shard, "view": self.view, "key": self.key, "rows": self.rows}
        told = ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)
        lines = [f"{self.file}: {self.what}" + (f" ({told})" if told else "")]
        lines += [
            f"  {name + ':':<10}{text}" for name, text in (("got", self.got), ("expected", self.expected)) if text
        ]
        return "\n".join(lines)


@dataclass(slots=True)
class Findings:
    """Collects what one piece of the work finds; pieces are added up in order."""

    checked: Counter[str] = field(default_factory=Counter[str])
    """How many of what were checked, whatever came out."""
    not_checked: Counter[str] = field(default_factory=Counter[str])
    """Reasons, and how often each was met."""
    problems: list[Problem] = field(default_factory=list[Problem])
    num_problems: int = 0
    drift: Counter[int] = field(default_factory=Counter[int])
    """Canaries that drifted as far as is allowed, by how many levels."""

    def add(self, problem: Problem) -> None:
        self.num_problems += 1
        if len(self.problems) < _KEPT_PROBLEMS:
            self.problems.append(problem)

    def expect(self, file: str, what: str, got: object, expected: object, *, shard: str | None = None) -> bool:
        """Whether ``got`` is ``expected``; a problem where it is not."""
        if got != expected:
            self.add(Problem(file, what, got=_brief(got), expected=_brief(expected), shard=shard))
        return got == expected

    @contextmanager
    def told(self, file: str, *, shard: str | None = None, view: int | None = None) -> Generator[None]:
        """Turns an error into a problem of this file, so that the rest is still checked."""
        try:
            yield
        except StillroomError as error:
            what = error.what if error.where is None else f"{error.what} ({error.where})"
            got, expected = (None if value is None else _brief(value) for value in (error.got, error.expected))
            self.add(Problem(file, what, got=got, expected=expected, shard=shard, view=view, code=error.code))

    def merge(self, other: Findings) -> None:
        self.checked.update(other.checked)
        self.not_checked.update(other.not_checked)
        self.drift.update(other.drift)
        self.num_problems += other.num_problems
        self.problems.extend(other.problems[: _KEPT_PROBLEMS - len(self.problems)])


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 300 else text[:299] + "…"


@dataclass(frozen=True, slots=True)
class Recomputed:
    """What came of asking the teacher again. The difference is a share of the standard deviation of all answers."""

    rows: int = 0
    same_environment: int = 0
    """Rows whose part was built in the numeric environment of here, which must be the same bits."""
    identical: int = 0
    largest_difference: float = 0.0

    def plus(self, other: Recomputed) -> Recomputed:
        return Recomputed(
            self.rows + other.rows,
            self.same_environment + other.same_environment,
            self.identical + other.identical,
            max(self.largest_difference, other.largest_difference),
        )


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result for a screen or for ``--json``. ``problems`` are the first of ``num_problems``."""

    url: str
    fingerprint: str | None
    num_problems: int
    problems: tuple[Problem, ...]
    checked: dict[str, int]
    not_checked: dict[str, int]
    num_unnamed: int
    unnamed: tuple[str, ...]
    """Files that nothing names, and what killed writers left: no harm; ``stillroom cache gc`` removes them."""
    recomputed: Recomputed | None = None
    drift: dict[int, int] = field(default_factory=dict[int, int])
    """Canaries whose pixels differ and were allowed to, by how many levels of 255 their block means differ at most."""

    @property
    def ok(self) -> bool:
        return self.num_problems == 0

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self)}

    def joined(self, findings: Findings, recomputed: Recomputed) -> VerifyReport:
        """With what a live teacher says."""
        return replace(
            self,
            num_problems=self.num_problems + findings.num_problems,
            problems=(*self.problems, *findings.problems)[:_KEPT_PROBLEMS],
            not_checked={**self.not_checked, **findings.not_checked},
            recomputed=recomputed,
        )

    @classmethod
    def of(cls, url: str, *, fingerprint: str | None, findings: Findings, unnamed: list[str]) -> VerifyReport:
        return cls(
            url=url,
            fingerprint=fingerprint,
            num_problems=findings.num_problems,
            problems=tuple(findings.problems),
            checked=dict(findings.checked),
            not_checked=dict(findings.not_checked),
            num_unnamed=len(unnamed),
            unnamed=tuple(unnamed[:_KEPT_NAMES]),
            drift=dict(findings.drift),
        )
