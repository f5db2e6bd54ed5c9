"""Modules of a user with the names of Stillroom's packages, in the folder where a command runs."""

from __future__ import annotations

from pathlib import Path, PurePath

import pytest

from jobs.ray.connection import check_shadowing
from pipeline.core.errors import InputError
from tests.errors import raises
from tests.jobs.programs import run_python

ROOT = Path(__file__).resolve().parents[3]
# Workers need no package to run a builtin, so only the import of Stillroom's own package is tested.
_FAN_OUT = (
    "from jobs.ray.fan_out import fan_out\n"
    "from schemas.config import RayConfig\n"
    "assert dict(fan_out(len, ['abc'], RayConfig(), what='a task')) == {'abc': 3}"
)


def _hostile(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('the module of the working folder')\n")
    return folder


@pytest.mark.slow
@pytest.mark.ray
def test_ray_s_workers_import_stillroom_and_not_modules_of_the_working_folder(tmp_path: Path) -> None:
    # -P gives the import path of a console command, without the working folder. Ray's workers have that folder first.
    folder = _hostile(tmp_path, "jobs.py", "pipeline/__init__.py", "schemas.py")
    done = run_python("-P", "-c", _FAN_OUT, cwd=folder, PYTHONPATH="")
    assert done.returncode == 0, done.stderr


def test_python_m_imports_stillroom_s_pipeline_where_the_working_folder_has_another(tmp_path: Path) -> None:
    folder = _hostile(tmp_path, "pipeline/__init__.py", "schemas.py")
    done = run_python("-m", "jobs.cli", "--version", cwd=folder, PYTHONPATH="")
    assert done.stdout.startswith("stillroom "), done.stderr


@pytest.mark.parametrize("names", [["jobs.py"], ["jobs/__init__.py", "jobs/mine.py"]])
def test_a_package_that_hides_stillroom_s_from_a_cluster_s_workers_is_refused(names: list[str]) -> None:
    with raises("ray.hidden-package", InputError, got=names[0], where="/work"):
        check_shadowing(map(PurePath, names), folder=Path("/work"), next_step="rename it")


@pytest.mark.parametrize("names", [["jobs/__init__.py", "jobs/build_cache.py"], ["jobs/a.txt"], ["src/jobs.py"], []])
def test_a_checkout_and_folders_without_such_a_module_pass(names: list[str]) -> None:
    check_shadowing(map(PurePath, names), folder=Path("/work"), next_step="")
