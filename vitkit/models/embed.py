"""Features of many images into one safetensors file, in pieces that outlast a stop.

`OUT.partial/` beside the output holds the finished pieces, a safetensors file each, written whole or not at all. Each says
which job it belongs to: a digest of the model's weights and preprocessing, the images, the batch size, the device and the
precision. Asked for again, a job takes its own sound pieces and computes the others, in the same batches as without a
stop, so that the output is the same to the bit. When the output stands, the folder is removed.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vitkit.contracts import TrainedModel
from vitkit.errors import RunError, UsageError
from vitkit.files import atomic_write
from vitkit.models.features import device_of
from vitkit.models.image_sources import Source

FORMAT = "vitkit-features-1"
PIECE = 1024
"""Images in a piece, about: what a stop costs at most."""


@dataclass(frozen=True)
class Embedded:
    """What `embed` wrote: `count` rows of `width` features, how many of them were there before, and lines for the rest."""

    path: Path
    count: int
    width: int
    resumed: int
    skipped: list[str]


def embed(
    model: TrainedModel,
    source: Source,
    out: str | Path,
    *,
    model_name: str = "",
    batch_size: int = 256,
    precision: str = "fp32",
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Embedded:
    """Write `features` float32 `(n d)`, `labels` int64 `(n,)` where they are known, and metadata, to `out`.

    The metadata `vitkit` is a JSON object: `format`, `files` (the name of each row's; not for a dataset, whose rows are in
    its order) or `dataset` and `split`, `classes` of the labels, `skipped` (a line for each picture that could not be read),
    `model` and `preprocessing`. `precision` is fp32, or bf16 by autocast. `progress(done, total)` is called after each batch. Raises
    `UsageError` for a file that is there without `overwrite`, a batch size below 1 and where no picture can be read;
    `RunError` where the file cannot be written or another process writes it.
    """
    out = Path(out)
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    if out.is_dir() or out.suffix != ".safetensors":
        raise UsageError(f"-o {out}: expected the name of a .safetensors file")
    if out.exists() and not overwrite:
        raise UsageError(f"-o {out} is there already; choose another name, or give --overwrite")
    device = device_of(model)
    about = {
        "model": {
            "source": model_name, "weights": model.config["weights"]["sha256"], "modules": model.config["modules"],
            "device": device.type, "precision": precision, "batch_size": batch_size,
        },
        "preprocessing": model.preprocessing, **source.describe(),
    }  # fmt: skip
    job = hashlib.sha256(json.dumps([FORMAT, about, source.fingerprint()], sort_keys=True).encode()).hexdigest()
    with _workplace(out) as folder:
        pieces, resumed = _Pieces(folder, job, len(source), batch_size), 0
        for start in pieces.starts:
            if pieces.is_sound(start):
                resumed += pieces.stop(start) - start
        done = resumed
        progress(done, len(source))
        for start in pieces.starts:
            if pieces.is_sound(start):
                continue
            features: list[Tensor] = []
            rows: list[int] = []
            problems: dict[int, str] = {}
            stop = pieces.stop(start)
            for batch in source.batches(model, range(start, stop, batch_size), batch_size):
                if batch.images is not None:
                    features.append(_encode(model, batch.images, device, precision))
                rows += batch.rows
                problems |= batch.problems
                done += batch.stop - batch.start
                progress(done, len(source))
            pieces.write(start, features, rows, problems)
        tensors, rows, problems = pieces.joined()
        skipped = [f"{source.name(index)}: {problem}" for index, problem in problems.items()]
        if not rows:
            raise UsageError(f"none of the {len(source)} pictures can be read: {'; '.join(skipped[:3])}")
        if source.labels is not None:
            tensors["labels"] = source.labels[rows].clone()
        told: dict[str, Any] = {"format": FORMAT, **about, "skipped": skipped}
        if "dataset" not in about:
            told["files"] = [source.name(index) for index in rows]
        metadata = {"vitkit": json.dumps(told, ensure_ascii=False)}  # safetensors puts several keys into any order
        with atomic_write(out) as temporary:
            temporary.write_bytes(save(tensors, metadata=metadata))
        shutil.rmtree(folder)
    return Embedded(out, len(rows), tensors["features"].shape[1], resumed, skipped)


class _Pieces:
    """The finished pieces of a job in a folder."""

    def __init__(self, folder: Path, job: str, count: int, batch_size: int) -> None:
        self.folder, self.job, self.count = folder, job, count
        self.size = max(1, PIECE // batch_size) * batch_size  # whole batches, the same ones as without a stop
        self.starts = range(0, count, self.size)
        self._sound = {start for start in self.starts if self._read(start) is not None}

    def stop(self, start: int) -> int:
        return min(start + self.size, self.count)

    def is_sound(self, start: int) -> bool:
        return start in self._sound

    def write(self, start: int, features: list[Tensor], rows: list[int], problems: dict[int, str]) -> None:
        joined = torch.cat(features) if features else torch.zeros(0, 0)
        if not bool(joined.isfinite().all()):
            raise RunError("the model's features are not finite: it has diverged, or try --precision fp32")
        tensors = {"features": joined, "rows": torch.tensor(rows, dtype=torch.int64)}
        with atomic_write(self._path(start)) as temporary:
            temporary.write_bytes(save(tensors, metadata={"job": self.job, "problems": json.dumps(problems)}))

    def joined(self) -> tuple[dict[str, Tensor], list[int], dict[int, str]]:
        """`features` of all pieces, their rows, and what was wrong with the others."""
        features: list[Tensor] = []
        rows: list[int] = []
        problems: dict[int, str] = {}
        for start in self.starts:
            found = self._read(start)
            if found is None:
                raise RunError(f"{self._path(start)} was changed meanwhile; the same command computes it again")
            features.append(found[0])
            rows += found[1].tolist()
            problems |= found[2]
        filled = [one for one in features if len(one)]
        return {"features": torch.cat(filled) if filled else torch.zeros(0, 0)}, rows, problems

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"

    def _read(self, start: int) -> tuple[Tensor, Tensor, dict[int, str]] | None:
        """A piece of this job, or None where there is none that is sound."""
        try:
            with safe_open(self._path(start), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job") != self.job:
                    return None
                problems = {int(index): said for index, said in json.loads(metadata["problems"]).items()}
                return file.get_tensor("features"), file.get_tensor("rows"), problems
        except (OSError, SafetensorError, ValueError, KeyError):
            return None


@contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """`OUT.partial`, held by this process alone."""
    folder = out.with_name(f"{out.name}.partial")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{out} is being written by another process; wait until it ends, or choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write beside {out}: {error.strerror or error}; choose another -o") from None
    try:
        yield folder
    finally:
        lock.release()


def _encode(model: TrainedModel, images: Tensor, device: torch.device, precision: str) -> Tensor:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.encode_image(images.to(device)).float().cpu().contiguous()


__all__ = ["Embedded", "embed"]
