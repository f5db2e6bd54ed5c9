"""Progress in a real terminal and in a log."""

from __future__ import annotations

import os
import pty
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from rich.table import Table

from jobs.observability.log import emit
from jobs.observability.progress import ProgressView

_END = "<end>"


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Standard error on a pseudo-terminal of 80 columns. Yields a function that reads it, without colours.

    Not a fixture: pytest sets its own standard error between a test's fixtures and the test.
    """
    leader, follower = pty.openpty()
    with (
        os.fdopen(follower, "w") as stream,
        os.fdopen(leader, "rb", buffering=0) as reader,
        monkeypatch.context() as at,
    ):
        at.setenv("TERM", "xterm")
        at.setenv("COLUMNS", "80")
        at.setattr("sys.stderr", stream)

        def written() -> str:
            # Text arrives later and in several reads.
            stream.write(_END)
            stream.flush()
            data = b""
            while not data.endswith(_END.encode()):
                data += reader.read(1 << 16)
            return re.sub(r"\x1b\[[0-9;]*m", "", data.decode().removesuffix(_END))

        yield written


def panel() -> Table:
    table = Table("node", "images/s", box=None)
    table.add_row("left", "12")
    return table


def test_a_terminal_shows_a_bar_with_its_panel_below(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with ProgressView("cache", 4) as view:
            view.update(3, "quick", panel=panel)
        last = written().rpartition("cache")[2]
    assert "3/4" in last
    assert re.search(r"node +images/s\s+left +12", last)


def test_a_log_line_appears_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with ProgressView("cache", 4) as view:
            view.update(1)
            emit("a node is gone")
            view.update(2)
        text = written()
    assert re.search(r"[\nK]a node is gone\s*\n", text)
    assert text.rindex("cache") > text.index("a node is gone")


def test_a_log_gets_lines_without_a_panel(capsys: pytest.CaptureFixture[str]) -> None:
    with ProgressView("cache", 4, done=2) as view:
        view.update(4, "quick", panel=panel)
    assert re.fullmatch(r"cache: 4/4 after \d+ s\n", capsys.readouterr().err)


def test_json_has_no_bar_even_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_LOG", "json")
    with terminal(monkeypatch) as written:
        with ProgressView("cache", 1) as view:
            view.update(1, panel=panel)
        (line,) = written().splitlines()
    assert '"event": "progress"' in line
    assert '"done": 1' in line


def test_80_columns_show_count_time_left_and_the_short_note(monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(monkeypatch) as written:
        with ProgressView("train a-run-with-a-long-name", 312_500) as view:
            view.update(150_000, "loss 1.2345, and far more", short="epoch 48/100, 12345 images/s")
        last = written().rpartition("train a")[2].splitlines()[0]
    assert re.search(r"150000/312500 0:00:\d\d left epoch 48/100, 12345 images/s", last)
    assert len("train a" + last.rstrip()) <= 80
