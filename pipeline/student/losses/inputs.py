"""What losses may take of one batch, and which of it each parameter of a loss is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from pipeline.student.data.teacher_outputs import TeacherOutputs
from pipeline.student.losses.dist import SumOverRanks
from pipeline.student.losses.nd import ClassDirections
from pipeline.student.losses.similarity import JoinOverRanks
from pipeline.tasks import AUX, EMBEDDING, TOKENS, Task, TaskHead


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInputs:
    """What losses may take of one teacher for one batch, on the batch's device.

    Attributes:
        weight: factor of the losses of this teacher.
        standardized: outputs that losses take in this form, by name; nd takes the norms of ``outputs``.
        projected: by the key of the term, the student's embedding in this teacher's width, or its patch tokens on this
            teacher's grid and in its width.
        class_directions: by the column of the classes.
        student_maps: [B,C,H,W] for each level, fused into the shapes of ``teacher_maps``.
    """

    outputs: TeacherOutputs
    weight: float = 1.0
    standardized: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    projected: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    class_directions: Mapping[str, ClassDirections] = field(default_factory=dict[str, ClassDirections])
    student_maps: tuple[Tensor, ...] | None = None
    teacher_maps: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """What losses may take of one batch on one rank, all on one device. B is the rank's number of rows.

    Attributes:
        outputs: of the student, [B,…] by name.
        targets: integers [B,…] by the name of the task's column, or of its ``view_target``.
        partner_B: int64, position of each row's mixup partner in this batch; None: the batch is not mixed.
        lambda_B: share of the row's image in its mixed pixels; comes with ``partner_B``.
        visible_BHW: bool, the pixels of the student's views that show the image; of tasks with a ``view_target``.
        log_priors: fp32 [K] by the column of the classes, for terms with a prior.
        sum_over_ranks, join_over_ranks: for terms that gather.
    """

    outputs: Mapping[str, Tensor]
    targets: Mapping[str, Tensor]
    teachers: tuple[TeacherInputs, ...] = ()
    partner_B: Tensor | None = None
    lambda_B: Tensor | None = None
    visible_BHW: Tensor | None = None
    log_priors: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    sum_over_ranks: SumOverRanks | None = None
    join_over_ranks: JoinOverRanks | None = None

    def partner_target(self, column: str) -> Tensor | None:
        """The target of each row's mixup partner; None: the batch is not mixed."""
        return None if self.partner_B is None else self.targets[column][self.partner_B]


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a parameter of a loss is.

    Attributes:
        source: an output, a target, or class directions; or, for the last two, an attribute of ``LossInputs`` or
            ``TeacherInputs``.
        name: of the output, of the target's column, or of the attribute; None: of the head for which the loss is
            computed.
    """

    source: Literal[
        "student output",
        "projected output",
        "target",
        "partner's target",
        "teacher output",
        "teacher norm",
        "class directions",
        "log prior",
        "batch",
        "teacher",
    ]
    name: str | None

    def of(self, head: TaskHead | None) -> Parameter:
        """The same for a head."""
        if self.name is not None or head is None:
            return self
        return replace(self, name=head.output if self.source.endswith("output") else head.column)

    def is_in(self, task: Task) -> bool:
        """Whether data and networks of the task have it."""
        match self.source:
            case "target" | "partner's target":
                return self.name in {task.view_target, *(column.name for column in task.columns)}
            case "student output" | "projected output" | "teacher output" | "teacher norm":
                return self.name in {*task.widths, task.embedding, TOKENS, AUX}
            case _:
                return True

    @property
    def is_of_teacher(self) -> bool:
        """Whether there is one value for each teacher."""
        return self.source in ("projected output", "teacher output", "teacher norm", "class directions", "teacher")

    def value(self, inputs: LossInputs, teacher: TeacherInputs | None, *, term: str, temperature: float) -> Any:
        """The value for one term; None: the batch does not have it.

        Args:
            teacher: None: the batch has none.
            temperature: at which the term reads outputs of the teacher.
        """
        assert self.name is not None, "the loss is computed for a head"
        if not self.is_of_teacher:
            return self._of_batch(inputs, self.name)
        return None if teacher is None else self._of_teacher(teacher, self.name, term, temperature)

    def _of_batch(self, inputs: LossInputs, name: str) -> Any:
        match self.source:
            case "student output":
                return inputs.outputs.get(name)
            case "target":
                return inputs.targets.get(name)
            case "partner's target":
                return inputs.partner_target(name)
            case "log prior":
                return inputs.log_priors.get(name)
            case _:
                return getattr(inputs, name)

    def _of_teacher(self, teacher: TeacherInputs, name: str, term: str, temperature: float) -> Any:
        match self.source:
            case "projected output":
                return teacher.projected.get(term)
            case "teacher output":
                standardized = teacher.standardized.get(name)
                return teacher.outputs.at(name, temperature) if standardized is None else standardized
            case "teacher norm":
                return teacher.outputs.norm_of(name)
            case "class directions":
                return teacher.class_directions.get(name)
            case _:
                return getattr(teacher, name)


PARAMETERS: dict[str, Parameter] = {
    "student_BK": Parameter("student output", None),
    "embedding_BD": Parameter("student output", EMBEDDING),
    "student_BD": Parameter("projected output", EMBEDDING),
    "student_BKhw": Parameter("student output", None),
    "aux_BKhw": Parameter("student output", AUX),
    "teacher_BKhw": Parameter("teacher output", None),
    "mask_BHW": Parameter("target", None),
    "visible_BHW": Parameter("batch", "visible_BHW"),
    "labels_B": Parameter("target", None),
    "mixed_labels_B": Parameter("partner's target", None),
    "targets_BK": Parameter("target", None),
    "mixed_targets_BK": Parameter("partner's target", None),
    "lambda_B": Parameter("batch", "lambda_B"),
    "log_prior_K": Parameter("log prior", None),
    "sum_over_ranks": Parameter("batch", "sum_over_ranks"),
    "join_over_ranks": Parameter("batch", "join_over_ranks"),
    "teacher_BK": Parameter("teacher output", None),
    "teacher_BD": Parameter("teacher output", EMBEDDING),
    "student_BPD": Parameter("projected output", TOKENS),
    "teacher_BPD": Parameter("teacher output", TOKENS),
    "teacher_norm_B": Parameter("teacher norm", EMBEDDING),
    "class_directions": Parameter("class directions", None),
    "student_maps": Parameter("teacher", "student_maps"),
    "teacher_maps": Parameter("teacher", "teacher_maps"),
}
"""By the names that losses have for them. All other parameters of a loss are keys of its config section, or those of
``TaskHead.arguments``."""
