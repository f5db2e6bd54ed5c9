"""Every file operation of a small build fails once, in each way, one after another; the cache is the same.

Faults are injected by the interpreter's audit events for each open, rename, link and remove below the cache's folder.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from jobs.build_cache import build_cache
from pipeline.cache.build.context import load_context, prepare
from pipeline.core.errors import StorageError
from pipeline.core.hashing import digest
from pipeline.shards.writer import pack_shards
from pipeline.storage import failures
from schemas.config import Config
from tests.errors import raises
from tests.faults.networks import LOG, forwards
from tests.marks import slow
from tests.pipeline.caches import digit_samples, files

PARTS = ("eval", "v0000-0000", "v0001-0001")
LINKS = pytest.mark.parametrize("hard_links", [True, slow(False)], ids=["hard links", "no hard links"])
WRITES = ("open for writing", "os.mkdir", "os.rename", "os.link")


class Killed(BaseException):
    """Like a SIGKILL: no code of the build runs after it."""


@dataclass
class Faults:
    """Records every operation below ``folder`` and may raise instead of it."""

    folder: Path
    strike: Callable[[Faults, str, Path], None]
    seen: list[str] = field(default_factory=list)
    struck: bool = False

    def operation(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR)
            event = "open for writing" if writes else "open"
        else:
            path = arguments[0]
        if isinstance(path, (str, os.PathLike)) and Path(path).is_relative_to(self.folder):
            self.seen.append(event)
            self.strike(self, event, Path(path))


_active: Faults | None = None


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if _active is not None and event in ("open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.listdir"):
        _active.operation(event, arguments)


@contextmanager
def injected(folder: Path, strike: Callable[[Faults, str, Path], None], *, hard_links: bool = True) -> Iterator[Faults]:
    """Without ``hard_links`` each link fails too, as on vfat."""

    def first(faults: Faults, event: str, path: Path) -> None:
        strike(faults, event, path)
        if event == "os.link" and not hard_links:
            raise OSError(errno.EPERM, "Operation not permitted", str(path))

    global _active
    _active = Faults(folder, first)
    try:
        yield _active
    finally:
        _active = None


@contextmanager
def no_faults() -> Iterator[None]:
    global _active
    former, _active = _active, None
    try:
        yield
    finally:
        _active = former


@pytest.fixture(scope="module", autouse=True)
def audit() -> None:
    """An audit hook stays for the life of the interpreter; without faults it does nothing."""
    sys.addaudithook(_hook)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(failures.PAUSE, "multiplier", 0)
    monkeypatch.setenv(LOG, str(tmp_path / "forwards"))


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Seven digits and one undecodable image."""
    samples = [*digit_samples(7), ("broken", {"png": b"no image", "cls": b"1"})]
    (url,) = pack_shards(samples, f"{tmp_path_factory.mktemp('shard')}/one-%d.tar", shard_size=8)
    return url


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory if possible: a small build spends most of its time in syncs to a disk."""
    root = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=root if root.is_dir() and os.access(root, os.W_OK) else None) as name:
        yield Path(name)


def config_of(shard: str, url: Path) -> Config:
    return Config.model_validate(
        {
            "data": {"shards": shard, "num_classes": 10, "bad_samples": "skip", "max_bad_share": 0.2},
            "teacher": {
                "model": "python:tests.faults.networks:Traced",
                "weights": "random",
                "mean": [0.5, 0.5, 0.5],
                "std": [0.5, 0.5, 0.5],
                "batch_size": 8,
            },
            "views": {"kind": "crop", "count": 2, "size": 8},
            "cache": {"url": str(url), "class_means": "eval", "views_per_part": 1},
            "ray": {"address": "none"},
        }
    )


@pytest.fixture
def undisturbed(shard: str, folder: Path) -> dict[str, bytes]:
    build_cache(config_of(shard, folder / "undisturbed"))
    return files(str(folder / "undisturbed"))


@pytest.fixture
def num_batches(shard: str, folder: Path) -> Callable[[], int]:
    """Returns the number of the teacher's batches so far, without the probes at its load."""
    load_context.cache_clear()
    before = len(forwards())
    prepare(config_of(shard, folder / "prepared"))
    probes = {*forwards()[before:]}
    return lambda: sum(batch not in probes for batch in forwards())


def operations(shard: str, url: Path, *, hard_links: bool = True) -> list[str]:
    """The operations of an undisturbed build, in order."""
    with injected(url, lambda *_: None, hard_links=hard_links) as faults:
        build_cache(config_of(shard, url))
    return faults.seen


def commits(contents: dict[str, bytes]) -> dict[str, dict[str, object]]:
    return {Path(name).stem: json.loads(data) for name, data in contents.items() if name.startswith("commits/")}


def check_half_built(contents: dict[str, bytes], undisturbed: dict[str, bytes]) -> None:
    """Checks that every file under a final name is complete, and that the files of commits exist."""
    assert {name: digest(data) for name, data in contents.items()} == {
        name: digest(undisturbed[name]) for name in contents if name in undisturbed
    }
    for commit in commits(contents).values():
        for ref in (commit["part"], commit["index"], commit["means"]):
            assert ref is None or ref["path"] in contents


def check_resumed(shard: str, url: Path, undisturbed: dict[str, bytes], num_batches: Callable[[], int]) -> None:
    """Checks that an undisturbed build resumes to the same bytes and repeats no committed part."""
    partial = files(str(url))
    check_half_built(partial, undisturbed)
    before = num_batches()
    manifest = build_cache(config_of(shard, url))
    # One batch a part.
    assert num_batches() - before == len(PARTS) - len(commits(partial))
    assert files(str(url)) == undisturbed
    assert (manifest.num_samples, manifest.num_ok, manifest.skipped) == (8, 7, {"undecodable": 1})
    for commit in commits(undisturbed).values():
        assert commit["read"] == commit["written"] + sum(commit["skipped"].values())


def positions(events: list[str], kinds: tuple[str, ...]) -> list[int]:
    return [number for number, event in enumerate(events) if event in kinds]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_an_operation_that_fails_once_is_repeated_and_nothing_else(
    shard: str, folder: Path, undisturbed: dict[str, bytes], num_batches: Callable[[], int]
) -> None:
    for position in range(len(operations(shard, folder / "count"))):

        def strike(faults: Faults, event: str, path: Path, position: int = position) -> None:
            del event
            if len(faults.seen) == position + 1:
                raise OSError(errno.EIO, "a bad moment", str(path))

        url, before = folder / f"cache-{position}", num_batches()
        with injected(url, strike):
            build_cache(config_of(shard, url))
        assert files(str(url)) == undisturbed, position
        assert num_batches() - before == len(PARTS), position


@pytest.mark.slow
def test_a_disk_that_fills_at_any_write_gives_one_error_and_a_build_that_resumes(
    shard: str, folder: Path, undisturbed: dict[str, bytes], num_batches: Callable[[], int]
) -> None:
    for position in positions(operations(shard, folder / "count"), WRITES):

        def strike(faults: Faults, event: str, path: Path, position: int = position) -> None:
            if len(faults.seen) > position and event in WRITES:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))

        url = folder / f"cache-{position}"
        with injected(url, strike), raises("storage.disk-full", StorageError):
            build_cache(config_of(shard, url))
        check_resumed(shard, url, undisturbed, num_batches)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_rename_or_link_that_always_fails_gives_one_error_and_a_build_that_resumes(
    shard: str, folder: Path, undisturbed: dict[str, bytes], num_batches: Callable[[], int]
) -> None:
    for position in positions(operations(shard, folder / "count"), ("os.rename", "os.link")):

        def strike(faults: Faults, event: str, path: Path, position: int = position) -> None:
            if len(faults.seen) > position and event in ("os.rename", "os.link"):
                raise OSError(errno.EIO, "always fails", str(path))

        url = folder / f"cache-{position}"
        with injected(url, strike) as faults, pytest.raises(StorageError) as caught:
            build_cache(config_of(shard, url))
        assert caught.value.exit_code == 1
        assert "always fails" in str(caught.value.got)
        # Each operation was given up after its fifth attempt.
        assert faults.seen[position:].count(faults.seen[position]) % 5 == 0
        check_resumed(shard, url, undisturbed, num_batches)


@pytest.mark.slow
@LINKS
def test_a_kill_at_any_operation_with_a_truncated_file_leaves_a_build_that_resumes(
    shard: str, folder: Path, undisturbed: dict[str, bytes], num_batches: Callable[[], int], hard_links: bool
) -> None:
    for position in range(len(operations(shard, folder / "count", hard_links=hard_links))):

        def strike(faults: Faults, event: str, path: Path, position: int = position) -> None:
            if len(faults.seen) <= position:
                return
            if not faults.struck and event in ("os.rename", "os.link"):
                with no_faults():
                    os.truncate(path, path.stat().st_size // 2)
            faults.struck = True
            raise Killed

        url = folder / f"cache-{position}"
        with injected(url, strike, hard_links=hard_links), pytest.raises(Killed):
            build_cache(config_of(shard, url))
        check_resumed(shard, url, undisturbed, num_batches)


@pytest.mark.slow
@LINKS
def test_a_second_builder_may_start_and_finish_at_any_write(
    shard: str, folder: Path, undisturbed: dict[str, bytes], hard_links: bool
) -> None:
    for position in positions(operations(shard, folder / "count", hard_links=hard_links), WRITES):

        def strike(faults: Faults, event: str, path: Path, position: int = position) -> None:
            del event, path
            if len(faults.seen) > position and not faults.struck:
                faults.struck = True
                with no_faults():
                    build_cache(config_of(shard, faults.folder))

        url = folder / f"cache-{position}"
        with injected(url, strike, hard_links=hard_links):
            build_cache(config_of(shard, url))
        assert files(str(url)) == undisturbed, position


# A separate disk that another program fills after the first commit, and then frees.
FILL = """
mount -t tmpfs -o size=64m tmpfs {disk} || exit 99
{python} -m jobs.build_cache {config} 2> {out}/first.log & builder=$!
until ls {commits}/*/*.json > /dev/null 2>&1; do kill -0 $builder || break; done
cat /dev/zero > {disk}/filler 2> /dev/null
wait $builder; echo $? > {out}/first
ls {commits}/*/ > {out}/committed
rm {disk}/filler
{python} -m jobs.build_cache {config} 2> {out}/second.log; echo $? > {out}/second
cp -r {cache} {out}/copy 2> /dev/null || true
"""


@pytest.mark.slow
@pytest.mark.skipif(subprocess.run(["unshare", "-rm", "true"], check=False).returncode != 0, reason="no namespaces")
@pytest.mark.parametrize("full", ["cache", slow("scratch")])
def test_a_full_disk_exits_1_with_one_message_and_the_same_command_resumes(
    full: str, shard: str, tmp_path: Path
) -> None:
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    cache = (disk if full == "cache" else out) / "cache"
    tree = config_of(shard, cache).model_dump(mode="json")
    # Many, so that the disk is full long before the last part.
    tree["views"]["count"] = 150
    (out / "config.yaml").write_text(yaml.safe_dump(tree))
    paths = {"disk": disk, "out": out, "cache": cache, "commits": cache / "commits", "config": out / "config.yaml"}
    script = FILL.format(python=sys.executable, **paths)
    scratch = {"TMPDIR": str(disk)} if full == "scratch" else {}
    subprocess.run(["unshare", "-rm", "bash", "-c", script], env={**os.environ, **scratch}, check=True)
    log = (out / "first.log").read_text()
    assert (out / "first").read_text() == "1\n", log
    assert (out / "second").read_text() == "0\n", (out / "second.log").read_text()
    assert log.count("error: ") == 1
    assert "storage.disk-full" in log
    assert "Traceback" not in log
    assert 0 < len((out / "committed").read_text().split()) < 151
    build_cache(Config.model_validate({**tree, "cache": {**tree["cache"], "url": str(tmp_path / "undisturbed")}}))
    assert files(str(out / ("copy" if full == "cache" else "cache"))) == files(str(tmp_path / "undisturbed"))
