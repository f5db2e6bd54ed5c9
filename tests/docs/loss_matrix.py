"""The table of docs/how-to/choose-a-loss.md: which loss takes which target and which outputs of a teacher."""

from __future__ import annotations

import re
from typing import Any

from pipeline.core.errors import ConfigError
from pipeline.student.losses import CompositeLoss
from pipeline.student.supervision.two_classes import two_class_heads
from pipeline.tasks import Task, task_of
from schemas.config import Config, DataConfig
from tests.docs.config_tables import losses

_TARGETS: dict[str, dict[str, Any]] = {
    "K classes": {"num_classes": 10},
    "2 classes": {"num_classes": 2},
    "multilabel": {"task": "heads", "label": "json", "heads": {"x": {"num_classes": 10, "kind": "multilabel"}}},
    "maps": {"task": "segmentation", "num_classes": 10},
    "no classes": {"task": "embedding", "label": None},
}
_DESCRIBED = "../reference/config.md#loss-"
_REQUIRED = {"review_kd": {"student_layers": ["a"], "teacher_layers": ["b"]}}


def filled(text: str) -> str:
    """The page with the table of the code."""
    rows = [f"| [`{name}`]({_DESCRIBED}{name}) | {' | '.join(_cells(name))} |" for name in losses()]
    head = ["loss", *_TARGETS, "labels", "of the teacher", "sampled logits", "relates rows"]
    table = "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])
    return re.sub(r"^\| loss \| K classes.*?(?=\n\n)", table, text, count=1, flags=re.MULTILINE | re.DOTALL)


def _cells(name: str) -> list[str]:
    composed = {target: _compose(name, task_of(DataConfig.model_validate(data))) for target, data in _TARGETS.items()}
    (loss, *_) = (loss for loss in composed.values() if loss is not None)
    needs = [*loss.teacher_outputs, *(["class means"] if loss.heads_of_class_means else [])]
    # Feature maps are no output that a cache has.
    needs = ["feature maps, online"] if name == "review_kd" else [need.partition(".")[0] for need in needs]
    return [
        *("no" if loss is None or two_class_heads(loss) else "yes" for loss in composed.values()),
        "yes" if loss.targets else "no",
        ", ".join(needs) or "nothing",
        "no" if any(map(loss.terms_without_samples, loss.teacher_outputs)) else "yes",
        "yes" if _section(name).relates_rows else "no",
    ]


def _section(name: str) -> Any:
    (section,) = Config.model_validate({"loss": [{"name": name, **_REQUIRED.get(name, {})}]}).loss
    return section


def _compose(name: str, task: Task) -> CompositeLoss | None:
    try:
        return CompositeLoss([_section(name)], task, where="loss")
    except ConfigError:
        return None
