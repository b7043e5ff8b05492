"""Tar shards: their addresses, their copies on this machine, and the index of each.

A shard is read through once, and its index is kept: the position of each image in the file, and the text of its label. The index
gives the order of an epoch in advance, and lets any image be read separately.
"""

import hashlib
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import urlsplit

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from webdataset.gopen import gopen
from webdataset.shardlists import expand_urls
from webdataset.tariterators import base_plus_ext

from vitkit.data import MAX_FILE_BYTES
from vitkit.errors import DatasetError, UsageError, printable
from vitkit.files import atomic_write
from vitkit_streams.tar import Damage, Member, members

REMOTE = ("http", "https", "hf", "s3", "gs", "gcs", "abfs", "az")
"""Schemes that fsspec opens; all but the first three need an additional package (s3fs, gcsfs, adlfs)."""
FORMAT = "vitkit-shard-2"
MAX_LABEL_BYTES = 1 << 20
LINES_KEPT = 100
"""Most lines on left-out members that the index of a shard keeps."""


@dataclass(frozen=True)
class Fields:
    """The extensions of a sample's image, of which the first one present counts, and of its label; `json:KEY` is a JSON entry."""

    image: str
    label: str

    @property
    def images(self) -> list[str]:
        return self.image.lower().split(";")

    @property
    def label_file(self) -> str:
        return self.label.partition(":")[0].lower()


@dataclass(frozen=True)
class Shard:
    """One tar file: `offsets` and `sizes` int64 `(n,)` of its images, `codes` `(n,)` of their labels among `texts`."""

    url: str
    index: Path
    bytes: int
    offsets: Tensor
    sizes: Tensor
    codes: Tensor
    texts: list[str]
    skipped: list[str]

    def key(self, place: int) -> str:
        """The name that the files of a sample share."""
        with safe_open(self.index, framework="pt") as file:
            return bytes(file.get_tensor("keys").tolist()).decode().split("\n")[place]


def expanded(urls: str | Sequence[str], *, allow_pipe: bool = False) -> list[str]:
    """Shards by webdataset's conventions: braces `{000..099}`, several joined by `::`, and patterns of local files.

    A folder stands for the `.tar` files in it. Raises `UsageError` if there is no shard, for an unknown scheme, a shard named twice
    and, unless `allow_pipe`, for `pipe:`, which runs a command of the shell; `DatasetError` for a local file that does not exist.
    """
    shards: list[str] = []
    for word in [urls] if isinstance(urls, str) else urls:
        try:
            words = expand_urls(word)
        except ValueError:
            raise UsageError(f"the braces of {word!r} do not match; write them as in shards-{{000..099}}.tar") from None
        for one in words:
            if one.startswith("pipe:") and not allow_pipe:
                raise UsageError(
                    f"{one!r} would run a command in a shell, with your rights; read it, and give allow_pipe=true if you want that"
                )
            remote = one.startswith("pipe:") or _scheme(one) in REMOTE
            shards += [one] if remote else _local(one)
    if not shards:
        raise UsageError(f"urls is {urls!r}: it names no shard; give tar files, for example urls=shards/train-{{000..099}}.tar")
    twice = [url for url, count in Counter(shards).items() if count > 1][:3]
    if twice:
        raise UsageError(f"a shard is named twice: {', '.join(twice)}")
    return shards


def _scheme(url: str) -> str:
    return urlsplit(url).scheme.lower() if "://" in url else ""


def _local(url: str) -> list[str]:
    scheme = _scheme(url)
    if scheme not in ("", "file"):
        raise UsageError(f"{url!r} has the scheme {scheme!r}; known are local files and {', '.join(REMOTE)}")
    text = url.removeprefix("file://").removeprefix("file:")
    path = Path(text).expanduser().absolute()
    if path.is_dir():
        tars = sorted(map(str, path.glob("*.tar")))
        if not tars:
            raise DatasetError(f"the folder {path} holds no .tar file")
        return tars
    if any(letter in text for letter in "*?") and not path.exists():
        tars = sorted(map(str, Path(path.anchor).glob(str(path.relative_to(path.anchor)))))
        if not tars:
            raise DatasetError(f"no shard fits {url!r} (searched {path})")
        return tars
    if not path.is_file():
        raise DatasetError(f"no shard at {path}; braces write several: train-{{000..099}}.tar")
    return [str(path)]


@dataclass(frozen=True)
class Cache:
    """A folder of indices and of remote shards; up to `gigabytes` of the shards used last are kept."""

    folder: Path
    gigabytes: float

    @contextmanager
    def held(self, url: str) -> Iterator[Path]:
        """The shard's file on this machine, downloaded if necessary, and not evicted during the block.

        `DatasetError` with its url if it is not available.
        """
        if _is_local(url):
            yield Path(url)
            return
        path = self._place(url)
        self._ready()
        with FileLock(f"{path}.lock"):
            if not path.exists():
                self._fetch(url, path)
            yield path
        self._evict(path)

    def _place(self, url: str) -> Path:
        return Path(url) if _is_local(url) else self.folder / f"{digest(url)}.tar"

    def _open(self, url: str) -> IO[bytes]:
        """The open shard; a reader can use it even after it is evicted."""
        try:
            return self._place(url).open("rb")
        except FileNotFoundError:
            if _is_local(url):
                raise DatasetError(f"the shard {url} was removed since training began; put it back and resume") from None
        with self.held(url) as path:
            return path.open("rb")

    def _ready(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DatasetError(f"cannot make {self.folder}: {error.strerror or error}; name another folder with cache=...") from None

    def _fetch(self, url: str, path: Path) -> None:
        with atomic_write(path) as temporary:
            try:
                with closing(opened(url)) as source, temporary.open("wb") as target:
                    shutil.copyfileobj(source, target, 1 << 20)
            except Exception as error:  # file systems and commands raise many kinds
                reason = printable(f"{type(error).__name__}: {error}", 400)
                advice = "check its url, the network, your rights and the room on the disk"
                raise DatasetError(f"the shard {url} is not available: {reason}; {advice}") from None

    def _evict(self, keep: Path) -> None:
        """Remove the shards that were used longest ago, but never `keep`, nor one that another process holds.

        A process that reads a removed shard has it open.
        """
        shards = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):  # another process was faster
                stat = path.stat()
                shards.append((path == keep, stat.st_mtime_ns, stat.st_size, path))
        room = self.gigabytes * 1e9
        for kept, _, size, path in sorted(shards, reverse=True):
            room -= size
            if room < 0 and not kept:
                with suppress(Timeout), FileLock(f"{path}.lock", timeout=0):
                    path.unlink(missing_ok=True)

    def read(self, shard: Shard, place: int) -> bytes:
        """The file of one image; `DatasetError` if the shard is not readable or not the one that was indexed."""
        offset, size = int(shard.offsets[place]), int(shard.sizes[place])
        try:
            with self._open(shard.url) as file:
                if os.fstat(file.fileno()).st_size != shard.bytes:
                    raise DatasetError(f"the shard {shard.url} has changed since it was indexed; start the command again to index it")
                if not _is_local(shard.url):
                    with suppress(FileNotFoundError):  # another process has evicted it
                        os.utime(self._place(shard.url))
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise DatasetError(f"the shard {shard.url} cannot be read: {error.strerror or error}") from None

    def shard(self, url: str, fields: Fields) -> Shard:
        """The shard with its index, which is made on the first call; errors as `held` and `scan`."""
        mark: list[Any] = [FORMAT, url, fields.image, fields.label]
        if _is_local(url):
            stat = Path(url).stat()
            mark += [stat.st_size, stat.st_mtime_ns]
        index = self.folder / f"{digest(*mark)}.index"
        self._ready()
        if not index.exists():
            with FileLock(f"{index}.lock"):
                if not index.exists():
                    with self.held(url) as path:
                        tensors, metadata = scan(path, url, fields)
                        size = path.stat().st_size
                    with atomic_write(index) as temporary:
                        temporary.write_bytes(save(tensors, metadata={"bytes": str(size), **metadata}))
        try:
            with safe_open(index, framework="pt") as file:
                metadata = file.metadata()
                offsets, sizes, codes = (file.get_tensor(name).clone() for name in ("offsets", "sizes", "codes"))
            lists = (json.loads(metadata[name]) for name in ("texts", "skipped"))
            return Shard(url, index, int(metadata["bytes"]), offsets, sizes, codes, *lists)
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise DatasetError(f"the index {index} of {url} is damaged ({error}); delete it") from None


def opened(url: str) -> IO[bytes]:
    """The bytes of a remote shard."""
    if url.startswith("pipe:"):
        stream: IO[bytes] = gopen(url)
        return stream
    import fsspec

    file: IO[bytes] = fsspec.open(url, "rb").open()
    return file


def scan(path: Path, url: str, fields: Fields) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read through a shard: tensors and metadata of its index.

    Consecutive files that share a name up to its first dot are a sample, as in webdataset. A damaged member and a sample without an
    image are left out and named. Raises `DatasetError` for a file that is no tar file or cut short, a sample without a label, and a
    shard without samples.
    """
    places: list[tuple[int, int]] = []
    keys: list[str] = []
    codes: list[int] = []
    texts: dict[str, int] = {}
    skipped: list[str] = []
    try:
        with path.open("rb") as file:
            for key, files in _samples(file, path.stat().st_size, skipped):
                name = printable(key)
                image = next((files[suffix] for suffix in fields.images if suffix in files), None)
                if image is None:
                    skipped.append(f"{name}: no {fields.image} among its files: {printable(', '.join(files))}")
                    continue
                if image.size > MAX_FILE_BYTES:
                    skipped.append(f"{name}: its image has {image.size:,} bytes; expected at most {MAX_FILE_BYTES:,}")
                    continue
                text = _label(file, files, fields, f"sample {name!r} of the shard {url}")
                places.append((image.offset, image.size))
                codes.append(texts.setdefault(text, len(texts)))
                keys.append(name)
    except (tarfile.TarError, EOFError) as error:
        raise DatasetError(
            f"the shard {url} is no tar file or cut short ({printable(error)}); compressed ones have to be unpacked"
        ) from None
    except OSError as error:
        raise DatasetError(f"the shard {url} cannot be read: {error.strerror or error}") from None
    if len(skipped) > LINES_KEPT:
        skipped[LINES_KEPT:] = [f"and {len(skipped) - LINES_KEPT:,} more"]
    skipped = [f"{url}: {line}" for line in skipped]
    if not places:
        raise DatasetError(f"the shard {url} holds no sample with an image ({fields.image}); {'; '.join(skipped[:2])}".rstrip("; "))
    offsets, sizes = torch.tensor(places, dtype=torch.int64).unbind(1)
    tensors = {
        "offsets": offsets.contiguous(), "sizes": sizes.contiguous(), "codes": torch.tensor(codes, dtype=torch.int64),
        "keys": torch.frombuffer(bytearray("\n".join(keys).encode()), dtype=torch.uint8),
    }  # fmt: skip
    return tensors, {"texts": json.dumps(list(texts)), "skipped": json.dumps(skipped)}


def _samples(file: BinaryIO, end: int, skipped: list[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Each sample's key and its files by their extensions in lower case; a line in `skipped` for each damaged member."""
    current, files = "", dict[str, Member]()
    for member in members(file, end):
        if isinstance(member, Damage):
            if len(skipped) <= LINES_KEPT:
                skipped.append(f"{printable(member.name)}: {member.reason}")
            continue
        key, extension = base_plus_ext(member.name)
        if key is None or ("/" not in key and key.startswith("__")):
            continue
        if key != current and files:
            yield current, files
            files = {}
        current = key
        files[extension.lower()] = member
    if files:
        yield current, files


def _label(file: BinaryIO, files: dict[str, Member], fields: Fields, where: str) -> str:
    member = files.get(fields.label_file)
    if member is None:
        raise DatasetError(
            f"{where} has no label: no {fields.label_file!r} among its files: {printable(', '.join(files))}; "
            f"give its place: label=cls, label=txt or label=json:KEY"
        )
    name = printable(member.name)
    if member.size > MAX_LABEL_BYTES:
        raise DatasetError(f"{where}: its label, {name!r}, has {member.size:,} bytes; expected at most {MAX_LABEL_BYTES:,}")
    file.seek(member.offset)
    try:
        text = file.read(member.size).decode()
    except UnicodeDecodeError:
        raise DatasetError(f"{where}: its label, {name!r}, is no text in UTF-8") from None
    entry = fields.label.partition(":")[2]
    if entry:
        try:
            value = json.loads(text)[entry]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DatasetError(f"{where}: {name!r} is no JSON object with an entry {entry!r}: {printable(text, 120)!r}") from None
        text = value if isinstance(value, str) else json.dumps(value)
    text = text.strip()
    if not text:
        raise DatasetError(f"{where} has an empty label, {name!r}")
    return text


def _is_local(url: str) -> bool:
    return not url.startswith("pipe:") and _scheme(url) == ""


def digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
