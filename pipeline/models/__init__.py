"""Teachers and students: any network of timm, torchvision or the user, with all outputs in one forward."""

from pipeline.models.embedding import EmbeddingModel, move_to_device, unsafe_in_channels_last
from pipeline.models.feature_maps import FeatureMap, find_maps, forward_with_maps, register_map_hooks
from pipeline.models.heads import MultiHeadNetwork, multi_head, selected_widths
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
    "MultiHeadNetwork",
    "WeightsFile",
    "find_maps",
    "forward_with_maps",
    "load_model",
    "load_state",
    "load_untrained",
    "move_to_device",
    "multi_head",
    "random_weights_warnings",
    "read_state",
    "register_map_hooks",
    "require_weights",
    "selected_widths",
    "unreadable_weights",
    "unsafe_in_channels_last",
]
