"""Writes shards of pairs of digits, with three targets and a domain each: `python examples/digit_pairs.py OUT`.

Each image has two of scikit-learn's digits side by side. Its JSON member has

    pair    the two digits, such as "3+7": 100 classes
    even    1 if their sum is even: 2 classes
    order   0, 1, 2: the left digit is smaller, equal, larger: 3 classes
    domain  how the image is corrupted: noise, blur, or occlusion

`train` is balanced and `tail` has 50 times as many images of its most frequent pair as of its rarest; both have the
domains noise and blur. `tune` has the same domains, and `test` also has occlusion. `tail`, `tune` and `test` show
different digits. `pairs.json` lists the pairs in the order of their class index, which is also their order of
frequency in `tail`: a random order, so that rarity is independent of the other two targets.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter
from sklearn.datasets import load_digits

from pipeline.shards.writer import pack_shards

SIZE, DIGIT_SIZE = 24, 11
IMBALANCE, MAX_COUNT = 50, 100
SEEN, UNSEEN = ("noise", "blur"), "occlusion"
NUM_DIGITS = {"train": 1400, "tune": 150, "test": 247}
SHARD_SIZE = 500
_MAX_LEVEL = 16  # scikit-learn's digits have 17 gray levels

Random = np.random.Generator
DigitImages = Mapping[int, NDArray[np.float64]]
"""[N,8,8] of each digit."""


def main(out: Path) -> dict[str, int]:
    """Writes all sets and returns their numbers of images. Equal versions of the libraries write equal bytes."""
    digits = split_digits(np.random.default_rng(0))
    names = class_names(np.random.default_rng(17))
    rare_last = [max(1, int(MAX_COUNT * IMBALANCE ** (-rank / 99))) for rank in range(100)]
    sets = {
        "train": ("train", [100] * 100, SEEN),
        "tail": ("train", rare_last, SEEN),
        "tune": ("tune", [12] * 100, SEEN),
        "test": ("test", [30] * 100, (*SEEN, UNSEEN)),
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "pairs.json").write_text(json.dumps(names))
    for seed, (name, (source, counts, domains)) in enumerate(sets.items(), start=2):
        rng = np.random.default_rng(seed)
        pairs = [pair for pair, count in zip(names, counts, strict=True) for _ in range(count)]
        # Each class has its domains in turn, and the shards are mixtures of all classes.
        chosen = [(pair, domains[number % len(domains)]) for number, pair in enumerate(pairs)]
        shuffled = [chosen[row] for row in rng.permutation(len(chosen))]
        pack_shards(samples(shuffled, digits[source], rng), f"{out}/{name}-%05d.tar", shard_size=SHARD_SIZE)
    return {name: sum(counts) for name, (_, counts, _) in sets.items()}


def split_digits(rng: Random) -> dict[str, DigitImages]:
    """The digits' images in disjoint sets."""
    loaded = cast("Any", load_digits())
    order = rng.permutation(len(loaded.target))
    starts = np.cumsum([0, *NUM_DIGITS.values()])
    split: dict[str, DigitImages] = {}
    for name, start, end in zip(NUM_DIGITS, starts[:-1], starts[1:], strict=True):
        rows = order[start:end]
        split[name] = {digit: loaded.images[rows[loaded.target[rows] == digit]] for digit in range(10)}
    return split


def class_names(rng: Random) -> list[str]:
    """The 100 pairs in a random order."""
    return [f"{number // 10}+{number % 10}" for number in rng.permutation(100)]


def targets(pair: str) -> dict[str, str | int]:
    """The targets of a pair, by name."""
    left, right = map(int, pair.split("+"))
    return {"pair": pair, "even": int((left + right) % 2 == 0), "order": int(np.sign(left - right)) + 1}


def samples(
    chosen: Sequence[tuple[str, str]], digits: DigitImages, rng: Random
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, (pair, domain) in enumerate(chosen):
        sink = io.BytesIO()
        corrupt(draw(pair, digits, rng), domain, rng).save(sink, "PNG")
        text = json.dumps({**targets(pair), "domain": domain})
        yield f"pair{number:05d}", {"png": sink.getvalue(), "json": text.encode()}


def draw(pair: str, digits: DigitImages, rng: Random) -> Image.Image:
    """The two digits side by side, each at a random height."""
    canvas = Image.new("L", (SIZE, SIZE))
    for place, digit in enumerate(map(int, pair.split("+"))):
        image_HW = digits[digit][rng.integers(len(digits[digit]))]
        image = Image.fromarray((image_HW * (255 / _MAX_LEVEL)).round().astype(np.uint8))
        left, top = rng.integers(2) + place * SIZE // 2, rng.integers(SIZE - DIGIT_SIZE + 1)
        canvas.paste(image.resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BILINEAR), (int(left), int(top)))
    return canvas


def corrupt(image: Image.Image, domain: str, rng: Random) -> Image.Image:
    """The image in its domain: Gaussian noise of 40 levels, a Gaussian blur of 1.2 pixels, or a gray 7 x 7 square."""
    if domain == "noise":
        levels_HW = np.asarray(image) + rng.normal(0, 40, (SIZE, SIZE))
        return Image.fromarray(levels_HW.round().clip(0, 255).astype(np.uint8))
    if domain == "blur":
        return image.filter(ImageFilter.GaussianBlur(1.2))
    left, top = (int(offset) for offset in rng.integers(SIZE - 7 + 1, size=2))
    image.paste(128, (left, top, left + 7, top + 7))
    return image


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
