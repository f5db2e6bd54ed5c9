"""Errors have stable codes, also in another process."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator

import pytest

from pipeline.core import errors
from pipeline.core.errors import CacheError, InputError, StillroomError, cause, first_line


def kinds() -> Iterator[type[StillroomError]]:
    return (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StillroomError))


@pytest.mark.parametrize("kind", [*kinds()], ids=lambda kind: kind.__name__)
def test_the_code_of_every_class_has_an_area_and_a_name(kind: type[StillroomError]) -> None:
    assert re.fullmatch(r"[a-z]+\.[a-z]+(-[a-z]+)*", kind("what").code)


def test_no_two_classes_share_a_code() -> None:
    codes = [kind.code for kind in kinds()]
    assert len({*codes}) == len(codes)


def test_an_error_may_have_a_more_precise_code_than_its_class() -> None:
    assert CacheError("what", code="cache.fingerprint-mismatch").code == "cache.fingerprint-mismatch"
    assert CacheError("what").code == CacheError.code


def test_an_error_has_the_same_code_and_fields_in_another_process() -> None:
    error = InputError("what", code="data.label-not-found", where="w", got=3, expected=["a"], next_step="n")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.code, str(copy)) == (InputError, "data.label-not-found", str(error))
    assert (copy.what, copy.where, copy.got, copy.expected, copy.next_step) == ("what", "w", "3", "['a']", "n")


@pytest.mark.parametrize(
    ("error", "line", "whole"),
    [
        (ValueError("first\nsecond"), "first", "ValueError: first"),
        (RuntimeError("\n  late\n"), "late", "RuntimeError: late"),
        (MemoryError(), "MemoryError", "MemoryError"),
        (OSError(" \n "), "OSError", "OSError"),
    ],
)
def test_an_error_of_another_library_is_one_line_even_without_a_text(error: Exception, line: str, whole: str) -> None:
    assert (first_line(error), cause(error)) == (line, whole)
