"""Saved models: loading, features, prediction, embedding of whole folders and export."""

from vitkit.models.image_sources import pictures_below, read_picture
from vitkit.models.predict import Prediction
from vitkit.models.saving import Model, encode_image, load, save

__all__ = ["Model", "Prediction", "encode_image", "load", "pictures_below", "read_picture", "save"]
