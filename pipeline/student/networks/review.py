"""The trained part of ReviewKD: fuses the student's feature maps, deep to shallow, into the teacher's shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from pipeline.core.errors import ConfigError
from pipeline.models import FeatureMap, LoadedModel, find_maps
from schemas.config import LossConfig, ReviewKdLoss


@dataclass(frozen=True, slots=True, kw_only=True)
class ReviewPlan:
    """Which feature maps of student and teacher are compared, shallow to deep.

    Attributes:
        student: the student's maps.
        teacher: the teacher's maps, one for each of the student's.
        embedding_dims: widths (Ds, Dt) of the embeddings, which form the deepest level as maps of one position; None:
            the embeddings are not compared.
        mid_channels: channels in which the levels are fused.
    """

    student: tuple[FeatureMap, ...]
    teacher: tuple[FeatureMap, ...]
    embedding_dims: tuple[int, int] | None
    mid_channels: int

    def levels(self, maps: Sequence[Tensor], embedding_BD: Tensor) -> tuple[Tensor, ...]:
        """The levels [B,C,H,W] of one network, from its maps and its embedding."""
        return tuple(maps) if self.embedding_dims is None else (*maps, embedding_BD[:, :, None, None])


def review_section(terms: Sequence[LossConfig]) -> ReviewKdLoss | None:
    """The ``review_kd`` term of a loss section, if it has one.

    Raises:
        ConfigError: it has two; a student has one set of fusion modules.
    """
    sections = [term for term in terms if isinstance(term, ReviewKdLoss)]
    if len(sections) > 1:
        raise ConfigError(
            "review_kd occurs more than once",
            code="config.review-repeated",
            where="loss",
            got=f"{len(sections)} terms",
            expected="one",
            next_step="list all layers in one term",
        )
    return sections[0] if sections else None


def plan_review(section: ReviewKdLoss, student: LoadedModel, teacher: LoadedModel) -> ReviewPlan:
    """Finds the maps by one forward pass of each network, in eval mode.

    Raises:
        ModelError: a network has no such layer, or the layer's output is no feature map.
    """
    dims = (student.module.embedding_dim, teacher.module.embedding_dim)
    return ReviewPlan(
        student=_maps(student, section.student_layers, "student_layers"),
        teacher=_maps(teacher, section.teacher_layers, "teacher_layers"),
        embedding_dims=dims if section.embedding else None,
        mid_channels=section.mid_channels,
    )


def _maps(loaded: LoadedModel, layers: Sequence[str], key: str) -> tuple[FeatureMap, ...]:
    return find_maps(loaded.module, layers, size=loaded.input.size, where=f"{key} of review_kd")


class Review(nn.Module):
    """forward(the student's levels, shallow to deep) -> as many maps in the shapes of the teacher's levels.

    Each level is fused with the deeper ones, so that the student's deep layers also learn from the teacher's shallow
    maps (Chen 2021, 2104.09044, sec. 3.3).
    """

    def __init__(self, plan: ReviewPlan) -> None:
        super().__init__()
        self.plan = plan
        widths = [
            (student.channels, teacher.channels, teacher.side)
            for student, teacher in zip(plan.student, plan.teacher, strict=True)
        ]
        if plan.embedding_dims is not None:
            widths.append((*plan.embedding_dims, 1))
        last = len(widths) - 1
        self.fusions = nn.ModuleList(
            Fusion(channels, plan.mid_channels, teacher_channels, teacher_side, deepest=level == last)
            for level, (channels, teacher_channels, teacher_side) in enumerate(widths)
        )

    def forward(self, levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
        fused: list[Tensor] = []
        carried: Tensor | None = None
        for fusion, level_BCHW in zip(self.fusions[::-1], reversed(levels), strict=True):
            output_BCHW, carried = fusion(level_BCHW, carried)
            fused.append(output_BCHW)
        return tuple(reversed(fused))


class Fusion(nn.Module):
    """ABF, attention-based fusion (Chen 2021, fig. 3): forward(map_BCHW, deeper_BMHW) -> (output, carried).

    The map is reduced to M channels. A convolution over it and the fused deeper map computes, for each position, two
    weights in [0, 1] for their sum; the deepest level has no deeper map. The sum, resized to the teacher's side, is
    carried to the next level [B,M,S,S]; as an output it gets the teacher's channels [B,Ct,S,S].
    """

    def __init__(
        self, channels: int, mid_channels: int, teacher_channels: int, teacher_side: int, *, deepest: bool
    ) -> None:
        super().__init__()
        self.teacher_side = teacher_side
        self.reduce = _conv(channels, mid_channels, kernel_size=1)
        self.choose = None if deepest else nn.Conv2d(2 * mid_channels, 2, kernel_size=1)
        self.expand = _conv(mid_channels, teacher_channels, kernel_size=3)

    def forward(self, map_BCHW: Tensor, deeper_BMHW: Tensor | None) -> tuple[Tensor, Tensor]:
        fused_BMHW = self.reduce(map_BCHW)
        if self.choose is not None:
            assert deeper_BMHW is not None, "only the deepest level has no deeper map"
            deeper_BMHW = _resized(deeper_BMHW, fused_BMHW.shape[-1])
            weights_B2HW = self.choose(torch.cat([fused_BMHW, deeper_BMHW], dim=1)).sigmoid()
            weight_B1HW, deeper_weight_B1HW = weights_B2HW.split(1, dim=1)
            fused_BMHW = fused_BMHW * weight_B1HW + deeper_BMHW * deeper_weight_B1HW
        carried_BMSS = _resized(fused_BMHW, self.teacher_side)
        return self.expand(carried_BMSS), carried_BMSS


def _conv(in_channels: int, out_channels: int, *, kernel_size: int) -> nn.Sequential:
    convolution = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(convolution.weight, a=1)  # as in the paper's code
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels))


def _resized(x_BCHW: Tensor, side: int) -> Tensor:
    """By nearest neighbours, as in the paper's code."""
    return x_BCHW if x_BCHW.shape[-1] == side else interpolate(x_BCHW, (side, side), mode="nearest")
