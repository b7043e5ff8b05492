"""What identifies a dataset: its classes and labels."""

import hashlib
import json
from typing import Any


def dataset_digest(dataset: Any) -> str:
    """SHA-256 of the classes and labels of a dataset, in hexadecimal digits: equal names with other labels differ."""
    digest = hashlib.sha256(json.dumps(list(dataset.classes)).encode())
    for split in (dataset.train, dataset.test):
        digest.update(split.labels.numpy().tobytes())
    return digest.hexdigest()


__all__ = ["dataset_digest"]
