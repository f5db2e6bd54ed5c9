"""The outputs of a row do not depend on the other rows; numerics and devices are those of the config."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline.core.errors import LostGpuError, ResourceError
from pipeline.teacher.inference import Teacher, load_teacher
from pipeline.teacher.numerics import (
    check_gpu,
    numeric_env,
    pick_device,
    pin_numerics,
    precision_warnings,
    visible_gpus,
)
from pipeline.teacher.rendering import Mixing
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
    return load_teacher(config, widths={"logits": 10}, size=8, device=CPU)


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
def test_a_row_at_one_batch_position_has_the_same_bits_among_any_other_rows(
    four_at_a_time: Teacher, count: int, start: int
) -> None:
    """Rows have the same batch position if they start at a multiple of the batch size."""
    start = 4 * (start % 3)
    alone = four_at_a_time.infer(pixels(12)[start : start + count])
    whole = four_at_a_time.infer(pixels(12))
    rows = slice(start, min(12, start + count))
    assert np.array_equal(alone["logits"], whole["logits"][rows])
    assert np.array_equal(alone["embedding"], whole["embedding"][rows])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 64])
def test_padding_to_the_batch_size_changes_no_row(batch_size: int, four_at_a_time: Teacher) -> None:
    actual, expected = teacher(batch_size).infer(pixels(11)), four_at_a_time.infer(pixels(11))
    np.testing.assert_allclose(actual["logits"], expected["logits"], rtol=0, atol=forward_error(expected["logits"]))
    assert actual["logits"].shape == (11, 10)
    assert actual["embedding"].shape == (11, 7)


def test_cutmix_partners_may_be_in_another_batch(four_at_a_time: Teacher) -> None:
    partner_N = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.int32)
    lambda_N = np.full(10, 0.75, np.float32)
    cutmix_box_N4 = np.tile(np.array([0.25, 0.0, 0.5, 0.5], np.float32), (10, 1))
    cutmix_box_N4[::3] = 0
    actual = four_at_a_time.infer(pixels(10), Mixing(partner_N, lambda_N, cutmix_box_N4))
    boxed = pixels(10)
    boxed[:, :, 0:4, 2:6] = pixels(10)[partner_N.tolist(), :, 0:4, 2:6]
    with_boxes = four_at_a_time.infer(boxed)
    blended = four_at_a_time.infer(pixels(10), Mixing(partner_N, lambda_N))
    for row in range(10):
        expected = blended if row % 3 == 0 else with_boxes
        assert np.array_equal(actual["logits"][row], expected["logits"][row])


def test_mixup_partners_may_be_in_another_batch(four_at_a_time: Teacher) -> None:
    partner_N = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0], np.int32)
    lambda_N = np.linspace(0.5, 1, 10).astype(np.float32)
    in_batches = four_at_a_time.infer(pixels(10), Mixing(partner_N, lambda_N))
    whole = four_at_a_time.forward(pixels(10), torch.from_numpy(partner_N), torch.from_numpy(lambda_N))
    assert list(in_batches) == list(whole) == ["logits", "embedding"]
    for name, found in in_batches.items():
        np.testing.assert_allclose(found, whole[name].numpy(), rtol=0, atol=forward_error(found))


def test_a_row_that_is_its_own_partner_is_not_mixed(four_at_a_time: Teacher) -> None:
    single = four_at_a_time.infer(pixels(6), Mixing(np.arange(6, dtype=np.int32), np.ones(6, np.float32)))
    assert np.array_equal(single["logits"], four_at_a_time.infer(pixels(6))["logits"])


def test_outputs_in_half_precision_are_fp32() -> None:
    outputs, exact = teacher(precision="bf16").infer(pixels(5)), teacher().infer(pixels(5))
    assert outputs["logits"].dtype == outputs["embedding"].dtype == np.float32
    difference = np.abs(outputs["logits"] - exact["logits"]).max()
    assert 0 < difference < 0.05 * np.abs(exact["logits"]).max()


def test_inference_does_not_change_a_teacher(four_at_a_time: Teacher) -> None:
    before = {name: tensor.clone() for name, tensor in four_at_a_time.state().items()}
    outputs = four_at_a_time.forward(pixels(4))
    assert not outputs["logits"].requires_grad
    assert not four_at_a_time.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in four_at_a_time.state().items())


def test_the_environment_is_plain_json_with_every_version_that_changes_bytes() -> None:
    pin_numerics(1)
    environment = numeric_env(CPU, batch_size=8)
    assert json.loads(json.dumps(environment)) == environment
    assert environment["threads"] == 1
    assert environment["torch"] == torch.__version__
    assert {"torchvision", "pillow", "pyarrow", "device", "batch_size"} <= environment.keys()


@pytest.mark.slow
def test_a_cpu_with_hidden_instructions_is_another_environment() -> None:
    script = "import torch, json; from pipeline.teacher.numerics import numeric_env as env; "
    script += "print(json.dumps(env(torch.device('cpu'), batch_size=8)))"
    native = torch.backends.cpu.get_cpu_capability()
    whole, hidden = (json.loads(printed(script, capability=name)) for name in (native.lower(), "default"))
    assert hidden["cpu_capability"] == "DEFAULT"
    assert {name for name in whole if whole[name] != hidden[name]} <= {"cpu_capability"}
    assert (whole == hidden) == (native == "DEFAULT")


def test_pinned_numerics_set_every_switch() -> None:
    torch.backends.cudnn.benchmark = True
    pin_numerics(1)
    assert not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_the_device_of_a_task_without_gpu_is_the_cpu() -> None:
    assert pick_device(False) == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_torch_cannot_use_is_refused_and_never_replaced_by_the_cpu() -> None:
    with pytest.raises(ResourceError) as caught:
        pick_device(True)
    assert (caught.value.code, caught.value.where) == ("ray.unusable-gpu", "ray.gpus_per_task")


def test_a_process_that_gets_another_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    first_visible = visible_gpus()
    check_gpu(torch.device("cuda"), first_visible)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_gpu(CPU, first_visible)
    with pytest.raises(LostGpuError) as caught:
        check_gpu(torch.device("cuda"), first_visible)
    assert (caught.value.code, caught.value.got) == ("ray.lost-gpu", "CUDA_VISIBLE_DEVICES='0'")
    assert str(caught.value.expected).startswith("'3'")


@pytest.mark.parametrize(
    ("batch_size", "max_rows", "fits"), [(64, 63, 32), (64, 10, 8), (7, 3, 3), (9, 2, 2), (2, 1, 1)]
)
def test_the_error_for_too_little_memory_has_a_batch_size_that_fits(
    batch_size: int, max_rows: int, fits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, smaller = (
        teacher(size, model="python:tests.pipeline.cache.teachers:Large", kwargs={}) for size in (batch_size, fits)
    )
    monkeypatch.setattr(teachers, "max_rows", max_rows)
    with pytest.raises(ResourceError) as caught:
        loaded.infer(pixels(4))
    assert (caught.value.code, caught.value.where) == ("model.out-of-memory", f"teacher.batch_size={batch_size}")
    assert str(caught.value.next_step).startswith(f"set teacher.batch_size={fits},")
    assert smaller.infer(pixels(4))["logits"].shape == (4, 10)


def test_the_error_for_a_single_row_beyond_memory_has_no_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = teacher(4, model="python:tests.pipeline.cache.teachers:Large", kwargs={})
    monkeypatch.setattr(teachers, "max_rows", 0)
    with pytest.raises(ResourceError) as caught:
        loaded.infer(pixels(4))
    assert (caught.value.code, caught.value.expected) == ("model.out-of-memory", "memory for a single row")
    assert "a smaller views.size" in str(caught.value.next_step)
    assert "set teacher.batch_size" not in str(caught.value)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86")
def test_a_precision_that_the_cpu_emulates_has_a_warning():
    flags = set(Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split())
    has_bf16 = {"avx512vl", "avx512bw", "avx512dq"} <= flags or "avx_ne_convert" in flags
    precisions = {"teacher.precision": "fp32", "train.precision": "bf16"}
    assert [text.partition(" ")[0] for text in precision_warnings(CPU, precisions)] == ["train.precision"][has_bf16:]
    assert precision_warnings(torch.device("cuda"), precisions) == []
