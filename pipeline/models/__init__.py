"""Teachers and students: any timm, torchvision or own network as logits and penultimate embedding in one forward."""

from pipeline.models.embedding import EmbeddingModel, lay_out, unsafe_in_channels_last
from pipeline.models.feature_maps import FeatureMap, find_maps, observe_maps, with_maps
from pipeline.models.load import (
    InputSpec,
    LoadedModel,
    load_model,
    load_untrained,
    random_weights_warnings,
    require_weights,
    unreadable_weights,
)
from pipeline.models.sources.base import WeightsFile
from pipeline.models.weights import load_state, read_state

__all__ = [
    "EmbeddingModel",
    "FeatureMap",
    "InputSpec",
    "LoadedModel",
    "WeightsFile",
    "find_maps",
    "lay_out",
    "load_model",
    "load_state",
    "load_untrained",
    "observe_maps",
    "random_weights_warnings",
    "read_state",
    "require_weights",
    "unreadable_weights",
    "unsafe_in_channels_last",
    "with_maps",
]
