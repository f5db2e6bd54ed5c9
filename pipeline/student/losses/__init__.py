"""Losses of a student: each a pure function of one batch in fp32, and their composition from a config."""

from pipeline.student.losses.ce import ce
from pipeline.student.losses.compose import LOSSES, BatchShare, CompositeLoss, LossInputs, TeacherInputs
from pipeline.student.losses.dist import dist
from pipeline.student.losses.hcl import hcl
from pipeline.student.losses.kd import kd
from pipeline.student.losses.nd import check_class_means, nd

__all__ = [
    "LOSSES",
    "BatchShare",
    "CompositeLoss",
    "LossInputs",
    "TeacherInputs",
    "ce",
    "check_class_means",
    "dist",
    "hcl",
    "kd",
    "nd",
]
