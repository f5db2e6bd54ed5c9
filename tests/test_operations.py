"""docs/how-to quotes error codes and a plan: each must be what the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.plan_cache import describe, report
from pipeline.core import errors
from schemas.config import Config
from tests.docs.error_codes import all_codes

pytestmark = pytest.mark.long

ROOT = Path(__file__).resolve().parents[1]
_MIN_CODES = 80
_PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-samples"
# The faults that operators of a cluster see first: the page must have every code of these modules.
_COMPLETE = (
    *("jobs/ray/fan_out.py", "jobs/ray/connection.py", "jobs/ray/cluster.py", "jobs/ray/worker_group.py"),
    *("pipeline/cache/build/commit.py", "pipeline/cache/format/header.py", "pipeline/cache/build/manifest.py"),
)


def quoted() -> list[str]:
    """First cells of the tables of failures."""
    text = (ROOT / "docs" / "how-to" / "recover.md").read_text()
    return re.findall(r"^\| \[`([^`]+)`\]", text, re.MULTILINE)


def codes_of(path: Path) -> Iterator[str]:
    """Codes that a module gives to its errors."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.keyword) and node.arg == "code" and isinstance(node.value, ast.Constant):
            yield str(node.value.value)


def test_the_page_has_the_failures_of_every_part() -> None:
    assert len(quoted()) >= _MIN_CODES


def test_every_quoted_code_is_one_of_the_code_s() -> None:
    classes = {value.code for value in vars(errors).values() if isinstance(value, type) and hasattr(value, "code")}
    assert {*quoted()} - all_codes() - classes == set()


@pytest.mark.parametrize("name", _COMPLETE)
def test_every_code_of_these_modules_is_in_the_tables(name: str) -> None:
    assert {*codes_of(ROOT / name)} - {*quoted()} == set()


@pytest.mark.slow
@pytest.mark.skipif(not _PHOTOGRAPHS.exists(), reason=f"{_PHOTOGRAPHS} is absent")
def test_the_plan_that_is_shown_is_printed(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "how-to" / "size-a-build.md").read_text()
    shown = re.search(r"^```yaml\n(.*?)^```$.*?^```\n(.*?)^measured", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    document = yaml.safe_load(shown[1])
    document["data"]["shards"] = f"{_PHOTOGRAPHS}/{document['data']['shards']}"
    document["cache"]["url"] = str(tmp_path / document["cache"]["url"])
    assert describe(report(Config.model_validate(document), measured=False)).startswith(shown[2])
