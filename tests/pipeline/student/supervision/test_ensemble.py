"""Several teachers: their losses are summed, over the same views of the same samples, or training does not begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.cache.read.reader import TeacherCache, open_cache
from pipeline.core.errors import ConfigError
from pipeline.shards.writer import Members, pack_shards
from pipeline.student.data.ensemble import check_same_plans, check_same_samples, check_same_shards
from pipeline.student.data.teacher_outputs import decode_outputs
from pipeline.student.evaluation.evaluator import evaluate_run
from pipeline.student.supervision.canaries import check_canaries
from pipeline.student.training.config_checks import check_config, check_training
from pipeline.student.training.trainer import train
from schemas.config import Config
from tests.errors import raises
from tests.marks import slow
from tests.pipeline.caches import TinyCache, build, cache_section, copy_of, digit_samples
from tests.pipeline.student.conftest import NUM_VIEWS, Replay
from tests.pipeline.student.runs import (
    CE,
    NORMALISED,
    SMALL,
    cached_source,
    index_shards,
    metrics,
    rewrite_view,
    run_config,
    set_cell,
    state_of,
    summary_of,
    train_until,
    training_error,
)
from tests.tolerances import ulps

SIZED = {**SMALL, "size": 16}
ALL_TERMS = [*CE, {"name": "kd", "temperature": 2.0}, {"name": "dist"}, {"name": "nd"}]
EVERY_LOSS = [
    *CE,
    *({"name": name, "temperature": 1.0} for name in ("kd", "dist", "dkd")),
    *({"name": name} for name in ("hard", "nd", "cosine", "mse")),
]
REVIEW = {"name": "review_kd", "student_layers": ["conv2"], "teacher_layers": ["layer3"]}
Rebuild = Callable[..., TinyCache]


def together(url: Path, *caches: TinyCache, **sections: Any) -> Config:
    """A run of ``Small`` at 16 pixels from several caches."""
    sections = {"data": {"shards": None}, "teacher": {"model": None}, "student": SIZED, **sections}
    sections["data"] = {"cache": [cache.url for cache in caches], **sections["data"]}
    return run_config(caches[0].config, url, **sections)


def online(url: Path, first: TinyCache, *others: TinyCache, **sections: Any) -> Config:
    """The same run with the teachers of these caches online, each with the class means of its cache."""
    listed = [
        {
            **cache.config.teacher.model_dump(mode="json", exclude_unset=True),
            "size": cache.config.views.size,
            "class_means": cache.url,
        }
        for cache in others
    ]
    teacher = {"class_means": first.url, "others": listed, **sections.pop("teacher", {})}
    config = run_config(first.config, url, mode="online", **{"student": SIZED, "teacher": teacher, **sections})
    index_shards(config, url / "index")
    return config


@pytest.fixture
def rebuilt(replays: Replay, tmp_path: Path) -> Rebuild:
    """``rebuilt(views={"seed": 5})``: a cache of two views, with these changes to the config."""

    def make(**sections: dict[str, Any]) -> TinyCache:
        tree = replays("crop").config.model_dump(mode="json", exclude_unset=True)
        changes = {"views": {"count": 2}, "cache": {"url": str(tmp_path / "rebuilt"), "class_means": "none"}}
        for part in (changes, sections):
            for section, keys in part.items():
                tree[section] = {**tree[section], **keys}
        config = Config.model_validate(tree)
        build(config)
        return TinyCache(cache_section(config).url, config)

    return make


def first_step(url: Path, *caches: TinyCache, loss: list[dict[str, Any]]) -> dict[str, float]:
    train(together(url, *caches, loss=loss, train={"epochs": 1}))
    return metrics(url)[0]


def test_losses_are_the_sums_of_those_with_each_teacher_alone(
    replays: Replay, wide_cache: TinyCache, tmp_path: Path
) -> None:
    """Before the first step the student, its rows and its views are the same for any teacher."""
    loss = [{"name": name, "temperature": 2.0, "weight": 0.5} for name in ("kd", "dist")]
    caches = replays("crop"), wide_cache
    both = first_step(tmp_path / "both", *caches, loss=loss)
    alone = [first_step(tmp_path / str(number), cache, loss=loss) for number, cache in enumerate(caches)]
    for key in ("loss/kd", "loss/dist"):
        values = [record[key] for record in alone]
        assert values[0] != pytest.approx(values[1], rel=1e-3)
        assert [both[f"{key}/{number}"] for number in (0, 1)] == values
        assert both[key] == pytest.approx(sum(values), rel=ulps(1))
    assert both["loss"] == pytest.approx(0.5 * (both["loss/kd"] + both["loss/dist"]), rel=ulps(4))


def test_a_list_of_one_cache_equals_that_cache(replays: Replay, tmp_path: Path) -> None:
    cache = replays("crop")
    listed = run_config(cache.config, tmp_path, data={"cache": [cache.url]})
    assert listed.data.caches == run_config(cache.config, tmp_path).data.caches == (cache.url,)


@pytest.mark.slow
def test_every_loss_trains_from_two_teachers_of_different_widths(
    replays: Replay, wide_cache: TinyCache, tmp_path: Path
) -> None:
    train(together(tmp_path, replays("crop"), wide_cache, loss=ALL_TERMS, train={"epochs": 10, "lr": 0.02}))
    curve = [record["loss"] for record in metrics(tmp_path)]
    assert sum(curve[-5:]) < 0.8 * sum(curve[:5])
    state = state_of(tmp_path)
    assert [state["projectors"][f"nd.{number}.2.weight"].shape for number in (0, 1)] == [(7, 16), (9, 16)]


@pytest.mark.slow
def test_two_teachers_resume_bitwise(replays: Replay, wide_cache: TinyCache, tmp_path: Path) -> None:
    caches, keys = (replays("crop"), wide_cache), {"loss": ALL_TERMS, "train": {"epochs": 3}}
    train(together(tmp_path / "straight", *caches, **keys))
    stopped = together(tmp_path / "stopped", *caches, **keys)
    train_until(stopped, lambda event: event["kind"] == "step" and event["step"] == 9)
    train(stopped)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "straight")
    straight, resumed = (state_of(tmp_path / name) for name in ("straight", "stopped"))
    for part in ("model", "projectors"):
        assert all(torch.equal(value, resumed[part][key]) for key, value in straight[part].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "size", "accumulate"),
    [("crop", 16, 1), slow("function_matching", 12, 1), slow("function_matching", 24, 2)],
)
def test_parity_every_loss_of_two_cached_teachers_is_that_of_the_two_online(
    replays: Replay, wide_caches: Replay, tmp_path: Path, kind: str, size: int, accumulate: int
) -> None:
    """Their inputs are 16 and 12 pixels, their embeddings 7 and 9 dimensions."""
    caches = replays(kind), wide_caches(kind)
    keys: dict[str, Any] = {
        "student": {**NORMALISED, "size": size},
        "loss": EVERY_LOSS,
        # A slow descent: on so many terms at once, larger steps would multiply errors of rounding.
        # As many epochs as both caches have views: the teachers online continue with new ones.
        "train": {"epochs": NUM_VIEWS - 2, "optimizer": "sgd", "momentum": 0.0, "lr": 0.002, "accumulate": accumulate},
    }
    train(together(tmp_path / "cached", *caches, **keys))
    config = online(tmp_path / "online", *caches, **keys)
    train(config)
    cached, online_metrics = metrics(tmp_path / "cached"), metrics(tmp_path / "online")
    assert len(cached) == 5 * (NUM_VIEWS - 2)
    for from_cache, from_online in zip(cached, online_metrics, strict=True):
        assert {f"loss/{term['name']}/{number}" for term in EVERY_LOSS[1:] for number in (0, 1)} < from_cache.keys()
        assert from_cache.keys() == from_online.keys()
        error = training_error(config, from_cache["step"] + 1)
        for name, value in from_cache.items():
            assert value == pytest.approx(from_online[name], rel=error), name
    for name, cache in zip(("manifest.json", "manifest-1.json"), caches, strict=True):
        assert (tmp_path / "online" / name).read_bytes() == storage.read(f"{cache.url}/manifest.json")


def test_class_means_of_another_online_teacher_are_refused(
    replays: Replay, wide_cache: TinyCache, tmp_path: Path
) -> None:
    config = online(tmp_path / "run", replays("crop"), wide_cache, loss=[{"name": "nd"}])
    first, other = config.teacher, config.teacher.others[0]
    other = other.model_copy(update={"class_means": first.class_means})
    with raises("cache.other-teacher") as caught:
        train(config.model_copy(update={"teacher": first.model_copy(update={"others": (other,)})}))
    assert caught.value.where == f"teacher.others.0.class_means: {replays('crop').url}"
    assert "weights: " in str(caught.value.got)
    assert not (tmp_path / "run" / "config.json").exists()


OTHER: dict[str, Any] = {"model": "timm/resnet18", "weights": "random", "size": 16}


@pytest.mark.parametrize(
    ("sections", "code", "key"),
    [
        ({"teacher": {"mode": "cache", "others": [OTHER]}}, "config.online-keys-unused", "teacher.others"),
        ({"teacher": {"mode": "none", "others": [OTHER]}, "loss": CE}, "config.online-keys-unused", "teacher.others"),
        ({"teacher": {"others": [OTHER, {}]}}, "config.missing-key", "teacher.others.1.model"),
        ({"teacher": {"others": [OTHER, OTHER]}}, "config.teacher-repeated", "teacher.others.1"),
        ({"teacher": {"others": [OTHER]}, "loss": [REVIEW]}, "config.review-needs-one-teacher", "teacher.others"),
        (
            {"teacher": {"others": [OTHER], "class_means": "x"}, "loss": [{"name": "nd"}]},
            "config.no-class-means",
            "teacher.others.0.class_means",
        ),
    ],
)
def test_teachers_that_cannot_run_together_are_refused_by_the_config_alone(
    replays: Replay, tmp_path: Path, sections: dict[str, Any], code: str, key: str
) -> None:
    with raises(code) as caught:
        check_config(run_config(replays("crop").config, tmp_path, mode="online", **sections))
    assert key in str(caught.value)


def test_the_first_teacher_among_the_others_would_count_twice(replays: Replay, tmp_path: Path) -> None:
    config = online(tmp_path, replays("crop"), replays("crop"))
    with raises("config.teacher-repeated"):
        check_config(config)


def test_views_are_as_many_as_the_fewest_of_any_cache(replays: Replay, wide_cache: TinyCache) -> None:
    source = cached_source(replays("crop"), wide_cache)
    assert [source.view_of(epoch) for epoch in (0, NUM_VIEWS - 3, NUM_VIEWS - 2, NUM_VIEWS)] == [0, NUM_VIEWS - 3, 0, 2]


def test_each_teachers_outputs_are_those_of_the_requested_rows(replays: Replay, wide_cache: TinyCache) -> None:
    caches, rows = (replays("crop"), wide_cache), np.array([3, 0, 12], np.int32)
    source = cached_source(*caches)
    source_rows = source.rows(1, rows, 3)
    for number, (cache, outputs) in enumerate(zip(caches, source.outputs, strict=True)):
        teacher_outputs = decode_outputs(source_rows.teachers[number], outputs, source.reads)
        columns = open_cache(cache.url).view("digits-01", 3)
        assert np.array_equal(teacher_outputs.at("logits"), columns.decoded("logits")[rows])
        assert np.array_equal(teacher_outputs.norm_B, columns.embedding_norm_N[rows])


@pytest.mark.slow
def test_a_run_uses_the_pinned_state_of_each_of_its_caches(
    replays: Replay, wide_cache: TinyCache, tmp_path: Path
) -> None:
    grown = copy_of(wide_cache, tmp_path / "grown")
    keys: dict[str, Any] = {"train": {"epochs": NUM_VIEWS, "eval_every_epochs": 0}}
    train(together(tmp_path / "straight", replays("crop"), wide_cache, **keys))
    config = together(tmp_path / "run", replays("crop"), grown, **keys)
    train_until(config, lambda event: event["kind"] == "step")
    before = (tmp_path / "run" / "manifest-1.json").read_bytes()
    build(grown.config.model_copy(update={"views": grown.config.views.model_copy(update={"count": NUM_VIEWS})}))
    train(config)
    assert (tmp_path / "run" / "manifest-1.json").read_bytes() == before != storage.read(f"{grown.url}/manifest.json")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")


def opened(*caches: TinyCache) -> list[TeacherCache]:
    return [open_cache(cache.url) for cache in caches]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sections", "code", "got"),
    [
        ({"views": {"seed": 5, "flip": 0.25}}, "cache.views-differ", "flip: 0.5 -> 0.25; seed: 0 -> 5"),
        ({"views": {"kind": "function_matching"}}, "cache.views-differ", "kind: crop -> function_matching"),
        ({"data": {"num_classes": 12}}, "cache.classes-differ", "num_classes: 10 -> 12"),
        ({"data": {"max_pixels": 10**6}}, "cache.reading-rules-differ", "max_pixels: 64000000 -> 1000000"),
    ],
)
def test_caches_of_another_plan_are_refused_with_the_difference_spelled_out(
    replays: Replay, rebuilt: Rebuild, tmp_path: Path, sections: dict[str, Any], code: str, got: str
) -> None:
    other = rebuilt(**sections)
    config = together(tmp_path / "run", replays("crop"), other)
    for refuse in (train, check_training):
        with raises(code) as caught:
            refuse(config)
        assert caught.value.got == got
        assert caught.value.where == f"{replays('crop').url} -> {other.url}"
    assert not (tmp_path / "run").exists()


def test_caches_over_other_shards_need_those_that_all_hold_to_be_named(
    replays: Replay, rebuilt: Rebuild, digits_shards: list[str], tmp_path: Path
) -> None:
    caches = replays("crop"), rebuilt(data={"shards": digits_shards[1:]})
    for first, second, got in ((0, 1, "1 missing: digits-00"), (1, 0, "1 only in the second: digits-00")):
        with raises("cache.shards-differ") as caught:
            check_same_shards(opened(caches[first], caches[second]))
        assert caught.value.got == got
    with raises("cache.shards-differ"):
        train(together(tmp_path / "all", *caches))
    with raises("cache.missing-shards") as caught:
        train(together(tmp_path / "two", *caches, data={"shards": digits_shards}))
    assert caught.value.where == caches[1].url
    train(together(tmp_path / "one", *caches, data={"shards": digits_shards[1]}))
    assert len(metrics(tmp_path / "one")) == 4


def test_caches_of_other_samples_are_refused_with_the_first_difference_of_each_shard(
    rebuilt: Rebuild, tmp_path: Path
) -> None:
    changes: dict[int, Callable[[str, Members], tuple[str, Members]]] = {
        4: lambda key, members: (key, {**members, "png": members["png"] + b"\0"}),
        9: lambda _, members: ("other", members),
        16: lambda key, members: (key, {**members, "cls": b"7"}),
        22: lambda key, members: (key, {**members, "png": b"nothing"}),
    }
    samples = [changes[row](*sample) if row in changes else sample for row, sample in enumerate(digit_samples(33))]
    caches: list[TinyCache] = []
    for name, packed in (("first", digit_samples(35)), ("second", samples)):
        (tmp_path / name).mkdir()
        shards = pack_shards(packed, f"{tmp_path}/{name}/digits-%02d.tar", shard_size=7)
        data = {"shards": shards, "bad_samples": "skip", "max_bad_share": 0.2}
        caches.append(rebuilt(data=data, cache={"url": str(tmp_path / f"of-{name}")}))
    with raises("cache.samples-differ") as caught:
        train(together(tmp_path / "run", *caches))
    differences = str(caught.value.got).split("; ")
    expected = [
        "digits-00/digit-0004 content_hash: ",
        "digits-01/digit-0009 key: digit-0009 -> other",
        "digits-02/digit-0016 label: 6 -> 7",
        "digits-03/digit-0022 status: ",
        "digits-04 had 7 samples -> 5",
    ]
    assert all(text.startswith(start) for text, start in zip(differences, expected, strict=True))
    assert not (tmp_path / "run").exists()


def test_where_the_bytes_of_a_sample_lie_in_its_tar_does_not_matter(
    replays: Replay, rebuilt: Rebuild, tmp_path: Path
) -> None:
    """Tars with an additional member per sample: different offsets and indexes, but the same images and labels."""
    samples = ((key, {"json": b"{}", **members}) for key, members in digit_samples(35))
    shards = pack_shards(samples, f"{tmp_path}/digits-%02d.tar", shard_size=20)
    other = rebuilt(data={"shards": shards})
    caches = opened(replays("crop"), other)
    first, second = ({shard.index_sha256 for shard in cache.shards} for cache in caches)
    assert first.isdisjoint(second)
    check_same_samples(caches, ["digits-00", "digits-01"])
    train(together(tmp_path / "run", replays("crop"), other))


def test_a_view_that_was_changed_in_one_cache_stops_at_the_join(replay_copy: Replay, wide_cache: TinyCache) -> None:
    cache = replay_copy("crop")
    rewrite_view(cache, "digits-01", 2, set_cell("flip", 6, lambda flip: not flip))
    source = cached_source(wide_cache, cache)
    source.rows(1, np.arange(15, dtype=np.int32), 1)
    with raises("cache.views-differ") as caught:
        source.rows(1, np.arange(15, dtype=np.int32), 2)
    assert caught.value.where == "view 2 of digits-01, row 6"
    assert str(caught.value.got).startswith("flip: ")


def test_the_canaries_of_each_cache_are_checked_at_its_teachers_size(
    replay_copy: Replay, wide_cache: TinyCache
) -> None:
    cache = replay_copy("crop")
    alone = [check_canaries(cached_source(one), cache.config.data) for one in (wide_cache, cache)]
    both = check_canaries(cached_source(wide_cache, cache), cache.config.data)
    assert both.num_compared == sum(report.num_compared for report in alone)
    rewrite_view(cache, "digits-00", 0, set_cell("pixel_digest", 0, bytes(16)))
    with raises("cache.pixel-drift"):
        check_canaries(cached_source(wide_cache, cache), cache.config.data)


def test_a_cache_without_canaries_is_not_proven_by_another(replay_copy: Replay, wide_cache: TinyCache) -> None:
    cache = replay_copy("crop")
    for shard in ("digits-00", "digits-01"):
        rewrite_view(cache, shard, 0, set_cell("pixel_digest", 0, None))
    with raises("cache.no-canaries") as caught:
        check_canaries(cached_source(wide_cache, cache), cache.config.data)
    assert caught.value.where == cache.url


def test_a_cache_that_lacks_what_a_loss_needs_is_named(replays: Replay, rebuilt: Rebuild, tmp_path: Path) -> None:
    other = rebuilt()
    with pytest.raises(ConfigError) as caught:
        train(together(tmp_path / "run", replays("crop"), other, loss=ALL_TERMS))
    assert (caught.value.code, caught.value.where) == ("cache.no-class-means", other.url)


@pytest.mark.parametrize("run", [together, online])
def test_teachers_of_different_sizes_need_the_students_size(
    replays: Replay, wide_cache: TinyCache, tmp_path: Path, run: Callable[..., Config]
) -> None:
    with pytest.raises(ConfigError) as caught:
        train(run(tmp_path / "run", replays("crop"), wide_cache, student=SMALL))
    assert (caught.value.code, caught.value.got) == ("config.student-size-unclear", "teachers of 12, 16 pixels")


def test_a_teacher_section_with_two_caches_is_refused(replays: Replay, wide_cache: TinyCache, tmp_path: Path) -> None:
    teacher = replays("crop").config.teacher.model_dump(mode="json", exclude_unset=True)
    with pytest.raises(ConfigError) as caught:
        train(together(tmp_path / "run", replays("crop"), wide_cache, teacher=teacher))
    assert (caught.value.code, caught.value.where) == ("config.one-teacher-of-several", "teacher.model")


@pytest.mark.parametrize(
    ("urls", "code"), [(["a", "b", "a"], "config.cache-repeated"), ([], "config.missing-key")], ids=["twice", "none"]
)
def test_a_list_of_caches_that_cannot_be_meant_is_refused_by_the_config_alone(
    replays: Replay, tmp_path: Path, urls: list[str], code: str
) -> None:
    with raises(code):
        check_config(run_config(replays("crop").config, tmp_path, data={"cache": urls}))


def test_a_run_in_the_folder_of_any_of_its_caches_is_refused(replays: Replay, wide_cache: TinyCache) -> None:
    with raises("config.run-in-cache"):
        check_config(together(Path(wide_cache.url), replays("crop"), wide_cache))


@pytest.mark.slow
@pytest.mark.parametrize("run", [together, online])
def test_a_run_of_several_teachers_evaluates_without_agreement(
    replays: Replay, wide_cache: TinyCache, digits_shards: list[str], tmp_path: Path, run: Callable[..., Config]
) -> None:
    train(run(tmp_path, replays("crop"), wide_cache, data={"val_shards": digits_shards}))
    evaluation = evaluate_run(
        str(tmp_path), tuple(digits_shards), checkpoint_name="last", num_threads=1, device=torch.device("cpu")
    )
    assert (evaluation.metrics["top1"], evaluation.metrics["agreement"]) == (summary_of(tmp_path)["top1"], None)


def test_plans_that_agree_are_of_any_teachers(replays: Replay, wide_cache: TinyCache) -> None:
    caches = opened(replays("crop"), wide_cache)
    check_same_plans(caches)
    check_same_shards(caches)
    check_same_samples(caches, [shard.shard_id for shard in caches[0].shards])
