"""One way to fail: an error says what, where, got, wanted and what to do next.

The exit code travels with the exception, so that a command line, a Ray task and a Ray job all end the same way:
2 for input that a person has to change, 1 for everything else.
"""

from __future__ import annotations

from pipeline.core.redaction import redact_text


class StillroomError(Exception):
    """Base of every error raised on purpose. Its text is the whole message a user sees, without credentials of URLs."""

    exit_code: int = 1
    code: str = "stillroom.failed"
    """Names the fault for programs and tests: stable where sentences change. A class has one; a fault with a name of
    its own gives a more precise one when it is raised."""

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
        lines = [f"[{self.code}] {self.what}"]
        for name, value in (
            ("where", self.where),
            ("got", self.got),
            ("expected", self.expected),
            ("next", self.next_step),
        ):
            if value is not None:
                lines.append(f"  {name + ':':<10}{value}")
        # Here, and not only where a message is made: the words of a library or a user may hold a URL too.
        return redact_text("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments defeat the default pickling, and these errors cross process borders.
        # got and wanted may be any object; their text is what matters on the other side.
        return _rebuild, (
            type(self),
            self.what,
            self.code,
            self.where,
            None if self.got is None else str(self.got),
            None if self.expected is None else str(self.expected),
            self.next_step,
        )


def _rebuild(
    kind: type[StillroomError],
    what: str,
    code: str,
    where: str | None,
    got: str | None,
    expected: str | None,
    next_step: str | None,
) -> StillroomError:
    return kind(what, code=code, where=where, got=got, expected=expected, next_step=next_step)


class InputError(StillroomError):
    """Something a person gave is wrong: a config key, a URL, a shard, a cache. Never retried. Exit code 2."""

    exit_code = 2
    code = "input.invalid"


class ConfigError(InputError):
    """A YAML document or override that does not say what is allowed."""

    code = "config.invalid"


class OrderError(ConfigError):
    """Items of a dataset that were taken in another order than that of training."""

    code = "data.out-of-order"


class StorageInputError(InputError):
    """A URL that is refused, missing, or not readable."""

    code = "storage.invalid"


class TooLargeError(StorageInputError):
    """A file that is larger than what it should be can be."""

    code = "storage.too-large"


class MissingPackageError(InputError):
    """An optional package is not installed that the store of a URL needs. It says nothing about what the URL names, so
    it must not be handled as a missing file."""

    code = "storage.missing-package"


class ShardError(InputError):
    """A shard, or a sample in it, that breaks a rule of the format."""

    code = "shard.invalid"


class ModelError(InputError):
    """A model that is unknown, cannot be built as asked, or whose weights do not fit."""

    code = "model.invalid"


class CacheError(InputError):
    """A cache that is incomplete, damaged, of another teacher, or does not match the images beside it."""

    code = "cache.invalid"


class ResourceError(InputError):
    """More workers, CPUs or GPUs were asked for than there are."""

    code = "ray.too-few-resources"


class StorageError(StillroomError):
    """Storage that failed although the request was right."""

    code = "storage.failed"


class TransientStorageError(StorageError):
    """Storage that failed in a way that often passes by itself: throttling, a lost connection. Worth another try."""

    code = "storage.transient"


class ClusterError(StillroomError):
    """Ray that could not start or failed although the request was right."""

    code = "ray.failed"


class LostGpuError(StillroomError):
    """A process that was given another GPU than the one it holds. Another process can do its work."""

    code = "ray.lost-gpu"


class SubmissionError(StillroomError):
    """A job that a cluster did not take, or of whose end nothing was heard."""

    code = "submit.failed"


class TrainingError(StillroomError):
    """Training that cannot go on, such as a loss that is not finite."""

    code = "train.failed"


class EvaluationError(StillroomError):
    """An evaluation without a meaning, such as one of logits that are not finite."""

    code = "evaluate.failed"


def first_line(error: BaseException) -> str:
    """The first line of another library's error, or its type where it has no text."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def cause(error: BaseException) -> str:
    """The error's type and first line: enough to act on, without a page of library text."""
    return f"{type(error).__name__}: {first_line(error)}" if str(error).strip() else type(error).__name__
