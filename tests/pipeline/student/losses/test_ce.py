"""Cross-entropy against a float64 loop over rows."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipeline.student.losses import ce
from tests.pipeline.student.losses.batches import (
    SEEDS,
    assert_equals_oracle,
    labelled_rows,
    law,
    mean_over,
    random_batch,
    without_partners,
)
from tests.tolerances import log_softmax_error, ulps


def oracle(student_BK: Tensor, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    rows: list[Tensor] = []
    for row, labels in labelled_rows(batch):
        target_K = torch.full_like(student_BK[row], smoothing / student_BK.shape[1])
        for label, share in labels:
            target_K[label] += (1 - smoothing) * share
        probs_K = student_BK[row].exp() / student_BK[row].exp().sum()
        rows.append(-(target_K * probs_K.log()).sum())
    return mean_over(rows, student_BK)


@law
@given(
    seed=SEEDS,
    num_rows=st.integers(1, 6),
    num_classes=st.integers(2, 5),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    mixed=st.booleans(),
)
def test_ce_equals_a_float64_loop_over_the_rows_with_each_label(
    seed: int, num_rows: int, num_classes: int, smoothing: float, mixed: bool
) -> None:
    """The value: a log-probability; 4 operations that mix two labels, K + 4 that smooth, B + 1 of the mean over rows.
    The gradient ``(softmax − target) / labelled rows``: exp of a log-probability, the sum over K of the chain rule, and
    8 operations that mix and smooth.
    """
    batch = random_batch(seed, num_rows, num_classes)
    del batch["teacher_BK"]
    student_BK = batch.pop("student_BK")
    batch = batch if mixed else without_partners(batch)
    largest = -student_BK.double().log_softmax(dim=1).min().item()
    of_logs = log_softmax_error(student_BK)
    assert_equals_oracle(
        lambda student_BK: ce(student_BK, **batch, label_smoothing=smoothing, prior=None),
        lambda student_BK: oracle(student_BK, batch, smoothing),
        student_BK,
        value_error=of_logs + ulps(num_classes + num_rows + 9, largest),
        gradient_error=(of_logs + ulps(num_classes + 9)) / max(len(labelled_rows(batch)), 1),
    )


def test_ce_equals_torch_cross_entropy_with_smoothing() -> None:
    logits_BK = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))
    labels_B = torch.arange(16) % 10
    expected = torch.nn.functional.cross_entropy(logits_BK, labels_B, label_smoothing=0.1)
    torch.testing.assert_close(ce(logits_BK, labels_B, label_smoothing=0.1), expected)
