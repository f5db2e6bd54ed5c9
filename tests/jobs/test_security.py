"""What data, configs and other people's caches cannot do, tried with hostile ones."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import distill
from jobs.entry import run_command
from jobs.evaluate import evaluate
from tests.jobs.conftest import NETWORK, Tree
from tests.jobs.guarded_http import SECRET, SIGNATURES, guarded, signed


def with_a_secret(folder: Path) -> list[str]:
    """Files below that hold one, or are called so."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if SECRET.search(path.read_bytes()) or SECRET.search(str(path).encode())]


def command(config: dict[str, Any], folder: Path, overrides: Sequence[str] = ()) -> int:
    """``stillroom distill``: its exit code."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return run_command(lambda: distill.main(str(path), list(overrides)))


def test_passwords_and_signatures_of_urls_are_in_no_file_no_message_and_no_log(
    shards: list[str],
    tree: Tree,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG, "pipeline")
    served, documents = tmp_path / "served", tmp_path / "documents"
    served.mkdir()
    names = [Path(path).name for path in shards[:2]]
    for path in shards[:2]:
        shutil.copy(path, served)
    with guarded(served) as address:
        urls = [signed(address, name) for name in names]
        data = {"shards": urls, "val_shards": urls[1]}
        short: dict[str, Any] = {"views": {"count": 1}, "train": {"epochs": 1}}
        assert command(tree(data=data, **short), documents) == 0
        assert evaluate(str(tmp_path / "run"), urls[1]).num_rows == 24
        # The same run under another signature.
        others = [signed(address, name, SIGNATURES[1]) for name in names]
        assert command(tree(data={"shards": others, "val_shards": others[1]}, **short), documents) == 0
        told = "".join(capfd.readouterr())
        assert "finished before; nothing to do" in told
        # Each of these fails in a place of its own.
        (served / names[1]).write_bytes((served / names[1]).read_bytes()[:3000])
        for number, failing in enumerate(
            (
                {},
                {"cache": {"url": urls[0]}},
                {"data": {**data, "shards": [*urls, signed(address, "absent.tar")]}},
                {"data": {**data, "shards": [*urls, urls[0]]}},
                {"data": {**data, "shards": urls[0].replace(".tar", ".tgz")}},
                {"data": {**data, "num_classes": urls}},
                {"teacher": {"weights": signed(address, "absent.pt")}},
                {"teacher": {"kwargs": {**NETWORK["kwargs"], "depth": urls[0]}}},
                {"teacher": {"model": f"timm/{urls[0]}"}},
                {"run": {"url": urls[0]}},
            )
        ):
            sections: dict[str, Any] = {"data": data, "cache": {"url": str(tmp_path / f"cache-{number}")}, **failing}
            assert command(tree(**sections), documents) == 2, failing
    told += "".join(capfd.readouterr()) + caplog.text
    assert told.count(f"http://{address}/") > 5
    assert not SECRET.search(told.encode())
    # The config alone, where a person wrote them.
    assert with_a_secret(tmp_path) == [str(documents / "config.yaml")]
