"""Saved models: loading, features, prediction, embedding of whole folders and export."""

from vitkit.models.attention import AttentionMaps, attention, principal_colours, rolled_out
from vitkit.models.features import Features, encode_image, evaluating, extract_features, feature_cache
from vitkit.models.image_sources import images_below, open_image
from vitkit.models.model import Model
from vitkit.models.predict import Prediction
from vitkit.models.saving import load, save
from vitkit.models.weights import LoadedWeights, load_weights, resample_positions

__all__ = [
    "AttentionMaps",
    "Features",
    "LoadedWeights",
    "Model",
    "Prediction",
    "attention",
    "encode_image",
    "evaluating",
    "extract_features",
    "feature_cache",
    "images_below",
    "load",
    "load_weights",
    "open_image",
    "principal_colours",
    "resample_positions",
    "rolled_out",
    "save",
]
