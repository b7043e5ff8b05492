"""Datasets: splits of images, how they are stored, preprocessed and cut into batches."""

from vitkit.data.dataset import ImageDataset, build, fetched, from_store, imported, pixel_moments, resolve, stand_in
from vitkit.data.digest import dataset_digest
from vitkit.data.image_folder import SUFFIXES, import_folder, pictures_of, read_square
from vitkit.data.preprocess import Preprocessing, preprocess
from vitkit.data.split import ImageBatches, ImageSplit, stratified_indices
from vitkit.data.store import Stored, read_store, store_directory, store_lock, store_path, stored_names, write_store

__all__ = [
    "SUFFIXES",
    "ImageBatches",
    "ImageDataset",
    "ImageSplit",
    "Preprocessing",
    "Stored",
    "build",
    "dataset_digest",
    "fetched",
    "from_store",
    "import_folder",
    "imported",
    "pictures_of",
    "pixel_moments",
    "preprocess",
    "read_square",
    "read_store",
    "resolve",
    "stand_in",
    "store_directory",
    "store_lock",
    "store_path",
    "stored_names",
    "stratified_indices",
    "write_store",
]
