"""The log of a job: plain lines on standard error, or with ``STILLROOM_LOG=json`` one JSON object a line.

The environment selects the form, not the config, so that an error about an unreadable config has the same form.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime

from pipeline.core.redaction import redact_text
from pipeline.shards.omissions import Omissions, merged

VARIABLE = "STILLROOM_LOG"


def emit(text: str, *, event: str = "message", level: int = logging.INFO, **fields: object) -> None:
    """Logs one event.

    Credentials in URLs are removed from the text and from fields that are text. Plain lines leave out the level
    ``DEBUG``, at which every finished task is logged; JSON has all levels.

    Args:
        text: the line for people.
        event: the kind of event, for programs.
        fields: JSON values, for programs.
    """
    redacted = {name: redact_text(value) if isinstance(value, str) else value for name, value in fields.items()}
    _logger.log(level, redact_text(text), extra={"event": event, "fields": redacted})


def warn(text: str) -> None:
    """Logs a warning: an event of kind ``warning``."""
    emit(text, event="warning", level=logging.WARNING)


def warn_of_omissions(command: str, omissions: Iterable[Omissions]) -> None:
    """Logs one line for each reason why members of shards were left out, with counts over all shards."""
    total = merged(omissions)
    for kind, line in zip(sorted(total.counts), total.lines(), strict=True):
        text = f"{command}: left out {line}"
        emit(text, event="omitted", level=logging.WARNING, kind=kind, count=total.counts[kind])


def as_json() -> bool:
    return os.environ.get(VARIABLE, "").lower() == "json"


def is_enabled(level: int) -> bool:
    """Whether lines of this level are written, so that callers can skip formatting them."""
    return level > logging.DEBUG or as_json()


def counted(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            if as_json():
                print(_json_line(record), file=sys.stderr, flush=True)
            elif is_enabled(record.levelno):
                print(record.getMessage(), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _json_line(record: logging.LogRecord) -> str:
    event = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", "message"),
        "message": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    return json.dumps(event, default=str)


# A user's logging configuration does not affect these lines, and they do not reach the user's handlers.
_logger = logging.getLogger("stillroom")
_logger.setLevel(logging.DEBUG)
_logger.propagate = False
_logger.addHandler(_Lines())
