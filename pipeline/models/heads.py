"""Networks with several heads: a backbone, and a linear layer for each head on the embedding that it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn

from pipeline.core.errors import ModelError
from pipeline.models.probe import backbone_output
from pipeline.models.sources.base import BuildRequest, BuiltModel, head_name, last_layer, untrained_head
from schemas.config import ModelConfig, Size, TeacherModelConfig

BACKBONE, HEADS = "backbone.", "heads."
"""Prefixes of the names of tensors in a network with several heads."""


class MultiHeadNetwork(nn.Module):
    """images_BCHW -> {head: [B,K]}: a linear layer for each head on the embedding.

    Tensors are named ``backbone.*``, as in the backbone, and ``heads.HEAD.weight`` and ``.bias``.

    Args:
        backbone: images_BCHW -> embedding_BD.
        embedding_dim: D.
        num_classes: K of each head.
        removed: names of the classifiers that the backbone had: their tensors in weights are left out.

    Raises:
        ModelError: the name of a head is that of an attribute of torch's modules.
    """

    def __init__(
        self,
        backbone: nn.Module,
        embedding_dim: int,
        num_classes: Mapping[str, int],
        *,
        removed: tuple[str, ...] = (),
        device: Any = None,
    ) -> None:
        super().__init__()
        self.backbone, self.removed = backbone, removed
        self.heads = nn.ModuleDict()
        for head, width in num_classes.items():
            if hasattr(self.heads, head):
                raise _reserved_name(head)
            self.heads[head] = nn.Linear(embedding_dim, width, device=device)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        embedding_BD = self.backbone(images_BCHW)
        return {name: head(embedding_BD) for name, head in self.heads.items()}


def _reserved_name(head: str) -> ModelError:
    return ModelError(
        "a head cannot have the name of an attribute of torch's modules",
        code="model.reserved-head-name",
        where=f"data.heads.{head}",
        got=head,
        next_step=f"choose another name, such as {head}_class",
    )


def multi_head(factory: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Decorator of a ``python:`` factory whose network ends in an ``nn.Linear``: it then builds other heads too.

    The decorated factory takes ``num_classes`` as an integer, or as a mapping from heads to integers: then the last
    ``nn.Linear`` is replaced by one for each head. 0 builds the network without that layer, and its tensors in
    weights are left out.
    """

    @wraps(factory)
    def build(num_classes: int | Mapping[str, int], *args: Any, **kwargs: Any) -> nn.Module:
        if isinstance(num_classes, int) and num_classes:
            return factory(num_classes, *args, **kwargs)
        network = factory(1, *args, **kwargs)
        name = last_layer(network, nn.Linear)
        if name is None:
            raise ModelError("this network has no nn.Linear to replace", code="model.no-linear-head", got=str(network))
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Identity())
        if isinstance(num_classes, int):
            network.removed = (name,)  # pyright: ignore[reportArgumentType]
            return network
        return MultiHeadNetwork(network, layer.in_features, num_classes, removed=(name,))

    return build


def selected_widths(widths: Mapping[str, int], config: ModelConfig) -> dict[str, int]:
    """The widths of those outputs that a network has: all, or the ``heads`` of a teacher."""
    heads = config.heads if isinstance(config, TeacherModelConfig) else None
    return {output: width for output, width in widths.items() if heads is None or head_name(output) in heads}


def backbone_request(request: BuildRequest) -> BuildRequest:
    """The request for the backbone of a network with several heads.

    Raises:
        ModelError: the heads of a teacher would be untrained.
    """
    if request.pretrained and not request.allow_new_head:
        raise untrained_head(request, 0)
    return replace(request, head="none")


def with_heads(built: BuiltModel, request: BuildRequest, *, size: Size) -> BuiltModel:
    """The network of a library with a linear layer for each head.

    Args:
        built: the backbone.
        size: input height and width in pixels, for a forward that determines D.

    Raises:
        ModelError: the backbone does not run at this size, or does not return an embedding.
    """
    embedding_BD = backbone_output(built, request, size=size)
    network = MultiHeadNetwork(
        built.network,
        embedding_BD.shape[1],
        request.classes_by_head,
        removed=built.heads,
        device=embedding_BD.device,
    )
    heads = tuple(f"{HEADS}{head}" for head in request.classes_by_head)
    return replace(built, network=network, heads=heads, has_new_heads=request.pretrained)
