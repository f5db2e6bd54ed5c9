"""Outputs of any network by name in one forward: what its heads return, and the embedding, the input of the heads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.sources.base import head_name
from pipeline.tasks import AUX, EMBEDDING

FINAL = "out"
"""The key of the logits in a dict that a network with a map of logits returns, as torchvision names it."""
_UNSAFE_CHANNELS = range(1, 9)

# The inputs of the heads in the forward that is running. A context variable belongs to one thread and one call: two
# forwards of one module do not mix, a deep copy or pickle of the module does not include it, and no activation
# outlives its call.
_captured: ContextVar[list[Tensor] | None] = ContextVar("captured head inputs", default=None)


class EmbeddingModel(nn.Module):
    """A network whose ``forward(images_BCHW)`` returns its outputs by name: those of its heads, and the embedding.

    The embedding is the input of the head. A hook captures it, so it needs no second forward, has its gradient and is
    exact under autocast and DDP. If a head classifies positions one by one (a convolution over a feature map), the
    embedding is their mean. Inputs of several heads are averaged if their widths are equal (distilled ViTs), else
    concatenated (CrossViT). Dropout before the head applies to the embedding too.

    If the network has ``forward_embedding(images_BCHW) -> (logits_BK, embedding_BD)``, this method is used instead. A
    network with several heads returns a dict by head in place of a tensor. What a network without heads and without
    this method returns is its embedding.

    Attributes:
        network: the module of the library, with its parameter names; save and load *its* ``state_dict``.
        heads: names of the submodules whose input is the embedding; empty with ``forward_embedding``, or without heads.
        widths: numbers in a row of each output, by its name.
        head_outputs: names of what the heads return.
        has_aux: in training mode there is also ``AUX``, the map of an auxiliary head.
    """

    def __init__(
        self, network: nn.Module, heads: tuple[str, ...], *, widths: Mapping[str, int], has_aux: bool = False
    ) -> None:
        """Called by ``pipeline.models.probe.wrap``, which registers the hooks and determines D."""
        super().__init__()
        self.network, self.heads = network, heads
        self.widths = dict(widths)
        self.has_aux = has_aux
        self.head_outputs = tuple(name for name in widths if name != EMBEDDING)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return self.widths[EMBEDDING]

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        output, embedding_BD = forward_with_embedding(self.network, self.heads, images_BCHW)
        auxiliary = {AUX: output[AUX]} if self.has_aux and self.training else {}
        return {**named_outputs(output, self.head_outputs), **auxiliary, EMBEDDING: embedding_BD}

    def head_modules(self, output: str) -> tuple[str, ...]:
        """Names of the submodules in ``heads`` that compute an output of the heads."""
        if len(self.head_outputs) == 1:
            return self.heads
        return tuple(name for name in self.heads if name == f"heads.{head_name(output)}")

    def forward_heads(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        """``head_outputs`` without the embedding: the forward of the network itself if it has heads."""
        if self.heads:
            return named_outputs(self.network(images_BCHW), self.head_outputs)
        outputs = self(images_BCHW)
        return {name: outputs[name] for name in self.head_outputs}


def move_to_device(module: nn.Module, device: torch.device, *, channels_last: bool = True) -> None:
    """Moves a module to a device, with convolution weights in channels-last memory by default.

    Views are channels-last too, so convolutions repack nothing: training ResNets in fp32 on a CPU is 1.3 to 1.6 times
    faster.
    """
    module.to(device)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - torch's stubs lack this overload


def unsafe_in_channels_last(module: nn.Module, device: torch.device) -> list[str]:
    """Names of the convolutions whose backward pass corrupts memory in channels-last layout.

    These are 1x1 convolutions with a stride and up to 8 input channels, on a CPU (torch 2.14).
    """
    if device.type != "cpu":
        return []
    return [name for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and _is_unsafe(layer)]


def _is_unsafe(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and max(layer.stride) > 1 and layer.in_channels in _UNSAFE_CHANNELS


def named_outputs(output: Tensor | Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """What a network returns, a tensor or a dict by head, by the names of the outputs; of a dict with a final and an
    auxiliary map of logits the final one.

    Raises:
        KeyError: the network returns no output for a head.
    """
    if not names:
        return {}
    if len(names) == 1:
        (name,) = names
        return {name: output if isinstance(output, Tensor) else output[FINAL]}
    assert not isinstance(output, Tensor), "a network with several heads returns a dict"
    return {name: output[head_name(name)] for name in names}


def register_head_hooks(network: nn.Module, heads: tuple[str, ...]) -> None:
    """Registers hooks that let ``forward_with_embedding`` read the inputs of these submodules. Once per network."""
    for name in heads:
        network.get_submodule(name).register_forward_pre_hook(_capture)


def forward_with_embedding(network: nn.Module, heads: tuple[str, ...], images_BCHW: Tensor) -> tuple[Any, Tensor]:
    """One forward of a network with registered hooks: what it returns, and the embedding [B,D].

    Raises:
        RuntimeError: a head did not run exactly once.
    """
    if not heads:
        forward_embedding = getattr(network, "forward_embedding", None)
        output, embedding_BD = (
            ({}, network(images_BCHW)) if forward_embedding is None else forward_embedding(images_BCHW)
        )
        return output, embedding_BD
    inputs: list[Tensor] = []
    token = _captured.set(inputs)
    try:
        output = network(images_BCHW)
    finally:
        _captured.reset(token)
    if len(inputs) != len(heads):
        raise RuntimeError(f"{' and '.join(heads)} ran {len(inputs)} times in one forward, not once each")
    return output, _join(inputs)


def _capture(module: nn.Module, args: tuple[Any, ...]) -> None:
    inputs = _captured.get()
    if inputs is not None:
        inputs.append(_mean_over_positions(args[0], channels_first=isinstance(module, nn.Conv2d)))


def _join(inputs: list[Tensor]) -> Tensor:
    """The inputs of the heads, each [B,Di], as one [B,D]."""
    if all(tensor is inputs[0] for tensor in inputs):
        return inputs[0]
    return torch.stack(inputs).mean(0) if len({x.shape for x in inputs}) == 1 else torch.cat(inputs, dim=1)


def _mean_over_positions(x: Tensor, *, channels_first: bool) -> Tensor:
    """[B,D,H,W] (channels first) or [B,...,D] to [B,D]."""
    if x.ndim <= 2:
        return x
    return x.flatten(2).mean(2) if channels_first else x.flatten(1, -2).mean(1)
