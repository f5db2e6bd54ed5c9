"""What a submitted job runs in: a working directory and its config, as one zip file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.errors import StorageInputError

# Ray's dashboard refuses larger request bodies; the 512 MiB of which Ray's own messages speak are never reached.
MAX_BYTES = 100 << 20
# Where the config stands in the job's working directory: its own place may be excluded, elsewhere, or a URL.
CONFIG_FOLDER = ".stillroom"
# Patterns of .gitignore. Folders named data and runs are left out at the top alone: deeper ones may be packages.
_EXCLUDES = (".git", ".venv", "venv", "__pycache__", "*.egg-info", ".*_cache", ".hypothesis", ".env")
_EXCLUDES_AT_THE_TOP = (f"/{CONFIG_FOLDER}", "/data", "/runs")
_IGNORE_FILES = (".gitignore", ".rayignore")
# The same bytes for the same files: what the cluster has is not uploaded again.
_TIME = (1980, 1, 1, 0, 0, 0)
_NUM_NAMED = 5

# Patterns, and the folder that they are relative to.
_Rule = tuple[Path, GitIgnoreSpec]


@dataclass(frozen=True, slots=True)
class WorkingDir:
    """The files of a folder that go with a job, and what cannot go: links to folders, and no files at all."""

    folder: Path
    sizes: dict[Path, int]
    left_out: tuple[Path, ...]

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())


def find_files(folder: Path, excludes: Sequence[str]) -> WorkingDir:
    """What is below a folder, less our own exclusions, the given ones, and those of .gitignore and .rayignore files.

    Args:
        folder: the working directory.
        excludes: further patterns of .gitignore, relative to the folder.

    Raises:
        StorageInputError: it is no folder, cannot be read, or is larger than a cluster takes.
    """
    folder = folder.absolute()
    rule = (folder, _patterns([*_EXCLUDES, *_EXCLUDES_AT_THE_TOP, *excludes]))
    try:
        found = list(_walk(folder, [rule]))
        sizes = {path: path.stat().st_size for path in found if path.is_file()}
    except OSError as error:
        raise StorageInputError(
            "this working directory cannot be read",
            where=str(folder),
            got=str(error),
            next_step="give another one (--working-dir), or leave out what cannot be read (--exclude PATTERN)",
        ) from error
    working_dir = WorkingDir(folder, sizes, tuple(path for path in found if path not in sizes))
    _check_size(working_dir)
    return working_dir


def _patterns(lines: Sequence[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(lines)


def _walk(folder: Path, rules: Sequence[_Rule]) -> Iterator[Path]:
    ignored = [folder / name for name in _IGNORE_FILES if (folder / name).is_file()]
    rules = [*rules, *((folder, _patterns(path.read_text().splitlines())) for path in ignored)]
    for path in sorted(folder.iterdir()):
        # A pattern that ends in a slash is of folders alone.
        slash = "/" if path.is_dir() else ""
        if any(patterns.match_file(f"{path.relative_to(base)}{slash}") for base, patterns in rules):
            continue
        # A link may lead to whole disks, or back to where it stands.
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, rules)
        else:
            yield path


def _check_size(found: WorkingDir) -> None:
    if found.size_bytes <= MAX_BYTES:
        return
    largest = sorted(found.sizes.items(), key=lambda item: item[1], reverse=True)[:_NUM_NAMED]
    listed = "".join(f"\n    {size / 1e6:.1f} MB  {path.relative_to(found.folder)}" for path, size in largest)
    raise StorageInputError(
        "this working directory is larger than a cluster takes",
        where=str(found.folder),
        got=f"{found.size_bytes / 1e6:.1f} MB in {len(found.sizes)} files, the largest:{listed}",
        wanted=f"{MAX_BYTES / 1e6:.1f} MB at most",
        next_step="leave files out (--exclude PATTERN, .rayignore), or give the folder of the code (--working-dir)",
    )


def write_package(target: Path, found: WorkingDir, config_name: str, config_text: bytes) -> None:
    """Writes the zip file: the found files by their paths in the folder, and the config as ``config_name``."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as package:
        for path in found.sizes:
            entry = zipfile.ZipInfo.from_file(path, path.relative_to(found.folder), strict_timestamps=False)
            entry.date_time = _TIME
            package.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED)
        package.writestr(zipfile.ZipInfo(config_name, _TIME), config_text)
