"""Pictures and labels into tar shards, as webdataset's own `ShardWriter` names and packs them."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset.writer import TarWriter

from vitkit.errors import UsageError


def write_shards(
    folder: Path, pictures: Iterable[np.ndarray], labels: Sequence[int | str], *, per_shard: int = 1000, prefix: str = "train"
) -> list[Path]:
    """Write `PREFIX-000000.tar`, ... with `per_shard` samples each into `folder`: KEY.png and KEY.cls; the paths.

    Pictures are uint8 `(h w)`, grey, or `(h w 3)`. Raises `UsageError` for fewer than one a shard.
    """
    if per_shard < 1:
        raise UsageError(f"per_shard is {per_shard}; expected at least 1 sample")
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    writer = None
    try:
        for number, (picture, label) in enumerate(zip(pictures, labels, strict=True)):
            if number % per_shard == 0:
                if writer is not None:
                    writer.close()
                paths.append(folder / f"{prefix}-{len(paths):06d}.tar")
                writer = TarWriter(str(paths[-1]))
            body = io.BytesIO()
            Image.fromarray(picture).save(body, "PNG")
            assert writer is not None
            writer.write({"__key__": f"{number:08d}", "png": body.getvalue(), "cls": str(label).encode()})
    finally:
        if writer is not None:
            writer.close()
    return paths
