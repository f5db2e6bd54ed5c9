"""Ask the teacher: fixed batches in, fp32 logits and embeddings out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.models import LoadedModel, lay_out, load_model
from pipeline.teacher.groups import GroupViews
from pipeline.views.pixels import to_input
from schemas.config import Precision, TeacherConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Answers:
    """The teacher's words on N rows, fp32 on the CPU."""

    logits_NK: NDArray[np.float32]
    embedding_ND: NDArray[np.float32]


class Teacher:
    """A frozen network in eval mode on one device. Safe to keep for the life of a process."""

    def __init__(self, loaded: LoadedModel, *, device: torch.device, precision: Precision, batch_size: int) -> None:
        self.loaded = loaded
        self.device = device
        self.precision: Precision = precision
        self.batch_size = batch_size
        self.module = loaded.module.eval().requires_grad_(False)
        lay_out(self.module, device)
        self._mean_C = torch.tensor(loaded.input.mean, device=device)
        self._std_C = torch.tensor(loaded.input.std, device=device)

    @torch.inference_mode()
    def forward(
        self,
        pixels_BCHW: Tensor,
        partner_B: Tensor | None = None,
        lambda_B: Tensor | None = None,
        cut_B4: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """uint8 pixels [B,C,H,W] to fp32 logits [B,K] and embedding [B,D], on the device.

        Mixes row b with row ``partner_B[b]`` on [0,1] pixels first, with weight ``lambda_B[b]`` on its own, or in the
        box ``cut_B4[b]``.
        """
        images = to_input(
            pixels_BCHW.to(self.device, non_blocking=True),
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=None if partner_B is None else partner_B.to(self.device),
            lambda_B=None if lambda_B is None else lambda_B.to(self.device),
            cut_B4=None if cut_B4 is None else cut_B4.to(self.device),
        )
        return self._ask(images)

    def _ask(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _AUTOCAST.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits_BK, embedding_BD = self.module(images_BCHW)
        return logits_BK.float(), embedding_BD.float()

    @torch.inference_mode()
    def answer(
        self,
        pixels_NCHW: Tensor,
        partner_N: NDArray[np.int32] | None = None,
        lambda_N: NDArray[np.float32] | None = None,
        cut_N4: NDArray[np.float32] | None = None,
    ) -> Answers:
        """All rows in batches of exactly ``batch_size``; the last is padded, so that every row's arithmetic is the same
        whatever came before it."""
        num_rows = len(pixels_NCHW)
        position_N = torch.arange(num_rows)
        logits: list[Tensor] = []
        embeddings: list[Tensor] = []
        for start in range(0, num_rows, self.batch_size):
            rows = position_N[start : start + self.batch_size]
            padded = torch.cat([rows, rows[-1:].expand(self.batch_size - len(rows))])
            images = self._mixed_input(pixels_NCHW, padded, partner_N, lambda_N, cut_N4)
            logits_BK, embedding_BD = self._ask(images)
            logits.append(logits_BK[: len(rows)].cpu())
            embeddings.append(embedding_BD[: len(rows)].cpu())
        return Answers(torch.cat(logits).numpy(), torch.cat(embeddings).numpy())

    def _mixed_input(
        self,
        pixels_NCHW: Tensor,
        rows_B: Tensor,
        partner_N: NDArray[np.int32] | None,
        lambda_N: NDArray[np.float32] | None,
        cut_N4: NDArray[np.float32] | None,
    ) -> Tensor:
        """Mixing needs the partner's pixels, which may lie in another batch of the same group."""
        pixels = _pick(pixels_NCHW, rows_B).to(self.device, non_blocking=True)
        if partner_N is None or lambda_N is None:
            return to_input(pixels, mean_C=self._mean_C, std_C=self._std_C)
        partner_B = torch.from_numpy(partner_N).long()[rows_B]
        return to_input(
            pixels,
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=torch.arange(len(rows_B), device=self.device),
            lambda_B=torch.from_numpy(lambda_N)[rows_B].to(self.device),
            cut_B4=None if cut_N4 is None else torch.from_numpy(cut_N4)[rows_B].to(self.device),
            partner_pixels_NCHW=_pick(pixels_NCHW, partner_B).to(self.device, non_blocking=True),
        )

    def state(self) -> dict[str, Tensor]:
        return self.module.network.state_dict()


def _pick(pixels_NCHW: Tensor, rows_B: Tensor) -> Tensor:
    """Rows in channels-last memory, in which convolutions are fastest."""
    return pixels_NCHW[rows_B].contiguous(memory_format=torch.channels_last)


def load_teacher(config: TeacherConfig, *, num_classes: int, size: int | None, device: torch.device) -> Teacher:
    """The teacher of a config on a device.

    Raises:
        ModelError: the model cannot be built as asked.
    """
    loaded = load_model(config, num_classes=num_classes, size=size, where="teacher")
    return Teacher(loaded, device=device, precision=config.precision, batch_size=config.batch_size)


def ask_groups(groups: Iterator[GroupViews], teacher: Teacher) -> Iterator[tuple[GroupViews, list[Answers]]]:
    """Each group with the teacher's answers for each of its V views."""
    for group in groups:
        mixing = group.mixing if group.mixes else None
        yield (
            group,
            [
                teacher.answer(pixels_NCHW, *(mixing[view] if mixing else ()))
                for view, pixels_NCHW in enumerate(group.pixels_VNCHW)
            ],
        )
