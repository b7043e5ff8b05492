"""Features of many images, written into one safetensors file in pieces that survive an interruption.

`OUT.partial/` beside the output holds a marker file and the finished pieces, a safetensors file each. A piece stores the digest of its
content and the digest of its job: the model's weights and preprocessing, the images, the batch size, the device and the precision. A
second call of a job uses its intact pieces and computes the others, in the same batches as without an interruption, so the output is
identical bit by bit. At the end the pieces are removed.
"""

import hashlib
import json
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
from vitkit.errors import RunError, UsageError, printable
from vitkit.files import atomic_write, check_output, is_leftover, write_text
from vitkit.models.features import device_of
from vitkit.models.image_sources import Source

FORMAT = "vitkit-features-1"
PIECE_IMAGES = 1024
"""Approximate number of images in a piece: an interruption loses the work on at most one piece."""
LOCK = ".lock"
MARKER = "vitkit-embed"
"""The file that marks a folder of pieces as vitkit's; no other folder is written to or removed."""


@dataclass(frozen=True)
class Embedded:
    """The output of `embed`: `count` rows of `width` features, `resumed` of them from an earlier call; a line for each skipped image."""

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

    The metadata `vitkit` is a JSON object: `format`, `files` (the file of each row; rows of a dataset have none and keep the dataset's
    order) or `dataset` and `split`, `classes` of the labels, `skipped` (a line for each image that could not be read), `model` and
    `preprocessing`. `precision` is fp32, or bf16 by autocast. `progress(done, total)` is called after each batch. `overwrite` replaces a
    file of features, never another file. Raises `UsageError` for an output that exists, a folder `OUT.partial` that vitkit did not make, a
    batch size below 1, and if no image can be read; `RunError` if the file cannot be written or another process writes it.
    """
    out = Path(out)
    if batch_size < 1:
        raise UsageError(f"--batch-size {batch_size}: expected at least 1")
    if out.suffix != ".safetensors":
        raise UsageError(f"-o {printable(out)}: expected the name of a .safetensors file")
    check_output(out, overwrite=overwrite, is_ours=_holds_features, kind="a .safetensors file of features")
    device = device_of(model)
    about = {
        "model": {
            "source": model_name, "weights": model.config["weights"]["sha256"], "modules": model.config["modules"],
            "device": device.type, "precision": precision, "batch_size": batch_size,
        },
        "preprocessing": model.preprocessing, **source.describe(),
    }  # fmt: skip
    job = hashlib.sha256(json.dumps([FORMAT, about, source.fingerprint()], sort_keys=True).encode()).hexdigest()
    with _partial_folder(out) as folder:
        pieces, resumed = _Pieces(folder, job, len(source), batch_size), 0
        for start in pieces.starts:
            if pieces.is_intact(start):
                resumed += pieces.stop(start) - start
        done = resumed
        progress(done, len(source))
        for start in pieces.starts:
            if pieces.is_intact(start):
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
            raise UsageError(f"none of the {len(source)} images can be read: {'; '.join(map(printable, skipped[:3]))}")
        if source.labels is not None:
            tensors["labels"] = source.labels[rows].clone()
        description: dict[str, Any] = {"format": FORMAT, **about, "skipped": skipped}
        if "dataset" not in about:
            description["files"] = [source.name(index) for index in rows]
        text = json.dumps(description, ensure_ascii=False).encode("utf-8", "backslashreplace").decode()  # names may not be UTF-8
        metadata = {"vitkit": text}  # one key: safetensors does not keep the order of several
        with atomic_write(out) as temporary:
            temporary.write_bytes(save(tensors, metadata=metadata))
        pieces.remove()
    return Embedded(out, len(rows), tensors["features"].shape[1], resumed, skipped)


class _Pieces:
    """The finished pieces of a job, in a folder."""

    def __init__(self, folder: Path, job: str, count: int, batch_size: int) -> None:
        self.folder, self.job, self.count = folder, job, count
        self.size = max(1, PIECE_IMAGES // batch_size) * batch_size  # complete batches, the same as without an interruption
        self.starts = range(0, count, self.size)
        self._intact = {start for start in self.starts if self._read(start) is not None}

    def stop(self, start: int) -> int:
        return min(start + self.size, self.count)

    def is_intact(self, start: int) -> bool:
        return start in self._intact

    def write(self, start: int, features: list[Tensor], rows: list[int], problems: dict[int, str]) -> None:
        joined = torch.cat(features) if features else torch.zeros(0, 0)
        if not bool(joined.isfinite().all()):
            raise RunError("the model's features are not finite: its training has diverged, or try --precision fp32")
        piece, text = (joined, torch.tensor(rows, dtype=torch.int64)), json.dumps(problems)
        metadata = {"job": self.job, "problems": text, "digest": _digest(*piece, text)}
        with atomic_write(self._path(start)) as temporary:
            temporary.write_bytes(save({"features": piece[0], "rows": piece[1]}, metadata=metadata))

    def joined(self) -> tuple[dict[str, Tensor], list[int], dict[int, str]]:
        """`features` of all pieces, their rows, and the problem of each row without features."""
        features: list[Tensor] = []
        rows: list[int] = []
        problems: dict[int, str] = {}
        for start in self.starts:
            piece = self._read(start)
            if piece is None:
                raise RunError(f"{printable(self._path(start))} was changed by another process; the same command computes it again")
            features.append(piece[0])
            rows += piece[1].tolist()
            problems |= piece[2]
        filled = [tensor for tensor in features if len(tensor)]
        return {"features": torch.cat(filled) if filled else torch.zeros(0, 0)}, rows, problems

    def remove(self) -> None:
        """Remove the files of this format, and the folder if it is empty afterwards."""
        for path in self.folder.iterdir():
            is_piece = path.suffix == ".safetensors" and path.stem.isdigit()
            if is_piece or path.name in (MARKER, LOCK) or is_leftover(path):
                path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, start: int) -> Path:
        return self.folder / f"{start:09d}.safetensors"

    def _read(self, start: int) -> tuple[Tensor, Tensor, dict[int, str]] | None:
        """An intact piece of this job, or None."""
        try:
            with safe_open(self._path(start), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("job") != self.job:
                    return None
                features, rows = file.get_tensor("features"), file.get_tensor("rows")
                if metadata["digest"] != _digest(features, rows, metadata["problems"]):
                    return None
                problems = {int(index): problem for index, problem in json.loads(metadata["problems"]).items()}
                return features, rows, problems
        except (OSError, SafetensorError, ValueError, KeyError):
            return None


def _digest(features: Tensor, rows: Tensor, problems: str) -> str:
    digest = hashlib.sha256(f"{tuple(features.shape)} {features.dtype} {problems}".encode())
    digest.update(features.numpy().tobytes())
    digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def _holds_features(path: Path) -> bool:
    """Whether a file is an earlier output of `embed`."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool(json.loads((file.metadata() or {})["vitkit"])["format"] == FORMAT)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """`OUT.partial`, locked by this process. Raises `UsageError` for a folder without the marker that is not empty."""
    folder = out.with_name(f"{out.name}.partial")
    try:
        is_foreign = folder.is_symlink() or (
            folder.exists() and not (folder / MARKER).is_file() and (not folder.is_dir() or any(folder.iterdir()))
        )
        if is_foreign:
            raise UsageError(
                f"{printable(folder)} exists and was not made by vitkit embed, which keeps its pieces there; move it, or choose another -o"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / MARKER, "Pieces of an output of `vitkit embed`; the same command resumes from them.\n")
        lock = FileLock(folder / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise RunError(f"{printable(out)} is being written by another process; wait until it ends, or choose another name") from None
    except OSError as error:
        raise RunError(f"cannot write beside {printable(out)}: {error.strerror or error}; choose another -o") from None
    try:
        yield folder
    finally:
        lock.release()


def _encode(model: TrainedModel, images: Tensor, device: torch.device, precision: str) -> Tensor:
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        return model.encode_image(images.to(device)).float().cpu().contiguous()


__all__ = ["Embedded", "embed"]
