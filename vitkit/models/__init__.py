"""Saved models: loading, features, prediction, embedding of whole folders and export."""

from vitkit.models.features import Features, encode_image, evaluating, extract_features, feature_cache
from vitkit.models.image_sources import pictures_below, read_picture
from vitkit.models.model import Model
from vitkit.models.predict import Prediction
from vitkit.models.saving import load, save
from vitkit.models.weights import LoadedWeights, load_weights

__all__ = [
    "Features",
    "LoadedWeights",
    "Model",
    "Prediction",
    "encode_image",
    "evaluating",
    "extract_features",
    "feature_cache",
    "load",
    "load_weights",
    "pictures_below",
    "read_picture",
    "save",
]
