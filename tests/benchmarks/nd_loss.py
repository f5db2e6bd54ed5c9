"""ND in one vectorised expression against the official code's loop over samples.

The loop does what the official one does: the label by ``.item()``, a tensor made of its class mean's list of floats
(class means come from a JSON file), two norms, and Python's ``max`` of them, for each sample. *kept* is the same loop
with class means that are a tensor already, the most that a loop could save.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.student.losses import ClassDirections, nd
from tests.benchmarks.timing import Spread, interleaved, ratio

B, K, D = 256, 1000, 2048


def _loop(student_BD: Tensor, teacher_BD: Tensor, means: dict[str, list[float]], labels_B: Tensor) -> Tensor:
    loss = torch.zeros(())
    for student_D, teacher_D, label in zip(student_BD, teacher_BD, labels_B, strict=True):
        mean_D = torch.tensor(means[str(label.item())])
        loss = loss + _of_row(student_D, teacher_D, mean_D)
    return loss / len(labels_B)


def _loop_of_tensors(student_BD: Tensor, teacher_BD: Tensor, means_KD: Tensor, labels_B: Tensor) -> Tensor:
    loss = torch.zeros(())
    for student_D, teacher_D, label in zip(student_BD, teacher_BD, labels_B, strict=True):
        loss = loss + _of_row(student_D, teacher_D, means_KD[label.item()])
    return loss / len(labels_B)


def _of_row(student_D: Tensor, teacher_D: Tensor, mean_D: Tensor) -> Tensor:
    longest = max(student_D.norm(), teacher_D.norm())
    return 1 - torch.dot(student_D, mean_D / mean_D.norm()) / longest


def run() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(B, D, generator=generator, requires_grad=True)
    # Half of the teacher's embeddings are the longer ones.
    teacher = torch.randn(B, D, generator=generator) * (0.5 + torch.rand(B, 1, generator=generator))
    means = torch.randn(K, D, generator=generator)
    labels = torch.randint(0, K, (B,), generator=generator)
    table = {str(label): mean.tolist() for label, mean in enumerate(means)}
    norm, directions = teacher.norm(dim=1), ClassDirections.of(means)
    variants = {
        "loop": lambda: _loop(student, teacher, table, labels),
        "kept": lambda: _loop_of_tensors(student, teacher, means, labels),
        "nd": lambda: nd(student, norm, directions, labels),
    }
    for name, call in variants.items():
        torch.testing.assert_close(call(), variants["loop"](), msg=name)
    seconds = interleaved(
        {name: lambda call=call: _gradient(call(), student) for name, call in variants.items()}, rounds=25
    )
    for name, values in seconds.items():
        print(f"  {name:<6}{Spread.of([value * 1e3 for value in values])} ms")
    print(f"  loop / nd: {ratio(seconds['loop'], seconds['nd'])}")
    print(f"  kept / nd: {ratio(seconds['kept'], seconds['nd'])}")


def _gradient(loss: Tensor, student_BD: Tensor) -> Tensor:
    return torch.autograd.grad(loss, student_BD)[0]
