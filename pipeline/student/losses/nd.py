"""ND: norm and direction of the student's embedding (Wang 2023, 2305.17007)."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import CacheError
from pipeline.student.losses.arithmetic import is_labelled, labelled_mean, no_autocast

# Squares of entries this large still sum within fp32 at any width.
_LARGEST_ENTRY = 1e15
# Below it neither embedding has a direction worth learning, and 1/norm would overflow an fp16 gradient.
_SMALLEST_NORM = 1e-4
_NUM_CLASSES_NAMED = 5


def nd(
    student_BD: Tensor,
    teacher_norm_B: Tensor,
    class_means_KD: Tensor,
    labels_B: Tensor,
    *,
    mixed_labels_B: Tensor | None = None,
    lambda_B: Tensor | None = None,
) -> Tensor:
    """``1 − s·e / max(‖s‖, ‖t‖)``, mean over the labelled rows; 0 with zero gradient when no row has a label.

    s is the student's embedding, ‖t‖ the norm of the teacher's, e the unit vector along the class mean. Where the
    student is the shorter, the gradient is ``−e / (‖t‖ · rows)``: grow along e. Where it is as long or longer, the loss
    is 1 − cosine, without radial gradient. With mixing, e lies along ``lambda * mean + (1 - lambda) * mixed_mean``,
    and the row counts only if both labels are there.

    A row whose mean has no direction (zero norm, or not finite), or both of whose embeddings are shorter than 1e-4,
    contributes 0, while the divisor stays the number of labelled rows. ``check_class_means`` refuses missing means
    before a run; here nothing is looked at on the host, so that a step never waits for the device.

    Args:
        student_BD: embeddings ``[B,D]`` of the teacher's width, any floating type.
        teacher_norm_B: ``[B]``, norms of the teacher's unnormalised embeddings.
        class_means_KD: ``[K,D]``, the teacher's mean embedding of each class; NaN in a row: the class was not seen.
        labels_B: int64 ``[B]`` in ``[0, K)``; -1 where there is none.
        mixed_labels_B: int64 ``[B]``, the labels of the mixup partners. Comes with ``lambda_B``.
        lambda_B: ``[B]``, each row's own share of its mixed pixels.

    Returns:
        fp32 scalar.
    """
    assert (mixed_labels_B is None) == (lambda_B is None), "mixed_labels_B and lambda_B come together"
    with no_autocast(student_BD):
        mean_BD = _target_means(class_means_KD, labels_B, mixed_labels_B, lambda_B)
        direction_BD, has_direction_B = _directions(mean_BD)
        student_BD = student_BD.float().clamp(-_LARGEST_ENTRY, _LARGEST_ENTRY)
        student_norm_B = torch.linalg.vector_norm(student_BD, dim=1)
        teacher_norm_B = teacher_norm_B.detach().float()
        # torch.maximum would split the gradient at a tie, and leave a radial part there.
        length_B = torch.where(student_norm_B >= teacher_norm_B, student_norm_B, teacher_norm_B)
        cosine_B = (student_BD * direction_BD).sum(dim=1) / length_B.clamp_min(_SMALLEST_NORM)
        loss_B = torch.where(has_direction_B & (length_B >= _SMALLEST_NORM), 1 - cosine_B, 0.0)
        return labelled_mean(loss_B, is_labelled(labels_B, mixed_labels_B))


def _target_means(
    class_means_KD: Tensor, labels_B: Tensor, mixed_labels_B: Tensor | None, lambda_B: Tensor | None
) -> Tensor:
    """``[B,D]``; a row without a label takes class 0's, to be left out of the mean."""
    means_KD = class_means_KD.detach().float()
    mean_BD = means_KD[labels_B.clamp_min(0)]
    if mixed_labels_B is None or lambda_B is None:
        return mean_BD
    return means_KD[mixed_labels_B.clamp_min(0)].lerp(mean_BD, lambda_B.float()[:, None])


def _directions(mean_BD: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows ``[B,D]``, zero where there is no direction, and bool ``[B]`` where there is one."""
    norm_B = torch.linalg.vector_norm(mean_BD, dim=1)
    has_direction_B = norm_B.isfinite() & (norm_B > 0)
    # Chosen before it meets the student: a NaN that is masked only in the loss comes back in the gradient.
    return torch.where(has_direction_B[:, None], mean_BD / norm_B[:, None], 0.0), has_direction_B


def check_class_means(class_means_KD: Tensor, label_counts_K: Tensor, *, where: str) -> None:
    """Refuses, once before a run, class means that ``nd`` would miss.

    Args:
        class_means_KD: ``[K,D]``; a row that is not finite marks a class without a mean.
        label_counts_K: integers ``[K]``, how often each class occurs among the training labels.
        where: the cache, for the message.

    Raises:
        CacheError: K differs, or a class occurs in the labels but has no mean; names the first such classes.
    """
    if len(class_means_KD) != len(label_counts_K):
        raise CacheError(
            "the class means are not of this data's classes",
            where=where,
            got=f"K = {len(class_means_KD)}",
            wanted=f"K = {len(label_counts_K)}",
            next_step="check data.num_classes, or build the cache over this data",
        )
    missing_K = (label_counts_K > 0) & ~class_means_KD.isfinite().all(dim=1)
    classes: list[int] = missing_K.nonzero()[:, 0].tolist()
    if classes:
        named = ", ".join(map(str, classes[:_NUM_CLASSES_NAMED]))
        raise CacheError(
            "classes occur in the labels but have no mean, which nd needs",
            where=where,
            got=f"{len(classes)} without a mean: {named}{', …' if len(classes) > _NUM_CLASSES_NAMED else ''}",
            wanted="a mean for every class that occurs",
            next_step="build the cache over shards that hold these classes, or drop nd from the loss section",
        )
