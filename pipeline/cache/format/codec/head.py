"""``head``: logits that are not stored, but computed from the stored embedding by the linear head of the teacher."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.cache.format.codec.encoding import Encoding
from pipeline.core.errors import CacheError, cause
from schemas.cache_format import Output

NAME = "head"


@dataclass(frozen=True, slots=True, eq=False)
class LinearHead:
    """``W·h + b`` in fp32, of embeddings as a cache stores them.

    Attributes:
        stored: how the cache stores the embedding.
    """

    weight_KD: Tensor
    bias_K: Tensor
    stored: Output

    def logits(self, embedding_BD: Tensor) -> Tensor:
        """fp32 [B,K] of decoded embeddings, also under autocast."""
        device = embedding_BD.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return functional.linear(embedding_BD.float(), self.weight_KD, self.bias_K)

    def logits_of_exact(self, embedding_BD: Tensor) -> Tensor:
        """fp32 [B,K] of the teacher's embeddings: the logits that a cache of them has."""
        return self.logits(_stored_and_decoded(embedding_BD, self.stored))

    def to(self, device: torch.device) -> LinearHead:
        return replace(self, weight_KD=self.weight_KD.to(device), bias_K=self.bias_K.to(device))

    def to_bytes(self) -> bytes:
        """The file of the cache: safetensors with ``weight`` [K,D] and ``bias`` [K], float32."""
        return safetensors.torch.save({"weight": self.weight_KD.contiguous(), "bias": self.bias_K.contiguous()})

    @classmethod
    def parse(cls, data: bytes, *, num_classes: int, stored: Output, where: str) -> LinearHead:
        """
        Raises:
            CacheError: the bytes are not such a file, of this size.
        """
        expected = {"weight": (num_classes, *stored.shape), "bias": (num_classes,)}
        try:
            tensors = safetensors.torch.load(data)
        except (safetensors.SafetensorError, ValueError) as error:
            raise _invalid(where, cause(error), expected) from error
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        is_valid = shapes == expected and all(
            tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in tensors.values()
        )
        if not is_valid:
            raise _invalid(where, shapes, expected)
        return cls(tensors["weight"], tensors["bias"], stored)


def _invalid(where: str, got: object, expected: object) -> CacheError:
    return CacheError(
        "this file is not the linear head of the cache's teacher",
        code="cache.invalid-head",
        where=where,
        got=got,
        expected=f"finite float32 {expected}",
        next_step="restore it, or build another cache",
    )


def _stored_and_decoded(values_BD: Tensor, output: Output) -> Tensor:
    """``decode(encode(values))`` on the device of the values, to the same bits."""
    if output.encoding == "dense":
        return values_BD if output.dtype == "float32" else values_BD.half().float()
    assert output.encoding == "int8", "the encodings of cache.embeddings"
    offset_B1 = values_BD.amin(1, keepdim=True)
    scale_B1 = (values_BD.amax(1, keepdim=True) - offset_B1) / 255
    steps_BD = (values_BD - offset_B1) / torch.where(scale_B1 > 0, scale_B1, torch.inf)
    return offset_B1 + scale_B1 * steps_BD.round().clamp(max=255)


def _describe(name: str, shape: tuple[int, ...], _kind: str) -> Output:
    return Output(name=name, shape=shape, dtype="float32", encoding=NAME, fields=())


def _has_no_rows(*_: object) -> NoReturn:
    raise AssertionError("the logits of a linear head have no column")


HEAD = Encoding(NAME, (NAME,), _describe, _has_no_rows, _has_no_rows)
