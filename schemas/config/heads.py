"""``data.heads``: the targets of a sample with several of them."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field

from schemas.config.section import Section

HEAD_NAME = re.compile(r"[a-z][a-z0-9_]*")


class HeadConfig(Section):
    """One target of a sample, and the head of a network that predicts it."""

    num_classes: int = Field(ge=2, description="K. Classes must lie in [0, K).")
    kind: Literal["class", "multilabel"] = Field(
        "class", description="class: one class a sample; multilabel: any number of classes, each with a sigmoid."
    )
