"""The linear head of a teacher, proved on images: a cache of embeddings then has the teacher's logits too."""

from __future__ import annotations

import copy

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.cache.format.codec import LinearHead
from pipeline.core.errors import ModelError
from pipeline.tasks import EMBEDDING
from pipeline.teacher.inference import Teacher
from schemas.cache_format import Output

_NEXT_STEP = "set cache.logits=int8t (from 256 classes), int8 or fp16"


def linear_head(teacher: Teacher, name: str, stored: Output, pixels_NCHW: Tensor, *, key: str) -> LinearHead:
    """Reads weight and bias of the layer that computes an output, and compares ``W·h + b`` with the network's logits on
    images, all in fp32.

    Args:
        name: of the output.
        stored: how the embedding is stored.
        key: of the config, for messages.

    Raises:
        ModelError: no single linear layer computes the output from the embedding.
    """
    head = _read(teacher, stored, key)
    exact = copy.copy(teacher)
    exact.precision, exact.batch_size = "fp32", len(pixels_NCHW)
    outputs = exact.infer(pixels_NCHW)
    got_NK = head.logits(torch.from_numpy(outputs[EMBEDDING])).numpy()
    off_NK = np.abs(got_NK.astype(np.float64) - outputs[name])
    bound_NK = rounding_bound(head, outputs[EMBEDDING])
    if (off_NK <= bound_NK).all():
        return head
    worst = np.unravel_index((off_NK / bound_NK).argmax(), off_NK.shape)
    raise _not_linear(
        teacher,
        f"a logit of {outputs[name][worst]:.6g} where W·h + b is {got_NK[worst]:.6g}",
        f"a difference of at most {bound_NK[worst]:.3g}, the rounding of float32",
        key,
    )


def rounding_bound(head: LinearHead, embedding_ND: NDArray[np.float32]) -> NDArray[np.float64]:
    """[N,K]: how far two float32 sums of the same D + 1 terms, in any order, may differ.

    Each is off by at most (D + 1) · 2⁻²⁴ of the sum of their magnitudes (Higham 2002, sec. 4.2).
    """
    weight_KD, bias_K = (np.abs(tensor.double().numpy()) for tensor in (head.weight_KD, head.bias_K))
    magnitude_NK = np.abs(embedding_ND.astype(np.float64)) @ weight_KD.T + bias_K
    return 2 * (embedding_ND.shape[1] + 1) * 2.0**-24 * magnitude_NK


def _read(teacher: Teacher, stored: Output, key: str) -> LinearHead:
    module, expected = teacher.module, "one nn.Linear, or one convolution of 1 × 1"
    if len(module.heads) != 1:
        named = f"{len(module.heads)} layers: {', '.join(module.heads)}" if module.heads else "no layer of the network"
        raise _not_linear(teacher, f"{named} whose input is the embedding", expected, key)
    layer = module.network.get_submodule(module.heads[0])
    is_pointwise = isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1) and layer.groups == 1
    if not isinstance(layer, nn.Linear) and not is_pointwise:
        raise _not_linear(teacher, f"{module.heads[0]}, a {type(layer).__name__}", expected, key)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight_KD = layer.weight.detach().float().cpu().flatten(1)
    bias_K = torch.zeros(len(weight_KD)) if layer.bias is None else layer.bias.detach().float().cpu()
    return LinearHead(weight_KD.clone(), bias_K.clone(), stored)


def _not_linear(teacher: Teacher, got: str, expected: str, key: str) -> ModelError:
    return ModelError(
        "the logits of this teacher are not a linear function of its embedding",
        code="model.head-not-linear",
        where=f"{key}, {teacher.loaded.architecture['model']}",
        got=got,
        expected=expected,
        next_step=_NEXT_STEP,
    )
