"""A config that lacks a key is bad input to every command: one error, exit code 2, before any work."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import index_shards
from jobs.build_cache import build_cache
from jobs.cache_ops import verify
from jobs.distill import distill
from jobs.plan_cache import report
from jobs.recipes.document import load_recipe
from jobs.recipes.schedule import describe_plan
from jobs.submit import check_job
from jobs.train_student import train_student
from pipeline.core.errors import ConfigError, InputError
from schemas.config import Config
from tests.errors import raises
from tests.jobs.conftest import NETWORK

Tree = dict[str, Any]

COMMANDS: dict[str, Callable[[Config, str], object]] = {
    "cache build": lambda config, _: build_cache(config),
    "cache plan": lambda config, _: report(config, measured=False),
    "cache verify": lambda config, _: verify("/nowhere/cache", config=config),
    "train": lambda config, _: train_student(config),
    "distill": lambda config, _: distill(config),
    "shards index": lambda _, source: index_shards.main(source, []),
    **{
        f"submit {command}": lambda config, _, command=command: check_job(command, config)
        for command in ("build", "train", "distill")
    },
}
# Dotted keys, and sections that are removed as a whole.
KEYS = (
    *("data", "data.shards", "data.num_classes", "data.cache", "data.val_shards", "teacher", "teacher.model"),
    *("cache", "student", "student.model", "loss", "run", "views"),
)


def document(mode: str) -> Tree:
    """A complete config with shards and a cache that do not exist, so that every command ends when it opens them."""
    return {
        "data": {"shards": "/nowhere/a.tar", "val_shards": "/nowhere/b.tar", "num_classes": 10, "cache": "/nowhere/c"},
        "teacher": {**NETWORK, "weights": "random", "mode": mode},
        "views": {"kind": "crop", "size": 16},
        "cache": {"url": "/nowhere/c"},
        "student": dict(NETWORK),
        "loss": [{"name": "ce" if mode == "none" else "kd"}],
        "run": {"url": "/nowhere/run"},
        "ray": {"address": "none"},
    }


def lacking(tree: Tree) -> Iterator[tuple[str, Tree]]:
    """The tree without each of ``KEYS``."""
    for key in KEYS:
        section, _, name = key.partition(".")
        if name:
            yield key, {**tree, section: {item: value for item, value in tree[section].items() if item != name}}
        else:
            yield key, {item: value for item, value in tree.items() if item != section}


@pytest.mark.parametrize("mode", ["cache", "online", "none"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_missing_key_ends_a_command_as_bad_input(command: str, mode: str, tmp_path: Path) -> None:
    source = tmp_path / "config.yaml"
    for _, tree in lacking(document(mode)):
        source.write_text(yaml.safe_dump(tree))
        # A submission is checked by its config alone, and may lack keys that it does not use.
        refused = contextlib.suppress(InputError) if command.startswith("submit") else pytest.raises(InputError)
        with refused:
            COMMANDS[command](Config.model_validate(tree), str(source))


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("distill", "data.num_classes"),
        ("submit distill", "data.num_classes"),
        ("cache build", "data.num_classes"),
        ("cache verify", "data.num_classes"),
        ("shards index", "data.shards"),
        ("train", "loss"),
    ],
)
def test_a_missing_key_is_named(command: str, key: str, tmp_path: Path) -> None:
    tree = dict(lacking(document("cache")))[key]
    source = tmp_path / "config.yaml"
    source.write_text(yaml.safe_dump(tree))
    with raises("config.missing-key", ConfigError, got=f"no {key}") as caught:
        COMMANDS[command](Config.model_validate(tree), str(source))
    assert f"{key}=…" in str(caught.value.next_step)


RECIPE: Tree = {
    "title": "tiny",
    "common": {
        "data": {"shards": "/nowhere/a.tar", "val_shards": "/nowhere/b.tar", "num_classes": 10},
        "views": {"kind": "crop", "size": 16},
        "student": dict(NETWORK),
        "loss": [{"name": "ce"}],
    },
    "teacher": {"train": {"epochs": 1}},
    "cache": {"views": {"count": 2}},
    "students": {"kd": {"loss": [{"name": "kd"}]}},
}


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (None, None),
        ("data.shards", "data.shards"),
        ("data.val_shards", "data.val_shards"),
        ("data.num_classes", "data.num_classes"),
        ("student", "student.model"),
        ("loss", "loss"),
    ],
)
def test_a_recipe_names_a_missing_key_before_its_first_stage(
    missing: str | None, expected: str | None, tmp_path: Path
) -> None:
    tree = yaml.safe_load(yaml.safe_dump({**RECIPE, "out": str(tmp_path / "out")}))
    if missing is not None:
        *section, name = missing.split(".")
        (tree["common"][section[0]] if section else tree["common"]).pop(name)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    if expected is None:
        assert "teacher" in describe_plan(load_recipe(str(tmp_path / "recipe.yaml"), []))
        return
    with raises("config.missing-key", ConfigError) as caught:
        load_recipe(str(tmp_path / "recipe.yaml"), [])
    assert expected in str(caught.value.got)
    # The next step names a key of the recipe; all stages share the section data.
    section = "common" if expected.startswith("data.") else r"(teacher|students\.\w+)"
    assert re.search(rf" {section}\.{re.escape(expected)}=…", str(caught.value.next_step))
