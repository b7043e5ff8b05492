"""Resident memory and images per second while batches are streamed from tar shards that are larger than memory may be.

    python tests/benchmarks/streaming_memory.py              # 5 GB in a temporary folder, removed afterwards
    python tests/benchmarks/streaming_memory.py --gigabytes 0.06 --every 100

Few distinct JPEG pictures, each padded to its size with bytes that decoders ignore, so that reading weighs more than decoding.
Memory is this process's: its threads read and decode, there are no workers of another kind. `private` is what only it holds,
`files` are pages of libraries and mapped files, which the system takes back when it needs them.
"""

import argparse
import io
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from webdataset.writer import TarWriter

from vitkit import datasets
from vitkit.transforms import RandomCrop

CLASSES = 10
PER_SHARD = 500


def write(folder: Path, size: int, picture_bytes: int, side: int) -> int:
    """Shards of so many bytes altogether; how many samples."""
    generator = np.random.default_rng(0)
    bodies = []
    for label in range(CLASSES):
        coarse = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        body = io.BytesIO()
        Image.fromarray(coarse).resize((side, side)).save(body, "JPEG", quality=85)
        bodies.append(body.getvalue().ljust(picture_bytes, b"\0"))
        assert len(bodies[label]) == picture_bytes
    count = size // picture_bytes
    for start in range(0, count, PER_SHARD):
        with TarWriter(str(folder / f"train-{start // PER_SHARD:06d}.tar")) as writer:
            for number in range(start, min(start + PER_SHARD, count)):
                label = number % CLASSES
                writer.write({"__key__": f"{number:08d}", "jpg": bodies[label], "cls": str(label).encode()})
    return count


def memory() -> dict[str, float]:
    """Megabytes of this process and any children: `resident`, `private` and `files`."""
    found = {"resident": 0.0, "private": 0.0, "files": 0.0}
    own = os.getpid()
    children = Path(f"/proc/{own}/task/{own}/children").read_text().split()
    for process in [str(own), *children]:
        lines = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":" in line)
        for name, field in (("resident", "VmRSS"), ("private", "RssAnon"), ("files", "RssFile")):
            found[name] += int(lines.get(field, "0 kB").split()[0]) / 1024
    return found


def stream(folder: Path, *, batch_size: int, img_size: int, every: int) -> Iterator[tuple[int, float, dict[str, float]]]:
    """One epoch in batches; after about `every` images their number, the seconds so far and the memory."""
    data = datasets.build("webdataset", urls=str(folder), img_size=img_size, test_size=200, cache=str(folder / "index"))
    batches = data.train.batches(batch_size, shuffle=True, augment=RandomCrop(4))
    began, seen, shown = time.monotonic(), 0, 0
    for batch in batches.epoch(0):
        seen += len(batch["labels"])
        if seen - shown >= every:
            shown = seen
            yield seen, time.monotonic() - began, memory()
    assert seen == len(data.train), f"{seen} of {len(data.train)} images"
    yield seen, time.monotonic() - began, memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0, help="size of the set, in 10^9 bytes")
    parser.add_argument("--picture-kb", type=int, default=300, help="size of a picture's file, in 1,000 bytes")
    parser.add_argument("--side", type=int, default=128, help="pixels of a picture's side, as stored")
    parser.add_argument("--img-size", type=int, default=64, help="pixels of a picture's side, as delivered")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--every", type=int, default=2000, help="images between two lines")
    parser.add_argument("--folder", type=Path, default=None, help="where the set is written (a temporary folder)")
    given = parser.parse_args()
    size = round(given.gigabytes * 1e9)
    with tempfile.TemporaryDirectory(prefix="vitkit-streaming-", dir=given.folder) as name:
        free = shutil.disk_usage(name).free
        if free < 1.2 * size:
            parser.error(f"{name} has {free / 1e9:.1f} GB free; the set needs {size / 1e9:.1f} GB and some room")
        began = time.monotonic()
        count = write(Path(name), size, given.picture_kb * 1000, given.side)
        took = time.monotonic() - began
        print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, torch {torch.__version__}")
        print(f"{size / 1e9:.2f} GB, {count:,} pictures, written in {took:.0f} s; memory before: {memory()['resident']:.0f} MB", flush=True)
        print("images | seconds | images/s | resident MB | private MB | files MB")
        lines = []
        for seen, seconds, used in stream(Path(name), batch_size=given.batch_size, img_size=given.img_size, every=given.every):
            lines.append(used)
            rate = seen / max(seconds, 1e-9)
            shown = " | ".join(f"{used[key]:.0f}" for key in ("resident", "private", "files"))
            print(f"{seen:,} | {seconds:.0f} | {rate:.0f} | {shown}", flush=True)
        first, last = lines[0], lines[-1]
        highest = max(line["resident"] for line in lines)
        print(f"resident at the first line {first['resident']:.0f} MB, at the last {last['resident']:.0f} MB, highest {highest:.0f} MB")


if __name__ == "__main__":
    main()
