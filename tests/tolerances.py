"""How far floating-point results may lie from exact ones: bounds derived from the arithmetic."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def ulps(num_operations: float, magnitude: float = 1.0, *, dtype: torch.dtype = torch.float32) -> float:
    """The largest error of a chain of operations whose operands and results are at most ``magnitude``.

    A sum, product, quotient or root errs by half a unit in the last place (ulp) of its result; an ``exp``, ``log`` or
    ``log1p`` of torch by at most one. Each counts here as one ulp of ``magnitude``, and errors add up (Higham 2002,
    Accuracy and Stability of Numerical Algorithms, ch. 3). A sum of n terms is a chain of n operations in any order;
    the magnitude of a mean is the mean of its terms' absolute values.
    """
    return num_operations * torch.finfo(dtype).eps * magnitude


def log_softmax_error(logits_BK: Tensor) -> float:
    """The largest error of an entry of ``log_softmax`` over the last dimension of fp32 logits.

    A chain of K + 4 operations: division by a temperature, subtraction of the largest logit, ``exp``, K − 1 sums,
    ``log``, subtraction. Their results are at most the spread of a row plus log K; a relative error of the sum becomes
    an absolute one of its logarithm, hence at least 1.
    """
    num_classes = logits_BK.shape[-1]
    spread = 2 * logits_BK.detach().abs().max().item()
    return ulps(num_classes + 4, max(1.0, spread + math.log(num_classes)))


def kl_error(student_BK: Tensor, teacher_BK: Tensor) -> float:
    """The largest error of ``Σ p · (log p − log q)``, mean over the rows, from fp32 logits divided by T.

    An error of log p or log q counts once in the difference, and once more, times the difference, in p = exp(log p).
    Then each term takes 3 operations more (``exp``, subtraction, product), and the mean is a chain of B · K + 1.
    """
    log_student_BK, log_teacher_BK = (
        logits_BK.detach().double().log_softmax(-1) for logits_BK in (student_BK, teacher_BK)
    )
    largest = max(1.0, (log_teacher_BK - log_student_BK).abs().max().item())
    of_logs = max(log_softmax_error(student_BK), log_softmax_error(teacher_BK))
    return 2 * of_logs + (of_logs + ulps(student_BK.numel() + 4)) * largest
