"""Saves and restores the state of a training: weights, optimizer and position."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.augment.stored_pixels import encoder_environment, other_encoder
from pipeline.core.errors import ConfigError
from pipeline.core.hashing import short_digest
from pipeline.core.redaction import redact
from pipeline.models.sources.torchvision import input_transform
from pipeline.models.weights import stored_transform_input
from pipeline.student.evaluation.metrics import MetricSet, Score, Values, metrics_of
from pipeline.student.run import checkpoint
from pipeline.student.run.metrics_files import published_evaluation
from pipeline.student.training.setup import TrainingSetup


@dataclass(slots=True)
class Progress:
    """How far a training is.

    Attributes:
        step: optimizer steps that are done, over all epochs.
        seconds: of training, in all starts of the run.
        best: the score of the best evaluation.
        was_evaluated: whether the evaluation after ``step`` is published already.
        former_best: the score of the best evaluation so far by a metric that no longer selects the best checkpoint.
    """

    step: int = 0
    seconds: float = 0.0
    best: Score | None = None
    was_evaluated: bool = False
    former_best: Score | None = None

    def best_value(self, metric: str) -> float | None:
        """None: another metric selects the best checkpoint."""
        return self.best.value if self.best is not None and self.best.metric == metric else None

    def improves(self, values: Values, metrics: MetricSet) -> bool:
        """Whether an evaluation with these values is better than all before; it is the best one from now on."""
        score = metrics.score(values)
        if score is None or not metrics.is_better(score, self.best):
            return False
        self.best = score
        return True


class Checkpointer:
    """The checkpoints of one run."""

    def __init__(self, setup: TrainingSetup) -> None:
        self._run_url, self._order, self._config = setup.run_url, setup.order, setup.config
        self._student, self._optimizer_step = setup.student.module, setup.optimizer_step
        self._metrics, self._untrained = metrics_of(setup.spec.data, setup.config.train.best), sorted(setup.untrained)
        # A cache has the views that its build encoded; other trainings encode their views themselves.
        self._encoder = {} if setup.spec.caches else encoder_environment(setup.spec.student_plan)

    def save(self, progress: Progress, *names: str) -> None:
        """Replaces the checkpoints of these names, in this order."""
        state = self._state(progress)
        for name in names:
            checkpoint.save(self._run_url, name, state)

    def _state(self, progress: Progress) -> dict[str, Any]:
        raw, evaluated = self._student.model.network, self._optimizer_step.evaluated.network
        return {
            # The weights that are evaluated, for every reader; the raw ones only resume the training.
            "model": evaluated.state_dict(),
            "raw": None if evaluated is raw else raw.state_dict(),
            "projectors": self._student.projectors.state_dict(),
            "review": None if self._student.review is None else self._student.review.state_dict(),
            **self._optimizer_step.state_dict(),
            "untrained": self._untrained,
            "step": progress.step,
            f"best_{self._metrics.main.key}": progress.best_value(self._metrics.main.key),
            "best": None if progress.best is None else asdict(progress.best),
            "seconds": progress.seconds,
            "order": self._order_id(),
            **self._encoder,
            **input_transform(evaluated),
        }

    def _order_id(self) -> str:
        """What the position in a checkpoint counts in: another order would repeat some rows and skip others."""
        order = self._order
        rows = [*zip(order.shard_ids, order.num_ok_S.tolist(), strict=True)]
        return short_digest([order.seed, order.global_batch_size, order.num_lanes, order.kind, order.tail, rows])

    def restore(self) -> Progress:
        """Loads the last checkpoint into the networks and the optimizer; without one, nothing changes.

        Raises:
            ConfigError: the checkpoint is of another order of training, or its views of another encoder.
            CacheError: the checkpoint is damaged.
        """
        state = checkpoint.load(self._run_url, checkpoint.LAST)
        if state is None:
            return Progress()
        if state["order"] != self._order_id():
            raise ConfigError(
                "the checkpoint belongs to a different order of training",
                code="run.other-order",
                where=redact(self._run_url),
                got="other shards, or other rows in them, than when the run was begun",
                next_step="restore the shards and their index, or choose another run.url",
            )
        if self._encoder and (reason := other_encoder(state)) is not None:
            raise ConfigError(
                "the views of this run would change",
                code="run.other-encoder",
                where=redact(self._run_url),
                got=reason,
                next_step="install the version that began the run, or choose another run.url",
            )
        self._optimizer_step.evaluated.network.load_state_dict(state["model"])
        if state["raw"] is not None:
            self._student.model.network.load_state_dict(state["raw"])
        self._restore_input_transform(state)
        self._student.projectors.load_state_dict(state["projectors"])
        if self._student.review is not None:
            self._student.review.load_state_dict(state["review"])
        self._optimizer_step.load_state_dict(state)
        return self._progress(state)

    def _restore_input_transform(self, state: dict[str, Any]) -> None:
        """Restores the input transform of the run, which earlier versions chose without regard to the weights."""
        assert self._config.student is not None
        if "transform_input" in self._config.student.kwargs:
            return
        networks: tuple[Any, ...] = self._optimizer_step.evaluated.network, self._student.model.network
        for network in networks:
            if input_transform(network):
                network.transform_input = bool(stored_transform_input(state))

    def _progress(self, state: dict[str, Any]) -> Progress:
        """Includes the evaluation after the checkpoint's step, which runs after the checkpoint is saved."""
        progress = Progress(state["step"], state["seconds"])
        if (best := state.get("best")) is not None:
            progress.best = Score(**best)
        elif (value := state.get(f"best_{self._metrics.main.key}")) is not None:
            # A run of a version that selected by no other metric.
            progress.best = Score(self._metrics.main.key, value)
        published = published_evaluation(self._run_url, progress.step - 1)
        progress.was_evaluated = published is not None
        if progress.best is not None and progress.best.metric not in self._metrics.selection:
            # Another train.best: no checkpoint is the best one yet.
            progress.best, progress.former_best = None, progress.best
        else:
            progress.improves(published or {}, self._metrics)
        return progress
