"""Losses of a student: pure functions of one batch in fp32, and their composition from a config.

Importing a loss here registers its name.
"""

from pipeline.student.losses.ce import ce
from pipeline.student.losses.composite import BatchShare, CompositeLoss
from pipeline.student.losses.dist import dist, dist_multilabel
from pipeline.student.losses.dkd import dkd
from pipeline.student.losses.embedding import cosine, mse, sifn, smooth_l1
from pipeline.student.losses.hard import hard
from pipeline.student.losses.hcl import hcl
from pipeline.student.losses.inputs import PARAMETERS, LossInputs, Parameter, TeacherInputs
from pipeline.student.losses.kd import kd
from pipeline.student.losses.maps import ce_map, cwd, dist_map, kd_map
from pipeline.student.losses.multilabel import bce, kd_multilabel
from pipeline.student.losses.nd import ClassDirections, check_class_means, nd
from pipeline.student.losses.registry import LOSSES, MAP_LOSSES, MULTILABEL_LOSSES
from pipeline.student.losses.similarity import similarity
from pipeline.student.losses.tokens import token_cosine, token_mse

__all__ = [
    "LOSSES",
    "MAP_LOSSES",
    "MULTILABEL_LOSSES",
    "PARAMETERS",
    "BatchShare",
    "ClassDirections",
    "CompositeLoss",
    "LossInputs",
    "Parameter",
    "TeacherInputs",
    "bce",
    "ce",
    "ce_map",
    "check_class_means",
    "cosine",
    "cwd",
    "dist",
    "dist_map",
    "dist_multilabel",
    "dkd",
    "hard",
    "hcl",
    "kd",
    "kd_map",
    "kd_multilabel",
    "mse",
    "nd",
    "sifn",
    "similarity",
    "smooth_l1",
    "token_cosine",
    "token_mse",
]
