"""Datasets larger than memory: webdataset's tar shards, and Hugging Face `datasets`."""

from vitkit_streams.arrow import hf_dataset
from vitkit_streams.web import webdataset

__all__ = ["hf_dataset", "webdataset"]
