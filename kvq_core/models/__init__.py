"""Models through transformers: loading, what is supported, and the geometry of their KV cache."""

from kvq_core.models.geometry import LayerGeometry, ModelGeometry, model_geometry
from kvq_core.models.load import LoadedModel, load_config, load_model
from kvq_core.models.support import check_support
from kvq_core.presets import PRESETS

__all__ = [
    "PRESETS",
    "LayerGeometry",
    "LoadedModel",
    "ModelGeometry",
    "check_support",
    "load_config",
    "load_model",
    "model_geometry",
]
