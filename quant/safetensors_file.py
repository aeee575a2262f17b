"""Opens safetensors files: which tensors are in one, and their values as arrays that are read when they are used.

A file is data from a stranger: the header is held against the bytes that exist before anything is taken from it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ms4.quant.blocks import Floats
from ms4.quant.gguf_file import FileError, shown

MAX_HEADER_BYTES = 100 << 20
MAX_DIMS = 8
# BF16 has no type in NumPy: its bits come as integers.
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_u64 = struct.Struct("<Q")


class SafetensorsError(FileError):
    """The file is missing, damaged, or holds numbers of a kind that cannot be read."""


@dataclass(frozen=True)
class Stored:
    """One tensor: numbers of `dtype` (a key of DTYPES), mapped from the file, in any view of them."""

    dtype: str
    array: npt.NDArray[Any] = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def floats(self, at: slice = slice(None)) -> Floats:
        """Float32 values of a range along the first axis."""
        part = self.array[at]
        if self.dtype == "BF16":
            return (part.astype(np.uint32) << 16).view(np.float32)
        return part.astype(np.float32)


def open_safetensors(path: str | os.PathLike[str]) -> dict[str, Stored]:
    """The tensors of a file by their names.  SafetensorsError if it is damaged; OSError if it cannot be opened."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        n_header = _u64.unpack(prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= n_header <= min(size - 8, MAX_HEADER_BYTES):
            raise SafetensorsError(path, "not a safetensors file, or cut off inside its header")
        raw = file.read(n_header)
    header = _parse(path, raw)
    data = np.memmap(path, np.uint8, "r", 8 + n_header) if size > 8 + n_header else np.empty(0, np.uint8)
    return {name: _tensor(path, name, entry, data) for name, entry in header.items() if name != "__metadata__"}


def _parse(path: str | os.PathLike[str], raw: bytes) -> Mapping[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise SafetensorsError(path, "the header is not JSON") from None
    if not isinstance(header, dict):
        raise SafetensorsError(path, "the header is not a JSON object")
    return header


def _tensor(path: str | os.PathLike[str], name: str, entry: Any, data: npt.NDArray[np.uint8]) -> Stored:
    def refuse(reason: str) -> SafetensorsError:
        return SafetensorsError(path, f"tensor {shown(name)}: {reason}")

    fields: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise refuse(f"the type {shown(str(dtype))} is not supported; {', '.join(DTYPES)} are")
    dims, ends = _sizes(shape), _sizes(offsets)
    if dims is None or not 0 < len(dims) <= MAX_DIMS or not all(dims):
        raise refuse("the shape is damaged")
    if ends is None or len(ends) != 2 or not ends[0] <= ends[1] <= data.size:
        raise refuse("it lies outside the file, which is damaged or cut off")
    kind = np.dtype(DTYPES[dtype])
    if ends[1] - ends[0] != math.prod(dims) * kind.itemsize:
        raise refuse(f"it has {ends[1] - ends[0]} bytes, which is not what its shape takes")
    return Stored(dtype, data[ends[0] : ends[1]].view(kind).reshape(dims))


def _sizes(values: Any) -> list[int] | None:
    """A list of integers from 0 on, or None."""
    right = isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 62 for v in values)
    return values if right else None
