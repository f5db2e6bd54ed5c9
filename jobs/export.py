"""The words of ``stillroom export``."""

from __future__ import annotations

from pipeline.student.export.exporters import Exported


def describe(done: Exported) -> str:
    """The line that the command prints."""
    checked = "" if done.difference is None else f"; logits within {done.difference:.1g} of the student's"
    backbone = "; the backbone alone: no loss trained the head" if done.head_left_out else ""
    return (
        f"export: step {done.step} as {done.format} in {done.url}, {done.size_bytes / 1e6:.1f} MB; "
        f"input {done.input}{checked}{backbone}"
    )
