"""Long-tailed subsets: the published profile, the same images for the same seed, copied unchanged."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.errors import ShardError
from pipeline.shards.long_tail import draw_long_tail, write_long_tail
from pipeline.shards.tar import Sample, read_samples
from pipeline.shards.writer import pack_shards
from pipeline.tasks import task_of
from schemas.config import DataConfig
from schemas.recipe import LongTailConfig
from tests.errors import raises
from tests.pipeline.caches import digit_samples

DATA = DataConfig(num_classes=10)


def samples(urls: list[str]) -> list[Sample]:
    return [sample for url in urls for sample in read_samples(Path(url), DATA, where=url)]


@pytest.mark.parametrize(
    ("imbalance", "expected"),
    [
        # 1000 · imbalance^(-k/9) by hand; CIFAR-10-LT has five times these (Cao 2019).
        (50, [1000, 647, 419, 271, 175, 113, 73, 47, 30, 20]),
        (100, [1000, 599, 359, 215, 129, 77, 46, 27, 16, 10]),
        (1, [1000] * 10),
    ],
)
def test_the_profile_is_the_published_one(imbalance: float, expected: list[int]) -> None:
    labels = {f"train/{row:05d}": row % 10 for row in range(10_000)}
    counts = Counter(labels[name] for name in draw_long_tail(labels, imbalance, 0))
    assert [counts[label] for label in range(10)] == expected


@given(st.lists(st.integers(0, 4), min_size=1, max_size=200), st.floats(1, 1000), st.integers(0, 5))
def test_every_class_stays_and_none_is_larger_than_the_previous_one(
    labels: list[int], imbalance: float, seed: int
) -> None:
    by_id = {f"s/{row}": label for row, label in enumerate(labels)}
    subset = draw_long_tail(by_id, imbalance, seed)
    assert subset <= by_id.keys()
    counts = Counter(by_id[name] for name in subset)
    assert counts.keys() == set(labels)
    in_order = [counts[label] for label in sorted(counts)]
    assert in_order == sorted(in_order, reverse=True)
    assert in_order[0] == min(Counter(labels).values())


@given(st.permutations(range(40)))
def test_the_subset_does_not_depend_on_the_order_of_listing(order: list[int]) -> None:
    names = [f"s/{row}" for row in order]
    labels = {name: int(name.rpartition("/")[2]) % 4 for name in names}
    assert draw_long_tail(labels, 8, 3) == draw_long_tail(dict(sorted(labels.items())), 8, 3)


def test_the_subset_is_copied_byte_for_byte_in_its_order_and_reproducibly(tmp_path: Path) -> None:
    source = pack_shards(digit_samples(160), f"{tmp_path}/all-%d.tar", shard_size=60)
    tail = LongTailConfig(shards=tuple(source), imbalance=8, shard_size=24)
    first = write_long_tail(source, f"{tmp_path}/a/tail-%05d.tar", tail, DATA)
    again = write_long_tail(source, f"{tmp_path}/b/tail-%05d.tar", tail, DATA)
    assert [Path(url).read_bytes() for url in first.urls] == [Path(url).read_bytes() for url in again.urls]
    whole = {f"all-{row // 60}/{sample.key}": sample for row, sample in enumerate(samples(source))}
    subset = samples(first.urls)
    assert [name for name in whole if name in {sample.key for sample in subset}] == [sample.key for sample in subset]
    assert all((sample.data, sample.target) == (whole[sample.key].data, whole[sample.key].target) for sample in subset)
    assert first.counts == [Counter(sample.target for sample in subset)[label] for label in range(10)]
    assert len(first.urls) == -(-sum(first.counts) // 24)


def test_another_seed_selects_other_images_with_the_same_profile() -> None:
    labels = {f"s/{row}": row % 10 for row in range(300)}
    first, second = (draw_long_tail(labels, 10, seed) for seed in (0, 1))
    assert Counter(labels[name] for name in first) == Counter(labels[name] for name in second)
    assert first != second


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"label": "JSON:Meta.Label"}, '{{"Meta": {{"Label": {label}}}}}'),
        ({"label": "CLS", "label_map": {f"n{label}": label for label in range(10)}}, "n{label}"),
        ({"label": "CLS", "classes": [f"digit {label}" for label in range(10)]}, "digit {label}"),
    ],
)
def test_a_subset_is_read_by_the_config_of_its_shards(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    data = DataConfig(num_classes=10, **keys)
    (member,) = task_of(data).members
    source = pack_shards(
        (
            (key, {"png": sample["png"], member: text.format(label=sample["cls"].decode()).encode()})
            for key, sample in digit_samples(40)
        ),
        f"{tmp_path}/all-%d.tar",
        shard_size=40,
    )
    tail = LongTailConfig(shards=source[0], imbalance=1, shard_size=40)
    (url,) = write_long_tail(source, f"{tmp_path}/tail-%d.tar", tail, data).urls
    classes = {sample.key: sample.target for sample in read_samples(Path(url), data, where=url)}
    expected = {f"all-0/{key}": int(sample["cls"]) for key, sample in digit_samples(40)}
    assert len(classes) >= 10
    assert classes.items() <= expected.items()


def test_the_error_for_a_sample_without_a_label_names_it(tmp_path: Path) -> None:
    members = [(key, {"png": sample["png"]} if key == "digit-0003" else sample) for key, sample in digit_samples(8)]
    source = pack_shards(members, f"{tmp_path}/all-%d.tar", shard_size=8)
    with raises("shard.long-tail-sample", ShardError) as caught:
        write_long_tail(source, f"{tmp_path}/tail-%d.tar", LongTailConfig(shards=source[0], imbalance=2), DATA)
    assert str(caught.value.where).endswith("digit-0003")
    assert caught.value.got == "status ok, label None"
