"""safetensors files tensor by tensor and piece by piece: neither reading nor writing holds more than one piece.

A file is 8 bytes (the header's length, little-endian), the header (JSON: per tensor its dtype, shape and place in the
data), and the data. The safetensors package checks a header; the bytes are read and written here, because its own
functions hold whole tensors, and know no bfloat16 without torch.

Files written here carry checksums in ``__metadata__``: CRC-32 of the header and of every tensor.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tlkernels._version import __version__

PIECE = 1 << 22  # bytes; a multiple of every block of every dtype
VERSION_KEY, CHECKSUM_KEY = "tlkernels.version", "tlkernels.crc32"


class FileError(Exception):
    """A file that cannot be read or written; the message is one line for the person at the terminal."""


@dataclass(frozen=True)
class Entry:
    """A tensor of a file: its dtype in safetensors' spelling, and its place in the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


# ---- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """An open file whose header has been checked: every byte of the data belongs to exactly one tensor."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _check_header(path)
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise FileError(f"{path}: {reason(error)}") from None
        try:
            self._parse()
        except BaseException:
            self.close()
            raise

    def _parse(self) -> None:
        size = int.from_bytes(self._read(0, 8), "little")
        self.header = self._read(8, size)
        self._data = 8 + size
        try:
            table = json.loads(self.header, object_pairs_hook=_unique)
            self.metadata: dict[str, str] = table.pop("__metadata__", None) or {}
            entries = [Entry(n, t["dtype"], tuple(t["shape"]), *t["data_offsets"]) for n, t in table.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FileError(f"{self.path}: not a valid safetensors file: its header has {error}") from None
        #: name -> entry, in the order of the data
        self.tensors = {e.name: e for e in sorted(entries, key=lambda e: (e.begin, e.end))}
        self.nbytes = max((e.end for e in entries), default=0)

    def _read(self, offset: int, size: int) -> bytes:
        data = bytearray(size)
        self._fill(offset, memoryview(data))
        return bytes(data)

    def _fill(self, offset: int, target: memoryview) -> None:
        try:
            self._file.seek(offset)
            done = 0
            while done < len(target):
                got = self._file.readinto(target[done:])
                if not got:
                    raise FileError(f"{self.path}: ends at byte {offset + done}; it was cut short while being read")
                done += got
        except OSError as error:
            raise FileError(f"{self.path}: cannot be read: {reason(error)}") from None

    def pieces(self, entry: Entry, size: int = PIECE) -> Iterator[memoryview]:
        """The bytes of a tensor, `size` at a time. Each piece is valid until the next is asked for."""
        buffer = memoryview(bytearray(min(size, entry.nbytes)))
        for begin in range(0, entry.nbytes, size):
            piece = buffer[: min(size, entry.nbytes - begin)]
            self._fill(self._data + entry.begin + begin, piece)
            yield piece

    def read(self, name: str) -> bytes:
        """All bytes of a (small) tensor."""
        entry = self.tensors[name]
        return self._read(self._data + entry.begin, entry.nbytes)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _check_header(path: Path) -> None:
    try:
        from safetensors import SafetensorError, safe_open
    except ModuleNotFoundError:
        raise FileError("reading safetensors files needs the package safetensors: pip install safetensors") from None
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise FileError(f"{path}: is {kind}; expected a safetensors file")
        with safe_open(path, framework="np"):
            pass
    except OSError as error:
        raise FileError(f"{path}: {reason(error)}") from None
    except SafetensorError as error:
        raise FileError(f"{path}: not a valid safetensors file: {str(error).splitlines()[0]}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two entries named {next(n for n in names if names.count(n) > 1)!r}")
    return table


# ---- writing --------------------------------------------------------------------------------------------------------


class Writer:
    """The data of a file under construction. Tensors are written in any order, each from its start to its end."""

    def __init__(self, descriptor: int, entries: Sequence[Entry], metadata: dict[str, str]) -> None:
        self._descriptor = descriptor
        self._entries = {e.name: e for e in entries}
        self._metadata = metadata
        self._written = dict.fromkeys(self._entries, 0)
        self._crc = dict.fromkeys(self._entries, 0)
        self._data = len(_header(entries, metadata, "0" * 8 * (1 + len(entries))))

    def write(self, name: str, data: Any) -> None:
        """Append to a tensor."""
        piece = memoryview(data).cast("B") if memoryview(data).nbytes else memoryview(b"")
        entry = self._entries[name]
        assert self._written[name] + len(piece) <= entry.nbytes, name
        _write_at(self._descriptor, piece, self._data + entry.begin + self._written[name])
        self._written[name] += len(piece)
        self._crc[name] = zlib.crc32(piece, self._crc[name])

    def finish(self) -> None:
        """Write the header, now that the checksums are known."""
        entries = list(self._entries.values())
        assert all(self._written[e.name] == e.nbytes for e in entries)
        tensors = "".join(f"{self._crc[e.name]:08x}" for e in entries)
        blank = _header(entries, self._metadata, "0" * 8 + tensors)
        _write_at(
            self._descriptor, memoryview(_header(entries, self._metadata, f"{zlib.crc32(blank[8:]):08x}" + tensors)), 0
        )


def layout(tensors: Sequence[tuple[str, str, Sequence[int], int]]) -> list[Entry]:
    """Places for tensors, each (name, dtype, shape, bytes): the widest elements first, so that all are aligned."""

    def width(tensor: tuple[str, str, Sequence[int], int]) -> int:
        numel = 1
        for size in tensor[2]:
            numel *= size
        return tensor[3] // numel if numel else 0

    entries, offset = [], 0
    for name, dtype, shape, nbytes in sorted(tensors, key=lambda t: (-width(t), t[0])):
        entries.append(Entry(name, dtype, tuple(shape), offset, offset + nbytes))
        offset += nbytes
    return entries


def _header(entries: Sequence[Entry], metadata: dict[str, str], checksum: str) -> bytes:
    """The length and the header, padded so that the data is aligned."""
    table: dict[str, Any] = {"__metadata__": {**metadata, VERSION_KEY: __version__, CHECKSUM_KEY: checksum}}
    for e in entries:
        table[e.name] = {"dtype": e.dtype, "shape": e.shape, "data_offsets": [e.begin, e.end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while len(data):
        done = os.pwrite(descriptor, data[:PIECE], offset)
        data, offset = data[done:], offset + done


@contextlib.contextmanager
def writing(path: Path, entries: Sequence[Entry], metadata: dict[str, str], *, force: bool) -> Iterator[Writer]:
    """A `Writer` whose file takes its name only when the block has ended without an exception, and is then complete.

    Until then it is a temporary file in the same directory, which any exception (an interrupt, a full disk) removes.
    The space is reserved first, so that a disk that is too small is found before the work is done.
    """
    target = Path(os.path.realpath(path))  # what a symbolic link stands for is replaced, not the link
    temporary = target.parent / f".tlkernels-{secrets.token_hex(8)}.tmp"
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            writer = Writer(descriptor, entries, metadata)
            _reserve(descriptor, writer._data + max((e.end for e in entries), default=0))
            yield writer
            writer.finish()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        check_target(path, force=force)
        os.replace(temporary, target)
        _sync_directory(target.parent)
    except OSError as error:
        raise FileError(f"{path}: cannot be written: {reason(error)}; nothing was left behind") from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def check_target(path: Path, *, force: bool) -> None:
    """Refuse to write where something stands, or where nothing can be."""
    if path.is_dir():
        raise FileError(f"{path}: is a directory; expected the name of the file to write")
    if os.path.lexists(path) and not force:
        raise FileError(f"{path}: already exists; give --force to replace it")
    if not Path(os.path.realpath(path)).parent.is_dir():
        raise FileError(f"{path}: the directory {path.parent} does not exist")


def _reserve(descriptor: int, size: int) -> None:
    try:
        os.posix_fallocate(descriptor, 0, size)
    except AttributeError:  # a system without it
        os.ftruncate(descriptor, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- checksums ------------------------------------------------------------------------------------------------------


def damage(reader: Reader, advance: Any) -> list[str] | None:
    """What a file's own checksums say is wrong with it, one sentence each; None when it carries no checksums.

    ``advance(n)`` is called for every n bytes read.
    """
    stored = reader.metadata.get(CHECKSUM_KEY)
    if stored is None and VERSION_KEY not in reader.metadata:
        return None
    if stored is None or len(stored) != 8 * (1 + len(reader.tensors)):
        return ["the checksums are incomplete"]
    found = []
    field = f'"{CHECKSUM_KEY}":"'.encode()
    blank = reader.header.replace(field + stored[:8].encode(), field + b"0" * 8)
    if f"{zlib.crc32(blank):08x}" != stored[:8]:
        found.append("the header does not match its checksum")
    for i, entry in enumerate(reader.tensors.values(), 1):
        crc = 0
        for piece in reader.pieces(entry):
            crc = zlib.crc32(piece, crc)
            advance(len(piece))
        if f"{crc:08x}" != stored[8 * i : 8 * i + 8]:
            found.append(f"{entry.name}: the data does not match its checksum")
    return found
