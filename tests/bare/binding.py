"""`ms4._core` without cffi: the part of cffi's API mode that csrc/__init__.py uses, on ctypes.

For `make gpu` on a machine without pip.  The declarations are those that cffi gets (csrc/build_parts.py), in
declarations.h beside this file; the engine is libms4.so beside it.  A pointer to a struct that ffi.new makes is the
struct itself, which ctypes passes by reference; one to a number is an array of one; a struct that the declarations do
not open is an address.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

HERE = Path(__file__).parent
NUMBERS = {
    "char": ctypes.c_char, "int": ctypes.c_int, "float": ctypes.c_float, "double": ctypes.c_double,
    "size_t": ctypes.c_size_t, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "uint8_t": ctypes.c_uint8,
    "uint64_t": ctypes.c_uint64,
}  # fmt: skip
STATEMENT = re.compile(r"[^;{]*(?:\{[^}]*\}[^;]*)?;")
FUNCTION = re.compile(r"(?P<result>[\w\s]+[\s*])(?P<name>\w+)\((?P<parameters>.*)\)")
TO_FUNCTION = re.compile(r"(?P<result>[\w\s*]+)\(\*(?P<name>\w+)\)\((?P<parameters>.*)\)")
CALLBACK = re.compile(r"(?P<result>[\w\s*]+)\((?P<parameters>.*)\)")


class Declarations:
    """Types, constants and functions, as read from C."""

    def __init__(self, text: str) -> None:
        self.types: dict[str, Any] = {**NUMBERS, "void": None}  # None: known by its address only
        self.constants: dict[str, int] = {}
        self.functions: dict[str, tuple[Any, list[Any]]] = {}
        text = re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL)
        for name, value in re.findall(r"^#define (\w+) (\d+)\s*$", text, re.MULTILINE):
            self.constants[name] = int(value)
        text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
        for statement in STATEMENT.findall(text):
            self._read(" ".join(statement.rstrip(";").split()))

    def _read(self, statement: str) -> None:
        if found := re.fullmatch(r"typedef enum \{(.*)\} (\w+)", statement):
            self._enum(found[1])
            self.types[found[2]] = ctypes.c_int
        elif found := re.fullmatch(r"typedef struct \{(.*)\} (\w+)", statement):
            parts = [part.strip() for part in found[1].split(";") if part.strip()]
            members = [member for part in parts for member in self._members(part)]
            self.types[found[2]] = type(found[2], (ctypes.Structure,), {"_fields_": members})
        elif found := re.fullmatch(r"(?:typedef )?struct (\w+)(?: \w+)?", statement):
            self.types[found[1]] = None
        elif found := FUNCTION.fullmatch(statement):
            parameters = [self._parameter(part) for part in split(found["parameters"])]
            self.functions[found["name"]] = self._parameter(found["result"]), parameters
        else:
            raise ValueError(f"a declaration that is not understood: {statement}")

    def _enum(self, body: str) -> None:
        value = -1
        for part in body.strip().rstrip(",").split(","):
            name, _, given = (word.strip() for word in part.partition("="))
            value = int(given) if given else value + 1
            self.constants[name] = value

    def _members(self, text: str) -> Iterator[tuple[str, Any]]:
        """(name, type) of each in `int32_t a, b[3]`, or of `int (*name)(void *)`."""
        if found := TO_FUNCTION.fullmatch(text):
            yield found["name"], self.function(f"{found['result']}({found['parameters']})")
            return
        found = re.fullmatch(r"(?:const )?(?P<base>\w+) (?P<names>.+)", text)
        assert found, text
        for declared in found["names"].split(","):
            name, size = re.findall(r"\w+", declared + " 0")[:2]
            n = self.constants[size] if size in self.constants else int(size)
            kind = self.kind(found["base"] + "*" * declared.count("*"))
            yield name, kind * n if n else kind

    def kind(self, text: str) -> Any:
        """The type of `const float *` with or without a name behind it; None: void."""
        words = [word for word in re.findall(r"\w+", text) if word not in ("const", "struct")]
        kind, stars = self.types[words[0]], text.count("*")
        if kind is None and stars:
            kind, stars = ctypes.c_void_p, stars - 1
        for _ in range(stars):
            kind = ctypes.POINTER(kind)
        return kind

    def _parameter(self, text: str) -> Any:
        """The same for a parameter or a result, of which text comes as bytes, and functions as what `function` made."""
        if TO_FUNCTION.fullmatch(text.strip()):
            return ctypes.c_void_p
        kind = self.kind(text)
        return ctypes.c_char_p if kind is ctypes.POINTER(ctypes.c_char) else kind

    def function(self, text: str) -> Any:
        """The type of a pointer to `int(uint64_t, void *)`."""
        found = CALLBACK.fullmatch(text)
        assert found, text
        return ctypes.CFUNCTYPE(self.kind(found["result"]), *map(self.kind, split(found["parameters"])))


def split(parameters: str) -> list[str]:
    """At the commas outside of parentheses."""
    return [] if parameters.strip() in ("", "void") else re.split(r",(?![^(]*\))", parameters)


class Ffi:
    """What cffi calls `ffi`."""

    NULL = None

    def __init__(self, declarations: Declarations) -> None:
        self._declared = declarations

    def new(self, text: str, init: Any = None) -> Any:
        """`T *`, of which there is one, or `T[]`, of which there are as many as init says or has."""
        text = text.strip()
        if text.endswith("*"):
            kind = self._declared.kind(text[:-1])
            if not issubclass(kind, ctypes.Structure):
                return (kind * 1)()
            return kind(**init) if isinstance(init, dict) else kind(*(init or ()))
        kind = self._declared.kind(text[:-2])
        if isinstance(init, bytes):
            return ctypes.create_string_buffer(init)
        if isinstance(init, int):
            return (kind * init)()
        made = (kind * len(init))()
        for i, value in enumerate(init):
            made[i] = value
        return made

    def from_buffer(self, text: Any, data: Any = None, require_writable: bool = False) -> Any:
        """An array over the memory of `data`, which it keeps alive."""
        if data is None:
            text, data = "uint8_t[]", text
        memory = data if isinstance(data, np.ndarray) else np.frombuffer(data, np.uint8)
        if not memory.flags.c_contiguous or (require_writable and not memory.flags.writeable):
            raise ValueError("memory that is not in one piece, or not to be written")
        kind = self._declared.kind(text[:-2])
        array = (kind * (memory.nbytes // ctypes.sizeof(kind))).from_address(memory.ctypes.data)
        array.kept = memory
        return array

    def buffer(self, pointer: Any, n: int) -> Any:
        """n bytes at an array or a pointer."""
        at = pointer if isinstance(pointer, ctypes.Array) else pointer.contents
        return (ctypes.c_char * n).from_address(ctypes.addressof(at))

    def string(self, text: Any) -> bytes:
        """Up to the first zero; for members that are arrays, and for results, ctypes has done it."""
        return text if isinstance(text, bytes) else ctypes.string_at(text)

    def callback(self, text: str, call: Callable[..., Any]) -> Any:
        return self._declared.function(text)(call)


def opened(declarations: Declarations, library: Path) -> Any:
    """What cffi calls `lib`."""
    loaded = ctypes.CDLL(str(library))
    lib = SimpleNamespace(**declarations.constants)
    for name, (result, parameters) in declarations.functions.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, parameters
        setattr(lib, name, function)
    return lib


_declared = Declarations((HERE / "declarations.h").read_text())
ffi = Ffi(_declared)
lib = opened(_declared, HERE / "libms4.so")
