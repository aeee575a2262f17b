"""What an mmproj file must say and hold: metadata -> `ms4.VisionShape` and pixel rule, tensors -> the engine's table.

The file is a vision tower with its projector, as converters write it next to a text model (SPEC 4.7): the towers of
this family only (projector type "pixtral"), with or without a patch merger and biases in the projector.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import ms4
from ms4.models.image import PixelRule
from ms4.models.mistral4 import Key, ModelError, check_value
from ms4.quant.gguf_file import GgufFile, Opener, TensorInfo, shown

KEYS = (
    Key("image_size", int, 1, 1 << 14),
    Key("patch_size", int, 1, 256),
    Key("embedding_length", int, 8, 1 << 16),
    Key("feed_forward_length", int, 1, 1 << 20),
    Key("block_count", int, 1, 1024),
    Key("projection_dim", int, 1, 1 << 20),
    Key("attention.head_count", int, 1, 4096),
    Key("attention.layer_norm_epsilon", float, 1e-12, 0.1),
    Key("spatial_merge_size", int, 1, 8, 1),
    Key("rope.freq_base", float, 1.001, 1e12, 10000.0),
)
LAYER = ("ln1", "ln2", "attn_q", "attn_k", "attn_v", "attn_out", "ffn_gate", "ffn_up", "ffn_down")
SPARE = ("v.token_embd.img_break",)  # a copy of the text model's own embedding: not needed
_LAYER_TENSOR = re.compile(r"v\.blk\.(0|[1-9]\d{0,4})\.([a-z0-9_]+)\.weight")


@dataclass(frozen=True)
class Tower:
    """A checked mmproj file."""

    path: str
    shape: ms4.VisionShape
    rule: PixelRule
    tensors: tuple[ms4.Tensor, ...]
    gguf: GgufFile = field(repr=False, compare=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str], opener: Opener | None = None) -> Tower:
        """GgufError or ModelError: what is wrong with the file.  opener: as of GgufFile.open."""
        return cls.of(GgufFile.open(path, opener))

    @classmethod
    def of(cls, gguf: GgufFile) -> Tower:
        """The same, of a header that is open already."""
        _check_kind(gguf)
        values = _hyperparameters(gguf)
        shape = _shape(gguf, values)
        return cls(gguf.path, shape, _pixel_rule(gguf, values), tuple(_table(gguf, shape)), gguf)


def _check_kind(gguf: GgufFile) -> None:
    architecture = gguf.metadata.get("general.architecture")
    if architecture != "clip":
        name = shown(architecture) if type(architecture) is str else "missing"
        raise ModelError(gguf.path, f"the architecture is {name}: not a vision tower; --mmproj takes the mmproj file")
    for name, wanted in (("clip.projector_type", "pixtral"), ("clip.has_vision_encoder", True)):
        value = gguf.metadata.get(name)
        if type(value) is not type(wanted) or value != wanted:
            found = shown(value) if type(value) is str else "missing" if value is None else "something else"
            raise ModelError(gguf.path, f"{name} is {found}; ms4 runs the projector of Pixtral and Mistral Small")


def _hyperparameters(gguf: GgufFile) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key in KEYS:
        name = f"clip.vision.{key.name}"
        value = gguf.metadata.get(name, key.default)
        if type(value) is object:
            raise ModelError(gguf.path, f"mmproj: the key {name} is missing")
        check_value(gguf, name, key, value)
        values[key.name] = value
    d, heads, side = values["embedding_length"], values["attention.head_count"], values["patch_size"]
    if d % heads or d // heads % 8:
        raise ModelError(gguf.path, f"mmproj: clip.vision.embedding_length {d} is not {heads} heads of a multiple of 8")
    least = gguf.metadata.get("clip.vision.image_min_pixels", 0)
    if type(least) is not int or not 0 <= least <= values["image_size"] ** 2:
        raise ModelError(gguf.path, "mmproj: clip.vision.image_min_pixels is more than image_size allows")
    if values["image_size"] < side * values["spatial_merge_size"]:
        raise ModelError(gguf.path, f"mmproj: clip.vision.image_size is {values['image_size']}: less than one token")
    return values


def _shape(gguf: GgufFile, v: Mapping[str, Any]) -> ms4.VisionShape:
    flags = {}
    for name in ("clip.use_silu", "clip.use_gelu"):
        flags[name] = gguf.metadata.get(name, False)
        if type(flags[name]) is not bool:
            raise ModelError(gguf.path, f"mmproj: {name} has the wrong type; a bool was expected")
    if flags["clip.use_silu"] == flags["clip.use_gelu"]:
        raise ModelError(gguf.path, "mmproj: one of clip.use_silu and clip.use_gelu must be true")
    return ms4.VisionShape(
        n_layer=v["block_count"],
        d_model=v["embedding_length"],
        d_ffn=v["feed_forward_length"],
        n_head=v["attention.head_count"],
        patch_size=v["patch_size"],
        merge=v["spatial_merge_size"],
        d_out=v["projection_dim"],
        gelu=flags["clip.use_gelu"],
        eps=v["attention.layer_norm_epsilon"],
        rope_theta=v["rope.freq_base"],
    )


def _pixel_rule(gguf: GgufFile, v: Mapping[str, Any]) -> PixelRule:
    triples = []
    for name, low in (("clip.vision.image_mean", -1e3), ("clip.vision.image_std", 1e-6)):
        value = gguf.metadata.get(name)
        if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or len(value) != 3:
            raise ModelError(gguf.path, f"mmproj: {name} must be three numbers")
        if not all(math.isfinite(x) and low <= x <= 1e3 for x in value.tolist()):
            raise ModelError(gguf.path, f"mmproj: {name} is out of range")
        triples.append(tuple(value.tolist()))
    return PixelRule(v["image_size"], v["patch_size"] * v["spatial_merge_size"], triples[0], triples[1])


def _dims(s: ms4.VisionShape, gguf: GgufFile) -> dict[str, tuple[int, ...]]:
    """Dimensions of every tensor the tower may have, as they are stored."""
    d, d_out, f = s.d_model, s.d_out, s.d_ffn
    hidden = gguf.tensors["mm.1.weight"].dims[-1] if "mm.1.weight" in gguf.tensors else d_out
    dims: dict[str, tuple[int, ...]] = {
        "v.patch_embd.weight": (s.patch_size, s.patch_size, 3, d),
        "v.pre_ln.weight": (d,),
        "mm.1.weight": (d, hidden),
        "mm.2.weight": (hidden, d_out),
    }
    square = {name: (d, d) for name in ("attn_q", "attn_k", "attn_v", "attn_out")}
    layer = {"ln1": (d,), "ln2": (d,), **square, "ffn_gate": (d, f), "ffn_up": (d, f), "ffn_down": (f, d)}
    dims |= {f"v.blk.{i}.{name}.weight": layer[name] for i in range(s.n_layer) for name in LAYER}
    if s.merge > 1:
        dims["mm.patch_merger.weight"] = (d * s.merge**2, d)
    optional = {"mm.input_norm.weight": (d,), "mm.1.bias": (hidden,), "mm.2.bias": (d_out,)}
    return dims | {name: shape for name, shape in optional.items() if name in gguf.tensors}


def _table(gguf: GgufFile, shape: ms4.VisionShape) -> list[ms4.Tensor]:
    dims = _dims(shape, gguf)
    for name in gguf.tensors:
        if name not in dims and name not in SPARE:
            raise ModelError(gguf.path, f"mmproj: unexpected tensor {name}: a tower of another family?")
    table = []
    for name, wanted in dims.items():
        tensor = gguf.tensors.get(name)
        if tensor is None:
            raise ModelError(gguf.path, f"mmproj: tensor {name} is missing")
        if _trimmed(tensor.dims) != _trimmed(wanted):
            found, expected = (" x ".join(map(str, x)) for x in (tensor.dims, wanted))
            raise ModelError(gguf.path, f"mmproj: tensor {name} has the shape {found}; the metadata says {expected}")
        table.append(_entry(tensor, name, wanted))
    return table


def encode_macs(tower: Tower, n_cells: int) -> int:
    """Multiply-adds for an image of so many cells: products with weights, scores, and the sums of values."""
    s = tower.shape
    n = n_cells * s.merge**2
    hidden = next(t.dims[1] for t in tower.tensors if t.role == "mm.1")
    layer = n * (4 * s.d_model**2 + 3 * s.d_model * s.d_ffn) + 2 * n * n * s.d_model
    patches = n * 3 * s.patch_size**2 * s.d_model
    merger = n * s.d_model**2 if s.merge > 1 else 0
    return s.n_layer * layer + patches + merger + n_cells * hidden * (s.d_model + s.d_out)


def _trimmed(dims: tuple[int, ...]) -> tuple[int, ...]:
    while len(dims) > 1 and dims[-1] == 1:
        dims = dims[:-1]
    return dims


def _entry(tensor: TensorInfo, name: str, dims: tuple[int, ...]) -> ms4.Tensor:
    match = _LAYER_TENSOR.fullmatch(name)
    role = f"v.{match[2]}" if match else name.removesuffix(".weight").replace(".bias", "_bias")
    columns = math.prod(dims[:-1]) if len(dims) > 1 else dims[0]
    rows = dims[-1] if len(dims) > 1 else 1
    layer = int(match[1]) if match else -1
    return ms4.Tensor(role, layer, tensor.type, tensor.file, tensor.offset, tensor.bytes, (columns, rows, 1))
