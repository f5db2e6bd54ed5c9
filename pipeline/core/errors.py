"""Errors with stable codes. Each names what failed, where, got, expected and the next step.

The exit code is part of the exception, so that a command, a Ray task and a Ray job end with the same one: 2 for input
that the user has to change, 1 for any other failure.
"""

from __future__ import annotations

from functools import partial

from pipeline.core.redaction import redact_text


class StillroomError(Exception):
    """Base class of all deliberate errors. ``str(error)`` is the complete message, with redacted URLs."""

    exit_code: int = 1
    code: str = "stillroom.failed"
    """Identifies the fault for programs and tests; stable across versions. Each ``raise`` passes a precise code. The
    code of the class is the default."""

    def __init__(
        self,
        what: str,
        *,
        code: str | None = None,
        where: str | None = None,
        got: object = None,
        expected: object = None,
        next_step: str | None = None,
    ) -> None:
        self.what, self.where, self.got, self.expected, self.next_step = what, where, got, expected, next_step
        if code is not None:
            self.code = code
        super().__init__(self._text())

    def _text(self) -> str:
        details = {"where": self.where, "got": self.got, "expected": self.expected, "next": self.next_step}
        lines = [f"  {name + ':':<10}{value}" for name, value in details.items() if value is not None]
        # Redacted here because texts of a library or a user may also contain a URL.
        return redact_text("\n".join([f"[{self.code}] {self.what}", *lines]))

    def __reduce__(self) -> tuple[object, ...]:
        # Default pickling does not support keyword-only arguments, and these errors cross process borders.
        # got and expected may be any object; another process needs only their text.
        details = {
            "code": self.code,
            "where": self.where,
            "got": None if self.got is None else str(self.got),
            "expected": None if self.expected is None else str(self.expected),
            "next_step": self.next_step,
        }
        return partial(type(self), **details), (self.what,)


class InputError(StillroomError):
    """Wrong input of the user: a config key, a URL, a shard, a cache. Never retried. Exit code 2."""

    exit_code = 2
    code = "input.invalid"


class ConfigError(InputError):
    """A YAML document or override with invalid content."""

    code = "config.invalid"


class OrderError(ConfigError):
    """Items of a dataset that were requested in an order that differs from that of training."""

    code = "data.out-of-order"


class StorageInputError(InputError):
    """A URL that is refused, missing or not readable."""

    code = "storage.invalid"


class TooLargeError(StorageInputError):
    """A file above the size limit of its kind."""

    code = "storage.too-large"


class ShardError(InputError):
    """A shard or a sample that breaks a rule of the format."""

    code = "shard.invalid"


class ModelError(InputError):
    """A model that is unknown or cannot be built with the given options, or weights that do not fit."""

    code = "model.invalid"


class CacheError(InputError):
    """A cache that is incomplete, damaged, of another teacher, or does not match its images."""

    code = "cache.invalid"


class ResourceError(InputError):
    """More workers, CPUs or GPUs were requested than exist."""

    code = "ray.too-few-resources"


class StorageError(StillroomError):
    """Storage that failed on a valid request."""

    code = "storage.failed"


class TransientStorageError(StorageError):
    """A storage failure that is often temporary: throttling, a lost connection. Retried."""

    code = "storage.transient"


class ClusterError(StillroomError):
    """Ray that could not start, or failed on a valid request."""

    code = "ray.failed"


class LostGpuError(StillroomError):
    """A process was assigned a different GPU from the one that it uses. Another process can take over its work."""

    code = "ray.lost-gpu"


class SubmissionError(StillroomError):
    """A job that a cluster did not accept, or whose end it did not report."""

    code = "submit.failed"


class TrainingError(StillroomError):
    """Training that cannot continue, for example after a loss that is not finite."""

    code = "train.failed"


class EvaluationError(StillroomError):
    """An evaluation whose result would be meaningless, for example because logits are not finite."""

    code = "evaluate.failed"


def first_line(error: BaseException) -> str:
    """The first line of an error of another library, or its type if it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cause(error: BaseException) -> str:
    """The error's type and first line."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
