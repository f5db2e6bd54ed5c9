"""Exports a trained student as one file: its weights, or a graph that runs without Stillroom."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, get_args

import safetensors.torch

from pipeline import storage
from pipeline.core.errors import ConfigError
from pipeline.core.hashing import digest, weights_digest
from pipeline.core.redaction import redact
from pipeline.models import EmbeddingModel
from pipeline.models.sources.base import head_name
from pipeline.models.sources.torchvision import input_transform
from pipeline.student.evaluation.loaded_run import CheckpointName, LoadedRun, load_run
from pipeline.student.export.graphs import StudentGraph, check_onnx_packages, write_onnx, write_pt2
from pipeline.student.run import checkpoint
from schemas.config import height_width

ExportFormat = Literal["safetensors", "pt2", "onnx"]
_GRAPHS: dict[ExportFormat, Callable[[StudentGraph, Path, Mapping[str, str]], float]] = {
    "pt2": write_pt2,
    "onnx": write_onnx,
}

# Keys of a head that describe the data.
_LABEL_FORMS = {"label_offset", "label_map"}


@dataclass(frozen=True, slots=True)
class ExportedModel:
    """The written file.

    Attributes:
        difference: largest difference of the graph's output from the network's; None for weights.
        head_left_out: the head was not trained, so the file has the backbone alone.
    """

    url: str
    format: ExportFormat
    size_bytes: int
    step: int
    input: str
    difference: float | None
    head_left_out: bool = False


def export_run(
    run_url: str,
    out_url: str,
    *,
    format: ExportFormat | None = None,
    checkpoint_name: CheckpointName = "last",
    with_normalization: bool = False,
) -> ExportedModel:
    """Writes the student of a run, without projectors and without a head that no loss trained.

    A graph is published only if its output equals the network's within ``TOLERANCE``.

    Args:
        format: default: by the suffix of ``out_url``.
        checkpoint_name: ``last`` is the end of a finished run.
        with_normalization: the graph takes uint8 RGB [N,3,S,S] instead of normalised float32.

    Raises:
        ConfigError: there is no such run, it is not finished, the format is unknown, a package is missing, or the
            format is a graph and the student's head was not trained.
        ModelError: the network cannot be exported as a graph, or the graph's output differs.
        StorageInputError: ``out_url`` is refused or cannot be written.
    """
    chosen = format or _format_of(out_url)
    _check_request(chosen, with_normalization=with_normalization)
    storage.check_writable(out_url)
    if checkpoint_name == "last":
        _check_finished(run_url)
    run = load_run(run_url, checkpoint_name)
    untrained = _untrained_outputs(run, chosen, run_url)
    left_out = _left_out(run.student.module, untrained)
    metadata = _metadata(run, run_url, checkpoint_name, with_normalization=with_normalization)
    if left_out:
        metadata["left_out"] = json.dumps(left_out)
    with storage.scratch_folder() as folder:
        path = folder / f"student.{chosen}"
        difference = None
        if chosen in _GRAPHS:
            model = run.student.module
            graph = StudentGraph(
                model,
                run.student.input,
                normalizes=with_normalization,
                outputs=[name for name in model.head_outputs if name not in untrained],
            ).eval()
            difference = _GRAPHS[chosen](graph, path, metadata)
        else:
            _write_weights(run, path, metadata, left_out)
        size_bytes = path.stat().st_size
        storage.put(path, out_url)
    return ExportedModel(redact(out_url), chosen, size_bytes, run.step, metadata["input"], difference, bool(left_out))


def _format_of(out_url: str) -> ExportFormat:
    suffix = PurePosixPath(redact(out_url)).suffix.removeprefix(".").lower()
    formats: dict[str, ExportFormat] = {name: name for name in get_args(ExportFormat)}
    if suffix not in formats:
        raise ConfigError(
            "the suffix of this file names no format",
            code="export.unknown-format",
            where=redact(out_url),
            got=f".{suffix}" if suffix else "no suffix",
            expected=", ".join(f".{name}" for name in formats),
            next_step="use one of these, or pass --format",
        )
    return formats[suffix]


def _check_request(format: ExportFormat, *, with_normalization: bool) -> None:
    if format == "onnx":
        check_onnx_packages()
    if with_normalization and format not in _GRAPHS:
        raise ConfigError(
            "a file of weights cannot contain the normalisation",
            code="export.no-graph-to-normalize",
            where="--with-normalization",
            got=f"format {format}",
            expected=" or ".join(_GRAPHS),
            next_step="leave it out; mean and std are in the file's metadata",
        )


def _check_finished(run_url: str) -> None:
    checkpoint.read_config(run_url)
    if checkpoint.read_summary(run_url) is None:
        raise ConfigError(
            "this run is not finished, so its last checkpoint is an intermediate one",
            code="run.not-finished",
            where=redact(run_url),
            next_step="run stillroom train CONFIG again to finish it, or pass --checkpoint best",
        )


def _metadata(run: LoadedRun, run_url: str, checkpoint_name: str, *, with_normalization: bool) -> dict[str, str]:
    """The metadata of every format: text by name, lists and maps as JSON."""
    student, size = run.student, run.student.input.size
    height, width = height_width(size)
    kind = "uint8 RGB" if with_normalization else "float32 RGB, of [0,1] less mean, over std"
    return {
        "model": str(student.architecture["model"]),
        "kwargs": json.dumps(student.architecture["kwargs"]),
        "num_classes": json.dumps(student.architecture["num_classes"]),
        **_heads(run),
        "input": f"{kind}, [N,3,{height},{width}]",
        "size": json.dumps(size),
        "interpolation": student.input.interpolation,
        "mean": json.dumps(list(student.input.mean)),
        "std": json.dumps(list(student.input.std)),
        "checkpoint": checkpoint_name,
        "step": str(run.step),
        **{key: json.dumps(value) for key, value in input_transform(student.module.network).items()},
        "weights_digest": weights_digest(student.module.network.state_dict()),
        "run_config_sha256": digest(storage.read(storage.join(run_url, checkpoint.CONFIG))),
    }


def _heads(run: LoadedRun) -> dict[str, str]:
    """The heads of a student that has several targets, with the outputs of a graph that they return; the names of the
    classes of a student with one."""
    configured, classes = run.supervision.data.heads, run.supervision.data.classes
    outputs = {head_name(output): output for output in run.student.module.head_outputs}
    heads = {
        head: {**configured[head].model_dump(mode="json", exclude=_LABEL_FORMS, exclude_none=True), "output": output}
        for head, output in outputs.items()
        if head in configured
    }
    return {
        **({"heads": json.dumps(heads)} if heads else {}),
        **({"classes": json.dumps(classes)} if classes and run.student.module.head_outputs else {}),
    }


def _untrained_outputs(run: LoadedRun, format: ExportFormat, run_url: str) -> Collection[str]:
    """Outputs of heads that no loss trained, which the file leaves out.

    Raises:
        ConfigError: a graph would have no output.
    """
    heads = run.student.module.head_outputs
    if format in _GRAPHS and heads and run.untrained.issuperset(heads):
        raise ConfigError(
            "the head of this student was not trained: no loss reads its output, which a graph returns",
            code="export.untrained-head",
            where=redact(run_url),
            got=f"format {format}, losses {', '.join(term.name for term in run.config.loss)}",
            next_step="export to .safetensors, which has the backbone alone, or add a loss on this output",
        )
    return run.untrained


def _left_out(model: EmbeddingModel, untrained: Collection[str]) -> list[str]:
    """Names of the tensors of untrained heads."""
    prefixes = tuple(f"{module}." for output in untrained for module in model.head_modules(output))
    return [name for name in model.network.state_dict() if name.startswith(prefixes)]


def _write_weights(run: LoadedRun, path: Path, metadata: Mapping[str, str], left_out: Sequence[str]) -> None:
    # Copies, since the format supports neither shared memory nor strides.
    state = {
        name: tensor.contiguous().clone()
        for name, tensor in run.student.module.network.state_dict().items()
        if name not in left_out
    }
    safetensors.torch.save_file(state, path, {"format": "pt", **metadata})
