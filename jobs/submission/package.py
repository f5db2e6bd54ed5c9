"""The working directory of a submitted job and its config, as one zip file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.core.errors import StorageInputError

# Ray's dashboard refuses larger request bodies, although Ray's own messages name 512 MiB.
MAX_BYTES = 100 << 20
# Folder of the config in the job's working directory: its original path may be excluded, outside of it, or a URL.
CONFIG_FOLDER = ".stillroom"
# Patterns of .gitignore. Folders named data and runs are excluded at the top level only: deeper ones may be packages.
_EXCLUDES = (".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".env")
_EXCLUDES_AT_TOP = (f"/{CONFIG_FOLDER}", "/data", "/runs")
_IGNORE_FILES = (".gitignore", ".rayignore")
# A constant time gives equal files equal bytes, and Ray uploads a package once.
_TIMESTAMP = (1980, 1, 1, 0, 0, 0)
_NUM_NAMED = 5

# Patterns, and the folder that they are relative to.
_Rule = tuple[Path, GitIgnoreSpec]


@dataclass(frozen=True, slots=True)
class WorkingDir:
    """The files of a folder that are uploaded with a job.

    Attributes:
        sizes: bytes by path.
        left_out: caches, runs and other results, links to folders, and special files.
    """

    folder: Path
    sizes: dict[Path, int]
    left_out: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())

    def relative(self, paths: Collection[Path]) -> list[str]:
        return [str(path.relative_to(self.folder)) for path in paths]

    def __str__(self) -> str:
        """The folder, its size, and what is not uploaded."""
        text = f"{self.folder} ({len(self.sizes)} files, {self.size_bytes / 1e6:.1f} MB)"
        if not self.left_out:
            return text
        num_more = len(self.left_out) - _NUM_NAMED
        names = ", ".join(self.relative(self.left_out[:_NUM_NAMED])) + (f" and {num_more} more" if num_more > 0 else "")
        return f"{text} without results, links to folders and special files: {names}"


def find_files(
    folder: Path, excludes: Sequence[str], *, results: Collection[Path] = (), inputs: Collection[Path] = ()
) -> WorkingDir:
    """The files below a folder without default exclusions, ``excludes``, .gitignore and .rayignore, caches and runs.

    Args:
        folder: the working directory.
        excludes: further patterns of .gitignore, relative to the folder.
        results: further files and folders to leave out.
        inputs: paths that the job reads from its copy of the folder. A cache or run that contains one is uploaded.

    Raises:
        StorageInputError: the folder is missing, cannot be read, or is larger than a cluster accepts.
    """
    folder = folder.absolute()
    rule = (folder, GitIgnoreSpec.from_lines([*_EXCLUDES, *_EXCLUDES_AT_TOP, *excludes]))
    left_out: list[Path] = []
    try:
        inputs, results = _below(folder, inputs), _below(folder, results)
        paths = list(_walk(folder, [rule], left_out, lambda path: _is_result(path, results, inputs)))
        sizes = {path: path.stat().st_size for path in paths if path.is_file()}
    except OSError as error:
        raise StorageInputError(
            "this working directory cannot be read",
            code="submit.unreadable-working-dir",
            where=str(folder),
            got=str(error),
            next_step="give another one (--working-dir), or leave out what cannot be read (--exclude PATTERN)",
        ) from error
    left_out += (path for path in paths if path not in sizes)
    working_dir = WorkingDir(folder, sizes, tuple(left_out))
    _check_size(working_dir)
    return working_dir


def _below(folder: Path, paths: Collection[Path]) -> set[Path]:
    """The paths that lie below the folder, with links resolved, as ``_walk`` names them."""
    real, targets = folder.resolve(), [(folder / path).resolve() for path in paths]
    return {folder / target.relative_to(real) for target in targets if target.is_relative_to(real) and target != real}


def _is_result(path: Path, results: Collection[Path], inputs: Collection[Path]) -> bool:
    """Whether ``path`` is in ``results``, or a cache, or a run, and contains no input."""
    is_cache = (path / "header.json").is_file() and any((path / name).exists() for name in ("commits", "manifest.json"))
    is_run = (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()
    return (path in results or is_cache or is_run) and not any(name.is_relative_to(path) for name in inputs)


def _walk(
    folder: Path, rules: Sequence[_Rule], left_out: list[Path], is_result: Callable[[Path], bool]
) -> Iterator[Path]:
    """Files and links; results are appended to ``left_out`` instead."""
    ignore_files = [folder / name for name in _IGNORE_FILES if (folder / name).is_file()]
    rules = [*rules, *((folder, GitIgnoreSpec.from_lines(path.read_text().splitlines())) for path in ignore_files)]
    for path in sorted(folder.iterdir()):
        # A pattern that ends in a slash matches folders only.
        slash = "/" if path.is_dir() else ""
        if any(patterns.match_file(f"{path.relative_to(base)}{slash}") for base, patterns in rules):
            continue
        if is_result(path):
            left_out.append(path)
        # A link to a folder may lead to whole disks, or form a cycle.
        elif path.is_dir() and not path.is_symlink():
            yield from _walk(path, rules, left_out, is_result)
        else:
            yield path


def _check_size(working_dir: WorkingDir) -> None:
    if working_dir.size_bytes <= MAX_BYTES:
        return
    largest = sorted(working_dir.sizes, key=lambda path: working_dir.sizes[path], reverse=True)[:_NUM_NAMED]
    lines = [
        f"\n    {working_dir.sizes[path] / 1e6:.1f} MB  {name}"
        for path, name in zip(largest, working_dir.relative(largest), strict=True)
    ]
    raise StorageInputError(
        "this working directory is larger than a cluster accepts",
        code="submit.working-dir-too-large",
        where=str(working_dir.folder),
        got=f"{working_dir.size_bytes / 1e6:.1f} MB in {len(working_dir.sizes)} files, the largest:{''.join(lines)}",
        expected=f"{MAX_BYTES / 1e6:.1f} MB at most",
        next_step="leave files out (--exclude PATTERN, .rayignore), or give the folder of the code (--working-dir)",
    )


def write_package(target: Path, working_dir: WorkingDir, config_name: str, config_text: bytes) -> None:
    """Writes the zip file: the files by their paths in the folder, and the config as ``config_name``."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as package:
        for path in working_dir.sizes:
            entry = zipfile.ZipInfo.from_file(path, path.relative_to(working_dir.folder), strict_timestamps=False)
            entry.date_time = _TIMESTAMP
            package.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        package.writestr(zipfile.ZipInfo(config_name, _TIMESTAMP), config_text)
