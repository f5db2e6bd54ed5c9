"""What a job tells while it runs: plain lines on standard error, or with ``STILLROOM_LOG=json`` one JSON object a line.

Chosen by the environment and not by a config, so that a config that cannot be read is told of in the same form.
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
    """One event: ``text`` for people; ``event``, which names its kind, and the fields for machines.

    Credentials of URLs are left out of the text, and of fields that are text. Plain lines leave out the level
    ``DEBUG``, at which every finished task is logged; JSON has all.
    """
    plain = {name: redact_text(value) if isinstance(value, str) else value for name, value in fields.items()}
    _logger.log(level, redact_text(text), extra={"event": event, "fields": plain})


def warn_of_omissions(command: str, several: Iterable[Omissions]) -> None:
    """One line for each kind of what was left out of shards, with counts over all of them."""
    whole = merged(several)
    for kind, line in zip(sorted(whole.counts), whole.lines(), strict=True):
        text = f"{command}: left out {line}"
        emit(text, event="omitted", level=logging.WARNING, kind=kind, count=whole.counts[kind])


def as_json() -> bool:
    return os.environ.get(VARIABLE, "").lower() == "json"


def is_enabled(level: int) -> bool:
    """Whether a line of this level goes anywhere, for who would make many in vain."""
    return level > logging.DEBUG or as_json()


def counted(number: int, noun: str) -> str:
    """``1 node``, ``2 nodes``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        try:
            if as_json():
                print(_object(record), file=sys.stderr, flush=True)
            elif is_enabled(record.levelno):
                print(record.getMessage(), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _object(record: logging.LogRecord) -> str:
    told = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname.lower(),
        "event": getattr(record, "event", "message"),
        "message": record.getMessage(),
        **getattr(record, "fields", {}),
    }
    return json.dumps(told, default=str)


# What a user's own code logs goes its own ways; these lines go this one alone.
_logger = logging.getLogger("stillroom")
_logger.setLevel(logging.DEBUG)
_logger.propagate = False
_logger.addHandler(_Lines())
