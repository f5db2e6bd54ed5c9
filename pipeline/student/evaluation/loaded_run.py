"""Loads the trained network of a run from a checkpoint, in eval mode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pipeline import storage
from pipeline.core.config_loading import require
from pipeline.core.errors import ConfigError, ModelError
from pipeline.core.redaction import redact
from pipeline.models import LoadedModel, WeightsFile, load_model
from pipeline.models.weights import stored_transform_input
from pipeline.student.evaluation.finite import FiniteWeights
from pipeline.student.losses import CompositeLoss
from pipeline.student.networks.student import projector_for
from pipeline.student.run import checkpoint
from pipeline.student.supervision.spec import SupervisionSpec, resolve_spec
from pipeline.tasks import task_of
from schemas.config import Config

CheckpointName = Literal["best", "last"]
_NUM_NAMED = 3


@dataclass(frozen=True, slots=True)
class LoadedRun:
    """A student, without the projectors of its training.

    Attributes:
        step: optimiser steps until the checkpoint.
        untrained: names of the outputs whose heads are not trained; see ``TrainingSetup.untrained``.
        projectors: the state of all projectors.
    """

    config: Config
    supervision: SupervisionSpec
    student: LoadedModel
    step: int
    untrained: frozenset[str]
    projectors: Mapping[str, Tensor]

    @property
    def head_trained(self) -> bool:
        """Whether all heads are trained."""
        return not self.untrained

    def projector(self, teacher_dim: int) -> nn.Module | None:
        """Of the first loss that compares embeddings, to the first teacher's width; None: no loss does."""
        terms = CompositeLoss(self.config.loss, task_of(self.supervision.data), where="loss").projected
        if not terms:
            return None
        module, prefix = projector_for(self.student.module.embedding_dim, teacher_dim), f"{terms[0]}.0."
        state = {name.removeprefix(prefix): value for name, value in self.projectors.items() if name.startswith(prefix)}
        module.load_state_dict(state)
        return module.eval()


def load_run(run_url: str, checkpoint_name: CheckpointName) -> LoadedRun:
    """Loads a checkpoint of a run.

    Raises:
        ConfigError: there is no run, or it has no such checkpoint.
        CacheError: the run's cache cannot be read, or the checkpoint is damaged.
        ModelError: the checkpoint's weights are not finite.
    """
    config = checkpoint.read_config(run_url)
    require(config, "student.model", "run.url", command=f"the config of {redact(run_url)}")
    supervision = resolve_spec(config)
    assert config.student is not None
    name = checkpoint.BEST if checkpoint_name == "best" else checkpoint.LAST
    state = checkpoint.load(run_url, name)
    if state is None:
        raise ConfigError(
            f"this run has no {checkpoint_name} checkpoint",
            code="run.no-checkpoint",
            where=redact(run_url),
            next_step="train it to the end of an epoch"
            + (", with data.val_shards that have labels, or with an online teacher" if name == checkpoint.BEST else ""),
        )
    student = load_model(
        config.student.model_copy(update={"weights": "random", "sha256": None}),
        widths=task_of(supervision.data).widths,
        size=config.student.size or supervision.size,
        where="student",
        expected_weights=WeightsFile(state["model"], transform_input=stored_transform_input(state)),
    )
    weights = FiniteWeights.of([student.module.network])
    student.module.network.load_state_dict(state["model"])
    _check_finite(weights, storage.join(run_url, name), int(state["step"]))
    untrained = frozenset(state.get("untrained", _untrained(config, supervision)))
    return LoadedRun(config, supervision, student, int(state["step"]), untrained, state["projectors"])


def load_student(run_url: str, checkpoint_name: CheckpointName = "best") -> nn.Module:
    """The student of a finished or interrupted run, in evaluation mode on the CPU.

    Its forward takes normalised images ``[B, 3, H, W]`` in fp32 and returns what the network does: in most networks
    the output of its head, such as the logits of a classifier.

    Raises:
        StillroomError: there is no such run or checkpoint, or it cannot be loaded.
    """
    return load_run(run_url, checkpoint_name).student.module.network.eval()


def _untrained(config: Config, supervision: SupervisionSpec) -> frozenset[str]:
    """Of a run of an earlier version, whose checkpoints do not name these outputs."""
    assert config.student is not None
    if config.student.weights != "random":
        return frozenset()
    task = task_of(supervision.data)
    return frozenset(task.widths) - CompositeLoss(config.loss, task, where="loss").student_outputs


def _check_finite(weights: FiniteWeights, url: str, step: int) -> None:
    names = weights.not_finite()
    if names:
        raise ModelError(
            "the weights of this checkpoint are not finite",
            code="weights.not-finite",
            where=redact(url),
            got=f"NaN or infinity in {', '.join(names[:_NUM_NAMED])}, after {step} steps",
            next_step="train again with a lower train.lr or with train.clip_norm, in another run.url",
        )
