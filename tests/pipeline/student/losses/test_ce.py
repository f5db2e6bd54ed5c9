"""Cross-entropy against a float64 loop over rows and classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import ce
from tests.pipeline.student.losses.batches import SEEDS, law, random_batch
from tests.tolerances import log_softmax_error, ulps


def softmax(row: np.ndarray) -> np.ndarray:
    weights = np.exp(row - row.max())
    return weights / weights.sum()


def targets(labels: list[int], mixed: list[int], lambdas: list[float], num_classes: int, smoothing: float):
    """float64 target distribution of each row; None for a row that has no label."""
    for label, mixed_label, share in zip(labels, mixed, lambdas, strict=True):
        if label < 0 or mixed_label < 0:
            yield None
            continue
        target = np.full(num_classes, smoothing / num_classes)
        target[label] += (1 - smoothing) * share
        target[mixed_label] += (1 - smoothing) * (1 - share)
        yield target


def oracle(logits_BK: Tensor, rows: list[np.ndarray | None]) -> tuple[float, np.ndarray]:
    """Value and gradient ``(softmax - target) / labelled rows``."""
    num = max(sum(target is not None for target in rows), 1)
    value, gradient_BK = 0.0, np.zeros(tuple(logits_BK.shape))
    for i, (logits, target) in enumerate(zip(logits_BK.double().numpy(), rows, strict=True)):
        if target is not None:
            probs = softmax(logits)
            value -= float((target * np.log(probs)).sum()) / num
            gradient_BK[i] = (probs - target) / num
    return value, gradient_BK


def check_against_oracle(loss: Tensor, logits_BK: Tensor, rows: list[np.ndarray | None]) -> None:
    """Value and gradient within the rounding of fp32.

    The value: a log-probability; 4 operations that mix two labels, K + 4 that smooth, B + 1 of the mean over rows. The
    gradient ``(softmax − target) / labelled rows``: exp of a log-probability, the sum over K of the chain rule, and 8
    operations that mix and smooth.
    """
    value, gradient_BK = oracle(logits_BK.detach(), rows)
    (num_rows, num_classes), num_labelled = logits_BK.shape, max(sum(target is not None for target in rows), 1)
    largest = -logits_BK.detach().double().log_softmax(dim=1).min().item()
    of_logs = log_softmax_error(logits_BK)
    loss.backward()
    error = of_logs + ulps(num_classes + num_rows + 9, largest)
    assert loss.item() == pytest.approx(value, rel=0, abs=error)
    error = (of_logs + ulps(num_classes + 9)) / num_labelled
    np.testing.assert_allclose(logits_BK.grad, gradient_BK, rtol=0, atol=error)


@law
@given(
    seed=SEEDS, num_rows=st.integers(1, 6), num_classes=st.integers(2, 5), smoothing=st.sampled_from([0.0, 0.1, 0.7])
)
def test_ce_equals_a_float64_loop_over_the_labelled_rows(
    seed: int, num_rows: int, num_classes: int, smoothing: float
) -> None:
    batch = random_batch(seed, num_rows, num_classes)
    logits_BK, labels_B = batch["student_BK"], batch["labels_B"]
    rows = list(targets(labels_B.tolist(), labels_B.tolist(), [1.0] * num_rows, num_classes, smoothing))
    logits_BK.requires_grad_()
    check_against_oracle(ce(logits_BK, labels_B, label_smoothing=smoothing), logits_BK, rows)


@law
@given(seed=SEEDS, num_rows=st.integers(1, 6), num_classes=st.integers(2, 5), smoothing=st.sampled_from([0.0, 0.1]))
def test_mixed_ce_equals_a_float64_loop_over_rows_with_both_labels(
    seed: int, num_rows: int, num_classes: int, smoothing: float
) -> None:
    batch = random_batch(seed, num_rows, num_classes)
    logits_BK = batch.pop("student_BK").requires_grad_()
    del batch["teacher_BK"]
    labels, mixed, lambdas = (batch[name].tolist() for name in ("labels_B", "mixed_labels_B", "lambda_B"))
    rows = list(targets(labels, mixed, lambdas, num_classes, smoothing))
    loss = ce(logits_BK, **batch, label_smoothing=smoothing)
    check_against_oracle(loss, logits_BK, rows)


def test_ce_of_equal_logits_is_the_log_of_the_number_of_classes() -> None:
    loss = ce(torch.zeros(3, 7), torch.tensor([0, 3, 6])).item()
    assert loss == pytest.approx(math.log(7), rel=0, abs=ulps(7 + 3 + 5, math.log(7)))


def test_ce_equals_torch_cross_entropy_with_smoothing() -> None:
    logits_BK = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    labels_B = torch.arange(16) % 10
    expected = torch.nn.functional.cross_entropy(logits_BK, labels_B, label_smoothing=0.1)
    torch.testing.assert_close(ce(logits_BK, labels_B, label_smoothing=0.1), expected)
