"""Classifiers on frozen embeddings, which measure networks without one: nearest neighbours and a linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn import functional

NUM_NEIGHBOURS, TEMPERATURE = 20, 0.07
"""Of Wu 2018 (1805.01978), with the number of neighbours that DINO has (2104.14294)."""
PROBE_CS = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse strengths of the L2 penalty, among which the held-out images choose."""
HELD_OUT_ONE_IN = 5
_MAX_ITERATIONS = 2000
_MAX_SIMILARITIES = 2**24


@dataclass(frozen=True)
class Reference:
    """Embeddings of labelled images, on one device.

    Attributes:
        embedding_RD: fp32.
        label_R: int64, of at least two classes.
        is_held_out_R: the images that choose the penalty of the probe, the same for any order of the images.
        fits_probe: whether the probe is measured.
    """

    embedding_RD: Tensor
    label_R: Tensor
    is_held_out_R: Tensor
    fits_probe: bool

    def knn(self, embedding_ND: Tensor) -> Tensor:
        """int64 [N] on the CPU: the class with the largest sum of ``exp(cosine / 0.07)`` over the 20 nearest images, or
        over all if there are fewer; the lowest of equal classes."""
        classes_C, class_R = self.label_R.unique(return_inverse=True)
        unit_RD = functional.normalize(self.embedding_RD, dim=1)
        rows = max(1, _MAX_SIMILARITIES // len(class_R))
        predicted = [
            classes_C[self._votes(chunk_BD.to(unit_RD.device), unit_RD, class_R, len(classes_C)).argmax(1)]
            for chunk_BD in embedding_ND.split(rows)
        ]
        return torch.cat([*predicted, classes_C[:0]]).cpu()

    def _votes(self, embedding_BD: Tensor, unit_RD: Tensor, class_R: Tensor, num_classes: int) -> Tensor:
        """[B,C]"""
        similarity_BR = functional.normalize(embedding_BD, dim=1) @ unit_RD.T
        nearest_Bk, row_Bk = similarity_BR.topk(min(NUM_NEIGHBOURS, len(class_R)), dim=1)
        votes_BC = torch.zeros(len(embedding_BD), num_classes, device=unit_RD.device)
        return votes_BC.scatter_add_(1, class_R[row_Bk], (nearest_Bk / TEMPERATURE).exp())

    def probe(self, embedding_ND: Tensor) -> Tensor:
        """int64 [N] on the CPU: the classes of a multinomial logistic regression on standardised embeddings, with the
        penalty that is best on the held-out images (the strongest of equal ones), fitted to all images."""
        return torch.from_numpy(self._probe.predict(embedding_ND.cpu().double().numpy()).astype(np.int64))

    @cached_property
    def _probe(self) -> Pipeline:
        values_RD, label_R = self.embedding_RD.cpu().double().numpy(), self.label_R.cpu().numpy()
        held_out_R = self.is_held_out_R.cpu().numpy()
        return _fit(values_RD, label_R, _best_c(values_RD, label_R, held_out_R))


def _best_c(values_RD: NDArray[np.float64], label_R: NDArray[np.int64], held_out_R: NDArray[np.bool_]) -> float:
    """1 where one of the two parts is too small to choose."""
    if not held_out_R.any() or len(np.unique(label_R[~held_out_R])) < 2:
        return 1.0
    values_FD, label_F = values_RD[~held_out_R], label_R[~held_out_R]
    scores = [_fit(values_FD, label_F, c).score(values_RD[held_out_R], label_R[held_out_R]) for c in PROBE_CS]
    return PROBE_CS[int(np.argmax(scores))]


def _fit(values_FD: NDArray[np.float64], label_F: NDArray[np.int64], c: float) -> Pipeline:
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=_MAX_ITERATIONS))
    return probe.fit(values_FD, label_F)
