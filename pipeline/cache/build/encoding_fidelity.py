"""How far stored numbers are from the teacher's: sums over rows, in float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]


def kl_sum(exact_NK: Matrix, stored_NK: Matrix, temperature: float) -> float:
    """Nats: KL of the softmax at T of the stored logits from that of the exact ones."""
    log_p, log_q = (_log_softmax(values, temperature) for values in (exact_NK, stored_NK))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


def pearson_sum(exact_NK: Matrix, stored_NK: Matrix, temperature: float) -> float:
    """1 − Pearson correlation of the probabilities of a row at T, DIST's relation within a row (Huang 2022)."""
    p, q = (np.exp(_log_softmax(values, temperature)) for values in (exact_NK, stored_NK))
    return float((1 - _cosines(p - p.mean(1, keepdims=True), q - q.mean(1, keepdims=True))).sum())


def cosine_sum(exact_ND: Matrix, stored_ND: Matrix) -> float:
    return float(_cosines(exact_ND.astype(np.float64), stored_ND.astype(np.float64)).sum())


def _cosines(left_ND: NDArray[np.float64], right_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    """[N]; of two zero vectors 1, of one 0."""
    norms = np.linalg.norm(left_ND, axis=1) * np.linalg.norm(right_ND, axis=1)
    same_N = (left_ND == right_ND).all(1)
    return np.where(same_N, 1.0, (left_ND * right_ND).sum(1) / np.where(norms > 0, norms, 1.0))


def _log_softmax(values_NK: Matrix, temperature: float) -> NDArray[np.float64]:
    scaled = values_NK.astype(np.float64) / temperature
    scaled -= scaled.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))
