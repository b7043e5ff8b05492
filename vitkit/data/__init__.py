"""Datasets: splits of images, how they are stored, preprocessed and cut into batches."""

from vitkit.data.dataloader import ImageBatches, View
from vitkit.data.dataset import (
    ImageDataset,
    build,
    fetched,
    from_store,
    held_out,
    imported,
    pixel_moments,
    resolve,
    stand_in,
)
from vitkit.data.decode import MAX_FILE_BYTES, SUFFIXES, ImageReadError, read_image, read_square
from vitkit.data.image_files import ImageListing, class_order, list_images
from vitkit.data.image_folder import import_folder, read_layout
from vitkit.data.preprocess import Preprocessing, preprocess
from vitkit.data.split import ImageSplit, stratified_indices
from vitkit.data.store import Stored, read_store, store_directory, store_lock, store_path, stored_names, write_store

__all__ = [
    "MAX_FILE_BYTES",
    "SUFFIXES",
    "ImageBatches",
    "ImageDataset",
    "ImageListing",
    "ImageReadError",
    "ImageSplit",
    "Preprocessing",
    "Stored",
    "View",
    "build",
    "class_order",
    "fetched",
    "from_store",
    "held_out",
    "import_folder",
    "imported",
    "list_images",
    "pixel_moments",
    "preprocess",
    "read_image",
    "read_layout",
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
