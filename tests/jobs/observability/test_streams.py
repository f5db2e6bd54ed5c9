"""Closed, full or broken standard streams stop no work; only a lost result changes the exit code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.jobs.programs import run_python

# Every test starts processes.
pytestmark = pytest.mark.long

# Logs, prints far more than the buffer of a pipe, and writes a file that no other output may reach.
_WORK = """
import os, sys
from contextlib import suppress
from jobs.entry import run_command
from jobs.observability.log import emit
from jobs.observability.progress import ProgressView

def work():
    with open(sys.argv[1], "w") as file, ProgressView("work", 3) as view:
        with suppress(OSError):
            os.write(1, b"a library prints")
            os.write(2, b"a library prints")
        for done in range(3):
            emit("a line")
            view.update(done + 1)
        if len(sys.argv) > 2:
            for _ in range(20_000):
                print("a result")
        file.write("complete")

sys.exit(run_command(work))
"""


def _in_bash(shell: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a bash command in which ``"$@"`` is Python with these arguments."""
    command = ["bash", "-o", "pipefail", "-c", shell, "bash", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _run(shell: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same for the program above with its arguments."""
    return _in_bash(shell, "-c", _WORK, *arguments)


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("streams", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_work_with_a_closed_or_full_stream_is_done_and_exits_0(streams: str, unbuffered: str, tmp_path: Path) -> None:
    done = _run(f'PYTHONUNBUFFERED={unbuffered} "$@" {streams}', str(tmp_path / "out"))
    assert (done.returncode, (tmp_path / "out").read_text()) == (0, "complete"), done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_ends_early_changes_neither_work_nor_exit_code(tmp_path: Path) -> None:
    done = _run('"$@" | head -1', str(tmp_path / "out"), "print")
    assert (done.returncode, (tmp_path / "out").read_text()) == (0, "complete"), done.stderr
    assert (done.stderr.count("a line"), "Error" in done.stderr) == (3, False)


def test_a_result_lost_on_a_full_disk_is_one_error_and_exit_1(tmp_path: Path) -> None:
    done = _run('"$@" > /dev/full', str(tmp_path / "out"), "print")
    assert (done.returncode, (tmp_path / "out").read_text()) == (1, "complete")
    assert done.stderr.count("error: the output could not be written") == 1
    assert "Traceback" not in done.stderr


def test_characters_that_a_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    program = "from jobs.entry import run_command; run_command(lambda: print('\\u00e9\\u2713'))"
    done = run_python("-c", program, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "\\xe9\\u2713\n"), done.stderr


def test_help_through_a_pipe_that_closes_exits_0() -> None:
    done = _in_bash('"$@" | true', "-m", "jobs.cli", "--help")
    assert (done.returncode, done.stderr) == (0, "")
