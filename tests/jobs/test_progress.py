"""Progress in a real terminal, and in a log."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Callable, Iterator

import pytest
from rich.table import Table

from jobs.log import tell
from jobs.progress import ProgressView


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error on a pseudo-terminal of 80 columns; call it for what was written, without colours."""
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("STILLROOM_LOG", raising=False)
    with os.fdopen(follower, "w") as stream, os.fdopen(leader, "rb", buffering=0) as reader:
        monkeypatch.setattr("sys.stderr", stream)

        def written() -> str:
            stream.flush()
            text = reader.read(1 << 16).decode()
            return re.sub(r"\x1b\[[0-9;]*m", "", text)

        yield written
        monkeypatch.undo()


def panel() -> Table:
    table = Table("node", "images/s", box=None)
    table.add_row("left", "12")
    return table


def test_a_terminal_shows_a_bar_with_its_panel_below(terminal: Callable[[], str]) -> None:
    with ProgressView("cache", 4) as view:
        view.update(3, "quick", panel=panel)
    last = terminal().rpartition("cache")[2]
    assert "3/4" in last
    assert re.search(r"node +images/s\s+left +12", last)


def test_a_line_that_is_told_stands_above_the_bar(terminal: Callable[[], str]) -> None:
    with ProgressView("cache", 4) as view:
        view.update(1)
        tell("a node is gone")
        view.update(2)
    text = terminal()
    assert re.search(r"(^|[\nK])a node is gone\s*\r?\n", text)
    assert text.rindex("cache") > text.index("a node is gone")


def test_a_log_gets_lines_without_a_panel(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView("cache", 4, done=2) as view:
        view.update(4, "quick", panel=panel)
    assert re.fullmatch(r"cache: 4/4 after \d+ s\n", capsys.readouterr().err)


def test_json_is_not_drawn_over_even_in_a_terminal(
    terminal: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STILLROOM_LOG", "json")
    with ProgressView("cache", 1) as view:
        view.update(1, panel=panel)
    (line,) = terminal().splitlines()
    assert '"event": "progress"' in line
    assert '"done": 1' in line
