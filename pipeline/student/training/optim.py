"""Optimizer and schedule of a config, from torch, timm and pytorch_optimizer."""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import partial
from typing import Any

import torch
from pytorch_optimizer import SOAP
from timm.optim.lamb import Lamb
from timm.optim.rmsprop_tf import RMSpropTF
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pipeline.core.errors import ConfigError
from schemas.config import TrainConfig


def build_optimizer(module: nn.Module, train: TrainConfig) -> Optimizer:
    """Weight decay applies to tensors of two or more dimensions: norms and biases are no kernels."""
    decayed = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim > 1]
    others = [parameter for parameter in module.parameters() if parameter.requires_grad and parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # The config refuses those that the optimizer does not take.
    given = {"betas": train.betas, "eps": train.eps, "alpha": train.alpha}
    options: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if train.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=train.lr, momentum=train.momentum, nesterov=train.nesterov)
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.lr, **options)
    if train.optimizer == "lamb":
        # Lamb would clip a second time, after train.clip_norm.
        return Lamb(groups, lr=train.lr, max_grad_norm=None, **options)
    if train.optimizer == "rmsprop_tf":
        return RMSpropTF(groups, lr=train.lr, momentum=train.momentum, **options)
    return SOAP(groups, lr=train.lr, **options)


def build_schedule(optimizer: Optimizer, train: TrainConfig, *, total_steps: int) -> LambdaLR:
    """Linear warm-up from 0, then the config's schedule. Step it once an optimizer step.

    Raises:
        ConfigError: as ``check_warmup``.
    """
    check_warmup(train, total_steps)
    return LambdaLR(optimizer, partial(lr_factor, train=train, total_steps=total_steps))


def check_warmup(train: TrainConfig, total_steps: int) -> None:
    """
    Raises:
        ConfigError: the warm-up is as long as the training, so the peak learning rate would never be reached.
    """
    if train.warmup_steps >= total_steps:
        raise ConfigError(
            "the warm-up is as long as the training",
            code="train.warmup-too-long",
            where="train.warmup_steps",
            got=f"{train.warmup_steps} of {total_steps} steps",
            expected="fewer steps than the training has",
            next_step="lower train.warmup_steps, or train for more epochs",
        )


def lr_factor(step: int, *, train: TrainConfig, total_steps: int) -> float:
    """The share of the peak learning rate at a 0-based step; all epochs have the same number of steps."""
    if step < train.warmup_steps:
        return (step + 1) / train.warmup_steps
    if train.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - train.warmup_steps) / max(1, total_steps - train.warmup_steps))
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if train.schedule == "poly":
        end = train.end_lr / train.lr
        return end + (1 - end) * (1 - progress) ** train.power
    steps_per_epoch = total_steps // train.epochs
    if train.decay_epochs is None:
        return train.gamma ** bisect_right(train.milestones, step // steps_per_epoch)
    return train.gamma ** int(step / (train.decay_epochs * steps_per_epoch))
