"""The public face: what ``import stillroom`` offers, and that the wheel alone is the whole program."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import stillroom

ROOT = Path(__file__).resolve().parents[1]


def test_every_public_name_is_there_and_has_a_docstring() -> None:
    for name in stillroom.__all__:
        assert (getattr(stillroom, name).__doc__ or "").strip(), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="CachedDatasets"):
        stillroom.CachedDatasets  # noqa: B018


def test_import_loads_no_torch() -> None:
    script = "import sys, stillroom, pipeline.student; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(tmp_path / "dist"), str(ROOT)], check=True)
    (built,) = (tmp_path / "dist").glob("*.whl")
    return built


@pytest.mark.slow
def test_the_wheel_has_every_module_its_types_and_its_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packages = ("stillroom", "pipeline", "jobs", "schemas")
    modules = {str(path.relative_to(ROOT)) for package in packages for path in (ROOT / package).rglob("*.py")}
    assert modules <= names
    data = {"stillroom/py.typed", "pipeline/py.typed", "schemas/py.typed", "schemas/errors.toml"}
    assert data | {f"jobs/configs/{path.name}" for path in (ROOT / "jobs" / "configs").glob("*.yaml")} <= names
    assert not [name for name in names if name.startswith("tests")]


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.timeout(3000)
def test_the_wheel_in_an_empty_environment_runs_the_demo_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    programs = tmp_path / "venv" / "bin"
    # Both from one index and at once, so that pip picks a matching pair.
    subprocess.run([str(programs / "pip"), "install", "--quiet", "torch", "torchvision", str(wheel)], check=True)
    (tmp_path / "elsewhere").mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    demo = [str(programs / "stillroom"), "demo", "--out", "out"]
    subprocess.run(demo, cwd=tmp_path / "elsewhere", env=environment, check=True)
    assert (tmp_path / "elsewhere" / "out" / "results.json").is_file()
