"""Losses of multilabel heads in float64: over all sets of labels, and by hand."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss
from torch import Tensor

from pipeline.student.losses import bce, dist_multilabel, kd, kd_multilabel
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, mean_over, random_pair
from tests.tolerances import log_softmax_error, ulps

TEMPERATURES = st.sampled_from([0.5, 1.0, 4.0])


def set_probs(logits_K: Tensor) -> Tensor:
    """``[2^K]``: of each set of labels."""
    probs_K = 1 / (1 + (-logits_K).exp())
    sets = itertools.product([0, 1], repeat=len(logits_K))
    return torch.stack(
        [torch.stack([p if is_in else 1 - p for p, is_in in zip(probs_K, s, strict=True)]).prod() for s in sets]
    )


def kd_oracle(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """The divergence of the distributions over sets of labels."""
    rows: list[Tensor] = []
    for logits in zip(student_BK / temperature, teacher_BK.double() / temperature, strict=True):
        q, p = map(set_probs, logits)
        rows.append(temperature**2 * (p * (p.log() - q.log())).sum())
    return mean_over(rows, student_BK)


def log_error(logits_BK: Tensor) -> float:
    """Of the logarithm of a sigmoid: that of a softmax of the logit and 0."""
    return log_softmax_error(torch.stack([logits_BK, torch.zeros_like(logits_BK)], dim=-1))


@law
@given(seed=SEEDS, temperature=TEMPERATURES, num_rows=st.integers(1, 4), num_labels=st.integers(1, 5))
def test_kd_is_the_divergence_of_the_sets_of_labels(
    seed: int, temperature: float, num_rows: int, num_labels: int
) -> None:
    """Value: two logarithms, of which one is also that of the factor p; B · 2K terms of 3 operations. Gradient
    ``T · (q − p) / B``: exp of two logarithms, and 8 operations."""
    student_BK, teacher_BK = random_pair(seed, num_rows, num_labels, scale=3.0)
    of_logs = log_error(student_BK / temperature) + log_error(teacher_BK / temperature)
    largest = 1 + ((student_BK - teacher_BK).abs().max() / temperature).item()
    value_error = num_labels * (2 * of_logs + (of_logs + ulps(2 * num_rows * num_labels + 4)) * largest)
    assert_equals_oracle(
        lambda student_BK: kd_multilabel(student_BK, teacher_BK, temperature=temperature),
        lambda student_BK: kd_oracle(student_BK, teacher_BK, temperature),
        student_BK,
        value_error=temperature**2 * value_error,
        gradient_error=temperature * (of_logs + ulps(8)) / num_rows,
    )


def test_kd_of_one_label_is_that_of_two_classes() -> None:
    student_B1, teacher_B1 = random_pair(0, 6, 1, scale=3.0)
    student_B2, teacher_B2 = (
        torch.cat([logits_B1, torch.zeros(6, 1)], dim=1) for logits_B1 in (student_B1, teacher_B1)
    )
    torch.testing.assert_close(
        kd_multilabel(student_B1, teacher_B1, temperature=4.0), kd(student_B2, teacher_B2, temperature=4.0)
    )


def bce_oracle(student_BK: Tensor, batch: dict[str, Tensor], smoothing: float) -> Tensor:
    targets, rows = batch["targets_BK"].tolist(), list[Tensor]()
    partners = batch["mixed_targets_BK"].tolist() if "lambda_B" in batch else targets
    shares = batch["lambda_B"].tolist() if "lambda_B" in batch else [1.0] * len(targets)
    for logits_K, row, partner, share in zip(student_BK, targets, partners, shares, strict=True):
        if -1 in row or -1 in partner:
            continue
        loss = torch.zeros((), dtype=torch.float64)
        for logit, own, other in zip(logits_K, row, partner, strict=True):
            target = (share * own + (1 - share) * other) * (1 - smoothing) + smoothing / 2
            prob = 1 / (1 + (-logit).exp())
            loss = loss - target * prob.log() - (1 - target) * (1 - prob).log()
        rows.append(loss)
    return mean_over(rows, student_BK)


@law
@given(
    seed=SEEDS,
    num_rows=st.integers(1, 5),
    num_labels=st.integers(1, 6),
    smoothing=st.sampled_from([0.0, 0.1, 0.7]),
    mixed=st.booleans(),
)
def test_bce_equals_a_float64_loop_over_the_rows_with_labels(
    seed: int, num_rows: int, num_labels: int, smoothing: float, mixed: bool
) -> None:
    """Value: K logarithms and targets of 9 operations, sums over K and B. Gradient: a sigmoid and 9 operations."""
    generator = torch.Generator().manual_seed(seed)
    student_BK = 3 * torch.randn(num_rows, num_labels, generator=generator)
    targets_2BK = torch.randint(0, 2, (2, num_rows, num_labels), generator=generator)
    targets_2BK[torch.rand(2, num_rows, generator=generator) < 0.25] = -1
    batch = {"targets_BK": targets_2BK[0]}
    if mixed:
        batch |= {"mixed_targets_BK": targets_2BK[1], "lambda_B": 0.5 + torch.rand(num_rows, generator=generator) / 2}
    of_logs = log_error(student_BK)
    largest = 1 + student_BK.abs().max().item()
    num_counted = max(int((targets_2BK if mixed else targets_2BK[:1]).ge(0).all(2).all(0).sum()), 1)
    assert_equals_oracle(
        lambda student_BK: bce(student_BK, **batch, label_smoothing=smoothing),
        lambda student_BK: bce_oracle(student_BK, batch, smoothing),
        student_BK,
        value_error=num_labels * (of_logs + ulps(num_labels + num_rows + 9, largest)),
        gradient_error=(of_logs + ulps(9)) / num_counted,
    )


def test_bce_is_the_sum_over_labels_of_sklearns_log_loss() -> None:
    student_BK, _ = random_pair(0, 12, 4, scale=2.0)
    targets_BK = (torch.arange(48).reshape(12, 4) % 3 == 0).long()
    probs_BK = student_BK.double().sigmoid().numpy()
    expected = sum(log_loss(targets_BK[:, label], probs_BK[:, label], labels=[0, 1]) for label in range(4))
    assert bce(student_BK, targets_BK).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("num_labels", "has_inter"), [(9, False), (10, True)])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dist_is_the_correlation_of_sigmoids_within_rows_only_from_ten_labels_on(
    num_labels: int, has_inter: bool, temperature: float
) -> None:
    student_BK, teacher_BK = random_pair(1, 8, num_labels, scale=2.0)
    p_BK, q_BK = (1 / (1 + np.exp(-side.double().numpy() / temperature)) for side in (student_BK, teacher_BK))
    intra = np.mean([1 - np.corrcoef(p_BK[:, label], q_BK[:, label])[0, 1] for label in range(num_labels)])
    inter = np.mean([1 - np.corrcoef(p_BK[row], q_BK[row])[0, 1] for row in range(8)]) if has_inter else 0.0
    value = dist_multilabel(student_BK, teacher_BK, temperature=temperature, inter_weight=0.5, intra_weight=2.0)
    # numpy's correlation has no eps: 1e-8 of a product of norms that is above 0.01.
    assert value.item() == pytest.approx(
        temperature**2 * (0.5 * inter + 2 * intra), rel=1e-5, abs=temperature**2 * 3e-6
    )


def test_dist_gathered_over_two_ranks_is_that_of_the_whole_batch() -> None:
    student_BK, teacher_BK = random_pair(2, 8, 12)
    halves = [(student_BK[:3], teacher_BK[:3]), (student_BK[3:], teacher_BK[3:])]
    barrier, parts = Barrier(2, timeout=60), dict[int, Tensor]()

    def value(rank: int) -> Tensor:
        def sum_over_ranks(sums: Tensor) -> Tensor:
            parts[rank] = sums
            barrier.wait()
            total = parts[0] + parts[1]
            barrier.wait()
            return total

        return dist_multilabel(*halves[rank], temperature=1.0, gather=True, sum_over_ranks=sum_over_ranks)

    with ThreadPoolExecutor(2) as pool:
        values = list(pool.map(value, range(2)))
    expected = dist_multilabel(student_BK, teacher_BK, temperature=1.0)
    torch.testing.assert_close(values, [expected, expected])
