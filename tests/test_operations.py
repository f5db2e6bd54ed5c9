"""docs/operations.md quotes messages and a plan: each must be what the code prints."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from jobs.plan_cache import describe, report
from schemas.config import Config

ROOT = Path(__file__).resolve().parents[1]
_VARIES = "\0"
_LEAST_MESSAGES = 40
_PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "imagenet-samples"
# What operators of a cluster meet first: no message of these may lack its row.
_WITH_ALL_MESSAGES = (
    *("jobs/ray/task_scheduler.py", "jobs/ray/connection.py", "jobs/ray/cluster.py", "jobs/ray/worker_group.py"),
    *("pipeline/cache/build/commit.py", "pipeline/cache/format/header.py", "pipeline/cache/build/manifest.py"),
)


def templates() -> Iterator[str]:
    """Every text in the code, with ``_VARIES`` for what an f-string fills in."""
    for folder in ("jobs", "pipeline"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(
                        str(piece.value) if isinstance(piece, ast.Constant) else _VARIES for piece in node.values
                    )
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


CODE = set(templates())


def quoted() -> list[str]:
    """First cells of the tables of failures, and the line about void commits."""
    text = (ROOT / "docs" / "operations.md").read_text()
    section = re.search(r"^## Recovering from each failure\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section is not None
    return [
        *re.findall(r"^\| `([^`]+)` \|", section[1], re.MULTILINE),
        *re.findall(r"says `([^`]+)` and", section[1]),
    ]


def test_the_document_has_the_failures_of_every_part() -> None:
    assert len(quoted()) >= _LEAST_MESSAGES


@pytest.mark.parametrize("message", quoted())
def test_a_quoted_message_is_one_of_the_code_s(message: str) -> None:
    assert message.replace("…", _VARIES) in CODE


def raised(path: Path) -> Iterator[str]:
    """First arguments of the errors that a module makes."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.endswith("Error"):
            for what in node.args[:1]:
                if isinstance(what, ast.Constant):
                    yield str(what.value)
                elif isinstance(what, ast.JoinedStr):
                    yield "".join(str(item.value) if isinstance(item, ast.Constant) else "…" for item in what.values)


@pytest.mark.parametrize("name", _WITH_ALL_MESSAGES)
def test_every_error_of_these_modules_is_in_the_tables(name: str) -> None:
    assert {*raised(ROOT / name)} - {*quoted()} == set()


@pytest.mark.slow
@pytest.mark.skipif(not _PHOTOGRAPHS.exists(), reason=f"{_PHOTOGRAPHS} is absent")
def test_the_plan_that_is_shown_is_printed(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    found = re.search(r"^```yaml\n(.*?)^```$.*?^```\n(.*?)^measured", text, re.MULTILINE | re.DOTALL)
    assert found is not None
    document = yaml.safe_load(found[1])
    document["data"]["shards"] = f"{_PHOTOGRAPHS}/{document['data']['shards']}"
    document["cache"]["url"] = str(tmp_path / document["cache"]["url"])
    assert describe(report(Config.model_validate(document), measured=False)).startswith(found[2])
