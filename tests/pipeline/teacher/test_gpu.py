"""Inference and builds on a GPU: its rounding, queued work, and running out of memory."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache.build.context import prepare
from pipeline.cache.build.part import PartTask, build_part
from pipeline.core.errors import ResourceError
from pipeline.teacher.inference import Teacher, load_teacher, run_inference
from pipeline.teacher.numerics import pick_device, pin_numerics
from pipeline.teacher.rendering import GroupViews
from schemas.cache_format import Commit, ViewBlock
from schemas.config import TeacherConfig
from tests.errors import raises
from tests.pipeline.conftest import TinyConfig
from tests.tolerances import magnitude_of, network_operations, reordered

pytestmark = pytest.mark.gpu
SIZE = 32


def teacher(*, precision: str = "fp32", batch_size: int = 8, use_gpu: bool = True) -> Teacher:
    pin_numerics(1)
    config = TeacherConfig.model_validate(
        {"model": "timm/resnet18", "weights": "random", "batch_size": batch_size, "precision": precision}
    )
    return load_teacher(config, widths={"logits": 1000}, size=SIZE, device=pick_device(use_gpu))


def group(*, num_rows: int, num_views: int, pinned: bool) -> GroupViews:
    """Noise, mixed in pairs, with the memory layout of ``read_groups``."""
    random = np.random.default_rng(num_rows)
    pixels = torch.from_numpy(random.integers(0, 256, (num_views, num_rows, SIZE, SIZE, 3), dtype=np.uint8))
    lambda_VN = random.uniform(0.5, 1, (num_views, num_rows)).astype(np.float32)
    return GroupViews(
        shard_id="s",
        samples=[],
        row_N=np.arange(num_rows, dtype=np.int32),
        content_hash_N=np.zeros(num_rows, np.uint64),
        targets={"label": np.zeros(num_rows, np.int32)},
        box_VN4=np.zeros((num_views, num_rows, 4), np.int32),
        flip_VN=np.zeros((num_views, num_rows), np.bool_),
        partner_VN=np.tile(np.arange(num_rows, dtype=np.int32)[::-1], (num_views, 1)),
        mix_lambda_VN=lambda_VN,
        aug_params_VN={},
        pixels_VNCHW=(pixels.pin_memory() if pinned else pixels).movedim(-1, -3),
    )


def test_outputs_of_a_gpu_in_fp32_are_close_to_those_of_the_cpu() -> None:
    (on_gpu,) = run_inference(iter([group(num_rows=21, num_views=2, pinned=True)]), teacher())
    (on_cpu,) = run_inference(iter([group(num_rows=21, num_views=2, pinned=False)]), teacher(use_gpu=False))
    module = teacher(use_gpu=False).module
    error = reordered(network_operations(module, torch.zeros(1, 3, SIZE, SIZE), backward=False))
    for actual, expected in zip(on_gpu.outputs(), on_cpu.outputs(), strict=True):
        for values, reference in (
            (actual["logits"], expected["logits"]),
            (actual["embedding"], expected["embedding"]),
        ):
            np.testing.assert_allclose(values, reference, rtol=0, atol=error * magnitude_of(reference))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_queued_groups_have_the_outputs_of_single_groups(precision: str) -> None:
    model = teacher(precision=precision)
    groups = [group(num_rows=num_rows, num_views=3, pinned=True) for num_rows in (16, 9, 23, 16)]
    single = [next(iter(run_inference(iter([views]), model))).outputs() for views in groups]
    # All groups are queued before the first wait.
    queued = list(run_inference(iter(groups), model))
    for outputs, expected in zip(queued, single, strict=True):
        for view, expected_view in zip(outputs.outputs(), expected, strict=True):
            assert np.array_equal(view["logits"], expected_view["logits"])
            assert np.array_equal(view["embedding"], expected_view["embedding"])


def test_the_busy_times_of_queued_groups_do_not_exceed_the_elapsed_time() -> None:
    model = teacher()
    next(iter(run_inference(iter([group(num_rows=16, num_views=3, pinned=True)]), model))).outputs()
    began = time.monotonic()
    queued = list(run_inference((group(num_rows=16, num_views=3, pinned=True) for _ in range(4)), model))
    busy = [outputs.busy_s() for outputs in queued]
    assert min(busy) > 0
    assert sum(busy) <= time.monotonic() - began


def test_page_locked_pixels_change_no_bit() -> None:
    model = teacher(precision="bf16")
    pinned, pageable = (group(num_rows=12, num_views=1, pinned=flag) for flag in (True, False))
    assert pinned.pixels_VNCHW.is_pinned()
    first, second = (outputs.outputs()[0] for outputs in run_inference(iter([pinned, pageable]), model))
    assert np.array_equal(first["logits"], second["logits"])


def test_the_error_for_too_little_memory_has_a_batch_size_that_fits() -> None:
    pixels = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    free_bytes, total_bytes = torch.cuda.mem_get_info()
    taken = min(free_bytes, 2 << 30)
    torch.cuda.set_per_process_memory_fraction(taken / total_bytes)
    try:
        with raises("model.out-of-memory", ResourceError) as caught:
            teacher(batch_size=1 << 18).infer(pixels)
        fits = int(str(caught.value.next_step).partition("batch_size=")[2].partition(",")[0])
        assert teacher(batch_size=fits).infer(pixels)["logits"].shape == (1, 1000)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_builds_on_a_gpu_produce_the_same_part(tiny_config: TinyConfig, tmp_path: Path) -> None:
    assert [first_part(tiny_config, tmp_path / name).part.sha256 for name in "ab"] == [
        first_part(tiny_config, tmp_path / "c").part.sha256
    ] * 2


def first_part(tiny_config: TinyConfig, folder: Path) -> Commit:
    config = tiny_config(cache={"url": str(folder)}, ray={"gpus_per_task": 1}, teacher={"precision": "bf16"})
    assert isinstance(config.data.shards, tuple)
    prepare(config)
    return build_part(PartTask(config, config.data.shards[0], ViewBlock(start=0, stop=2)))
