"""The start and the end of every command: one message, one exit code, no traceback for errors that a user can fix."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import sys
from collections.abc import Callable

from jobs.observability.log import emit
from jobs.observability.streams import lost_output, protect_streams
from pipeline.core.errors import StillroomError
from pipeline.core.redaction import redact_text

INTERRUPTED = 130


def report_crashes() -> None:
    """Makes Python report a signal of native code (SIGSEGV, SIGBUS, SIGABRT, SIGFPE, SIGILL) and the Python stack on
    stderr. No process can report its own SIGKILL.
    """
    # A closed or replaced stream has no file descriptor.
    with contextlib.suppress(RuntimeError, OSError, ValueError, AttributeError):
        faulthandler.enable()


def run_command(command: Callable[[], None], *, resume: str | None = None) -> int:
    """Runs a command and returns its exit code: 0, 2 for bad input, 1 for failure, 130 for Ctrl-C.

    ``resume`` is the command that resumes from what is committed. It is printed after Ctrl-C.
    """
    protect_streams()
    code = _exit_code(command, resume)
    if code == 0 and (lost := lost_output()) is not None:
        emit(f"error: the output could not be written: {lost}", event="error", level=logging.ERROR, exit_code=1)
        return 1
    return code


def _exit_code(command: Callable[[], None], resume: str | None) -> int:
    try:
        command()
    except StillroomError as error:
        emit(f"error: {error}", event="error", level=logging.ERROR, code=error.code, exit_code=error.exit_code)
        return error.exit_code
    except KeyboardInterrupt:
        emit("interrupted; what is committed stays", event="interrupted", level=logging.WARNING)
        if resume is not None:
            # An override may contain a signed URL, and job logs are stored.
            emit(f"resume with: {redact_text(resume)}", event="resume")
        return INTERRUPTED
    return 0


def config_command(name: str, command: Callable[[str, list[str]], None], *, option: str | None = None) -> None:
    """Runs ``python -m jobs.NAME CONFIG [k.k=v …]`` and exits. An option is passed on among the overrides."""
    protect_streams()
    report_crashes()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        more = f" [{option}]" if option else ""
        print(f"usage: python -m jobs.{name} CONFIG [section.key=value ...]{more}", file=sys.stderr)
        raise SystemExit(0 if arguments else 2)
    resume = f"python -m jobs.{name} {' '.join(arguments)}"
    raise SystemExit(run_command(lambda: command(arguments[0], arguments[1:]), resume=resume))
