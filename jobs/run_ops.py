"""Operations on a finished run: evaluate and export its student; and the text of their results."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from jobs.observability.log import warn_of_omissions
from pipeline import storage
from pipeline.shards.index import omissions_of
from pipeline.shards.omissions import Omissions
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.evaluation.images import write_images
from pipeline.student.evaluation.loaded_run import CheckpointName
from pipeline.student.evaluation.metrics import WORST_DOMAIN, Evaluation, Metric
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
        reference: labelled shards, for nearest neighbours and a linear probe.
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
    """The text of ``stillroom evaluate``: a line for each metric, or for each head of several, and for each domain."""
    lines = [("images", str(evaluation.num_rows))]
    by_head: dict[str, list[tuple[Metric, float]]] = {}
    for metric in evaluation.definitions:
        value, head = evaluation.metrics[metric.key], metric.key.removeprefix(WORST_DOMAIN).rpartition("/")[0]
        if head:
            # A head lacks the metrics of another kind of head, and those of an untrained one.
            by_head.setdefault(head, []).extend([] if value is None else [(metric, value)])
        # Few students have a projector, and few evaluations a reference.
        elif value is not None or {"projector", "reference"}.isdisjoint(metric.needs):
            lines.append((metric.title, metric.text(value)))
    # An untrained head has another line below.
    measured = {
        head: values for head, values in by_head.items() if values or f"logits.{head}" not in evaluation.untrained
    }
    lines += [(f"head {head}", _texts(values, of_head=head)) for head, values in measured.items()]
    for key, names in evaluation.class_names.items():
        values = zip(names, evaluation.per_class[key], strict=True)
        lowest = sorted(((value, name) for name, value in values if value is not None), key=lambda pair: pair[0])
        lines.append(
            (f"lowest {key}", ", ".join(f"{name} {value:.1%}" for value, name in lowest[:_NUM_CLASSES]) or "-")
        )
    lines += _domain_lines(evaluation)
    if not evaluation.head_trained:
        heads = [name.partition(".")[2] for name in evaluation.untrained]
        name = f"head{'s' if len(heads) > 1 else ''} {', '.join(heads)}".strip()
        lines.append((name, "not trained: no loss reads its outputs, so they are not evaluated"))
    width = max(28, 2 + max(len(name) for name, _ in lines))
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _texts(values: Sequence[tuple[Metric, float]], *, of_head: str = "") -> str:
    titled = ((metric.title.removesuffix(f" ({of_head})"), metric.text(value)) for metric, value in values)
    return ", ".join(f"{title} {text}" for title, text in titled) or "-"


def _domain_lines(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The main metrics of each domain, and how many images are in none."""
    if not evaluation.by_domain:
        return []
    keys = {metric.key for metric in evaluation.definitions}
    main = [metric for metric in evaluation.definitions if WORST_DOMAIN + metric.key in keys]
    lines: list[tuple[str, str]] = []
    for domain, values in evaluation.by_domain.items():
        measured = ((metric, values.get(metric.key)) for metric in main)
        texts = _texts([(metric, value) for metric, value in measured if value is not None])
        lines.append((f"domain {domain}", f"{values['num_rows']} images, {texts}"))
    in_domain = sum(int(values["num_rows"] or 0) for values in evaluation.by_domain.values())
    if in_domain < evaluation.num_rows:
        lines.append(("in no domain", f"{evaluation.num_rows - in_domain} images"))
    return lines


def describe_export(exported: ExportedModel) -> str:
    """The line of ``stillroom export``."""
    checked = "" if exported.difference is None else f"; outputs within {exported.difference:.1g} of the student's"
    backbone = "; the backbone alone: no loss trained the head" if exported.head_left_out else ""
    return (
        f"export: step {exported.step} as {exported.format} in {exported.url}, {exported.size_bytes / 1e6:.1f} MB; "
        f"input {exported.input}{checked}{backbone}"
    )
