"""Labelled images whose embeddings classify others: collected over the ranks of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.augment.params import sample_keys
from pipeline.core.errors import ConfigError
from pipeline.core.redaction import redact
from pipeline.student.distributed import DistributedContext
from pipeline.student.evaluation.metrics import metrics_of
from pipeline.student.evaluation.metrics.reference import HELD_OUT_ONE_IN, Reference
from pipeline.tasks import Targets
from pipeline.tasks.classification import LABEL, NO_LABEL
from schemas.config import DataConfig


class ReferenceImages:
    """The labelled images of one rank."""

    def __init__(self) -> None:
        self._embeddings: list[Tensor] = []
        self._columns: list[Tensor] = []

    def add(self, embedding_ND: Tensor, targets: Targets, sample_ids: Sequence[str]) -> None:
        """Adds N images, of which only those with a label count."""
        is_held_out_N = sample_keys(0, sample_ids)[:, 1] % np.uint64(HELD_OUT_ONE_IN) == 0
        labelled_N = targets[LABEL] != NO_LABEL
        columns_N2 = np.stack([targets[LABEL], is_held_out_N], axis=1).astype(np.int64)
        self._embeddings.append(embedding_ND[torch.from_numpy(labelled_N)])
        self._columns.append(torch.from_numpy(columns_N2[labelled_N]))

    def of_all_ranks(
        self, distributed: DistributedContext, embedding_dim: int, *, fits_probe: bool, where: str
    ) -> Reference:
        """Those of all ranks, on every rank, each of which calls it.

        Args:
            where: the key or option that names the shards, for messages.

        Raises:
            ConfigError: the images have no labels of two classes.
        """
        device = distributed.device
        embedding_M = torch.cat([torch.empty(0, embedding_dim), *self._embeddings]).to(device).flatten()
        column_M = torch.cat([torch.empty(0, 2, dtype=torch.int64), *self._columns]).to(device).flatten()
        embedding_RD = distributed.join(embedding_M).reshape(-1, embedding_dim)
        label_R, is_held_out_R = distributed.join(column_M).reshape(-1, 2).unbind(1)
        num_classes = len(label_R.unique())
        if num_classes < 2:
            raise ConfigError(
                "images of a reference need labels of at least two classes",
                code="evaluate.reference-classes",
                where=where,
                got=f"{len(label_R)} labelled images of {num_classes} classes",
                next_step="name labelled shards, and in data.label the member that holds the labels",
            )
        return Reference(embedding_RD, label_R, is_held_out_R.bool(), fits_probe)


def check_reference(urls: Sequence[str], evaluated_urls: Sequence[str], data: DataConfig, *, key: str) -> None:
    """
    Raises:
        ConfigError: no metric of the task compares with a reference, or it has a shard that is evaluated.
    """
    if not any("reference" in metric.needs for metric in metrics_of(data).metrics):
        raise ConfigError(
            "no metric of this task compares with a reference",
            code="evaluate.reference-unused",
            where=key,
            got=f"data.task: {data.task}",
            expected="task embedding or classification, which have metrics of neighbours and of a linear probe",
            next_step=f"remove {key}",
        )
    shared = [url for url in urls if url in set(evaluated_urls)]
    if shared:
        raise ConfigError(
            "a shard is evaluated and is part of the reference: each image would be its own nearest neighbour",
            code="evaluate.reference-overlap",
            where=key,
            got=", ".join(map(redact, shared[:3])),
            expected="shards of training images",
        )
