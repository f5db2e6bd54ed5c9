"""How far floating-point results may lie from exact ones: bounds derived from the arithmetic."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


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


def reordered(num_operations: float, magnitude: float = 1.0, *, dtype: torch.dtype = torch.float32) -> float:
    """How far two results of n operations lie apart that were computed in different orders or places.

    For networks and trainings, where n · u (u = eps / 2) of ``ulps`` says nothing any more. If rounding errors are
    independent with mean zero, a sum or product of n numbers errs by more than λ · √n · u with probability of at most
    2n · exp(-λ² · (1 - u)² / 2), for λ = 8 that is n · 2.5e-14 (Higham & Mary 2019, A new approach to probabilistic
    rounding error analysis, SIAM J. Sci. Comput. 41). Both results err.

    It holds as long as a layer, and a step, do not increase the relative error of what they are given; where they do,
    the test says so.
    """
    return 8 * math.sqrt(num_operations) * torch.finfo(dtype).eps * magnitude


@torch.no_grad()
def network_operations(network: nn.Module, images_BCHW: Tensor, *, backward: bool = True) -> int:
    """The longest chain of operations from pixels to logits and, ``backward``, to the gradients of a batch.

    A layer sums over its fan-in. The gradients of its input are sums over its fan-out, those of its weights over the
    batch and its positions; a normalisation's mean and variance, and their gradients, are sums over these too.
    """
    num_operations = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal num_operations
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor):
            return
        batch_and_positions = output.numel() // len(weight)
        if weight.dim() == 1:
            num_operations += 4 * batch_and_positions if backward else 4
            return
        num_operations += weight[0].numel()
        if backward:
            num_operations += weight[:, 0].numel() + batch_and_positions

    with register_module_forward_hook(count):
        network(images_BCHW)
    return num_operations


def magnitude_of(values: Tensor | NDArray[np.floating]) -> float:
    """The largest absolute value."""
    return float(abs(values).max())
