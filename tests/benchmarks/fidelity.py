"""``python -m tests.benchmarks fidelity``: what each encoding costs, against the published one at equal bytes.

Published: the k largest probabilities of T = 1 in 4 bytes each (id and value), the rest shared evenly. It is granted
exact probabilities here, so that what it would lose in float16 does not count against it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipeline.cache.build.statistics import kl_sum, pearson_sum, total_variation_sum
from pipeline.cache.format.codec import RowIdentity, decode, encode, row_bytes, stored_outputs
from pipeline.tasks import OutputSpec
from tests.benchmarks.teachers import ten_classes, thousand_classes
from tests.pipeline.cache.format.codec.kinds import softmax, teacher_like

Matrix = NDArray[np.float32]
_FEW = ("fp32", "fp16", "int8", "topk:4", "topk:5", "topk:6")
_MANY = ("fp32", "fp16", "int8", "int8t", "int4", "topk:5", "topk:10", "topk:20", "topk:50", "topk:100", "topk:188")
_NUMBERS_OF_CLASSES = (256, 1000, 5000, 21_841)
_ENTRY_BYTES = 4
# At equal bytes: 65 to 68, and 137 to 140.
_PARTS = ("topk:20", "sampled:21@1", "sampled:21@4", "topk:44", "sampled:45@1", "sampled:45@4")
_NUMBERS_OF_VIEWS = (1, 2, 10, 50)


def _stored(exact_NK: Matrix, kind: str) -> tuple[int, Callable[[float], Matrix]]:
    """Bytes a row, and the logits that a loss at a temperature sees."""
    (output,) = stored_outputs([OutputSpec("logits", (exact_NK.shape[1],), kind)])
    column = encode(exact_NK, output)
    return row_bytes(output), lambda temperature: decode(column, output, temperature=temperature)


def _published(exact_NK: Matrix, k: int) -> Callable[[float], Matrix]:
    logits = exact_NK.astype(np.float64)
    probs_NK = np.exp(logits - logits.max(1, keepdims=True))
    probs_NK /= probs_NK.sum(1, keepdims=True)
    ids_Nk = np.argsort(-probs_NK, axis=1, kind="stable")[:, :k]
    kept_Nk = np.take_along_axis(probs_NK, ids_Nk, axis=1)
    np.put_along_axis(probs_NK, ids_Nk, 0, axis=1)
    share_N1 = probs_NK.sum(1, keepdims=True) / (probs_NK.shape[1] - k)
    found_NK = np.repeat(share_N1, probs_NK.shape[1], axis=1)
    np.put_along_axis(found_NK, ids_Nk, kept_Nk, axis=1)
    return lambda _: np.log(np.maximum(found_NK, np.finfo(np.float64).tiny)).astype(np.float32)


def _line(name: str, size: int, exact_NK: Matrix, stored: Callable[[float], Matrix]) -> None:
    num_rows = len(exact_NK)
    kl = "".join(f"{kl_sum(exact_NK, stored(t), t) / num_rows:>10.2e}" for t in (1.0, 2.0, 4.0))
    pearson = "".join(f"{pearson_sum(exact_NK, stored(t), t) / num_rows:>10.2e}" for t in (1.0, 4.0))
    flips = (exact_NK.argmax(1) != stored(1.0).argmax(1)).mean()
    print(f"    {name:<14}{size:>6}{kl}{flips:>9.2%}{pearson}", flush=True)


def _table(title: str, exact_NK: Matrix, kinds: tuple[str, ...]) -> None:
    exact = exact_NK.astype(np.float64)
    probs = np.exp(exact - exact.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    entropy = -(probs * np.log(np.maximum(probs, 1e-300))).sum(1).mean()
    print(f"  {title}: {len(exact)} rows, largest probability {probs.max(1).mean():.2f}, entropy {entropy:.2f} nats")
    print(f"    {'':<14}{'bytes':>6}{'KL T=1':>10}{'T=2':>10}{'T=4':>10}{'flips':>9}{'1-r T=1':>10}{'T=4':>10}")
    for kind in kinds:
        size, stored = _stored(exact_NK, kind)
        _line(kind, size, exact_NK, stored)
        k = size // _ENTRY_BYTES
        if kind == "int4" or kind.startswith("topk"):
            _line(f" published:{k}", k * _ENTRY_BYTES, exact_NK, _published(exact_NK, k))


def _mean_of_views(title: str, exact_NK: Matrix) -> None:
    """Total variation between the exact probabilities and the mean of what views of equal logits store."""
    titles = "".join(f"{f'V={number}':>9}" for number in _NUMBERS_OF_VIEWS)
    print(f"  {title}: total variation of the mean over V views\n    {'':<14}{'bytes':>6}{'T':>4}{titles}")
    for kind in _PARTS:
        (output,) = stored_outputs([OutputSpec("logits", (exact_NK.shape[1],), kind)])
        for temperature in output.temperatures if kind.startswith("sampled") else (1.0, 4.0):
            sum_NK = np.zeros(exact_NK.shape)
            errors: list[float] = []
            for view in range(_NUMBERS_OF_VIEWS[-1]):
                rows = RowIdentity([str(row) for row in range(len(exact_NK))], view)
                column = encode(exact_NK, output, identity=rows)
                sum_NK += softmax(decode(column, output, temperature=temperature), temperature)
                if view + 1 in _NUMBERS_OF_VIEWS:
                    mean_NK = (temperature * np.log(np.maximum(sum_NK / (view + 1), 1e-30))).astype(np.float32)
                    errors.append(total_variation_sum(exact_NK, mean_NK, temperature) / len(exact_NK))
            figures = "".join(f"{error:>9.4f}" for error in errors)
            print(f"    {kind:<14}{row_bytes(output):>6}{temperature:>4g}{figures}", flush=True)


def run() -> None:
    for num_classes in _NUMBERS_OF_CLASSES:
        _table(f"synthetic, {num_classes} classes", teacher_like(500, num_classes), ("fp16", "int8", "int8t", "int4"))
    _mean_of_views("synthetic, 1000 classes", teacher_like(200, 1000))
    for teacher, kinds in ((ten_classes(), _FEW), (thousand_classes(), _MANY)):
        for views in ("clean", "mixed"):
            logits_NK = teacher.logits(views)
            if teacher.num_classes > len(_MANY):
                _mean_of_views(f"{teacher.name}, {views}", logits_NK[:200])
            _table(f"{teacher.name} (top-1 {teacher.top1:.1%}), {views}", logits_NK, kinds)
            if teacher.num_classes > len(_MANY) and views == "clean":
                # Half the temperature: as sure of itself as teachers of ImageNet are on what they were trained with.
                _table(f"{teacher.name}, {views}, logits doubled", 2 * logits_NK, kinds)
