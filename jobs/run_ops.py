"""Operations on a finished run: evaluate and export its student; and the text of their results."""

from __future__ import annotations

import torch

from jobs.observability.log import warn_of_omissions
from pipeline import storage
from pipeline.shards.index import omissions_of
from pipeline.shards.omissions import Omissions
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.evaluation.images import write_images
from pipeline.student.evaluation.loaded_run import CheckpointName
from pipeline.student.evaluation.metrics import Evaluation
from pipeline.student.export.exporters import ExportedModel

_NUM_CLASSES = 5


def evaluate(
    run_url: str,
    shards: str | tuple[str, ...],
    *,
    checkpoint: CheckpointName = "last",
    threads: int = 1,
    with_teacher: bool = True,
    reference: str | tuple[str, ...] | None = None,
    rows_url: str | None = None,
) -> Evaluation:
    """Evaluates a trained run on validation shards, on a GPU if there is one.

    Args:
        reference: labelled shards, with whose embeddings metrics of task embedding compare.
        rows_url: a Parquet file to write, with the metrics of each image.

    Raises:
        StillroomError: there is no such run or checkpoint, a shard cannot be read, or ``rows_url`` cannot be written.
    """
    if rows_url is not None:
        storage.check_writable(rows_url)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(threads)
    omissions: list[Omissions] = []
    evaluation = evaluate_run(
        run_url,
        shards,
        checkpoint_name=checkpoint,
        num_threads=threads,
        device=device,
        with_teacher=with_teacher,
        reference=reference,
        on_index=lambda index: omissions.append(omissions_of(index)),
    )
    warn_of_omissions("evaluate", omissions)
    if rows_url is not None and evaluation.images is not None:
        write_images(rows_url, evaluation.images)
    return evaluation


def describe_evaluation(evaluation: Evaluation) -> str:
    """The text of ``stillroom evaluate``."""
    lines = [("images", str(evaluation.num_rows))]
    for metric in evaluation.definitions:
        value = evaluation.metrics[metric.key]
        # Few students have a projector.
        if value is not None or "projector" not in metric.needs:
            lines.append((metric.title, metric.text(value)))
    for key, names in evaluation.class_names.items():
        values = zip(names, evaluation.per_class[key], strict=True)
        lowest = sorted(((value, name) for name, value in values if value is not None), key=lambda pair: pair[0])
        lines.append(
            (f"lowest {key}", ", ".join(f"{name} {value:.1%}" for value, name in lowest[:_NUM_CLASSES]) or "-")
        )
    if not evaluation.head_trained:
        lines.append(("head", "not trained: no loss reads its outputs, so they are not evaluated"))
    # Names with a head are longer.
    width = max(28, *(len(name) + 2 for name, _ in lines))
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def describe_export(exported: ExportedModel) -> str:
    """The line of ``stillroom export``."""
    checked = "" if exported.difference is None else f"; outputs within {exported.difference:.1g} of the student's"
    backbone = "; the backbone alone: no loss trained the head" if exported.head_left_out else ""
    return (
        f"export: step {exported.step} as {exported.format} in {exported.url}, {exported.size_bytes / 1e6:.1f} MB; "
        f"input {exported.input}{checked}{backbone}"
    )
