"""One update of a student's weights: loss scaling, clipping, optimiser, schedule, average."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from pipeline.core.errors import TrainingError
from pipeline.models import EmbeddingModel
from pipeline.student.networks.student import Student
from pipeline.student.training.optim import build_optimizer, build_schedule
from schemas.config import TrainConfig

# Thirty overflows in a row from the first scale, 65536. A finite loss is then below the range of fp16.
_MIN_SCALE = 1e-4
# After n updates the decay is at most n / (9 + n), the warm-up of TensorFlow's moving averages.
_WARMUP_UPDATES = 9.0


@dataclass(frozen=True, slots=True)
class Update:
    """Measurements of one update.

    Attributes:
        lr: of this step.
        grad_norm: 0-d, before clipping; None where nothing is clipped.
        scale: of the next step's loss; None unless the precision is fp16.
    """

    lr: float
    grad_norm: Tensor | None
    scale: float | None


class OptimizerStep:
    """Updates weights from gradients. Every rank makes the same updates, since DDP gives every rank the same gradients.

    A step whose gradients overflow under fp16 changes nothing: neither weights nor schedule nor average.

    Attributes:
        averaged: the student's network with averaged weights and statistics; None without ``train.ema``.
    """

    def __init__(self, student: Student, train: TrainConfig, *, total_steps: int, device: torch.device) -> None:
        self.optimizer = build_optimizer(student, train)
        self.schedule = build_schedule(self.optimizer, train, total_steps=total_steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=train.precision == "fp16")
        self.averaged = None if train.ema is None else _average(student.model, train.ema)
        self._student, self._clip_norm = student, train.clip_norm

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""
        self.scaler.scale(loss).backward()

    @property
    def scale(self) -> float:
        """Of the loss; 1 unless the precision is fp16."""
        return self.scaler.get_scale()

    def step(self) -> Update:
        """Updates the weights, and clears the gradients."""
        lr = float(self.optimizer.param_groups[0]["lr"])
        grad_norm = self._clip()
        before = self._scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        after = self._scale()
        if before is None or after is None or after >= before:
            self._advance()
        return Update(lr, grad_norm, after)

    def _clip(self) -> Tensor | None:
        if self._clip_norm is None:
            return None
        self.scaler.unscale_(self.optimizer)
        return nn.utils.clip_grad_norm_(self._student.parameters(), self._clip_norm)

    def _scale(self) -> float | None:
        """Waits for the device; so does the step of the scaler."""
        return self.scaler.get_scale() if self.scaler.is_enabled() else None

    def _advance(self) -> None:
        self.schedule.step()
        if self.averaged is not None:
            self.averaged.update(self._student.model, step=self.num_updates)

    @property
    def num_updates(self) -> int:
        """Steps that changed the weights."""
        return self.schedule.last_epoch

    @property
    def evaluated(self) -> EmbeddingModel:
        """The network that is evaluated and exported: the averaged one, if there is one."""
        return self._student.model if self.averaged is None else self.averaged.module

    def averaged_buffers(self) -> Iterator[Tensor]:
        """Empty without an average."""
        return iter(()) if self.averaged is None else self.averaged.buffers()

    def check(self, *, where: str) -> None:
        """Checks the loss scale, once in many steps.

        Args:
            where: the steps since the last check.

        Raises:
            TrainingError: gradients overflow fp16 at any scale.
        """
        scale = self._scale()
        if scale is not None and scale < _MIN_SCALE:
            raise TrainingError(
                "gradients overflow fp16 at any scale of the loss",
                code="train.fp16-overflow",
                where=where,
                got=f"scale {scale:.1e} after {self.num_updates} updates",
                expected=f"a scale of at least {_MIN_SCALE:.0e}",
                next_step="use train.precision=bf16 or fp32, lower train.lr or set train.clip_norm, in another run.url",
            )

    def state_dict(self) -> dict[str, Any]:
        """Of optimizer, schedule and scaler; the weights are not included."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def _average(model: EmbeddingModel, decay: float) -> ModelEmaV3:
    return ModelEmaV3(model, decay=decay, use_warmup=True, warmup_gamma=_WARMUP_UPDATES, warmup_power=1.0)
