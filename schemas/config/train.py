"""``train`` and ``run``: optimisation of a student, and where its run is stored."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from schemas.config.model import Precision
from schemas.config.section import Section, Share

Optimizer = Literal["sgd", "adamw", "lamb", "rmsprop_tf", "soap"]
_OPTIMIZER_KEYS: Mapping[Optimizer, tuple[str, ...]] = {
    "sgd": (),
    "adamw": ("betas", "eps"),
    "lamb": ("betas", "eps"),
    "rmsprop_tf": ("eps", "alpha"),
    "soap": ("betas", "eps"),
}


class BalanceConfig(Section):
    """Weights of rows by the frequency of their class, for imbalanced data."""

    head: str | None = Field(None, description="task heads: the class head whose labels determine the weights.")
    power: float = Field(0.5, gt=0, le=1, description="A row of a class with n rows has weight n^-power; mean 1.")
    max_weight: float = Field(10.0, gt=1, description="Weights are clipped to [1 / max_weight, max_weight].")


class TrainConfig(Section):
    """Optimiser, schedule and order of training."""

    epochs: int = Field(1, ge=1, description="Passes over the training images; epoch e shows view e of each.")
    views_per_image: int = Field(
        1,
        ge=1,
        description="k, views of each image in a batch, decoded once: epoch e shows views e * k to e * k + k - 1.",
    )
    global_batch_size: int = Field(256, ge=1, description="G, rows per optimiser step over all ranks.")
    accumulate: int = Field(1, ge=1, description="Number of micro-batches of a rank in a full step.")
    precision: Precision = Field(
        "fp32", description="Below fp32: autocast, with loss scaling under fp16; losses stay fp32."
    )
    optimizer: Optimizer = Field("adamw", description="From torch, timm (lamb, rmsprop_tf), pytorch_optimizer (soap).")
    lr: float = Field(1e-3, gt=0, description="Peak learning rate.")
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd and rmsprop_tf.")
    nesterov: bool = Field(False, description="sgd only.")
    betas: tuple[Share, Share] | None = Field(
        None, description="adamw, lamb, soap: decay of both moments per step; default: that of the optimiser."
    )
    eps: float | None = Field(
        None, gt=0, description="All except sgd: added to the divisor; default: that of the optimiser."
    )
    alpha: Share | None = Field(
        None, description="rmsprop_tf: decay of the squared gradient per step; default: that of the optimiser."
    )
    weight_decay: float = Field(0.0, ge=0, description="On weights of two or more dimensions only.")
    warmup_steps: int = Field(0, ge=0, description="Step s of the warm-up has (s + 1) / warmup_steps of lr.")
    schedule: Literal["cosine", "constant", "step", "exponential", "poly"] = Field(
        "cosine", description="After warm-up; cosine ends at 0, poly at end_lr."
    )
    milestones: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (), description="step: after each of these epochs, counted from the start, lr is multiplied by gamma."
    )
    gamma: float = Field(0.1, gt=0, le=1, description="step and exponential: factor of lr.")
    decay_epochs: float | None = Field(None, gt=0, description="exponential: epochs between two factors gamma.")
    power: float = Field(0.9, gt=0, description="poly: exponent of the share of steps that are left.")
    end_lr: float = Field(0.0, ge=0, description="poly: the learning rate after the last step.")
    clip_norm: float | None = Field(None, gt=0, description="Global gradient norm.")
    balance: BalanceConfig | None = Field(
        None, description="Rows of rare classes have more weight in the gradients; null: all rows have the same."
    )
    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Decay per step of averaged weights, which are then evaluated and stored as the model.",
    )
    freeze: tuple[str, ...] = Field(
        (), description="Modules or parameters of the student, by name, that are not trained."
    )
    sync_batch_norm: bool = Field(
        False, description="BatchNorm's statistics in training are those of the rows of all ranks; GPUs only."
    )
    compile: bool = Field(False, description="torch.compile of the student.")
    channels_last: bool | None = Field(
        None,
        description="Memory layout of the student. Default: channels-last unless its backward pass can crash on a CPU.",
    )
    deterministic: bool = Field(False, description="Only deterministic algorithms, in all of torch.")
    seed: int = Field(0, ge=0, lt=2**63, description="Initial weights, order, dropout.")
    order: Literal["global", "pinned"] = Field("global", description="Shards permuted per epoch, or once by the seed.")
    lanes: int | None = Field(
        None, ge=1, description="C; default: the largest divisor of the units of a batch up to 64."
    )
    tail: Literal["drop", "short"] = Field("drop", description="Rows beyond the last full global batch.")
    num_workers: int = Field(0, ge=0, description="Loader processes per rank.")
    eval_every_epochs: int = Field(1, ge=0, description="0: only after the last epoch.")
    best: str | None = Field(
        None,
        description="Metric of the validation images that selects checkpoints/best.pt, such as balanced_accuracy, "
        "HEAD/top1 or worst_domain/top1; default: the main metric of the task.",
    )
    eval_agreement: bool | None = Field(
        None,
        description="Agreement with the teacher in each evaluation; true: also for training from a cache, with the "
        "configured teacher. Default: with a single online teacher.",
    )
    eval_reference: str | tuple[str, ...] | None = Field(
        None,
        description="Labelled training shards, for the accuracy of nearest neighbours of the embedding in each "
        "evaluation, and of a linear probe in the last; not with task heads.",
    )
    checkpoint_every_epochs: int = Field(1, ge=1, description="Epochs that a killed run loses at most.")
    checkpoint_every_steps: int | None = Field(None, ge=1, description="Steps that it loses at most, for long epochs.")
    keep_every_epochs: int | None = Field(None, ge=1, description="Epochs between permanent checkpoints.")
    gradient_norms_every_steps: int | None = Field(
        None, ge=1, description="Steps between two measurements of each term's gradient at the embedding."
    )
    tensorboard: bool = Field(False, description="Event files in <run url>/tensorboard.")

    @field_validator("milestones")
    @classmethod
    def _check_milestones(cls, milestones: tuple[int, ...]) -> tuple[int, ...]:
        if any(left >= right for left, right in pairwise(milestones)):
            raise ValueError(f"milestones are {list(milestones)}; expected ascending epochs")
        return milestones

    @model_validator(mode="after")
    def _check_schedule(self) -> TrainConfig:
        for schedule, key in (("step", "milestones"), ("exponential", "decay_epochs")):
            given = bool(getattr(self, key))
            if given and self.schedule != schedule:
                raise ValueError(f"{key} is for schedule {schedule}, and the schedule is {self.schedule}")
            if not given and self.schedule == schedule:
                raise ValueError(f"schedule {schedule} needs {key}")
        # By value, because the stored config of a run has every key.
        for key in ("power", "end_lr"):
            if self.schedule != "poly" and getattr(self, key) != TrainConfig.model_fields[key].default:
                raise ValueError(f"{key} is for schedule poly, and the schedule is {self.schedule}")
        if self.end_lr > self.lr:
            raise ValueError(f"end_lr is {self.end_lr:g}, above lr, which is {self.lr:g}")
        return self

    @model_validator(mode="after")
    def _check_gradient_norms(self) -> TrainConfig:
        if self.gradient_norms_every_steps is not None and self.compile:
            raise ValueError("gradient_norms_every_steps needs the graph of single layers, which compile removes")
        return self

    @model_validator(mode="after")
    def _check_optimizer(self) -> TrainConfig:
        for key in ("betas", "eps", "alpha"):
            if getattr(self, key) is not None and key not in _OPTIMIZER_KEYS[self.optimizer]:
                optimizers = [name for name, keys in _OPTIMIZER_KEYS.items() if key in keys]
                raise ValueError(f"{key} is for {', '.join(optimizers)}, and the optimizer is {self.optimizer}")
        return self


class RunConfig(Section):
    """The folder of a training run."""

    url: str = Field(description="Folder of the run; any allowed URL.")
