"""Codes of errors: each is listed with cause and remedy, and each listed one is raised."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from pipeline.core import errors
from pipeline.core.error_codes import error_codes, explain
from pipeline.core.errors import ConfigError, StillroomError
from tests.docs.error_codes import product_nodes

ROOT = Path(__file__).resolve().parents[3]
ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, StillroomError)}
CODE = re.compile(r"[a-z]+(?:-[a-z]+)*\.[a-z0-9]+(?:-[a-z0-9]+)*")


def test_every_raised_error_names_its_code() -> None:
    lacking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, node in product_nodes()
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS
        if not any(keyword.arg == "code" for keyword in node.keywords)
    ]
    assert not lacking


def test_the_list_has_the_codes_that_are_raised_and_no_other() -> None:
    listed = error_codes()
    areas = {code.partition(".")[0] for code in listed}
    raised = {
        node.value
        for _, node in product_nodes()
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and CODE.fullmatch(node.value)
        if node.value.partition(".")[0] in areas
    }
    classes = {value.code for name, value in vars(errors).items() if name in ERRORS}
    assert listed.keys() - raised == set()
    assert {code for code in raised - listed.keys() if code in classes or is_code(code)} == set()


def is_code(text: str) -> bool:
    """Keys of the config are dotted words too, without hyphens."""
    return "-" in text.partition(".")[2]


def test_each_entry_has_a_cause_and_a_remedy() -> None:
    for entry in error_codes().values():
        assert CODE.fullmatch(entry.code)
        assert entry.cause.endswith(".")
        assert entry.remedy.endswith((".", "`"))


def test_a_former_code_has_the_entry_of_its_current_name() -> None:
    assert explain("ray.no-answer").code == "ray.no-response"
    assert error_codes().keys().isdisjoint(entry.former for entry in error_codes().values())


def test_an_unknown_code_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        explain("cache.mising")
    assert caught.value.code == "explain.unknown-code"
    assert "cache.missing" in str(caught.value.next_step)
