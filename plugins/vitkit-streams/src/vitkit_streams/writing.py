"""Writing images and labels into tar shards, with the names and the format of webdataset's `ShardWriter`."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from vitkit.validation import at_least


def write_shards(
    folder: Path, images: Iterable[np.ndarray], labels: Sequence[int | str], *, per_shard: int = 1000, prefix: str = "train"
) -> list[Path]:
    """Write `PREFIX-000000.tar`, ... with `per_shard` samples each into `folder`, KEY.png and KEY.cls; return the paths.

    Images are uint8 `(h w)`, grey, or `(h w 3)`. Raises `UsageError` for a `per_shard` below 1.
    """
    at_least(1, per_shard=per_shard)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    writer = None
    try:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            if number % per_shard == 0:
                if writer is not None:
                    writer.close()
                paths.append(folder / f"{prefix}-{len(paths):06d}.tar")
                writer = TarWriter(str(paths[-1]))
            body = io.BytesIO()
            Image.fromarray(image).save(body, "PNG")
            assert writer is not None
            writer.write({"__key__": f"{number:08d}", "png": body.getvalue(), "cls": str(label).encode()})
    finally:
        if writer is not None:
            writer.close()
    return paths
