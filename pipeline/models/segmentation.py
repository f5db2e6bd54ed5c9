"""Networks whose logits are a map [B,K,h,w]: of torchvision, or a backbone of timm with a convolutional head.

Logits are those before their upsampling to the size of the input, in which a cache would have nothing but interpolated
numbers. An auxiliary head computes logits in training mode alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import timm
from torch import Tensor, nn
from torchvision import models
from torchvision.models.segmentation.deeplabv3 import DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.models.segmentation.lraspp import LRASPPHead

from pipeline.core.errors import ConfigError
from pipeline.models.embedding import FINAL
from pipeline.models.sources.base import BuildRequest
from pipeline.tasks import AUX

_DEFAULT_STRIDE = 8
_HEADS = {"fcn": FCNHead, "deeplabv3": DeepLabHead}


class Segmenter(nn.Module):
    """images_BCHW -> {"out": logits [B,K,h,w]}, and in training mode "aux", if the network has an auxiliary head.

    Tensors have the names of torchvision's segmentation networks: ``backbone.*``, ``classifier.*``,
    ``aux_classifier.*``.

    Attributes:
        heads: names of the layers whose outputs are the final logits.
    """

    heads: tuple[str, ...]

    def __init__(self, backbone: nn.Module, classifier: nn.Module, aux_classifier: nn.Module | None) -> None:
        super().__init__()
        self.backbone, self.classifier, self.aux_classifier = backbone, classifier, aux_classifier
        self.heads = tuple(f"classifier.{name}" for name in _last_layers(classifier))

    def features(self, images_BCHW: Tensor) -> Mapping[str, Tensor]:
        """Maps of the backbone by the names under which the heads take them: "out" and "aux"."""
        return self.backbone(images_BCHW)

    def forward(self, images_BCHW: Tensor) -> dict[str, Tensor]:
        features = self.features(images_BCHW)
        outputs = {FINAL: self.classifier(self._of_final(features))}
        if self.training and self.aux_classifier is not None:
            outputs[AUX] = self.aux_classifier(features[AUX])
        return outputs

    def _of_final(self, features: Mapping[str, Tensor]) -> Any:
        """The heads of LRASPP take several maps."""
        return features if len(self.heads) > 1 else features[FINAL]


class OnBackbone(Segmenter):
    """A backbone of timm, whose deepest map the final head takes, and the map before it the auxiliary one."""

    def __init__(self, backbone: Any, num_classes: int, *, head: Literal["fcn", "deeplabv3"], aux_head: bool) -> None:
        channels = backbone.feature_info.channels()
        super().__init__(
            backbone,
            _HEADS[head](channels[-1], num_classes),
            FCNHead(channels[-2], num_classes) if aux_head else None,
        )
        self.channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"

    def features(self, images_BCHW: Tensor) -> Mapping[str, Tensor]:
        maps = self.backbone(images_BCHW)
        if self.channels_last:
            maps = [map_BHWC.movedim(-1, 1) for map_BHWC in maps]
        return {FINAL: maps[-1], AUX: maps[-2] if len(maps) > 1 else maps[-1]}


def _last_layers(classifier: nn.Module) -> list[str]:
    """The convolutions whose outputs are logits, or, of LRASPP, summands of them."""
    if isinstance(classifier, LRASPPHead):
        return ["low_classifier", "high_classifier"]
    return [name for name, layer in classifier.named_modules() if isinstance(layer, nn.Conv2d)][-1:]


def torchvision_segmenter(name: str, num_classes: int, **kwargs: Any) -> Segmenter:
    """A network of torchvision with random weights. ``kwargs`` go to its constructor."""
    built: Any = models.get_model(name, weights=None, weights_backbone=None, num_classes=num_classes, **kwargs)
    return Segmenter(built.backbone, built.classifier, getattr(built, "aux_classifier", None))


def replace_heads(network: Segmenter, num_classes: int) -> None:
    """New last convolutions with random weights, for another number of classes."""
    auxiliary = [] if network.aux_classifier is None else _last_layers(network.aux_classifier)
    for name in (*network.heads, *(f"aux_classifier.{name}" for name in auxiliary)):
        old = network.get_submodule(name)
        assert isinstance(old, nn.Conv2d)
        parent, _, leaf = name.rpartition(".")
        setattr(network.get_submodule(parent), leaf, nn.Conv2d(old.in_channels, num_classes, kernel_size=1))


def timm_segmenter(request: BuildRequest) -> tuple[OnBackbone, tuple[str, ...]]:
    """A backbone of timm with a new head, and choices made on behalf of the user.

    Of ``kwargs``, ``head`` is ``fcn`` (default) or ``deeplabv3``, ``aux_head`` adds an auxiliary head, and
    ``output_stride`` is 8 by default, where the backbone can be built with it.

    Raises:
        ConfigError: ``head`` is neither.
    """
    kwargs = dict(request.config.kwargs)
    head, aux_head = kwargs.pop("head", "fcn"), bool(kwargs.pop("aux_head", False))
    stride = kwargs.pop("output_stride", None)
    if head not in _HEADS:
        raise ConfigError(
            "this head of a backbone is unknown",
            code="model.unknown-map-head",
            where=f"{request.where}.kwargs.head",
            got=head,
            expected=" or ".join(_HEADS),
        )
    keys: dict[str, Any] = {"features_only": True, "pretrained": request.pretrained, **kwargs}
    try:
        backbone: Any = timm.create_model(request.name, output_stride=stride or _DEFAULT_STRIDE, **keys)
    except (TypeError, NotImplementedError, AssertionError):
        if stride is not None:
            raise
        backbone = timm.create_model(request.name, **keys)
    reached = backbone.feature_info.reduction()[-1]
    notes = ()
    if stride is None and reached != _DEFAULT_STRIDE:
        notes = (f"{request.where}.model: the logits of {request.config.model} have an output stride of {reached}",)
    return OnBackbone(backbone, request.num_classes, head=head, aux_head=aux_head), notes
