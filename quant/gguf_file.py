"""Opens GGUF files and says what is in them: metadata, and where each tensor lies.

A file is data from a stranger.  Every count, length and offset is compared with the bytes that exist before anything
is allocated or read by it, and nothing of the tensor data is read here.  What the keys and tensors mean is the
business of `ms4.models`.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ms4.quant import visible
from ms4.quant.blocks import BLOCKS

MIB = 1 << 20
MAX_KEYS = MAX_TENSORS = 65_536
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 63
MAX_STRING_BYTES = 16 * MIB
MAX_ELEMENTS = 4 * MIB
MAX_HEADER_BYTES = 256 * MIB
MAX_PARTS = 999
MAX_TRAILING_BYTES = 64 * 1024
SMALLEST_KEY, SMALLEST_TENSOR = 14, 33  # bytes of the shortest possible records

STRING, ARRAY = 8, 9
BOOL = 7
SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
U32 = 4
_u32 = struct.Struct("<I")
_u64 = struct.Struct("<Q")
_ALIGNMENT = "general.alignment"
_KEY = re.compile(rb"[ -~]+")
_NAME = re.compile(rb"[A-Za-z0-9._-]+")
_PART_NAME = re.compile(r"(.*)-(\d{5})(-of-)(\d{5})(\.gguf)", re.DOTALL | re.IGNORECASE)
MAX_LINKS = 8  # from a name that somebody chose to that of a part

# The strangers that are most often found under a name ending in .gguf, by their first bytes.
_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer; fetch the real file with `git lfs pull`"),
    (b"<!doctype html", "an HTML page, perhaps a failed download"),
    (b"<html", "an HTML page, perhaps a failed download"),
    (b"pk\x03\x04", "a zip archive (a PyTorch checkpoint?)"),
    (b"\x80\x02", "a Python pickle (a PyTorch checkpoint?)"),
    (b"lmgg", "an old ggml file from before GGUF"),
    (b"fmgg", "an old ggml file from before GGUF"),
    (b"tjgg", "an old ggml file from before GGUF"),
)


def shown(text: str | bytes, limit: int = 80) -> str:
    """Text out of a file as it may be printed: on one line, cut at `limit`."""
    if isinstance(text, bytes):
        text = text[:limit].decode("utf-8", "backslashreplace")
    text = text[:limit]
    safe = visible.line(text)
    return safe if len(safe) <= limit else safe[: limit - 3] + "..."


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path for an error line: escaped, and of a long one the end."""
    text = os.fspath(path)
    safe = shown(text[-80:], 320)
    return safe if len(safe) <= 80 and len(text) <= 80 else "..." + safe[-77:]


class FileError(Exception):
    """A model file cannot be used: which file, and one sentence about why."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(f"{shown_path(path)}: {reason}")
        self.path = os.fspath(path)
        self.reason = reason


class GgufError(FileError):
    """The file is missing, damaged, or not a GGUF file at all."""


Stamp = tuple[int, int, int, int]  # device, inode, size, time of change in ns


class Source(Protocol):
    """The bytes of a file, wherever it lies."""

    stamp: Stamp

    def read(self, n: int, offset: int) -> bytes:
        """Up to n bytes from offset on; none at the end.  OSError, if they cannot be read."""

    def close(self) -> None: ...


Opener = Callable[[str], Source]  # FileNotFoundError, if there is no such file


@dataclass(frozen=True, eq=False)
class Strings:
    """An array of strings as two flat buffers: string i is raw[starts[i] : ends[i]], behind its 8 bytes of length."""

    raw: bytes
    ends: np.ndarray

    @property
    def starts(self) -> np.ndarray:
        return np.concatenate(([0], self.ends[:-1]))[: len(self.ends)] + 8

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> bytes:
        if not 0 <= i < len(self.ends):
            raise IndexError(i)
        start = 8 + (int(self.ends[i - 1]) if i else 0)
        return self.raw[start : int(self.ends[i])]

    def __iter__(self) -> Iterator[bytes]:
        return (self[i] for i in range(len(self)))

    def joined(self) -> bytes | None:
        """All strings, a newline before each; None if one of them holds a newline or a NUL."""
        flat = np.frombuffer(self.raw, np.uint8).copy()
        starts = self.starts
        for k in range(1, 8):
            flat[starts - k] = 0
        flat[starts - 8] = 10
        # Lengths are gone from the buffer, so any other NUL or newline stands in a string.
        if np.count_nonzero(flat) != len(flat) - 7 * len(self) or np.count_nonzero(flat == 10) != len(self):
            return None
        return flat.tobytes().translate(None, b"\0")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dims[0] is the contiguous dimension; `offset` counts from the start of file number `file`."""

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    bytes: int
    file: int

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.dims, dtype=object))


@dataclass(frozen=True)
class GgufFile:
    """A checked GGUF file, or the parts of one.

    Values of `metadata` are int, float, bool, str, a NumPy array of scalars, or `Strings`.  `stamps` identify the
    files that were read.
    """

    path: str
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    paths: tuple[str, ...]
    sizes: tuple[int, ...]
    stamps: tuple[Stamp, ...]
    warnings: tuple[str, ...] = field(default=())

    @classmethod
    def open(cls, path: str | os.PathLike[str], opener: Opener | None = None) -> GgufFile:
        """Reads the header of `path` and, if it is the first part of several, of all parts.

        opener: what opens a file that does not lie here.
        """
        opener = opener or _LocalFile
        first = _read_part(os.fspath(path), 0, opener)
        parts = [first, *_siblings(first, opener)]
        tensors: dict[str, TensorInfo] = {}
        for part in parts:
            for t in part.tensors:
                if t.name in tensors:
                    raise GgufError(part.path, f"tensor {t.name} is also in another part of the model")
                tensors[t.name] = t
        return cls(
            path=first.path,
            version=first.version,
            metadata=first.metadata,
            tensors=tensors,
            paths=tuple(p.path for p in parts),
            sizes=tuple(p.stamp[2] for p in parts),
            stamps=tuple(p.stamp for p in parts),
            warnings=tuple(w for p in parts for w in p.warnings),
        )

    def check_unchanged(self) -> None:
        """Raises GgufError if a file was replaced or written to since its header was read."""
        for path, stamp in zip(self.paths, self.stamps, strict=True):
            try:
                now = _stamp(os.stat(path))
            except OSError as e:
                raise GgufError(path, _in_words(e)) from e
            if now != stamp:
                raise GgufError(path, "the file changed while it was being opened; try again when it is complete")


@dataclass
class _Part:
    """One file, read alone."""

    path: str
    stamp: Stamp
    version: int = 0
    alignment: int = 32
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: list[TensorInfo] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def _stamp(s: os.stat_result) -> Stamp:
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns


class _LocalFile:
    """A file of this machine, opened without ever waiting for it."""

    def __init__(self, path: str) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except ValueError as e:
            raise GgufError(path, "not a file name") from e
        info = os.fstat(self._fd)
        self.stamp = _stamp(info)
        if not stat.S_ISREG(info.st_mode):
            self.close()
            if stat.S_ISDIR(info.st_mode):
                raise GgufError(path, "is a directory; give the .gguf file in it")
            raise GgufError(path, "not a regular file (a pipe, a device or a socket)")

    def read(self, n: int, offset: int) -> bytes:
        return os.pread(self._fd, n, offset)

    def close(self) -> None:
        os.close(self._fd)


def _in_words(error: OSError) -> str:
    return (error.strerror or "cannot be read").lower()


class _Header:
    """The bytes of a header, read as they are asked for: a cursor that cannot leave the file."""

    def __init__(self, path: str, source: Source) -> None:
        self.path = path
        self.source = source
        self.size = source.stamp[2]
        self.data = bytearray()
        self.at = 0

    def fail(self, reason: str) -> GgufError:
        return GgufError(self.path, reason)

    def need(self, n: int, what: str) -> None:
        """Makes the next n bytes present in `data`."""
        left = self.size - self.at
        if n > left:
            raise self.fail(
                f"truncated: {what} at byte {self.at} needs {n} bytes, {left} are left to the end of the file "
                "(interrupted download?)"
            )
        end = self.at + n
        if end > MAX_HEADER_BYTES:
            raise self.fail(f"{what} at byte {self.at}: the metadata is longer than {MAX_HEADER_BYTES // MIB} MiB")
        while len(self.data) < end:
            try:
                chunk = self.source.read(MIB, len(self.data))
            except OSError as e:
                raise self.fail(_in_words(e)) from e
            if not chunk:
                raise self.fail("the file became shorter while it was being read")
            self.data += chunk

    def number(self, form: struct.Struct, what: str) -> Any:
        self.need(form.size, what)
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def take(self, n: int, what: str) -> bytes:
        self.need(n, what)
        value = bytes(self.data[self.at : self.at + n])
        self.at += n
        return value

    def string(self, limit: int, what: str) -> bytes:
        start = self.at
        length = self.number(_u64, what)
        if length > self.size - self.at:
            raise self.fail(
                f"{what} at byte {start}: a string length of {length} bytes, "
                f"but {self.size - self.at} are left to the end of the file (truncated or damaged)"
            )
        if length > limit:
            raise self.fail(f"{what} at byte {start}: a string length of {length} bytes; at most {limit} are allowed")
        return self.take(length, what)

    def strings(self, n: int, what: str) -> Strings:
        """An array of n strings.  Only their lengths are looked at: this is the hot part of opening a model."""
        first, done = self.at, 0
        ends = np.empty(n, np.int64)
        while done < n:
            self.need(min(MIB, self.size - self.at, MAX_HEADER_BYTES - self.at), what)
            window = bytes(self.data[self.at : self.at + MIB])
            found = _short_strings(window)[: n - done]
            # Strings that are long, empty or hold NULs cannot be found so: the rest is walked one by one.
            if not len(found) or (found[-1] < len(window) // 4 and len(found) < n - done):
                self._walk_strings(ends, done, what)
                break
            ends[done : done + len(found)] = found + self.at
            done += len(found)
            self.at += int(found[-1])
        end, self.at = self.at, first
        return Strings(self.take(end - first, what), ends - first)

    def _walk_strings(self, ends: np.ndarray, done: int, what: str) -> None:
        """Follows the lengths of the strings from number `done` on, and writes down where each string ends."""
        at, unpack, size, have = self.at, _u64.unpack_from, self.size, len(self.data)
        for low in range(done, len(ends), 65_536):
            block: list[int] = []
            for i in range(low, min(low + 65_536, len(ends))):
                if at + 8 > have:
                    self.at = at
                    self.need(8, f"{what}, string {i}")
                    have = len(self.data)
                (length,) = unpack(self.data, at)
                at += 8 + length
                if length > MAX_STRING_BYTES or at > size:
                    raise self.fail(
                        f"{what}, string {i}: a length of {length} bytes; {size - at + length} are left to the end "
                        f"of the file, {MAX_STRING_BYTES} are allowed"
                    )
                block.append(at)
            ends[low : low + len(block)] = block
        self.at = at


def _short_strings(window: bytes) -> np.ndarray:
    """Where the strings at the start of the window end, as far as they can be found at once.

    Text holds no NULs, so the eight bytes of a small length stand out.  What looks like one may still be something
    else: each string found must begin where the one before it ends, and the first that does not ends the list.
    """
    if len(window) < 16:
        return np.empty(0, np.int64)
    numbers = np.ndarray((len(window) - 7,), np.dtype("<u8"), window, strides=(1,))
    starts = np.flatnonzero(numbers < 65_536)
    # The last byte of a text and the length after it look like a number too; the length itself is the later one.
    starts = starts[np.diff(starts, append=len(window) + 1) != 1]
    ends = starts + 8 + numbers[starts].astype(np.int64)
    linked = (starts == np.concatenate(([0], ends[:-1]))[: len(starts)]) & (ends <= len(window))
    return ends[: len(ends) if linked.all() else int(linked.argmin())]


def _read_part(path: str, index: int, opener: Opener, count: int = 1) -> _Part:
    """Reads the header of one file, number `index` of `count`."""
    try:
        source = opener(path)
    except FileNotFoundError as e:
        reason = f"part {index + 1} of {count} of the split model is missing" if index else _in_words(e)
        raise GgufError(path, reason) from e
    except OSError as e:
        raise GgufError(path, _in_words(e)) from e
    try:
        part = _Part(path, source.stamp)
        _read_header(_Header(path, source), part, index)
    finally:
        source.close()
    return part


def peek(path: str | os.PathLike[str], key: str) -> Any | None:
    """The value of one metadata key, for which no more of the file is read than what lies before it.

    None if the file has no such key.  GgufError, if the file cannot be read so far.
    """
    name = os.fspath(path)
    try:
        source = _LocalFile(name)
    except OSError as e:
        raise GgufError(name, _in_words(e)) from e
    try:
        part, header = _Part(name, source.stamp), _Header(name, source)
        _, n_keys = _read_counts(header, part)
        for number in range(n_keys):
            _read_key(header, part, number)
            if key in part.metadata:
                return part.metadata[key]
        return None
    finally:
        source.close()


def _read_header(header: _Header, part: _Part, index: int) -> None:
    n_tensors, n_keys = _read_counts(header, part)
    for number in range(n_keys):
        _read_key(header, part, number)
    names: set[str] = set()
    records = []
    for number in range(n_tensors):
        record = _read_tensor(header, number)
        if record[0] in names:
            raise header.fail(f"duplicate tensor {record[0]}: the name is in the file twice")
        names.add(record[0])
        records.append(record)
    data_start = -(-header.at // part.alignment) * part.alignment
    _place_tensors(header, part, records, data_start, index)


def _read_counts(header: _Header, part: _Part) -> tuple[int, int]:
    """Magic, version and the two counts."""
    size = header.size
    if size == 0:
        raise header.fail("the file is empty: not a GGUF file")
    header.need(min(size, 32), "the first bytes")
    begin = bytes(header.data[:32])
    if begin[: min(size, 4)] != b"GGUF"[:size]:
        raise header.fail(f"not a GGUF file: {_looks_like(begin)}")
    if size < 24:
        raise header.fail(f"truncated: {size} bytes are too short to be a GGUF file")
    header.at = 4
    part.version = header.number(_u32, "version")
    if part.version in (2 << 24, 3 << 24):
        raise header.fail("GGUF version with swapped bytes: a big-endian file; ms4 reads little-endian ones")
    if part.version not in (2, 3):
        raise header.fail(f"GGUF version {part.version}; ms4 reads versions 2 and 3")
    n_tensors, n_keys = header.number(_u64, "tensor count"), header.number(_u64, "key count")
    for n, limit, smallest, what in (
        (n_tensors, MAX_TENSORS, SMALLEST_TENSOR, "tensor count"),
        (n_keys, MAX_KEYS, SMALLEST_KEY, "metadata key count"),
    ):
        if n > limit or n > (size - 24) // smallest:
            raise header.fail(f"a {what} of {n} is impossible in a file of {size} bytes (at most {limit})")
    return n_tensors, n_keys


def _looks_like(begin: bytes) -> str:
    for start, name in _STRANGERS:
        if begin.lower().startswith(start):
            return "it looks like " + name
    if begin[8:9] == b"{":
        return "it looks like a safetensors file; ms4 runs GGUF files"
    if not begin.strip(b"\0"):
        return "it begins with zeros, as an unfinished download does"
    return f"its magic is '{shown(begin[:4])}'"


def _read_key(header: _Header, part: _Part, number: int) -> None:
    where = f"metadata key {number}"
    start = header.at
    raw = header.string(MAX_KEY_BYTES, where)
    if not _KEY.fullmatch(raw):
        raise header.fail(f"{where} at byte {start}: the key '{shown(raw)}' is empty or not plain ASCII")
    key = raw.decode("ascii")
    if key in part.metadata:
        raise header.fail(f"duplicate metadata key {shown(key)}: it is in the file twice")
    kind = header.number(_u32, f"the type of {shown(key)}")
    part.metadata[key] = _read_value(header, kind, shown(key))
    if key == _ALIGNMENT:
        alignment = part.metadata[key]
        if kind != U32 or alignment & (alignment - 1) or not 8 <= alignment <= 65_536:
            text = shown(str(alignment))
            raise header.fail(f"{_ALIGNMENT} is {text} (type {kind}); it must be a u32 power of two, 8 to 65536")
        part.alignment = alignment


def _read_value(header: _Header, kind: int, key: str) -> Any:
    if kind in SCALARS:
        value = header.number(SCALARS[kind], f"the value of {key}")
        if kind != BOOL:
            return value
        if value > 1:
            raise header.fail(f"{key} is a bool with the value {value}; 0 or 1 was expected")
        return bool(value)
    if kind == STRING:
        return header.string(MAX_STRING_BYTES, f"the value of {key}").decode("utf-8", "replace")
    if kind == ARRAY:
        return _read_array(header, key)
    raise header.fail(f"{key} has the value type {kind}, which GGUF does not have")


def _read_array(header: _Header, key: str) -> np.ndarray | Strings:
    kind, n = header.number(_u32, f"the element type of {key}"), header.number(_u64, f"the length of {key}")
    if kind == ARRAY:
        raise header.fail(f"{key} is an array of arrays; nested arrays are not supported")
    if kind not in SCALARS and kind != STRING:
        raise header.fail(f"{key} is an array with the element type {kind}, which GGUF does not have")
    width = 8 if kind == STRING else SCALARS[kind].size
    left = header.size - header.at
    if n > MAX_ELEMENTS or n * width > left:
        raise header.fail(
            f"{key} is an array with a count of {n} elements, but {left} bytes are left to the end of the file "
            f"and {MAX_ELEMENTS} elements are allowed"
        )
    if kind == STRING:
        return header.strings(n, key)
    raw = header.take(n * width, key)
    if kind != BOOL:
        return np.frombuffer(raw, SCALARS[kind].format)
    values = np.frombuffer(raw, np.uint8)
    if n and values.max() > 1:
        raise header.fail(f"{key} is an array of bools with the value {values.max()}; 0 or 1 was expected")
    return values.astype(bool)


_Record = tuple[str, tuple[int, ...], int, int, int]  # name, dims, type, offset in the data, bytes


def _read_tensor(header: _Header, number: int) -> _Record:
    where = f"the name of tensor {number}"
    raw = header.string(MAX_STRING_BYTES, where)
    if not 1 <= len(raw) <= MAX_NAME_BYTES or not _NAME.fullmatch(raw):
        text = shown(raw)
        raise header.fail(f"{where} is '{text}'; 1 to {MAX_NAME_BYTES} letters, digits and . _ - were expected")
    name = raw.decode("ascii")
    n_dims = header.number(_u32, f"tensor {name}")
    if not 1 <= n_dims <= 4:
        raise header.fail(f"tensor {name} has {n_dims} dimensions; 1 to 4 were expected")
    dims = struct.unpack(f"<{n_dims}Q", header.take(8 * n_dims, f"the dimensions of tensor {name}"))
    kind, offset = struct.unpack("<IQ", header.take(12, f"tensor {name}"))
    # Python's integers do not wrap.  No type needs less than one bit a weight, which bounds even unknown types.
    n_weights = 1
    for d in dims:
        n_weights *= d
    if n_weights == 0:
        raise header.fail(f"tensor {name} has a dimension of zero: {_times(dims)}")
    if n_weights > 8 * header.size:
        raise header.fail(
            f"tensor {name} is too large: its dimensions {_times(dims)} need more bytes than the file has "
            "(interrupted download?)"
        )
    if kind not in BLOCKS:
        raise header.fail(f"tensor {name} has type {kind}, which ms4 does not support; use another quantization")
    block = BLOCKS[kind]
    if dims[0] % block.weights:
        raise header.fail(
            f"tensor {name}: rows of {dims[0]} are not a multiple of the block of {block.weights} weights"
        )
    return name, dims, kind, offset, n_weights // block.weights * block.bytes


def _times(dims: tuple[int, ...]) -> str:
    return " x ".join(map(str, dims))


def _place_tensors(header: _Header, part: _Part, records: list[_Record], data_start: int, index: int) -> None:
    """Checks that the tensors fill the data section one after another, and no byte beyond the file."""
    at, before = 0, "the header"
    for name, _, _, offset, n_bytes in sorted(records, key=lambda r: r[3]):
        if offset % part.alignment:
            raise header.fail(f"tensor {name}: offset {offset} is not a multiple of the alignment {part.alignment}")
        end = data_start + offset + n_bytes
        if end > header.size and offset > at + header.size:
            raise header.fail(f"tensor {name}: offset {offset} is outside the file, which ends at {header.size}")
        if offset < at:
            raise header.fail(f"tensors {before} and {name} overlap: offset {offset}, but data up to {at}")
        if offset - at >= part.alignment:
            raise header.fail(f"a gap of {offset - at} bytes between {before} and tensor {name} (offset {offset})")
        if end > header.size:
            total = data_start + max(r[3] + r[4] for r in records)
            raise header.fail(
                f"truncated: tensor {name} ends at byte {end}, the file has {header.size} of the {total} bytes it "
                "needs (interrupted download?)"
            )
        at, before = offset + n_bytes, name
    trailing = header.size - data_start - at
    if trailing >= MAX_TRAILING_BYTES:
        part.warnings.append(f"{trailing} unused bytes after the last tensor")
    part.tensors = [
        TensorInfo(name, dims, kind, data_start + offset, n_bytes, index)
        for name, dims, kind, offset, n_bytes in records
    ]


def _split_number(part: _Part, key: str, low: int, high: int) -> int:
    value = part.metadata[key]
    if type(value) is not int:
        raise GgufError(part.path, f"{key} has the wrong type; an integer was expected")
    if not low <= value <= high:
        raise GgufError(part.path, f"{key} is {value}; {low} to {high} was expected for a split model")
    return value


def _siblings(first: _Part, opener: Opener) -> list[_Part]:
    """Reads the other parts of a split model and checks that they belong together."""
    if "split.count" not in first.metadata:
        return []
    count = _split_number(first, "split.count", 0, MAX_PARTS)
    if count <= 1:
        return []
    number = _split_number(first, "split.no", 0, count - 1) if "split.no" in first.metadata else 0
    if number:
        raise GgufError(first.path, f"part {number + 1} of {count} of a split model; give part 1 instead")
    match = _part_name(first.path, count)
    if match is None:
        wanted = f"-00001-of-{count:05}.gguf"
        raise GgufError(first.path, f"part 1 of a model split in {count}: its name must end in {wanted}")
    names = [f"{match[1]}-{i + 1:05}{match[3]}{count:05}{match[5]}" for i in range(count)]
    parts = [_read_part(name, i, opener, count) for i, name in enumerate(names) if i]
    for i, part in enumerate(parts, 1):
        _check_part(first, part, i, count)
    n_tensors = len(first.tensors) + sum(len(p.tensors) for p in parts)
    if "split.tensors.count" in first.metadata:
        promised = _split_number(first, "split.tensors.count", 0, MAX_TENSORS * MAX_PARTS)
        if promised != n_tensors:
            raise GgufError(first.path, f"split.tensors.count is {promised}, but the parts hold {n_tensors} tensors")
    return parts


def _part_name(path: str, count: int) -> re.Match[str] | None:
    """The name of part 1 of so many: that of the file, or of what it is a link to, beside which the other parts lie."""
    for _ in range(MAX_LINKS):
        match = _PART_NAME.fullmatch(path)
        if match and (int(match[2]), int(match[4])) == (1, count):
            return match
        try:
            path = os.path.join(os.path.dirname(path), os.readlink(path))
        except (OSError, ValueError):
            return None
    return None


def _check_part(first: _Part, part: _Part, index: int, count: int) -> None:
    for key in ("split.no", "split.count"):
        if key not in part.metadata:
            raise GgufError(part.path, f"{key} is missing: this is not part {index + 1} of a split model")
    if (part.metadata["split.no"], part.metadata["split.count"]) != (index, count):
        raise GgufError(part.path, f"its split keys say something else than part {index + 1} of {count}")
    architecture = first.metadata.get("general.architecture")
    if part.metadata.get("general.architecture", architecture) != architecture:
        raise GgufError(part.path, "general.architecture differs from part 1: a part of another model")
