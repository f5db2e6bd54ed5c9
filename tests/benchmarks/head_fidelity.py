"""How far logits are from the teacher's that are computed from its stored embeddings, against stored logits.

The ResNet with 1000 pseudo-classes of ``fidelity``; and rows like those of a ViT-B with 1000 classes: standard normal
embeddings of width 768, as after a layer norm, under a random head whose logits have a standard deviation of 2.5.
``outliers`` are 3 dimensions that are larger than the others by a factor, with weights smaller by the same factor, so
that the exact logits stay. It also measures what the product costs.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.cache.build.statistics import kl_sum
from pipeline.cache.format.codec import LinearHead, decode, encode, row_bytes, stored_outputs
from pipeline.tasks import OutputSpec
from tests.benchmarks.teachers import thousand_classes

Matrix = NDArray[np.float32]
_NUM_OUTLIERS = 3
_FACTORS = (1, 10, 40)
_BATCH = 256


def run() -> None:
    teacher = thousand_classes()
    state = torch.load(teacher.section["weights"], weights_only=True)["model"]
    _table("ResNet, 1000 pseudo-classes, mixed", state["fc.weight"], state["fc.bias"], teacher.embeddings("mixed"))
    torch.manual_seed(0)
    width = 768
    weight_KD = torch.randn(1000, width) * 2.5 / width**0.5
    _outliers("rows like those of a ViT-B", weight_KD, torch.zeros(1000), torch.randn(1000, width))
    _cost()


def _outliers(title: str, weight_KD: Tensor, bias_K: Tensor, embedding_ND: Tensor) -> None:
    for factor in _FACTORS:
        scale_D = torch.ones(embedding_ND.shape[1])
        scale_D[:_NUM_OUTLIERS] = factor
        name = title if factor == 1 else f"{title}, outliers times {factor}"
        _table(name, weight_KD / scale_D, bias_K, (embedding_ND * scale_D).numpy())


def _table(title: str, weight_KD: Tensor, bias_K: Tensor, embedding_ND: Matrix) -> None:
    num_classes, width = weight_KD.shape
    exact_NK = (embedding_ND.astype(np.float64) @ weight_KD.double().numpy().T + bias_K.double().numpy()).astype(
        np.float32
    )
    print(f"  {title}: D = {width}, K = {num_classes}, {len(exact_NK)} rows")
    print(f"    {'':<14}{'bytes':>6}{'KL T=1':>10}{'T=2':>10}{'T=4':>10}{'flips':>9}")
    for kind in ("int8", "fp16", "fp32"):
        (output,) = stored_outputs([OutputSpec("embedding", (width,), kind)])
        head = LinearHead(weight_KD, bias_K, output)
        (logits,) = stored_outputs([OutputSpec("logits", (num_classes,), "head")])
        decoded_NK = decode(encode(embedding_ND, output), logits, head=head)
        _line(f"head, {kind}", row_bytes(output), exact_NK, decoded_NK)
    for kind in ("int8", "int8t", "fp16"):
        (output,) = stored_outputs([OutputSpec("logits", (num_classes,), kind)])
        _line(kind, row_bytes(output), exact_NK, decode(encode(exact_NK, output), output))


def _line(name: str, size: int, exact_NK: Matrix, stored_NK: Matrix) -> None:
    kl = "".join(f"{kl_sum(exact_NK, stored_NK, t) / len(exact_NK):>10.2e}" for t in (1.0, 2.0, 4.0))
    print(f"    {name:<14}{size:>6}{kl}{(exact_NK.argmax(1) != stored_NK.argmax(1)).mean():>9.2%}", flush=True)


def _cost() -> None:
    """CPU time of a batch, in one thread, as in a loader process."""
    torch.set_num_threads(1)
    print(f"  decoding a row in a batch of {_BATCH}, one thread, us of CPU")
    for width, num_classes in ((384, 1000), (768, 1000), (2048, 1000)):
        (stored,) = stored_outputs([OutputSpec("embedding", (width,), "int8")])
        (logits,) = stored_outputs([OutputSpec("logits", (num_classes,), "head")])
        (int8t,) = stored_outputs([OutputSpec("logits", (num_classes,), "int8t")])
        head = LinearHead(torch.randn(num_classes, width), torch.zeros(num_classes), stored)
        rows = encode(np.random.default_rng(0).normal(size=(_BATCH, width)).astype(np.float32), stored)
        packed = encode(np.random.default_rng(0).normal(size=(_BATCH, num_classes)).astype(np.float32), int8t)
        of_head = _micros(lambda rows=rows, logits=logits, head=head: decode(rows, logits, head=head))
        of_int8t = _micros(lambda packed=packed, int8t=int8t: decode(packed, int8t))
        print(f"    D = {width}, K = {num_classes}: head {of_head:.1f}, int8t {of_int8t:.1f}", flush=True)


def _micros(work: Callable[[], object]) -> float:
    """The median of 20 calls, a row."""
    times: list[float] = []
    for _ in range(20):
        start_s = time.thread_time()
        work()
        times.append(time.thread_time() - start_s)
    return float(np.median(times)) / _BATCH * 1e6
