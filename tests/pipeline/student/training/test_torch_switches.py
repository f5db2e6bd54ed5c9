"""Compiled and deterministic training, and the errors where either is not available."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.student.training.torch_switches import check_compiler, demand_workspace, deterministic
from pipeline.student.training.trainer import train
from tests.errors import raises
from tests.pipeline.student.conftest import Replay
from tests.pipeline.student.runs import (
    CE,
    KD,
    NORMALISED,
    SMALL,
    assert_weights_close,
    losses,
    metrics,
    run_config,
    state_of,
    training_error,
)

CPU = torch.device("cpu")
# The compiler warns of what it does itself: it looks at .grad of inputs between two of its graphs.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_compiled_student_learns_what_an_ordinary_one_does_under_the_same_names(
    replays: Replay, tmp_path: Path
) -> None:
    """With a short last step, which has a different shape."""
    base = replays("function_matching").config
    for compiled in (False, True):
        keys: dict[str, Any] = {"epochs": 2, "optimizer": "sgd", "lr": 0.05, "compile": compiled}
        sections = {"student": NORMALISED, "loss": [*CE, *KD], "data": {"val_shards": base.data.shards}}
        config = run_config(base, tmp_path / str(compiled), train=keys, **sections)
        train(config)
    ordinary, compiled_losses = (losses(tmp_path / name) for name in ("False", "True"))
    error = training_error(config, len(ordinary))
    assert compiled_losses == pytest.approx(ordinary, rel=error)
    weights, expected = (state_of(tmp_path / name)["model"] for name in ("True", "False"))
    assert weights.keys() == expected.keys()
    assert_weights_close(weights, expected, error)


@pytest.mark.slow
def test_a_machine_without_a_compiler_is_refused_before_training(
    replays: Replay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with (
        torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),
        raises("train.compile-unavailable") as caught,
    ):
        train(run_config(replays("crop").config, tmp_path / "run", train={"compile": True}))
    assert "InvalidCxxCompiler: No working C++ compiler found" in str(caught.value.got)
    assert not (tmp_path / "run").exists()
    torch.compiler.reset()
    check_compiler(CPU)


def test_an_operation_without_a_deterministic_form_stops_the_training_by_name(replays: Replay, tmp_path: Path) -> None:
    student = {**SMALL, "model": "python:tests.pipeline.student.small_networks:Undecided"}
    config = run_config(replays("crop").config, tmp_path, student=student, train={"deterministic": True})
    with raises("train.not-deterministic") as caught:
        train(config)
    assert "put_" in str(caught.value.got)
    train(run_config(replays("crop").config, tmp_path / "again", student=student))


def test_a_deterministic_run_gives_the_bits_of_an_ordinary_one_on_a_cpu(replays: Replay, tmp_path: Path) -> None:
    base = replays("crop").config
    for expected in (False, True):
        train(run_config(base, tmp_path / str(expected), student=NORMALISED, train={"deterministic": expected}))
    assert metrics(tmp_path / "True") == metrics(tmp_path / "False")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_workspace_that_is_not_deterministic_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with raises("train.cublas-workspace") as caught:
        demand_workspace()
    assert caught.value.got == ":0:0"


def test_synchronised_batch_norm_on_a_cpu_is_refused_before_training(replays: Replay, tmp_path: Path) -> None:
    config = run_config(replays("crop").config, tmp_path / "run", student=NORMALISED, train={"sync_batch_norm": True})
    with raises("train.sync-batch-norm-on-cpu"):
        train(config)
    assert not (tmp_path / "run").exists()


def test_other_errors_pass_as_they_are() -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"), deterministic(True):
        raise RuntimeError("something else")
