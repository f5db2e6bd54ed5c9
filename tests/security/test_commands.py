"""Complete commands: untrusted data and configs run no code, and no output shows a secret."""

from __future__ import annotations

import collections
import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import yaml
from pydantic import BaseModel

from jobs import distill
from jobs.entry import run_command
from jobs.run_ops import evaluate
from pipeline.models import load_model
from schemas.config import Config, ModelConfig
from tests.jobs.conftest import NETWORK, Tree
from tests.security.guarded_http import SECRET, SIGNATURES, guarded, signed


def with_a_secret(folder: Path) -> list[str]:
    """Files below a folder with a secret in their content or name."""
    paths = (path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if SECRET.search(path.read_bytes()) or SECRET.search(str(path).encode())]


def command(config: dict[str, Any], folder: Path, overrides: Sequence[str] = ()) -> int:
    """The exit code of ``stillroom distill``."""
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
        again = [signed(address, name, SIGNATURES[1]) for name in names]
        assert command(tree(data={"shards": again, "val_shards": again[1]}, **short), documents) == 0
        output = "".join(capfd.readouterr())
        assert "finished earlier; nothing to do" in output
        # Each of these fails at another point.
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
    output += "".join(capfd.readouterr()) + caplog.text
    assert output.count(f"http://{address}/") > 5
    assert not SECRET.search(output.encode())
    # Only the config of the user.
    assert with_a_secret(tmp_path) == [str(documents / "config.yaml")]


URL_KEYS = (
    *("data.shards", "data.val_shards", "data.cache", "data.index", "data.local_dir", "run.url"),
    *("cache.url", "cache.class_means", "teacher.weights", "student.weights", "teacher.class_means"),
    *("teacher.others.0.weights", "teacher.others.0.class_means"),
    *("teacher.text_head", "teacher.others.0.text_head"),
    *(
        "data.classes",
        "data.label_map",
        "data.domain",
        "teacher.moments",
        "teacher.others.0.moments",
        "train.eval_reference",
    ),
)
# Any text that is no URL: names of models, layers, heads, metrics, members of a tar and encodings; and the address of
# Ray. Files of the labels of a head are read as those of ``data``.
OTHER_TEXTS = {
    *("data.image", "data.label", "data.heads", "student.model", "student.sha256"),
    *("data.heads.classes", "data.heads.label_map", "loss.0.heads", "train.balance.head", "train.best"),
    *("teacher.model", "teacher.sha256", "teacher.text_head_sha256", "teacher.heads", "teacher.tokens_layer"),
    *("teacher.others.0.model", "teacher.others.0.sha256", "teacher.others.0.text_head_sha256"),
    *("teacher.others.0.tokens_layer", "loss.0.student_layer"),
    *("teacher.others.0.heads", "cache.logits", "ray.address", "ray.resources_per_task"),
    *("train.freeze", "loss.0.student_layers", "loss.0.teacher_layers", "views.pixels", "student.views.pixels"),
}


def free_texts(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """Keys below a section whose value may be any text, also in a list."""
    for name, field in model.model_fields.items():
        kinds = list(kinds_of(field.annotation))
        if str in kinds:
            yield f"{prefix}{name}"
        position = ".0" if tuple in [get_origin(kind) for kind in kinds] else ""
        for inner in kinds:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from free_texts(inner, f"{prefix}{name}{position}.")


def kinds_of(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) is not Literal:
        for inner in get_args(annotation):
            yield from kinds_of(inner)


def test_every_key_of_free_text_is_listed_as_a_url_or_another_text() -> None:
    keys = {key for key in free_texts(Config, "") if not key.endswith(".kwargs")}
    assert keys == {*URL_KEYS, *OTHER_TEXTS}


@pytest.mark.parametrize(
    "url", ["pipe:touch {target}", "pipe://touch {target}", "simplecache::file://{target}", "ftp://h/a"]
)
@pytest.mark.parametrize("key", URL_KEYS)
def test_every_key_that_holds_a_url_refuses_commands_and_chains_and_other_protocols(
    key: str, url: str, tree: Tree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "created"
    override = f"{key}='{url.format(target=target)}'"
    # Class means are read before a text head.
    means = None if key.endswith(".text_head") else str(tmp_path / "means")
    others: list[dict[str, Any]] = [{**NETWORK, "weights": str(tmp_path / "x.pt"), "class_means": means}]
    loss = [{"name": "kd" if means is None else "nd"}]
    online: dict[str, Any] = {"teacher": {"mode": "online", "class_means": means, "others": others}, "loss": loss}
    if key.endswith(".moments"):
        # Moments are read of the teachers that are standardised alone.
        standardize = ["none", "mean_std"] if "others" in key else ["mean_std", "none"]
        online["teacher"] |= {"standardize": standardize, "class_means": None}
        others[0]["class_means"] = None
        online["loss"] = [{"name": "mse"}]
    config = tree(**online if key.startswith("teacher.") else {})
    assert command(config, tmp_path / "documents", [override]) == 2
    message = capsys.readouterr().err
    # data.local_dir is the only key that is a folder of the node and no URL.
    is_no_path = key == "data.local_dir" and "expected: a local path" in message
    assert "refused" in message or "weights of this kind are not read" in message or is_no_path, message
    assert not target.exists()
    assert not (tmp_path / "cache").exists()


def _hostile_shard(source: str, target: Path, outside: Path) -> None:
    """The samples of a shard, with members that name outside paths, link to them, or are no files."""
    with tarfile.open(source) as good, tarfile.open(target, "w") as bad:
        images = [member for member in good.getmembers() if member.name.endswith(".png")]
        for number, member in enumerate(images):
            data = good.extractfile(member)
            assert data is not None
            folder = ["", "../../", f"{outside}/", "/", "a/../../../"][number % 5]
            for name, content in ((f"{folder}{number}.png", data.read()), (f"{folder}{number}.cls", b"1")):
                info = tarfile.TarInfo(name)
                info.size, info.mode = len(content), 0o4777
                bad.addfile(info, io.BytesIO(content))
        for kind, name in (
            (tarfile.SYMTYPE, "link"),
            (tarfile.SYMTYPE, "link.png"),
            (tarfile.LNKTYPE, "hard.png"),
            (tarfile.FIFOTYPE, "fifo.png"),
            (tarfile.CHRTYPE, "device.png"),
            (tarfile.DIRTYPE, str(outside / "folder.png")),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(outside)
            bad.addfile(info)


@pytest.mark.slow
def test_no_command_unpickles_data_starts_a_program_or_writes_elsewhere_for_any_shard(
    shards: list[str], tree: Tree, tmp_path: Path
) -> None:
    outside, scratch = tmp_path / "outside", tmp_path / "scratch"
    for folder in (outside, scratch):
        folder.mkdir()
    shard = tmp_path / "hostile.tar"
    _hostile_shard(shards[0], shard, outside)
    with tarfile.open(shard) as archive:
        assert any(member.name.startswith("../../") for member in archive.getmembers())
    config = tree(
        data={"shards": str(shard), "val_shards": str(shard)},
        views={"count": 1},
        train={"num_workers": 0, "checkpoint_every_steps": 1},
    )
    # Pickled, as training loops save them.
    weights = load_model(
        ModelConfig.model_validate(NETWORK), widths={"logits": 10}, size=16
    ).module.network.state_dict()
    torch.save({"state_dict": collections.OrderedDict(weights)}, tmp_path / "teacher.pt")
    config["teacher"]["weights"] = str(tmp_path / "teacher.pt")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "control.pickle").write_bytes(pickle.dumps(collections.OrderedDict))
    done = subprocess.run(
        [sys.executable, "-m", "tests.security.audited", "config.yaml", "run", shard, "control.pickle"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "TMPDIR": str(scratch)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout.splitlines()[-1])
    assert [event.partition(" ")[0] for event in events["control"]] == ["pickle.find_class", "subprocess.Popen"]
    assert [event for event in events["commands"] if ": " not in event] == []
    places = [Path(event.partition(": ")[2]) for event in events["commands"]]
    mine = [tmp_path / name for name in ("cache", "run", "node", "scratch")]
    probes = [place for place in places if place.parent == tmp_path and place.name.startswith(".tmp-")]
    assert {place for place in places if not any(place.is_relative_to(folder) for folder in mine)} == {*probes}
    assert places
    assert list(outside.iterdir()) == []
