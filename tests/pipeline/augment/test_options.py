"""Augmentation parameters against a scalar loop, torchvision's statistics, frozen literals and laws."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import ks_2samp
from torchvision.transforms import RandomErasing

from pipeline.augment.options import OPS, cutmix_boxes
from pipeline.augment.params import ViewParams, unmix
from pipeline.cache.format.header import views_body, views_id
from schemas.cache_format import aug_param_columns
from schemas.config import ViewsConfig
from tests.pipeline.augment.test_known_answers import key, uniforms
from tests.pipeline.augment.test_params import ids, sample
from tests.tolerances import ulps

# Frozen: another value would be another format.
FROZEN = "f0ab1e059d9ec92749021e03819d9e2578f9965011754b4e0a1b06caaff6da96"


def plan_of(**options: Any) -> ViewsConfig:
    return ViewsConfig.model_validate({"kind": "function_matching", **options})


EVERYTHING = plan_of(
    seed=7,
    jitter={"probability": 0.8, "hue": 0.1},
    randaugment={"num_ops": 2, "magnitude": 12, "magnitude_spread": 6},
    erasing={"probability": 0.6},
    cutmix=0.5,
)


def sampled(plan: ViewsConfig, count: int = 200, view: int = 3) -> ViewParams:
    return sample(plan, ids(count), [view] * count, [(500, 375)] * count)


def scalar_uniforms(seed: int, name: str, view: int, stream: int, block: int) -> list[float]:
    return uniforms(key("view", seed, name), (block, view, stream, 0))


def test_jitter_equals_a_scalar_loop() -> None:
    plan = plan_of(jitter={"probability": 0.7, "brightness": 0.5, "contrast": 0.25, "saturation": 1.0, "hue": 0.125})
    actual = sampled(plan).aug_params
    for row, name in enumerate(ids(200)):
        choice, strength = (scalar_uniforms(0, name, 3, 3, block) for block in (0, 1))
        expected = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
        if choice[0] < 0.7:
            expected = {
                "brightness": 0.5 + strength[0],
                "contrast": 0.75 + 0.5 * strength[1],
                "saturation": 2 * strength[2],
                "hue": -0.125 + 0.25 * strength[3],
            }
        assert actual["jitter_order"][row] == int(choice[1] * 24)
        for column, value in expected.items():
            assert actual[f"jitter_{column}"][row] == np.float32(value), column


SCALES: dict[str, tuple[float, float]] = {
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 150 / 331),
    "translate_y": (0, 150 / 331),
    "rotate": (0, 30),
    "brightness": (1, 0.9),
    "saturation": (1, 0.9),
    "contrast": (1, 0.9),
    "sharpness": (1, 0.9),
}


def scalar_magnitude(op: str, strength: float, negative: bool) -> float:
    if op in SCALES:
        neutral, scale = SCALES[op]
        return neutral + (-scale if negative else scale) * strength
    return {"posterize": 8 - round(4 * strength), "solarize": 255 - 255 * strength}.get(op, 0)


def test_operations_and_magnitudes_equal_a_scalar_loop() -> None:
    plan = plan_of(randaugment={"num_ops": 3, "magnitude": 20, "magnitude_spread": 15})
    actual = sampled(plan).aug_params
    seen: set[str] = set()
    for row, name in enumerate(ids(200)):
        for number in range(3):
            u = scalar_uniforms(0, name, 3, 4, number)
            op = OPS[int(u[0] * 14)]
            level = min(max(5 + 30 * u[1], 0), 30)
            assert OPS[actual[f"op{number + 1}"][row]] == op
            expected = scalar_magnitude(op, level / 30, u[2] < 0.5)
            assert actual[f"op{number + 1}_magnitude"][row] == pytest.approx(expected, rel=ulps(1))
            seen.add(op)
    assert seen == {*OPS}


def scalar_erased(plan: ViewsConfig, name: str) -> list[float]:
    erasing = plan.erasing
    assert erasing is not None
    if scalar_uniforms(plan.seed, name, 3, 5, 0)[0] >= erasing.probability:
        return [0, 0, 0, 0]
    low, high = (math.log(bound) for bound in erasing.aspect)
    for attempt in range(10):
        u = scalar_uniforms(plan.seed, name, 3, 5, 1 + attempt)
        area = erasing.area[0] + (erasing.area[1] - erasing.area[0]) * u[0]
        aspect = math.exp(low + (high - low) * u[1])
        width, height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if width <= 1 and height <= 1:
            return [u[2] * (1 - width), u[3] * (1 - height), width, height]
    return [0, 0, 0, 0]


@pytest.mark.parametrize("area", [(0.02, 1 / 3), (0.6, 1.0)])
def test_erased_boxes_and_colours_equal_a_scalar_loop(area: tuple[float, float]) -> None:
    plan = plan_of(erasing={"probability": 0.8, "area": area, "aspect": [0.2, 5.0]})
    actual = sampled(plan).aug_params
    for row, name in enumerate(ids(200)):
        box = [float(actual[f"erase_{side}"][row]) for side in ("left", "top", "width", "height")]
        assert box == pytest.approx(scalar_erased(plan, name), rel=ulps(1))
        colour = [int(actual[f"erase_{name}"][row]) for name in ("red", "green", "blue")]
        assert colour == [int(256 * u) for u in scalar_uniforms(0, name, 3, 5, 0)[1:]]


def test_a_configured_colour_is_stored() -> None:
    actual = sampled(plan_of(erasing={"fill": [255, 0, 128]})).aug_params
    assert {tuple(actual[f"erase_{name}"].tolist()) for name in ("red", "green", "blue")} == {
        (255,) * 200,
        (0,) * 200,
        (128,) * 200,
    }


def test_cutmix_boxes_equal_a_scalar_loop_and_have_the_area_one_minus_lambda() -> None:
    params = sampled(plan_of(cutmix=0.4))
    box_N4 = cutmix_boxes(params.aug_params)
    assert box_N4 is not None
    for row, name in enumerate(ids(200)):
        u, weight = scalar_uniforms(0, name, 3, 6, 0), float(params.mix_lambda_N[row])
        side = math.sqrt(1 - weight)
        expected = [u[1] * (1 - side), u[2] * (1 - side), side, side] if u[0] < 0.4 else [0, 0, 0, 0]
        assert box_N4[row].tolist() == np.array(expected, np.float32).tolist()
        if u[0] < 0.4:
            assert float(box_N4[row, 2]) * float(box_N4[row, 3]) == pytest.approx(1 - weight, rel=ulps(2))
    assert 0 < (box_N4[:, 2] > 0).sum() < 200


def test_options_do_not_change_other_samples() -> None:
    plain, full = sampled(plan_of(seed=7)), sampled(EVERYTHING)
    assert plain.aug_params == {}
    for name in ("box_N4", "flip_N", "mix_lambda_N"):
        assert np.array_equal(getattr(plain, name), getattr(full, name))
    for option in ("jitter", "randaugment", "erasing", "cutmix"):
        alone = sampled(plan_of(seed=7, **{option: getattr(EVERYTHING, option)})).aug_params
        assert alone
        for name, values in alone.items():
            assert np.array_equal(values, full.aug_params[name]), name


def test_augmentation_parameters_are_frozen() -> None:
    names = ["train-00012/n01440764_18"] * 3 + ["val/ä"]
    params = sample(EVERYTHING, names, [0, 1, 2**40, 65_534], [(500, 375)] * 4)
    columns = "\n".join(f"{name} {values.dtype} {values.tolist()}" for name, values in params.aug_params.items())
    assert hashlib.sha256(columns.encode()).hexdigest() == FROZEN


def test_a_row_without_a_partner_is_not_mixed_and_has_no_box() -> None:
    params = sampled(plan_of(cutmix=1.0), 3)
    unmixed = unmix(params, np.array([False, True, False]))
    lambda_N = params.mix_lambda_N
    assert unmixed.mix_lambda_N.dtype == np.float32
    assert unmixed.mix_lambda_N.tolist() == [lambda_N[0], 1, lambda_N[2]]
    box_N4, unmixed_N4 = cutmix_boxes(params.aug_params), cutmix_boxes(unmixed.aug_params)
    assert box_N4 is not None
    assert unmixed_N4 is not None
    assert (box_N4[:, 2] > 0).all()
    assert unmixed_N4.tolist() == [box_N4[0].tolist(), [0, 0, 0, 0], box_N4[2].tolist()]


def test_eval_views_have_no_augmentation_parameters() -> None:
    assert sampled(ViewsConfig(kind="eval")).aug_params == {}


def test_erased_areas_and_aspects_are_distributed_as_torchvisions() -> None:
    count = 4000
    plan = plan_of(erasing={"probability": 1.0})
    actual = sampled(plan, count).aug_params
    view = torch.zeros(3, 1000, 1000)
    assert plan.erasing is not None
    area, aspect = list(plan.erasing.area), list(plan.erasing.aspect)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        boxes_N4 = np.array([RandomErasing.get_params(view, area, aspect, [0.0])[:4] for _ in range(count)]) / 1000
    top, left, height, width = boxes_N4.T
    erased = {side: actual[f"erase_{side}"].astype(np.float64) for side in ("left", "top", "width", "height")}
    # The two-sample bound at a significance of 1e-3; both samples are fixed.
    bound = 1.95 * math.sqrt(2 / count)
    assert ks_2samp(erased["width"] * erased["height"], width * height).statistic < bound
    # The aspect of torchvision is height / width.
    assert ks_2samp(erased["height"] / erased["width"], height / width).statistic < bound
    assert ks_2samp(erased["left"], left).statistic < bound
    assert ks_2samp(erased["top"], top).statistic < bound


UNIT = st.floats(0.01, 1, allow_nan=False)
JITTERS = st.fixed_dictionaries(
    {"probability": UNIT, "brightness": UNIT, "contrast": UNIT, "saturation": UNIT, "hue": st.floats(0, 0.5)}
)
OPERATIONS = st.fixed_dictionaries(
    {"num_ops": st.integers(1, 4), "magnitude": st.floats(0, 30), "magnitude_spread": st.floats(0, 30)}
)
ERASINGS = st.fixed_dictionaries(
    {"probability": UNIT, "fill": st.one_of(st.just("random"), st.tuples(*[st.integers(0, 255)] * 3))}
)
PLANS = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**62), "flip": UNIT},
    optional={"jitter": JITTERS, "randaugment": OPERATIONS, "erasing": ERASINGS, "cutmix": UNIT},
).map(lambda keys: plan_of(**keys))


@given(PLANS)
@settings(max_examples=40)
def test_columns_have_the_types_that_a_part_stores(plan: ViewsConfig) -> None:
    """So a replay from stored columns and an online run have the same values."""
    types = {name: pa.from_numpy_dtype(values_N.dtype) for name, values_N in sampled(plan, 3).aug_params.items()}
    assert types == aug_param_columns(plan)


@given(PLANS, PLANS, st.integers(1, 65_535), st.integers(1, 512))
@settings(max_examples=60)
def test_the_views_id_changes_exactly_if_a_meaningful_key_does(
    first: ViewsConfig, second: ViewsConfig, count: int, size: int
) -> None:
    size_keys = {"count", "size"}
    equal = first.model_dump(exclude=size_keys) == second.model_dump(exclude=size_keys)
    assert (views_id(first) == views_id(second)) == equal
    assert views_id(first) == views_id(first.model_copy(update={"count": count, "size": size}))


def test_the_id_of_a_plan_without_options_is_that_of_versions_without_options() -> None:
    # Frozen: caches of such plans carry it.
    assert views_id(plan_of(count=50, seed=0, size=224)) == "b39417b70e6b4f83"
    assert "jitter" not in views_body(plan_of())


def test_repeated_partners_change_the_views_id_and_partners_of_each_view_do_not() -> None:
    assert "mix_repeat" not in views_body(plan_of(mix_repeat=1))
    assert len({views_id(plan_of(mix_repeat=repeat)) for repeat in (1, 2, 4)}) == 3
    with pytest.raises(ValidationError, match="kind crop mixes nothing"):
        plan_of(kind="crop", mix_repeat=2)
