"""What quant/tiny.py and the writers of tests use of the package gguf: for `make gpu`, where it is not installed.

Its files are those of the package, byte for byte (tests/test_bare.py); only that a file has one part.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ms4.quant.blocks import BLOCKS, IDS

ALIGNMENT = 32
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
FORMATS = {UINT32: "<I", INT32: "<i", FLOAT32: "<f", BOOL: "<?"}
OF_DTYPE = {np.dtype(np.float32): IDS["F32"], np.dtype(np.float16): IDS["F16"]}
# Behind add_: the key, `{}` being the architecture.
KEYS = {
    **{name: f"general.{name}" for name in ("type", "name")},
    **{
        name: f"{{}}.{name}"
        for name in (
            "block_count context_length embedding_length feed_forward_length vocab_size leading_dense_block_count "
            "expert_count expert_used_count expert_shared_count expert_group_count expert_group_used_count "
            "expert_feed_forward_length expert_weights_scale expert_weights_norm expert_gating_func"
        ).split()
    },
    **{
        name: f"{{}}.attention.{name}"
        for name in (
            "head_count head_count_kv q_lora_rank kv_lora_rank key_length value_length key_length_mla value_length_mla"
        ).split()
    },
    "layer_norm_rms_eps": "{}.attention.layer_norm_rms_epsilon",
    "rope_dimension_count": "{}.rope.dimension_count",
    "rope_freq_base": "{}.rope.freq_base",
    "rope_scaling_type": "{}.rope.scaling.type",
    "rope_scaling_factor": "{}.rope.scaling.factor",
    "rope_scaling_orig_ctx_len": "{}.rope.scaling.original_context_length",
    "tokenizer_model": "tokenizer.ggml.model",
    "tokenizer_pre": "tokenizer.ggml.pre",
    "token_list": "tokenizer.ggml.tokens",
    "token_types": "tokenizer.ggml.token_type",
    "token_merges": "tokenizer.ggml.merges",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "unk_token_id": "tokenizer.ggml.unknown_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
    "add_bos_token": "tokenizer.ggml.add_bos_token",
    "add_eos_token": "tokenizer.ggml.add_eos_token",
    "chat_template": "tokenizer.chat_template",
}


class RopeScalingType:
    YARN = "yarn"


class ExpertGatingFuncType:
    SOFTMAX = 1


class GGMLQuantizationType(int):
    """The id of a block type."""


def kind_of(value: Any) -> int:
    kinds = ((bool, BOOL), (int, UINT32), (float, FLOAT32), ((str, bytes), STRING))
    return next((kind for types, kind in kinds if isinstance(value, types)), ARRAY)


def packed(kind: int, value: Any) -> bytes:
    if kind == STRING:
        raw = value if isinstance(value, bytes) else value.encode()
        return struct.pack("<Q", len(raw)) + raw
    if kind == ARRAY:
        of = kind_of(value[0])
        of = INT32 if of == UINT32 else of
        return struct.pack("<IQ", of, len(value)) + b"".join(packed(of, each) for each in value)
    return struct.pack(FORMATS[kind], value)


def padding(n: int) -> bytes:
    return bytes(-n % ALIGNMENT)


class GGUFWriter:
    """One file: keys and tensors are added, then written in this order: header, keys, table of tensors, data."""

    def __init__(self, path: str | os.PathLike[str], arch: str, split_max_tensors: int = 0) -> None:
        if split_max_tensors:
            raise ValueError("files of several parts take the package gguf")
        self._file = open(path, "wb")
        self._arch = arch
        self._keys: dict[str, tuple[int, Any]] = {"general.architecture": (STRING, arch)}
        self._tensors: dict[str, tuple[tuple[int, ...], int, int, np.ndarray | None]] = {}

    def __getattr__(self, name: str) -> Callable[[Any], None]:
        """add_NAME(value) of KEYS."""
        if not name.startswith("add_") or name[4:] not in KEYS:
            raise AttributeError(name)
        key = KEYS[name[4:]].format(self._arch)
        return lambda value: self._add(key, kind_of(value), value)

    def _add(self, key: str, kind: int, value: Any) -> None:
        self._keys[key] = kind, value

    def add_uint32(self, key: str, value: int) -> None:
        self._add(key, UINT32, value)

    def add_float32(self, key: str, value: float) -> None:
        self._add(key, FLOAT32, value)

    def add_bool(self, key: str, value: bool) -> None:
        self._add(key, BOOL, value)

    def add_string(self, key: str, value: str) -> None:
        self._add(key, STRING, value)

    def add_array(self, key: str, value: Sequence[Any]) -> None:
        self._add(key, ARRAY, value)

    def add_tensor_info(
        self, name: str, shape: Sequence[int], dtype: np.dtype, n_bytes: int, raw_dtype: int | None = None
    ) -> None:
        """shape: slowest first; of bytes, if dtype is that of bytes."""
        kind = OF_DTYPE[np.dtype(dtype)] if raw_dtype is None else int(raw_dtype)
        if raw_dtype is not None and dtype == np.uint8:
            block = BLOCKS[kind]
            shape = (*shape[:-1], shape[-1] // block.bytes * block.weights)
        self._tensors[name] = tuple(shape), kind, n_bytes, None

    def add_tensor(self, name: str, tensor: np.ndarray, raw_dtype: int | None = None) -> None:
        self.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.nbytes, raw_dtype)
        self._tensors[name] = (*self._tensors[name][:3], tensor)

    def write_header_to_file(self) -> None:
        self._file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(self._tensors), len(self._keys)))

    def write_kv_data_to_file(self) -> None:
        for key, (kind, value) in self._keys.items():
            self._file.write(packed(STRING, key) + struct.pack("<I", kind) + packed(kind, value))

    def write_ti_data_to_file(self) -> None:
        at = 0
        for name, (shape, kind, n_bytes, _) in self._tensors.items():
            self._file.write(packed(STRING, name) + struct.pack("<I", len(shape)))
            self._file.write(struct.pack(f"<{len(shape)}QIQ", *reversed(shape), kind, at))
            at += n_bytes + len(padding(n_bytes))

    def write_tensor_data(self, tensor: np.ndarray) -> None:
        self._file.write(padding(self._file.tell()))
        self._file.write(tensor.data)
        self._file.write(padding(tensor.nbytes))

    def write_tensors_to_file(self) -> None:
        self.write_ti_data_to_file()
        for _, _, _, tensor in self._tensors.values():
            assert tensor is not None
            self.write_tensor_data(np.ascontiguousarray(tensor))

    def close(self) -> None:
        self._file.close()
