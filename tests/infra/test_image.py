"""The Dockerfile without a daemon: linted, and its packages built from the files of its context."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.infra.manifests import CLUSTERS, INFRA, ROOT, cluster_spec, manifest, pods

DOCKERFILE = INFRA / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions() -> list[tuple[str, str]]:
    """Name and arguments of each instruction, without comments and with continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines())]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def pinned() -> dict[str, Version]:
    """Every package==version of the pip steps; ARGs are filled in."""
    defaults = dict(argument.split("=") for argument in arguments("ARG"))
    steps = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], "\n".join(arguments("RUN")))
    pins = re.findall(r"([a-z]+)(?:\[[a-z,]+\])?==([\d.]+)", steps)
    return {name: Version(version) for name, version in pins}


def test_the_linter_finds_nothing_and_would_find_a_base_image_without_a_version(tmp_path: Path) -> None:
    wrong = tmp_path / "Dockerfile"
    wrong.write_text(re.sub(r"python:[\w.-]+", "python:latest", DOCKERFILE.read_text()))
    hadolint = Path(sys.executable).parent / "hadolint"
    found, would_find = (
        subprocess.run([hadolint, file], capture_output=True, text=True, check=False) for file in (DOCKERFILE, wrong)
    )
    assert (found.returncode, found.stdout) == (0, "")
    assert "DL3007" in would_find.stdout


def test_the_base_image_has_an_exact_version_that_the_project_supports() -> None:
    base, *stages = [image.split()[0] for image in arguments("FROM")]
    version = re.fullmatch(r"python:(\d+\.\d+\.\d+)-slim-\w+", base)
    assert version is not None
    assert Version(version[1]) in Requirement(f"python{PROJECT['requires-python']}").specifier
    assert stages == ["base", "base", "torch-${ACCELERATOR}"]
    names = {image.partition(" AS ")[2] for image in arguments("FROM")}
    documented = re.findall(r"--build-arg ACCELERATOR=(\w+)", (INFRA / "README.md").read_text())
    assert {f"torch-{name}" for name in documented} == {"torch-cpu", "torch-cuda"} <= names


def test_pinned_packages_are_within_the_project_s_bounds_and_ray_is_that_of_the_manifests() -> None:
    bounds = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
    assert pinned().keys() == {"torch", "torchvision", "ray"}
    assert all(version in bounds[name] for name, version in pinned().items())
    assert {cluster_spec(manifest(name))["rayVersion"] for name in CLUSTERS} == {str(pinned()["ray"])}


def test_pods_use_the_image_of_this_version_and_its_user() -> None:
    for pod in (pod for name in CLUSTERS for pod in pods(manifest(name))):
        (container,) = pod.containers
        assert container["image"] == f"registry.example.com/stillroom:{PROJECT['version']}-cuda"
        user = pod.spec["securityContext"]
        assert arguments("USER") == [f"{user['runAsUser']}:{user['runAsGroup']}"]


def _context(folder: Path) -> None:
    """Copies the files that .dockerignore admits."""
    first, *rules = [rule for rule in (ROOT / ".dockerignore").read_text().splitlines() if not rule.startswith("#")]
    assert first == "*"
    admitted = [rule[1:] for rule in rules if rule.startswith("!")]
    assert [rule for rule in rules if not rule.startswith("!")] == ["**/__pycache__"]
    for name in admitted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)


@pytest.mark.slow
def test_the_context_builds_the_complete_package(tmp_path: Path) -> None:
    context, image = tmp_path / "context", tmp_path / "image"
    context.mkdir()
    image.mkdir()
    _context(context)
    wheels: list[set[str]] = []
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in map(context.__truediv__, sources):
                if source.is_dir():
                    shutil.copytree(source, image / target)
                else:
                    shutil.copy(source, image / target)
        elif name == "RUN" and any(re.fullmatch(r"\.(\[[a-z0-9,]+\])?", argument) for argument in shlex.split(rest)):
            wheels.append(_wheel(image, tmp_path / f"wheel-{len(wheels)}"))
    requirements, package = wheels
    assert not any(name.endswith(".py") for name in requirements)
    sources_here = {
        str(path.relative_to(ROOT))
        for folder in ("schemas", "pipeline", "jobs", "stillroom")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".toml", ".typed")
    }
    assert {name for name in package if ".dist-info/" not in name} == sources_here


def _wheel(source: Path, out: Path) -> set[str]:
    """The files of the wheel of this source, without its requirements."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", out, source], check=True, capture_output=True)
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_extras_that_the_image_installs_exist() -> None:
    (extras,) = re.findall(r"'\.\[([a-z0-9,]+)\]'", "\n".join(arguments("RUN")))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()


@pytest.mark.parametrize("name", ["ENV", "ARG"])
def test_the_image_has_no_secret_as_a_setting(name: str) -> None:
    given = re.findall(r"(\w+)=", " ".join(arguments(name)))
    assert not [key for key in given if re.search(r"TOKEN|KEY|SECRET|PASSWORD|CREDENTIAL", key)]
