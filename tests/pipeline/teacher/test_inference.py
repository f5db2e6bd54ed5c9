"""The teacher answers a row the same whatever stands beside it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.core.errors import LostGpuError, ResourceError
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.numerics import check_gpu, numeric_env, pick_device, pin_numerics, visible_gpus
from schemas.config import TeacherConfig
from tests.pipeline.cache import teachers
from tests.processors import printed
from tests.tolerances import magnitude_of, network_operations, reordered

CPU = torch.device("cpu")


def teacher(batch_size: int = 4, precision: str = "fp32", **keys: Any) -> Teacher:
    config = TeacherConfig.model_validate(
        {
            "model": "python:pipeline.models.cifar:resnet",
            "weights": "random",
            "kwargs": {"depth": 8, "widths": [4, 4, 6, 7]},
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.25],
            "batch_size": batch_size,
            "precision": precision,
            **keys,
        }
    )
    return load_teacher(config, num_classes=10, size=8, device=CPU)


def pixels(count: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(3).integers(0, 256, (count, 3, 8, 8), dtype=np.uint8))


def forward_error(outputs: NDArray[np.float32]) -> float:
    operations = network_operations(teacher().module, torch.zeros(1, 3, 8, 8), backward=False)
    return reordered(operations, magnitude_of(outputs))


@pytest.fixture(scope="module")
def four_at_a_time() -> Teacher:
    pin_numerics(1)
    return teacher(4)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 11), st.integers(0, 10))
def test_a_row_of_one_batch_position_has_the_same_bits_in_any_company(
    four_at_a_time: Teacher, count: int, start: int
) -> None:
    """Rows are at the same place of a batch when they start at a multiple of its size."""
    start = 4 * (start % 3)
    alone = four_at_a_time.infer(pixels(12)[start : start + count])
    whole = four_at_a_time.infer(pixels(12))
    rows = slice(start, min(12, start + count))
    assert np.array_equal(alone.logits_NK, whole.logits_NK[rows])
    assert np.array_equal(alone.embedding_ND, whole.embedding_ND[rows])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_padding_to_the_batch_size_changes_no_row(batch_size: int, four_at_a_time: Teacher) -> None:
    found, expected = teacher(batch_size).infer(pixels(11)), four_at_a_time.infer(pixels(11))
    np.testing.assert_allclose(found.logits_NK, expected.logits_NK, rtol=0, atol=forward_error(expected.logits_NK))
    assert found.logits_NK.shape == (11, 10)
    assert found.embedding_ND.shape == (11, 7)


def test_boxes_may_show_partners_of_another_batch(four_at_a_time: Teacher) -> None:
    partner_N = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.int32)
    lambda_N = np.full(10, 0.75, np.float32)
    cutmix_box_N4 = np.tile(np.array([0.25, 0.0, 0.5, 0.5], np.float32), (10, 1))
    cutmix_box_N4[::3] = 0
    found = four_at_a_time.infer(pixels(10), partner_N, lambda_N, cutmix_box_N4)
    boxed = pixels(10)
    boxed[:, :, 0:4, 2:6] = pixels(10)[partner_N.tolist(), :, 0:4, 2:6]
    by_hand = four_at_a_time.infer(boxed)
    blended = four_at_a_time.infer(pixels(10), partner_N, lambda_N)
    for row in range(10):
        expected = blended if row % 3 == 0 else by_hand
        assert np.array_equal(found.logits_NK[row], expected.logits_NK[row])


def test_partners_may_lie_in_another_batch(four_at_a_time: Teacher) -> None:
    partner_N = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.int32)
    lambda_N = np.linspace(0.5, 1, 10).astype(np.float32)
    in_batches = four_at_a_time.infer(pixels(10), partner_N, lambda_N)
    logits, embedding = four_at_a_time.forward(pixels(10), torch.from_numpy(partner_N), torch.from_numpy(lambda_N))
    for found, expected in ((in_batches.logits_NK, logits), (in_batches.embedding_ND, embedding)):
        np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=forward_error(found))


def test_a_row_alone_is_answered_as_if_nothing_were_mixed(four_at_a_time: Teacher) -> None:
    own = four_at_a_time.infer(pixels(6), np.arange(6, dtype=np.int32), np.ones(6, np.float32))
    assert np.array_equal(own.logits_NK, four_at_a_time.infer(pixels(6)).logits_NK)


def test_half_precision_answers_are_given_in_fp32() -> None:
    answers, exact = teacher(precision="bf16").infer(pixels(5)), teacher().infer(pixels(5))
    assert answers.logits_NK.dtype == answers.embedding_ND.dtype == np.float32
    difference = np.abs(answers.logits_NK - exact.logits_NK).max()
    assert 0 < difference < 0.05 * np.abs(exact.logits_NK).max()


def test_a_teacher_learns_nothing(four_at_a_time: Teacher) -> None:
    before = {name: tensor.clone() for name, tensor in four_at_a_time.state().items()}
    logits, _ = four_at_a_time.forward(pixels(4))
    assert not logits.requires_grad
    assert not four_at_a_time.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in four_at_a_time.state().items())


def test_the_environment_is_plain_json_and_names_what_changes_bytes() -> None:
    pin_numerics(1)
    environment = numeric_env(CPU, batch_size=8)
    assert json.loads(json.dumps(environment)) == environment
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert {"torchvision", "pillow", "pyarrow", "device", "batch_size"} <= environment.keys()


@pytest.mark.slow
def test_a_cpu_that_hides_instructions_is_another_environment() -> None:
    script = "import torch, json; from pipeline.teacher.numerics import numeric_env as env; "
    script += "print(json.dumps(env(torch.device('cpu'), batch_size=8)))"
    native = torch.backends.cpu.get_cpu_capability()
    whole, hidden = (json.loads(printed(script, capability=name)) for name in (native.lower(), "default"))
    assert hidden["cpu_capability"] == "DEFAULT"
    assert {name for name in whole if whole[name] != hidden[name]} <= {"cpu_capability"}
    assert (whole == hidden) == (native == "DEFAULT")


def test_numerics_stay_pinned_on_every_switch() -> None:
    torch.backends.cudnn.benchmark = True
    pin_numerics(1)
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_without_a_gpu_asked_for_the_device_is_the_cpu() -> None:
    assert pick_device(False) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has what the test lacks")
def test_a_gpu_that_torch_cannot_use_is_told_and_never_replaced_by_the_cpu() -> None:
    with pytest.raises(ResourceError, match=r"a GPU that torch cannot use[\s\S]*ray\.gpus_per_task"):
        pick_device(True)


def test_a_process_that_is_given_another_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = visible_gpus()
    check_gpu(torch.device("cuda"), seen)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_gpu(CPU, seen)
    with pytest.raises(LostGpuError, match=r"got: +CUDA_VISIBLE_DEVICES='0'\n +expected: +'3'"):
        check_gpu(torch.device("cuda"), seen)


@pytest.mark.parametrize(("batch_size", "room", "fits"), [(64, 63, 32), (64, 10, 8), (7, 3, 3), (9, 2, 2), (2, 1, 1)])
def test_a_batch_beyond_memory_is_refused_with_a_size_that_ran(
    batch_size: int, room: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, smaller = (
        teacher(size, model="python:tests.pipeline.cache.teachers:Large", kwargs={}) for size in (batch_size, fits)
    )
    monkeypatch.setattr(teachers, "max_rows", room)
    with pytest.raises(ResourceError, match=rf"batch_size={batch_size}\n[\s\S]*set teacher\.batch_size={fits},"):
        loaded.infer(pixels(4))
    assert smaller.infer(pixels(4)).logits_NK.shape == (4, 10)


def test_a_single_row_beyond_memory_is_refused_without_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = teacher(4, model="python:tests.pipeline.cache.teachers:Large", kwargs={})
    monkeypatch.setattr(teachers, "max_rows", 0)
    with pytest.raises(ResourceError, match=r"memory for a single row[\s\S]*a smaller views\.size") as caught:
        loaded.infer(pixels(4))
    assert "set teacher.batch_size" not in str(caught.value)
