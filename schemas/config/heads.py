"""``data.heads``: the targets of a sample with several of them."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from schemas.config.labels import LabelSection

HEAD_NAME = re.compile(r"[a-z][a-z0-9_]*")


class HeadConfig(LabelSection):
    """One target of a sample, and the head of a network that predicts it."""

    kind: Literal["class", "multilabel"] = Field(
        "class", description="class: one class a sample; multilabel: any number of classes, each with a sigmoid."
    )

    @model_validator(mode="after")
    def _check_num_classes(self) -> HeadConfig:
        if self.num_classes is None and self.classes is None:
            raise ValueError("num_classes is missing; expected num_classes, or classes, the names of the classes")
        return self
