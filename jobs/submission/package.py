"""What a submitted job runs in: a working directory and its config, as one zip file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pathspec import GitIgnoreSpec

from pipeline.core.errors import StorageInputError

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
    """The files of a folder that go with a job, and what cannot go: links to folders, and no files at all.

    ``results`` are the caches, runs and other paths that the job does not read from its copy of the folder.
    """

    folder: Path
    sizes: dict[Path, int]
    left_out: tuple[Path, ...]
    results: tuple[Path, ...] = ()

    @property
    def size_bytes(self) -> int:
        return sum(self.sizes.values())


def find_files(
    folder: Path, excludes: Sequence[str], *, results: Collection[Path] = (), inputs: Collection[Path] = ()
) -> WorkingDir:
    """What is below a folder, less our own exclusions, the given ones, those of .gitignore and .rayignore files, and
    caches and runs.

    Args:
        folder: the working directory.
        excludes: further patterns of .gitignore, relative to the folder.
        results: further files and folders to leave out.
        inputs: what the job reads from its copy of the folder: no cache or run that holds one of these is left out.

    Raises:
        StorageInputError: it is no folder, cannot be read, or is larger than a cluster takes.
    """
    folder = folder.absolute()
    rule = (folder, _patterns([*_EXCLUDES, *_EXCLUDES_AT_THE_TOP, *excludes]))
    try:
        read, named = _below(folder, inputs), _below(folder, results)
        unread: list[Path] = []
        found = list(_walk(folder, [rule], unread, lambda path: _is_result(path, named, read)))
        sizes = {path: path.stat().st_size for path in found if path.is_file()}
    except OSError as error:
        raise StorageInputError(
            "this working directory cannot be read",
            where=str(folder),
            got=str(error),
            next_step="give another one (--working-dir), or leave out what cannot be read (--exclude PATTERN)",
        ) from error
    left_out = tuple(path for path in found if path not in sizes)
    working_dir = WorkingDir(folder, sizes, left_out, tuple(unread))
    _check_size(working_dir)
    return working_dir


def _patterns(lines: Sequence[str]) -> GitIgnoreSpec:
    return GitIgnoreSpec.from_lines(lines)


def _below(folder: Path, paths: Collection[Path]) -> set[Path]:
    """The paths that lie below the folder, whatever links lead there, as its walk finds them."""
    real, targets = folder.resolve(), [(folder / path).resolve() for path in paths]
    return {folder / target.relative_to(real) for target in targets if target.is_relative_to(real) and target != real}


def _is_result(path: Path, named: Collection[Path], inputs: Collection[Path]) -> bool:
    """Whether it is named as a result, or is the folder of a cache or a run; never where it holds an input."""
    is_cache = (path / "header.json").is_file() and any((path / name).exists() for name in ("commits", "manifest.json"))
    is_run = (path / "config.json").is_file() and (path / "metrics.jsonl").is_file()
    return (path in named or is_cache or is_run) and not any(name.is_relative_to(path) for name in inputs)


def _walk(
    folder: Path, rules: Sequence[_Rule], results: list[Path], is_result: Callable[[Path], bool]
) -> Iterator[Path]:
    """Files and links; results are added to ``results`` instead."""
    ignored = [folder / name for name in _IGNORE_FILES if (folder / name).is_file()]
    rules = [*rules, *((folder, _patterns(path.read_text().splitlines())) for path in ignored)]
    for path in sorted(folder.iterdir()):
        # A pattern that ends in a slash is of folders alone.
        slash = "/" if path.is_dir() else ""
        if any(patterns.match_file(f"{path.relative_to(base)}{slash}") for base, patterns in rules):
            continue
        if is_result(path):
            results.append(path)
            continue
        # A link may lead to whole disks, or back to where it stands.
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, rules, results, is_result)
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
        expected=f"{MAX_BYTES / 1e6:.1f} MB at most",
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
