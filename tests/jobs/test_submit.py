"""``stillroom submit`` without a cluster: refused submissions, and the files that would be uploaded."""

from __future__ import annotations

import os
import socket
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus

from jobs.submission.follow import exit_code
from jobs.submission.package import MAX_BYTES, find_files, write_package
from jobs.submit import check_job, local_paths, submit
from pipeline.core.errors import InputError
from pipeline.storage.config_files import load_config
from tests.errors import raises
from tests.jobs.clusters import free_port
from tests.jobs.conftest import Document
from tests.jobs.programs import run_python

UNREACHABLE = "http://127.0.0.1:1"
SECRET = "hush-4711"

# Sections of the config, arguments of the submission, and a part of the message.
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "unknown key": ({"views": {"kinds": "crop"}}, {}, "views.kinds"),
    "a key that distill needs": ({"student": None}, {"command": "distill"}, "no student.model"),
    "a loss that the cache would not serve": ({"cache": {"logits": "none"}}, {"command": "distill"}, "cache.logits"),
    "a training without a cache": ({}, {"command": "train"}, "no data.cache"),
    "a cache in the job's own folder": ({"cache": {"url": "caches/a"}}, {}, "cache.url"),
    "a run in the job's own folder": ({"run": {"url": "runs/a"}}, {"command": "distill"}, "run.url"),
    "a cache in one process": ({"cache": {"url": "memory://a"}, "ray": {"address": "auto"}}, {}, "memory://"),
    "a command as URL": ({"data": {"shards": "pipe:cat a.tar"}}, {}, "refused"),
    "a password in an override": ({}, {"overrides": [f"data.shards=[s3://a/b.tar,s3://u:{SECRET}@c/d.tar]"]}, "--env"),
    "a signature in an override": ({}, {"overrides": [f"data.shards=https://a/b.tar?sig={SECRET}"]}, "data.shards"),
    "a variable with its value": ({}, {"env": [f"KEY={SECRET}"]}, "--env KEY"),
    "a variable that is not set": ({}, {"env": ["STILLROOM_NOT_SET"]}, "STILLROOM_NOT_SET"),
    "no requirements file": ({}, {"pip": Path("absent.txt")}, "absent.txt"),
    "no folder": ({}, {"working_dir": Path("/nowhere")}, "/nowhere"),
    "an id that is a path": ({}, {"submission_id": "a/b"}, "a/b"),
    "an address without protocol": ({}, {"address": "host:8265"}, "http://host:8265"),
    "an address of another protocol": ({}, {"address": "ray://host:10001"}, "ray://host:10001"),
}


def submit_build(source: str, **arguments: Any) -> int:
    base: dict[str, Any] = {"command": "build", "address": UNREACHABLE}
    return submit(source=source, **{**base, **arguments})


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_submission_is_refused_before_a_cluster_is_contacted(
    name: str, document: Document, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, changes, text = REFUSED[name]
    with pytest.raises(InputError) as caught:
        submit_build(document(**sections), **{"working_dir": tmp_path, **changes})
    assert text in str(caught.value)
    assert caught.value.code != "ray.no-response"
    assert SECRET not in str(caught.value) + "".join(capsys.readouterr())


def test_a_tilde_is_the_home_of_the_user_who_submits(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's driver expands the outputs in its config; local files are expanded here."""
    check_job("build", load_config(document(cache={"url": "~/caches/a"})))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for changes in ({"working_dir": Path("~/absent")}, {"pip": Path("~/absent")}):
        with pytest.raises(InputError) as caught:
            submit_build(document(), **{"working_dir": tmp_path, **changes})
        assert str(tmp_path / "home" / "absent") in str(caught.value)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of a server that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.slow
def test_unreachable_addresses_fail_after_the_stated_time(silent: str, document: Document, tmp_path: Path) -> None:
    # In another process: Ray reads the token once in a process, and other tests need other tokens.
    script = (
        "import sys, jobs.submit\n"
        "from pathlib import Path\n"
        "from jobs.submit import submit\n"
        "jobs.submit.RESPONSE_TIMEOUT_S = 1\n"
        "for address in sys.argv[2:]:\n"
        "    try:\n"
        "        submit('build', sys.argv[1], address=address, working_dir=Path('empty'))\n"
        "    except Exception as error:\n"
        "        print(error.code, error.exit_code, error)\n"
    )
    (tmp_path / "empty").mkdir()
    addresses = silent, f"http://127.0.0.1:{free_port()}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    done = run_python("-c", script, document(), *addresses, cwd=tmp_path, **token)
    assert done.stdout.count("ray.no-response 2 ") == 2
    assert silent in done.stdout
    assert "within 1 s" in done.stdout


def test_the_files_that_git_would_add_are_uploaded(tmp_path: Path) -> None:
    ignored = {".gitignore": "*.log\n!kept.log\n/top.py\nbuilt/\n", "pkg/.gitignore": "local.py\n"}
    paths = ["a.py", "b.log", "kept.log", "top.py", "built/x", "pkg/built/y", "pkg/top.py", "pkg/local.py", "local.py"]
    for name, text in {**ignored, **dict.fromkeys(paths, "x")}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    listing = ["git", "-c", "core.excludesFile=/dev/null", "ls-files", "--others", "--exclude-standard"]
    expected = subprocess.run(listing, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert names(tmp_path) == sorted(expected)
    assert "pkg/top.py" in expected


def names(folder: Path, *excludes: str) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in find_files(folder, excludes).sizes)


def test_environments_data_and_runs_are_not_uploaded_and_packages_of_such_names_are(tmp_path: Path) -> None:
    uploaded = ["a.py", "pkg/data/loader.py", "pkg/runs/b.py"]
    excluded = [".venv/x", ".git/x", "data/x.tar", "runs/x", "pkg/__pycache__/a.pyc", ".env", ".ruff_cache/x", "big/x"]
    for name in [*uploaded, *excluded]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "away").symlink_to("pkg")
    (tmp_path / ".rayignore").write_text("big\n")
    assert names(tmp_path) == [".rayignore", *uploaded]
    assert names(tmp_path, "pkg/runs", ".rayignore") == uploaded[:2]
    assert find_files(tmp_path, ()).left_out == (tmp_path / "away",)


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text("x")
    with (tmp_path / "weights.pt").open("wb") as file:
        file.truncate(MAX_BYTES - 1)
        assert find_files(tmp_path, ()).size_bytes == MAX_BYTES
        file.truncate(MAX_BYTES)
    with raises("submit.working-dir-too-large", InputError) as caught:
        find_files(tmp_path, ())
    assert "104.9 MB  weights.pt" in str(caught.value.got)
    assert "--exclude" in str(caught.value.next_step)
    assert names(tmp_path, "*.pt") == ["small.py"]


def test_a_package_contains_files_modes_and_config_and_depends_on_nothing_else(tmp_path: Path) -> None:
    folder, packages = tmp_path / "folder", [tmp_path / "first.zip", tmp_path / "second.zip"]
    (folder / "pkg").mkdir(parents=True)
    (folder / "pkg" / "run.sh").write_text("exit 3")
    (folder / "pkg" / "run.sh").chmod(0o755)
    for time_s, package in enumerate(packages):
        os.utime(folder / "pkg" / "run.sh", (time_s, time_s))
        write_package(package, find_files(folder, ()), ".stillroom/a.yaml", b"data: {}")
    assert packages[0].read_bytes() == packages[1].read_bytes()
    with zipfile.ZipFile(packages[0]) as package:
        assert package.namelist() == ["pkg/run.sh", ".stillroom/a.yaml"]
        assert package.read(".stillroom/a.yaml") == b"data: {}"
        assert package.getinfo("pkg/run.sh").external_attr >> 16 & 0o777 == 0o755


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130)],
)
def test_the_exit_code_is_the_one_of_the_jobs_command(status: str, code: int | None, expected: int) -> None:
    info = JobDetails(type="SUBMISSION", status=JobStatus(status), entrypoint="python", driver_exit_code=code)
    assert exit_code(info, "job") == expected


def test_results_in_the_working_directory_are_not_uploaded(document: Document, tmp_path: Path) -> None:
    folder = tmp_path / "project"
    large = ["out/best/checkpoints/best.pt", "out/cache/parts/a.parquet", "weights/teacher.pt", "shards/a-00.tar"]
    small = ["net.py", "out/best/config.json", "out/best/metrics.jsonl", "out/cache/header.json", "out/notes.txt"]
    earlier = ["earlier/config.json", "earlier/metrics.jsonl", "earlier/checkpoints/last.pt", "node/copy"]
    inputs = ["students/config.json", "students/metrics.jsonl", "students/checkpoints/last.pt", "hf/config.json"]
    for name in [*large, *small, *earlier, *inputs]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in large:
        with (folder / name).open("wb") as file:
            file.truncate(MAX_BYTES)
    config = load_config(
        document(
            data={"shards": f"{folder}/shards/a-{{00..00}}.tar", "local_dir": "node"},
            teacher={"weights": str(folder / "weights/teacher.pt")},
            student={"weights": "students/checkpoints/last.pt"},
            cache={"url": str(folder / "out/cache")},
            run={"url": str(folder / "out/best")},
        )
    )
    not_read, read = local_paths(config)
    uploaded = find_files(folder, (), results=not_read, inputs=read)
    # Files that the job reads from its copy are uploaded, also those inside a run.
    assert sorted(uploaded.relative(uploaded.sizes)) == sorted(["net.py", "out/notes.txt", *inputs])
    assert set(uploaded.relative(uploaded.left_out)) == {
        "earlier",
        "node",
        "out/best",
        "out/cache",
        "shards/a-00.tar",
        "weights/teacher.pt",
    }
    # The same folder by another name.
    (tmp_path / "link").symlink_to(folder)
    assert len(find_files(tmp_path / "link", (), results=not_read, inputs=read).sizes) == len(uploaded.sizes)
