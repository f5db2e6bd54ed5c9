"""An exported student has the outputs of the run's student; a refused export leaves no file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline import storage
from pipeline.models import InputSpec, LoadedModel, load_model
from pipeline.student.evaluation.loaded_run import CheckpointName
from pipeline.student.export.exporters import export_run
from pipeline.student.export.graphs import TOLERANCE, StudentGraph, write_onnx, write_pt2
from pipeline.student.run import checkpoint
from pipeline.student.training.trainer import train
from schemas.config import StudentConfig
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import CE, SMALL, run_config, state_of, train_until

NETWORKS: dict[str, dict[str, Any]] = {
    "cifar": {
        "model": "python:pipeline.models.cifar:resnet",
        "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]},
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.25],
    },
    "timm": {
        "model": "timm/vit_tiny_patch16_224",
        "kwargs": {"img_size": 32, "patch_size": 8, "depth": 2},
        "size": 32,
        "interpolation": "bicubic",
    },
    # Two heads, whose inputs are one embedding.
    "distilled": {
        "model": "timm/deit_tiny_distilled_patch16_224",
        "kwargs": {"img_size": 32, "patch_size": 16, "depth": 1},
        "size": 32,
        "interpolation": "bicubic",
    },
    "torchvision": {"model": "torchvision/mobilenet_v3_small", "size": 32},
}
Finished = Callable[[str], str]


@pytest.fixture(scope="module")
def finished(replays: Replay, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """``finished("timm")``: the URL of a run of one epoch with that network. Tests only read it."""
    runs: dict[str, str] = {}

    def get(name: str) -> str:
        if name not in runs:
            url = tmp_path_factory.mktemp("runs") / name
            base = replays("crop").config
            keys: dict[str, Any] = {"student": NETWORKS[name], "train": {"epochs": 1}, "loss": [*CE, {"name": "nd"}]}
            train(run_config(base, url, data={"val_shards": base.data.shards}, **keys))
            runs[name] = str(url)
        return runs[name]

    return get


def student_of(url: str) -> LoadedModel:
    """The run's student in eval mode, by hand."""
    config = checkpoint.read_config(url)
    assert config.student is not None
    loaded = load_model(config.student, widths={"logits": 10}, size=config.student.size or 16, where="student")
    loaded.module.network.load_state_dict(state_of(url)["model"])
    return loaded


def pixels(count: int, size: int) -> Tensor:
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(7))


def normalised(pixels_NCHW: Tensor, spec: InputSpec) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    return (pixels_NCHW / 255 - mean) / std


def run_graph(path: Path, images_NCHW: Tensor) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images_NCHW)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images_NCHW.numpy()})[0])


def metadata_of(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            return file.metadata()
    if path.suffix == ".pt2":
        extra = {"stillroom.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["stillroom.json"])
    import onnx

    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}


GRAPHS = [
    ("cifar", True),
    *(slow(name, False) if name == "torchvision" else (name, False) for name in NETWORKS),
]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize(("network", "with_normalization"), GRAPHS)
def test_a_graph_has_the_logits_of_the_runs_student_for_any_batch_size(
    finished: Finished, tmp_path: Path, network: str, suffix: str, with_normalization: bool
) -> None:
    path = tmp_path / f"student.{suffix}"
    done = export_run(finished(network), str(path), with_normalization=with_normalization)
    student = student_of(finished(network))
    assert done.difference is not None
    assert done.size_bytes == path.stat().st_size
    for count in (1, 2, 5):
        pixels_NCHW = pixels(count, student.input.size)
        expected_NK = student.module(normalised(pixels_NCHW, student.input))["logits"].detach()
        given = pixels_NCHW if with_normalization else normalised(pixels_NCHW, student.input)
        largest = float(expected_NK.abs().max())
        assert largest > 0
        torch.testing.assert_close(run_graph(path, given).detach(), expected_NK, rtol=0, atol=TOLERANCE * largest)
    kind = "uint8 RGB" if with_normalization else "float32 RGB"
    assert metadata_of(path)["input"].startswith(kind)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["logits", "x"])
def test_an_onnx_graph_has_an_output_of_the_heads_name(tmp_path: Path, output: str) -> None:
    import onnxruntime

    section = StudentConfig.model_validate({**SMALL, "weights": "random"})
    student = load_model(section, widths={output: 3}, size=16, where="student")
    path = tmp_path / "student.onnx"
    write_onnx(StudentGraph(student.module, student.input, normalizes=False).eval(), path, {})
    (described,) = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).get_outputs()
    assert (described.name, described.shape[1]) == (output, 3)


@pytest.mark.slow
@pytest.mark.parametrize("returned", [("logits.pair", "logits.even"), ("logits.even",)])
@pytest.mark.parametrize("with_normalization", [False, True])
def test_a_graph_of_several_heads_has_a_named_output_for_each_trained_head(
    tmp_path: Path, returned: tuple[str, ...], with_normalization: bool
) -> None:
    import onnxruntime

    section = StudentConfig.model_validate(
        {**SMALL, "model": "python:tests.pipeline.student.small_networks:normalised"}
    )
    student = load_model(section, widths={"logits.pair": 3, "logits.even": 2}, size=16, where="student")
    graph = StudentGraph(student.module, student.input, normalizes=with_normalization, outputs=returned).eval()
    assert write_pt2(graph, tmp_path / "student.pt2", {}) == 0
    assert write_onnx(graph, tmp_path / "student.onnx", {}) <= TOLERANCE
    program = torch.export.load(tmp_path / "student.pt2").module()
    session = onnxruntime.InferenceSession(tmp_path / "student.onnx", providers=["CPUExecutionProvider"])
    assert tuple(output.name for output in session.get_outputs()) == returned
    for count in (1, 4):
        pixels_NCHW = pixels(count, 16)
        images_NCHW = normalised(pixels_NCHW, student.input)
        given = pixels_NCHW if with_normalization else images_NCHW
        expected = {name: output.detach() for name, output in student.module(images_NCHW).items() if name in returned}
        assert program(given).keys() == expected.keys()
        for name, values in zip(returned, session.run(None, {"images": given.numpy()}), strict=True):
            atol = TOLERANCE * float(expected[name].abs().max())
            torch.testing.assert_close(program(given)[name].detach(), expected[name], rtol=0, atol=atol)
            torch.testing.assert_close(torch.from_numpy(values), expected[name], rtol=0, atol=atol)


@pytest.mark.parametrize("network", [slow(name) if name in ("timm", "torchvision") else name for name in NETWORKS])
def test_exported_weights_have_no_projectors_and_initialise_another_student(
    finished: Finished, tmp_path: Path, network: str
) -> None:
    """The runs use ND, so their checkpoints have projectors to the teacher's width."""
    path = tmp_path / "student.safetensors"
    assert export_run(finished(network), str(path)).difference is None
    student = student_of(finished(network))
    assert load_file(path).keys() == student.module.network.state_dict().keys()
    section = StudentConfig.model_validate({**NETWORKS[network], "weights": str(path)})
    again = load_model(section, widths={"logits": 10}, size=student.input.size, where="student")
    images = normalised(pixels(3, student.input.size), student.input)
    assert torch.equal(again.module(images)["logits"], student.module(images)["logits"])


@pytest.mark.parametrize("suffix", ["safetensors", slow("pt2"), slow("onnx")])
def test_metadata_describe_the_network_and_its_input(finished: Finished, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"student.{suffix}"
    export_run(finished("distilled"), str(path))
    metadata = metadata_of(path)
    spec = student_of(finished("distilled")).input
    assert metadata["model"] == NETWORKS["distilled"]["model"]
    assert json.loads(metadata["kwargs"]) == NETWORKS["distilled"]["kwargs"]
    assert (metadata["num_classes"], metadata["size"], metadata["interpolation"]) == ("10", "32", "bicubic")
    assert (json.loads(metadata["mean"]), json.loads(metadata["std"])) == (list(spec.mean), list(spec.std))
    assert (metadata["checkpoint"], metadata["step"]) == ("last", "5")


def test_the_named_checkpoint_is_exported(replays: Replay, tmp_path: Path) -> None:
    """At this learning rate the last epoch is not the best."""
    base = replays("crop").config
    keys: dict[str, Any] = {"loss": CE, "data": {"val_shards": base.data.shards}}
    train(run_config(base, tmp_path / "run", train={"epochs": 3, "lr": 3.0}, **keys))
    names: list[tuple[CheckpointName, str]] = [("best", checkpoint.BEST), ("last", checkpoint.LAST)]
    for name, path in names:
        done = export_run(str(tmp_path / "run"), str(tmp_path / "a.safetensors"), checkpoint_name=name)
        assert (done.step == 15) == (name == "last")
        expected, written = state_of(tmp_path / "run", path)["model"], load_file(tmp_path / "a.safetensors")
        assert written.keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in written.items())


def test_an_export_is_written_to_any_store_in_the_format_of_the_option(finished: Finished) -> None:
    url = "memory://exports/weights"
    done = export_run(finished("cifar"), url, format="safetensors")
    data = storage.read(url)
    assert safetensors.torch.load(data)
    assert len(data) == done.size_bytes
    storage.delete(url)


class Dropped(nn.Module):
    """Random at every call, also in eval mode, so that a graph's logits differ from the network's."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(3, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.fc(images_BCHW.mean((2, 3))) + torch.rand(())


class Branching(Dropped):
    """Has no graph: its control flow depends on the pixels."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        pooled_BC = images_BCHW.mean((2, 3))
        return self.fc(pooled_BC) if float(pooled_BC.sum()) > 0 else self.fc(-pooled_BC)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.parametrize(
    ("network", "code"), [("Dropped", "export.graph-differs"), ("Branching", "export.not-a-graph")]
)
def test_a_network_without_an_equal_graph_is_refused_and_leaves_no_file(
    replays: Replay, tmp_path: Path, network: str, code: str, suffix: str
) -> None:
    student = {**SMALL, "model": f"python:{__name__}:{network}"}
    train(run_config(replays("crop").config, tmp_path / "run", student=student, train={"epochs": 1}))
    with raises(code):
        export_run(str(tmp_path / "run"), str(tmp_path / f"student.{suffix}"))
    assert not list(tmp_path.glob("student*"))


def test_only_the_best_checkpoint_of_an_unfinished_run_is_exported(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    keys: dict[str, Any] = {"data": {"val_shards": base.data.shards}, "train": {"epochs": 3}}
    config = run_config(base, tmp_path / "run", **keys)
    train_until(config, lambda event: event["kind"] == "eval" and event["epoch"] == 2)
    out = str(tmp_path / "student.safetensors")
    with raises("run.not-finished"):
        export_run(str(tmp_path / "run"), out)
    assert export_run(str(tmp_path / "run"), out, checkpoint_name="best").step == 5


def test_invalid_requests_are_refused_before_the_run_is_read(finished: Finished, tmp_path: Path) -> None:
    run = finished("cifar")
    with raises("run.not-found"):
        export_run(str(tmp_path / "nowhere"), str(tmp_path / "a.onnx"))
    for name in ("student.pth", "student"):
        with raises("export.unknown-format"):
            export_run(run, str(tmp_path / name))
    with raises("export.no-graph-to-normalize"):
        export_run(run, str(tmp_path / "a.safetensors"), with_normalization=True)
    with raises("storage.read-only-protocol"):
        export_run(run, "https://example.org/a.onnx")
    (tmp_path / "file").write_text("")
    with raises("storage.file-in-path"):
        export_run(run, str(tmp_path / "file" / "a.safetensors"))


def test_a_missing_package_is_named_with_what_installs_it(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with raises("export.missing-package", got="no onnxruntime") as caught:
        export_run(finished("cifar"), str(tmp_path / "a.onnx"))
    assert "stillroom[export]" in str(caught.value.next_step)
