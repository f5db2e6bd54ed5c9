"""Ask the teacher: fixed batches in, fp32 logits and embeddings out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.augment.pixels import to_input
from pipeline.core.errors import ResourceError, first_line
from pipeline.models import LoadedModel, lay_out, load_model
from pipeline.teacher.rendering import GroupViews
from schemas.config import Precision, TeacherModelConfig

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class InferenceOutputs:
    """The teacher's words on N rows, fp32 on the CPU."""

    logits_NK: NDArray[np.float32]
    embedding_ND: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Mixing:
    """Whom each row is mixed with and how, on the device."""

    partner_N: Tensor
    lambda_N: Tensor
    cutmix_box_N4: Tensor | None


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
        cutmix_box_B4: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """uint8 pixels [B,C,H,W] to fp32 logits [B,K] and embedding [B,D], on the device.

        Mixes row b with row ``partner_B[b]`` on [0,1] pixels first, with weight ``lambda_B[b]`` on its own, or in the
        box ``cutmix_box_B4[b]``.
        """
        images = to_input(
            pixels_BCHW.to(self.device, non_blocking=True),
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=None if partner_B is None else partner_B.to(self.device),
            lambda_B=None if lambda_B is None else lambda_B.to(self.device),
            cutmix_box_B4=None if cutmix_box_B4 is None else cutmix_box_B4.to(self.device),
        )
        return self._ask(images)

    def _ask(self, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _AUTOCAST.get(self.precision)
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            logits_BK, embedding_BD = self.module(images_BCHW)
        return logits_BK.float(), embedding_BD.float()

    @torch.inference_mode()
    def ask(
        self,
        pixels_NCHW: Tensor,
        partner_N: NDArray[np.int32] | None = None,
        lambda_N: NDArray[np.float32] | None = None,
        cutmix_box_N4: NDArray[np.float32] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """uint8 pixels to fp32 logits [N,K] and embedding [N,D] on the device, which may still be at work on them.

        All rows in batches of exactly ``batch_size``; the last is padded, so that every row's arithmetic is the same
        whatever came before it.

        Raises:
            ResourceError: a batch does not fit into the device's memory; names a batch size that does.
        """
        try:
            return self._in_batches(self.batch_size, pixels_NCHW, partner_N, lambda_N, cutmix_box_N4)
        except torch.OutOfMemoryError as error:
            told = first_line(error)
        # Only now: while the error was handled, its frames kept the memory that ran out.
        raise self._too_large(pixels_NCHW[:1], told)

    def answer(
        self,
        pixels_NCHW: Tensor,
        partner_N: NDArray[np.int32] | None = None,
        lambda_N: NDArray[np.float32] | None = None,
        cutmix_box_N4: NDArray[np.float32] | None = None,
    ) -> InferenceOutputs:
        """The words of ``ask``, waited for."""
        logits_NK, embedding_ND = self.ask(pixels_NCHW, partner_N, lambda_N, cutmix_box_N4)
        return InferenceOutputs(logits_NK.cpu().numpy(), embedding_ND.cpu().numpy())

    def _in_batches(
        self,
        batch_size: int,
        pixels_NCHW: Tensor,
        partner_N: NDArray[np.int32] | None,
        lambda_N: NDArray[np.float32] | None,
        cutmix_box_N4: NDArray[np.float32] | None = None,
    ) -> tuple[Tensor, Tensor]:
        # Sent once a call and never waited for, so that a GPU does not stand still between batches.
        pixels_NCHW = pixels_NCHW.to(self.device, non_blocking=True)
        mixing = None
        if partner_N is not None and lambda_N is not None:
            cut = None if cutmix_box_N4 is None else self._sent(cutmix_box_N4)
            mixing = _Mixing(self._sent(partner_N).long(), self._sent(lambda_N), cut)
        logits: list[Tensor] = []
        embeddings: list[Tensor] = []
        for rows_B in torch.arange(len(pixels_NCHW), device=self.device).split(batch_size):
            padded_B = torch.cat([rows_B, rows_B[-1:].expand(batch_size - len(rows_B))])
            logits_BK, embedding_BD = self._ask(self._input(pixels_NCHW, padded_B, mixing))
            logits.append(logits_BK[: len(rows_B)])
            embeddings.append(embedding_BD[: len(rows_B)])
        return torch.cat(logits), torch.cat(embeddings)

    def _sent(self, values_N: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(values_N).to(self.device, non_blocking=True)

    def _input(self, pixels_NCHW: Tensor, rows_B: Tensor, mixing: _Mixing | None) -> Tensor:
        """Mixing needs the partner's pixels, which may lie in another batch of the same group."""
        pixels_BCHW = _pick(pixels_NCHW, rows_B)
        if mixing is None:
            return to_input(pixels_BCHW, mean_C=self._mean_C, std_C=self._std_C)
        return to_input(
            pixels_BCHW,
            mean_C=self._mean_C,
            std_C=self._std_C,
            partner_B=torch.arange(len(rows_B), device=self.device),
            lambda_B=mixing.lambda_N[rows_B],
            cutmix_box_B4=None if mixing.cutmix_box_N4 is None else mixing.cutmix_box_N4[rows_B],
            partner_pixels_NCHW=_pick(pixels_NCHW, mixing.partner_N[rows_B]),
        )

    def _too_large(self, pixels_1CHW: Tensor, told: str) -> ResourceError:
        sizes = [self.batch_size >> halvings for halvings in range(1, self.batch_size.bit_length())]
        fits = next((size for size in sizes if self._runs(size, pixels_1CHW)), None)
        return ResourceError(
            "the teacher runs out of memory at this batch size",
            where=f"teacher.batch_size={self.batch_size}",
            got=told,
            expected="memory for a single row" if fits is None else f"teacher.batch_size={fits}, which ran just now",
            next_step="use a device with more memory, a smaller views.size or a lower teacher.precision"
            if fits is None
            else f"set teacher.batch_size={fits}, or give each task more of the device (ray.gpus_per_task)",
        )

    def _runs(self, batch_size: int, pixels_1CHW: Tensor) -> bool:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            # Mixed with itself, since mixing holds a second batch of pixels.
            self._in_batches(batch_size, pixels_1CHW, np.zeros(1, np.int32), np.ones(1, np.float32))
        except torch.OutOfMemoryError:
            return False
        return True

    def state(self) -> dict[str, Tensor]:
        return self.module.network.state_dict()


def _pick(pixels_NCHW: Tensor, rows_B: Tensor) -> Tensor:
    """Rows in channels-last memory, in which convolutions are fastest."""
    return pixels_NCHW[rows_B].contiguous(memory_format=torch.channels_last)


def load_teacher(
    config: TeacherModelConfig, *, num_classes: int, size: int | None, device: torch.device, where: str = "teacher"
) -> Teacher:
    """The teacher of a config on a device.

    Args:
        where: YAML section of ``config``, for messages.

    Raises:
        ModelError: the model cannot be built as asked.
    """
    loaded = load_model(config, num_classes=num_classes, size=size, where=where)
    return Teacher(loaded, device=device, precision=config.precision, batch_size=config.batch_size)


@dataclass(frozen=True, slots=True)
class GroupOutputs:
    """A mix group and the teacher's words on its V views, which a GPU may still be sending. ``answers`` waits."""

    group: GroupViews
    logits_VNK: Tensor
    embedding_VND: Tensor
    asked_s: float
    """What asking took the process, which on a GPU does not wait for an answer."""
    began: torch.cuda.Event | None
    arrived: torch.cuda.Event | None

    def busy_s(self) -> float:
        """Seconds that the device was at it, from the first pixel to the last word. Waits as ``answers`` does."""
        if self.began is None or self.arrived is None:
            return self.asked_s
        self.arrived.synchronize()
        return self.began.elapsed_time(self.arrived) / 1e3

    def answers(self) -> list[InferenceOutputs]:
        """One item a view."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return [
            InferenceOutputs(logits_NK.numpy(), embedding_ND.numpy())
            for logits_NK, embedding_ND in zip(self.logits_VNK, self.embedding_VND, strict=True)
        ]


def run_inference(groups: Iterator[GroupViews], teacher: Teacher) -> Iterator[GroupOutputs]:
    """Each group with the teacher's words, gathered on the device and sent in one piece."""
    for group in groups:
        mixing = group.mixing if group.mixes else None
        began, began_s = _mark(teacher.device), time.monotonic()
        words = [
            teacher.ask(pixels_NCHW, *(mixing[view] if mixing else ()))
            for view, pixels_NCHW in enumerate(group.pixels_VNCHW)
        ]
        # Not waited for: the next group is queued behind it. torch takes page-locked memory for such a copy.
        logits_VNK, embedding_VND = (
            torch.stack(told).to("cpu", non_blocking=True) for told in zip(*words, strict=True)
        )
        asked_s = time.monotonic() - began_s
        yield GroupOutputs(group, logits_VNK, embedding_VND, asked_s, began, _mark(teacher.device))


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """An event after all that the device was given so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
