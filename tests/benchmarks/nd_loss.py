"""ND in one vectorised expression against a loop over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.student.losses import nd
from tests.benchmarks.timing import Spread, interleaved, ratio

B, K, D = 256, 1000, 2048


def _loop(student_BD: Tensor, norm_B: Tensor, means_KD: Tensor, labels_B: Tensor) -> Tensor:
    losses = []
    for row in range(len(student_BD)):
        mean = means_KD[int(labels_B[row].item())]
        own = student_BD[row].norm()
        longest = own if own.item() >= norm_B[row].item() else norm_B[row]
        losses.append(1 - student_BD[row] @ (mean / mean.norm()) / longest)
    return torch.stack(losses).mean()


def run() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(B, D, generator=generator, requires_grad=True)
    norm, means = torch.rand(B, generator=generator) * 60, torch.randn(K, D, generator=generator)
    labels = torch.randint(0, K, (B,), generator=generator)
    variants = {"loop": _loop, "nd": nd}
    seconds = interleaved(
        {name: lambda call=call: call(student, norm, means, labels).backward() for name, call in variants.items()},
        rounds=15,
    )
    for name, values in seconds.items():
        print(f"  {name:<6}{Spread.of([value * 1e3 for value in values])} ms")
    print(f"  loop / nd: {ratio(seconds['loop'], seconds['nd'])}")
