"""The programs of examples/: the training loop trains, and the pairs of digits are what their text says."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.shards.writer import pack_shards
from tests.jobs.conftest import config_of, tree_below
from tests.pipeline.caches import build, cache_section, digit_samples

pytestmark = pytest.mark.long

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_training_loop_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = pack_shards(digit_samples(12), f"{tmp_path}/digits-%02d.tar", shard_size=7)
    config = config_of(tree_below(tmp_path, shards))
    build(config)
    example("own_loop").main(cache_section(config).url, epochs=1, global_batch_size=6)
    assert capsys.readouterr().out.startswith("epoch 0: loss ")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    example("digit_pairs").main(folder)
    return folder


def members(folder: Path, name: str) -> list[tuple[bytes, dict[str, Any]]]:
    """PNG and targets of each sample, read with tarfile alone."""
    samples: list[tuple[bytes, dict[str, Any]]] = []
    for path in sorted(folder.glob(f"{name}-*.tar")):
        with tarfile.open(path) as tar:
            content = {member.name: tar.extractfile(member).read() for member in tar}  # pyright: ignore[reportOptionalMemberAccess]
        keys = sorted({name.partition(".")[0] for name in content})
        samples += [(content[f"{key}.png"], json.loads(content[f"{key}.json"])) for key in keys]
    return samples


def test_the_pairs_of_digits_have_their_targets_domains_and_counts(pairs: Path) -> None:
    names = json.loads((pairs / "pairs.json").read_text())
    assert sorted(names) == [f"{left}+{right}" for left in range(10) for right in range(10)]
    sets = {name: members(pairs, name) for name in ("train", "tail", "tune", "test")}
    assert {name: len(samples) for name, samples in sets.items()} == {
        "train": 10_000,
        "tail": 2_486,
        "tune": 1_200,
        "test": 3_000,
    }
    for name, samples in sets.items():
        domains = Counter(target["domain"] for _, target in samples)
        assert set(domains) == {"noise", "blur"} | ({"occlusion"} if name == "test" else set())
        assert max(domains.values()) - min(domains.values()) <= 1
        for _, target in samples:
            left, right = map(int, target["pair"].split("+"))
            assert target["even"] == (left + right + 1) % 2
            assert target["order"] == (0 if left < right else 1 if left == right else 2)
    assert Image.open(io.BytesIO(sets["tail"][0][0])).size == (24, 24)
    counts = Counter(target["pair"] for _, target in sets["tail"])
    assert [counts[name] for name in names] == sorted(counts.values(), reverse=True)
    assert (max(counts.values()), min(counts.values())) == (100, 2)


def test_rarity_of_a_pair_says_nothing_of_its_other_targets(pairs: Path) -> None:
    names = json.loads((pairs / "pairs.json").read_text())
    targets = {target["pair"]: target for _, target in members(pairs, "tune")}
    of_rank = [targets[name] for name in names]
    for values in (
        [target["even"] for target in of_rank],
        *([target["order"] == k for target in of_rank] for k in range(3)),
    ):
        assert abs(np.corrcoef(np.arange(100), values)[0, 1]) < 0.05


def test_sets_of_pairs_show_different_digits() -> None:
    split = example("digit_pairs").split_digits(np.random.default_rng(0))
    images = [{image.tobytes() for digit in digits.values() for image in digit} for digits in split.values()]
    assert [len(digits) for digits in images] == [1400, 150, 247]
    assert len(set.union(*images)) == 1797
