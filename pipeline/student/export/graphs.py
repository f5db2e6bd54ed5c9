"""Writes a network as a graph (torch.export, ONNX), and compares the written file with the network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from pipeline.augment.pixels import to_input
from pipeline.core.errors import ConfigError, ModelError, cause
from pipeline.models import EmbeddingModel, InputSpec
from pipeline.tasks import EMBEDDING
from schemas.config import height_width

TOLERANCE = 1e-4
"""Largest difference of a graph's output from the network's, relative to its largest number: backends reorder sums."""

METADATA_FILE = "stillroom.json"
"""The name of the metadata inside a ``.pt2``."""

_CHECKED_BATCHES = (1, 3)
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class StudentGraph(nn.Module):
    """forward(images_NCHW) -> what the student's head returns, [N,…], without the embedding; a dict by output name if
    the student has several heads; the embedding [N,D] if it has none.

    Args:
        normalizes: the input is uint8 RGB instead of normalised float32.
        outputs: names of the outputs of heads that the graph returns; None: all.
    """

    def __init__(
        self, model: EmbeddingModel, spec: InputSpec, *, normalizes: bool, outputs: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self.model, self.size, self.normalizes = model, spec.size, normalizes
        self.outputs = tuple(model.head_outputs if outputs is None else outputs) or (EMBEDDING,)
        self.register_buffer("mean_C", torch.tensor(spec.mean), persistent=False)
        self.register_buffer("std_C", torch.tensor(spec.std), persistent=False)

    def forward(self, images_NCHW: Tensor) -> Tensor | dict[str, Tensor]:
        if self.normalizes:
            images_NCHW = to_input(images_NCHW, mean_C=self.get_buffer("mean_C"), std_C=self.get_buffer("std_C"))
        outputs = self.model.forward_heads(images_NCHW) if self.model.head_outputs else self.model(images_NCHW)
        if len(self.model.head_outputs) <= 1:
            return outputs[self.outputs[0]]
        return {name: outputs[name] for name in self.outputs}

    def noise(self, count: int) -> Tensor:
        """Random input, the same at every call."""
        shape, generator = (count, 3, *height_width(self.size)), torch.Generator().manual_seed(count)
        if self.normalizes:
            return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        return torch.randn(shape, generator=generator)


def write_pt2(student: StudentGraph, path: Path, metadata: Mapping[str, str]) -> float:
    """Writes a ``torch.export`` program for any batch size, with its metadata in ``stillroom.json``. Returns the
    largest difference of its output from the network's.

    Raises:
        ModelError: the network is not exportable for any batch size, or the program's output differs.
    """
    torch.export.save(_program(student), path, extra_files={METADATA_FILE: json.dumps(dict(metadata))})
    return _largest_difference(student, torch.export.load(path).module(), "torch.export")


def write_onnx(student: StudentGraph, path: Path, metadata: Mapping[str, str]) -> float:
    """Writes ONNX for any batch size: input ``images``, outputs by their names, metadata in the model's properties.

    Raises:
        ConfigError: a package is missing.
        ModelError: as ``write_pt2``, or an operator has no ONNX form.
    """
    check_onnx_packages()
    program = _program(student)
    try:
        onnx = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=list(student.outputs), verbose=False
        )
        assert onnx is not None, "without a file the exporter returns the program"
        onnx.model.metadata_props.update(metadata)
        onnx.save(path, external_data=False)
        run = _onnx_runner(path, student.outputs)
    except Exception as error:
        raise _no_graph("ONNX", error) from error
    return _largest_difference(student, run, "ONNX Runtime")


def check_onnx_packages() -> None:
    """
    Raises:
        ConfigError: a package that writes or checks ONNX is not installed.
    """
    missing = [name for name in _ONNX_PACKAGES if find_spec(name) is None]
    if missing:
        raise ConfigError(
            "ONNX needs packages that are not installed",
            code="export.missing-package",
            got=f"no {', '.join(missing)}",
            next_step="pip install 'stillroom[export]', or export to .pt2 or .safetensors",
        )


def _program(student: StudentGraph) -> ExportedProgram:
    try:
        with torch.no_grad():
            return torch.export.export(student, (student.noise(2),), dynamic_shapes=({0: Dim("batch")},))
    except Exception as error:
        raise _no_graph("torch.export", error) from error


def _no_graph(kind: str, error: Exception) -> ModelError:
    return ModelError(
        f"this network cannot be exported as a graph ({kind})",
        code="export.not-a-graph",
        where="student.model",
        got=cause(error),
        next_step="export its weights to .safetensors, or change the network where its code depends on the data",
    )


def _onnx_runner(path: Path, outputs: Sequence[str]) -> Callable[[Tensor], dict[str, Tensor]]:
    # Optional; check_onnx_packages has found it.
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images_NCHW: Tensor) -> dict[str, Tensor]:
        values = session.run(list(outputs), {"images": images_NCHW.numpy()})
        return {name: torch.from_numpy(np.asarray(value)) for name, value in zip(outputs, values, strict=True)}

    return run


@torch.no_grad()
def _largest_difference(student: StudentGraph, graph: Callable[[Tensor], Any], kind: str) -> float:
    largest = 0.0
    for count in _CHECKED_BATCHES:
        images_NCHW = student.noise(count)
        expected = _by_name(student(images_NCHW), student)
        try:
            got = _by_name(graph(images_NCHW), student)
        except Exception as error:
            raise _no_graph(f"{kind} for {count} images", error) from error
        largest = max(largest, *(_difference(got[name], expected[name], name, kind) for name in student.outputs))
    return largest


def _by_name(output: Tensor | Mapping[str, Tensor], student: StudentGraph) -> Mapping[str, Tensor]:
    return dict.fromkeys(student.outputs, output) if isinstance(output, Tensor) else output


def _difference(got: Tensor, expected: Tensor, output: str, kind: str) -> float:
    difference = float((got - expected).abs().max()) if got.shape == expected.shape else math.inf
    if not difference <= TOLERANCE * float(expected.abs().max()):
        raise ModelError(
            f"the graph's output differs from the network's ({kind})",
            code="export.graph-differs",
            where="student.model",
            got=f"{output} {tuple(got.shape)} that differ by up to {difference:.2g}",
            expected=f"{output} {tuple(expected.shape)} within {TOLERANCE:g} of the largest",
            next_step="export to another format",
        )
    return difference
