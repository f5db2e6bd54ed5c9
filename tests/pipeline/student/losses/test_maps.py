"""Losses on maps of logits, against torch's losses and loops in float64 over positions."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, interpolate

from pipeline.models.maps import at_centres, to_grid
from pipeline.student.losses import MAP_LOSSES, BatchShare, CompositeLoss, LossInputs, TeacherInputs
from pipeline.student.losses.maps import ce_map, cwd, dist_map, kd_map
from pipeline.tasks import task_of
from pipeline.tasks.masks import mask_of_view
from pipeline.tasks.view_geometry import visible_size
from schemas.config import Config, DataConfig
from tests.errors import raises
from tests.pipeline.student.losses.batches import SEEDS, assert_equals_oracle, law, random_pair, teacher_outputs
from tests.pipeline.student.losses.test_dist import mean_relation
from tests.tolerances import kl_error, log_softmax_error, ulps

IGNORE = 255
SIZE = (12, 20)
TASK = task_of(DataConfig.model_validate({"task": "segmentation", "num_classes": 5}))
TEMPERATURES = st.sampled_from([1.0, 4.0])


def visible(num_rows: int, *, seed: int) -> Tensor:
    """bool [B,12,20]: all of the first view, and the upper left or right of others."""
    generator = torch.Generator().manual_seed(seed)
    shown = torch.zeros(num_rows, *SIZE, dtype=torch.bool)
    for row in range(num_rows):
        height, width = (int(torch.randint(1, side + 1, (), generator=generator)) if row else side for side in SIZE)
        shown[row, :height, :width] = True
    return shown.flip(2) if seed % 2 else shown


def masks(num_rows: int, num_classes: int, *, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mask_BHW = torch.randint(0, num_classes, (num_rows, *SIZE), generator=generator, dtype=torch.uint8)
    return mask_BHW.masked_fill(torch.rand(mask_BHW.shape, generator=generator) < 0.3, IGNORE)


def counted_positions(visible_BHW: Tensor, grid: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Of each row, the cells whose centre lies in a pixel that shows the image."""
    rows: list[list[tuple[int, int]]] = []
    for visible_HW in visible_BHW:
        centres = [
            (y, x, math.floor((y + 0.5) * SIZE[0] / grid[0]), math.floor((x + 0.5) * SIZE[1] / grid[1]))
            for y in range(grid[0])
            for x in range(grid[1])
        ]
        rows.append([(y, x) for y, x, row, column in centres if visible_HW[row, column]])
    return rows


@law
@given(seed=SEEDS, grid=st.sampled_from([(3, 5), (12, 20), (5, 7), (1, 1)]), smoothing=st.sampled_from([0.0, 0.1]))
def test_ce_is_that_of_torch_at_the_size_of_the_mask(seed: int, grid: tuple[int, int], smoothing: float) -> None:
    """Four products and three sums of an interpolation, log softmax, and a mean of up to B·H·W values; a probability in
    the gradient is the exp of a logarithm, and a position sums the gradients of the pixels around it."""
    student_BKhw, _ = random_pair(seed, 2, 4, *grid)
    mask_BHW = masks(2, 4, seed=seed)
    keys = {"label_smoothing": smoothing}

    def oracle(logits_BKhw: Tensor) -> Tensor:
        logits_BKHW = interpolate(logits_BKhw, SIZE, mode="bilinear", align_corners=False)
        return cross_entropy(logits_BKHW, mask_BHW.long(), ignore_index=IGNORE, **keys)

    of_log = log_softmax_error(student_BKhw.movedim(1, -1)) + 2 * ulps(7, student_BKhw.abs().max().item())
    largest = 2 * student_BKhw.abs().max().item() + math.log(4)
    assert_equals_oracle(
        lambda logits_BKhw: ce_map(logits_BKhw, mask_BHW, ignore_index=IGNORE, **keys),
        oracle,
        student_BKhw,
        value_error=of_log + ulps(mask_BHW.numel() + 4, largest),
        gradient_error=of_log + ulps(mask_BHW.numel() + 12),
    )


@law
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_kd_is_the_mean_over_the_counted_positions_of_a_row(seed: int, temperature: float) -> None:
    student_BKhw, teacher_BKhw = random_pair(seed, 3, 5, 3, 5, scale=2.0)
    visible_BHW = visible(3, seed=seed)
    positions = counted_positions(visible_BHW, (3, 5))

    def oracle(logits_BKhw: Tensor) -> Tensor:
        rows: list[Tensor] = []
        for row, counted in enumerate(positions):
            values: list[Tensor] = [0 * logits_BKhw.sum()]
            for y, x in counted:
                p_K, q_K = ((z[row, :, y, x] / temperature).softmax(0) for z in (teacher_BKhw.double(), logits_BKhw))
                values.append((p_K * (p_K / q_K).log()).sum())
            rows.append(torch.stack(values).sum() / max(len(counted), 1))
        return temperature**2 * torch.stack(rows).mean()

    of_logs = 2 * log_softmax_error(torch.stack([student_BKhw, teacher_BKhw]).movedim(2, -1) / temperature)
    kl = kl_error(student_BKhw.movedim(1, -1) / temperature, teacher_BKhw.movedim(1, -1) / temperature)
    assert_equals_oracle(
        lambda logits_BKhw: kd_map(logits_BKhw, teacher_BKhw, visible_BHW, temperature=temperature),
        oracle,
        student_BKhw,
        value_error=temperature**2 * kl,
        gradient_error=temperature * (of_logs + ulps(12)),
    )


@law
@given(seed=SEEDS, aux_weight=st.sampled_from([0.0, 0.4]))
def test_dist_is_the_published_formula_of_the_counted_positions(seed: int, aux_weight: float) -> None:
    """Within 1e-5, in float64, for logits of a usual size."""
    maps = 3 * torch.randn(3, 2, 19, 4, 6, generator=torch.Generator().manual_seed(seed))
    visible_BHW = visible(2, seed=seed)
    at = [(row, y, x) for row, counted in enumerate(counted_positions(visible_BHW, (4, 6))) for y, x in counted]

    def oracle(logits_BKhw: Tensor) -> Tensor:
        p_NK, q_NK = (
            torch.stack([map_BKhw[row, :, y, x].double().softmax(0) for row, y, x in at])
            for map_BKhw in (logits_BKhw, maps[1])
        )
        return 2 - mean_relation(p_NK, q_NK) - mean_relation(p_NK.T, q_NK.T)

    value = dist_map(maps[0], maps[1], visible_BHW, temperature=1.0, aux_weight=aux_weight, aux_BKhw=maps[2])
    assert value.item() == pytest.approx((oracle(maps[0]) + aux_weight * oracle(maps[2])).item(), rel=0, abs=1e-5)


@law
@given(seed=SEEDS, temperature=TEMPERATURES)
def test_cwd_compares_softmaxes_over_the_counted_positions_of_a_class(seed: int, temperature: float) -> None:
    student_BKhw, teacher_BKhw = random_pair(seed, 2, 3, 3, 5, scale=2.0)
    visible_BHW = visible(2, seed=seed)
    positions = counted_positions(visible_BHW, (3, 5))

    def oracle(logits_BKhw: Tensor) -> Tensor:
        total = 0 * logits_BKhw.sum()
        for row, counted in enumerate(positions):
            for k in range(3 if counted else 0):
                p_P, q_P = (
                    torch.stack([z[row, k, y, x] / temperature for y, x in counted]).softmax(0)
                    for z in (teacher_BKhw.double(), logits_BKhw)
                )
                total = total + (p_P * (p_P / q_P).log()).sum()
        return temperature**2 * total / (2 * 3)

    of_logs = 2 * log_softmax_error(torch.stack([student_BKhw, teacher_BKhw]).flatten(3) / temperature)
    kl = kl_error(student_BKhw.flatten(2) / temperature, teacher_BKhw.flatten(2) / temperature)
    assert_equals_oracle(
        lambda logits_BKhw: cwd(logits_BKhw, teacher_BKhw, visible_BHW, temperature=temperature),
        oracle,
        student_BKhw,
        value_error=temperature**2 * kl,
        gradient_error=temperature * (of_logs + ulps(15 + 6)),
    )


@pytest.mark.parametrize("name", ["kd", "dist", "cwd"])
def test_padding_never_counts(name: str) -> None:
    """Neither in the value nor in the gradient, on equal grids, also if a row shows no centre of a cell."""
    student_BKhw, teacher_BKhw = random_pair(3, 2, 5, 3, 5)
    visible_BHW = torch.zeros(2, *SIZE, dtype=torch.bool)
    visible_BHW[0, :8, :13], visible_BHW[1, :1, :1] = True, True
    counted_Bhw = at_centres(visible_BHW, (3, 5))
    assert counted_Bhw.sum(dim=(1, 2)).tolist() == [2 * 3, 0]
    others = [map_BKhw.where(counted_Bhw[:, None], 50.0) for map_BKhw in (student_BKhw, teacher_BKhw)]
    values: list[Tensor] = []
    for student, teacher in ((student_BKhw, teacher_BKhw), others):
        student = student.clone().requires_grad_()
        value = MAP_LOSSES[name](student, teacher, visible_BHW, temperature=2.0)
        value.backward()
        assert not student.grad.movedim(1, -1)[~counted_Bhw].any()
        assert student.grad.movedim(1, -1)[counted_Bhw].any()
        values.append(value.detach())
    torch.testing.assert_close(*values)


def test_the_centres_of_a_grid_are_those_by_which_a_view_shows_pixels() -> None:
    """The part of a view that shows the image, on a grid, is what a view of the grid's size shows of it."""
    original = (30, 50)
    for box in [(0, 0, 50, 30), (10, 5, 60, 40), (3, 20, 90, 25), (49, 29, 7, 8)]:
        height, width = visible_size(box, SIZE, original)
        visible_BHW = torch.zeros(1, *SIZE, dtype=torch.bool)
        visible_BHW[:, :height, :width] = True
        assert at_centres(visible_BHW, SIZE).equal(visible_BHW)
        for grid in ((3, 5), (6, 10), (5, 7)):
            shown_HW = mask_of_view(visible_BHW[0].numpy().astype(np.uint8), (0, 0, *SIZE[::-1]), False, grid, ignore=2)
            assert at_centres(visible_BHW, grid)[0].tolist() == shown_HW.astype(bool).tolist()


@pytest.mark.parametrize("grid", [(6, 9), (12, 18), (5, 4), (9, 18), (4, 9)])
def test_a_map_on_a_finer_grid_is_bilinear_and_on_a_coarser_one_the_mean_of_its_cells(grid: tuple[int, int]) -> None:
    map_BKhw = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    between = min(grid[0], 6), min(grid[1], 9)
    if all(side % new == 0 for side, new in zip((6, 9), between, strict=True)):
        expected = adaptive_avg_pool2d(map_BKhw, between)
    else:  # 60 and 36 are multiples of both grids, so that every cell has whole positions
        expected = adaptive_avg_pool2d(map_BKhw.repeat_interleave(10, 2).repeat_interleave(4, 3), between)
    expected = interpolate(expected, grid, mode="bilinear", align_corners=False)
    # The weights have 24 bits.
    torch.testing.assert_close(to_grid(map_BKhw, grid), expected, rtol=0, atol=ulps(8, 4))


def inputs(num_rows: int, *, seed: int) -> dict[str, Any]:
    student_BKhw, teacher_BKhw = random_pair(seed, num_rows, 5, 3, 5)
    return {
        "student": student_BKhw,
        "aux": student_BKhw.flip(1),
        "teacher": teacher_BKhw,
        "mask": masks(num_rows, 5, seed=seed),
        "visible": visible(num_rows, seed=seed),
    }


def of_batch(loss: CompositeLoss, batch: dict[str, Any], *, num_pixels: int, num_rows: int, world_size: int) -> Tensor:
    own_pixels = int((batch["mask"] != IGNORE).sum())
    share = BatchShare(
        world_size=world_size,
        num_rows=len(batch["mask"]),
        num_rows_global=num_rows,
        num_labelled={"mask": own_pixels},
        num_labelled_global={"mask": num_pixels},
    )
    inputs = LossInputs(
        outputs={"logits": batch["student"], "aux": batch["aux"], "embedding": batch["student"].mean((2, 3))},
        targets={"mask": batch["mask"]},
        teachers=(TeacherInputs(outputs=teacher_outputs({None: batch["teacher"]})),),
        visible_BHW=batch["visible"],
    )
    return loss(inputs, share, epoch=0)[0]


def compose(*sections: dict[str, Any]) -> CompositeLoss:
    return CompositeLoss(Config.model_validate({"loss": sections}).loss, TASK, where="a test")


def test_the_mean_over_ranks_is_the_loss_of_the_global_batch() -> None:
    """Also where ranks have other numbers of rows, and of pixels with a class."""
    loss = compose(
        {"name": "ce", "aux_weight": 0.4}, {"name": "kd", "temperature": 2.0, "weight": 3.0}, {"name": "cwd"}
    )
    batch = inputs(3, seed=4)
    batch["mask"][0, 2:] = IGNORE
    keys = {"num_pixels": int((batch["mask"] != IGNORE).sum()), "num_rows": 3}
    expected = of_batch(loss, batch, world_size=1, **keys)
    ranks = [{name: values[rows] for name, values in batch.items()} for rows in (slice(0, 1), slice(1, 3))]
    mean = sum(of_batch(loss, rank, world_size=2, **keys) for rank in ranks) / 2
    torch.testing.assert_close(mean, expected)


@pytest.mark.parametrize(
    ("data", "section", "code"),
    [
        ({}, {"name": "ce", "aux_weight": 0.4}, "loss.option-of-other-head"),
        ({}, {"name": "cwd"}, "loss.other-task"),
        ({"task": "segmentation"}, {"name": "ce", "prior": "balanced"}, "loss.option-of-other-head"),
        ({"task": "segmentation"}, {"name": "dkd"}, "loss.other-task"),
        ({"task": "segmentation"}, {"name": "nd"}, "loss.other-task"),
    ],
)
def test_losses_and_options_of_other_tasks_are_refused(
    data: dict[str, Any], section: dict[str, Any], code: str
) -> None:
    config = Config.model_validate({"loss": [section], "data": {"num_classes": 5, **data}})
    with raises(code) as caught:
        CompositeLoss(config.loss, task_of(config.data), where="loss")
    assert str(caught.value.where).startswith("loss.0.")


def test_an_auxiliary_head_is_read_only_with_a_weight() -> None:
    assert "aux" not in compose({"name": "ce"}, {"name": "dist"}).student_outputs
    assert "aux" in compose({"name": "ce"}, {"name": "dist", "aux_weight": 0.4}).student_outputs
    assert all("aux_weight" in inspect.signature(loss).parameters for loss in MAP_LOSSES.values())
