"""The members of a tar file that is not trusted: each is valid, or damaged and named, and reading always ends.

Python's tarfile is not used: a negative size makes it read backwards without end, it calls itself for each extension header in a chain,
reads extension headers of any size into memory, and takes a damaged header for the end of the archive. Here every step moves forward,
extension headers are bounded, and after a damaged header the next valid one is searched.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = tarfile.BLOCKSIZE
MAGIC, MAGIC_OFFSET = b"ustar", 257
WINDOW_BYTES = 1 << 20
MAX_EXTENSION_BYTES = 1 << 16
"""Extension headers hold a name and a few numbers."""


@dataclass(frozen=True)
class Member:
    """A regular file: its name, as in a file system's, and where its bytes lie."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """A member that is left out, and the reason."""

    name: str
    reason: str


def members(file: BinaryIO, end: int) -> Iterator[Member | Damage]:
    """The regular files of a tar file of `end` bytes, and its damaged parts.

    Raises `tarfile.ReadError` if it does not begin as a tar file, and if it ends within a member.
    """
    if end < BLOCK:
        raise tarfile.ReadError(f"{end} bytes are less than one header")
    walk = _Walk(file, end)
    while walk.place + BLOCK <= end:
        yield from walk.step()
    if walk.too_long is not None:
        raise tarfile.ReadError(f"it ends within {walk.too_long.name!r}")
    if file.seek(walk.place) < end and any(file.read(end - walk.place)):
        raise tarfile.ReadError("it ends within a header")
    yield from walk.close_gap()


class _Walk:
    """The position in a tar file, and the facts about the next member that extension headers give."""

    def __init__(self, file: BinaryIO, end: int) -> None:
        self.file, self.end, self.place = file, end, 0
        self.name: str | None = None  # from an extension header
        self.fields: dict[str, str] = {}
        self.gap: int | None = None  # where blocks that are no header began
        self.too_long: Damage | None = None  # ends the file, unless another member follows

    def step(self) -> Iterator[Member | Damage]:
        """One block that is no header, or one header with the bytes that belong to it."""
        if self.gap is not None or self.too_long is not None:
            self._skip_to_header()
        self.file.seek(self.place)
        block = self.file.read(BLOCK)
        if len(block) < BLOCK:  # the file became shorter while it was read
            self.place = self.end
            return
        start, self.place = self.place, self.place + BLOCK
        if not any(block):  # the end of an archive, which another one may follow
            yield from self.close_gap()
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except (tarfile.HeaderError, ValueError) as error:
            if start == 0:
                raise tarfile.ReadError(f"no tar header at its beginning: {error}") from None
            self.gap = start if self.gap is None else self.gap
            return
        yield from self.close_gap()
        if self.too_long is not None:
            yield self.too_long
            self.too_long = None
        yield from self._member(header, block)

    def _skip_to_header(self) -> None:
        """Move on to the next block that has the mark of a header, or to the end."""
        while self.place + BLOCK <= self.end:
            self.file.seek(self.place)
            window = self.file.read(WINDOW_BYTES)
            if len(window) < BLOCK:
                break
            mark = window.find(MAGIC)
            while mark >= 0 and (mark - MAGIC_OFFSET) % BLOCK:
                mark = window.find(MAGIC, mark + 1)
            if mark >= 0:
                self.place += mark - MAGIC_OFFSET
                return
            self.place += len(window) // BLOCK * BLOCK
        self.place = self.end

    def close_gap(self) -> Iterator[Damage]:
        if self.gap is not None and self.too_long is None:
            yield Damage(f"byte {self.gap:,}", "no tar header where one should be")
        self.gap = None

    def _member(self, header: tarfile.TarInfo, block: bytes) -> Iterator[Member | Damage]:
        size, name = header.size, self.name or self.fields.get("path") or header.name
        if header.type in (b"L", b"K", b"x", b"X", b"g"):
            if not 0 <= size <= min(MAX_EXTENSION_BYTES, self.end - self.place):
                yield Damage(name, f"its extension header claims {size:,} bytes; expected at most {MAX_EXTENSION_BYTES:,}")
                return
            self._extend(header.type, self.file.read(size))
            self.place += _padded(size)
            return
        fields, self.fields, self.name = self.fields, {}, None
        if "size" in fields:
            size = int(fields["size"]) if fields["size"].isdecimal() and len(fields["size"]) < 20 else -1
        has_data = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
        if not has_data:
            return
        if size < 0:
            yield Damage(name, "its size is negative or no number")
        elif self.place + _padded(size) > self.end:
            self.too_long = Damage(name, f"it claims {size:,} bytes, more than the shard has")
        elif header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in fields):
            self.place += 0 if header.type != tarfile.GNUTYPE_SPARSE else self._sparse_headers(block)
            self.place += _padded(size)
            yield Damage(name, "it is a sparse file, which is not supported")
        else:
            offset, self.place = self.place, self.place + _padded(size)
            if header.isreg():
                yield Member(name, offset, size)

    def _extend(self, kind: bytes, body: bytes) -> None:
        if kind == b"L":
            self.name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind in (b"x", b"X"):
            self.fields |= _records(body)

    def _sparse_headers(self, block: bytes) -> int:
        """Bytes of the headers that continue a sparse file's map."""
        length, more = 0, block[482]
        while more and self.place + length + BLOCK <= self.end:
            more = self.file.read(BLOCK)[504]
            length += BLOCK
        return length


def _records(body: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header; records after a damaged one are left out."""
    fields, place = {}, 0
    while place < len(body):
        digits, space, _ = body[place : place + 8].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        if not len(digits) + 1 < length <= len(body) - place:
            break
        key, _, value = body[place + len(digits) + 1 : place + length - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        place += length
    return fields


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


__all__ = ["Damage", "Member", "members"]
