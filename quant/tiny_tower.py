"""Writes vision towers of any size with random weights, in the keys, shapes and names of the real one."""

import os

import gguf
import numpy as np

from ms4.quant.blocks import BLOCKS, IDS
from ms4.quant.tiny import random_blocks

PATCH, MERGE = 14, 2


def keys(w: gguf.GGUFWriter, layers: int, width: int, heads: int, out_width: int, side: int) -> None:
    w.add_type("mmproj")
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.use_silu", True)
    w.add_string("clip.projector_type", "pixtral")
    for name, value in {
        "image_size": side, "patch_size": PATCH, "spatial_merge_size": MERGE, "embedding_length": width,
        "feed_forward_length": 4 * width, "block_count": layers, "projection_dim": out_width,
        "attention.head_count": heads,
    }.items():  # fmt: skip
        w.add_uint32(f"clip.vision.{name}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    w.add_array("clip.vision.image_mean", [0.48145466, 0.4578275, 0.40821073])
    w.add_array("clip.vision.image_std", [0.26862954, 0.26130258, 0.27577711])


def plan(layers: int, width: int, out_width: int) -> list[tuple[str, tuple[int, ...]]]:
    """(name, ne) of every tensor."""
    d, f = width, 4 * width
    out = [("v.patch_embd", (PATCH, PATCH, 3, d)), ("v.pre_ln", (d,)), ("mm.input_norm", (d,))]
    out += [("mm.patch_merger", (d * MERGE**2, d)), ("mm.1", (d, out_width)), ("mm.2", (out_width, out_width))]
    for i in range(layers):
        shapes = {"ln1": (d,), "ln2": (d,), "ffn_gate": (d, f), "ffn_up": (d, f), "ffn_down": (f, d)}
        shapes |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_out"), (d, d))
        out += [(f"v.blk.{i}.{name}", shape) for name, shape in shapes.items()]
    return out


def write_mmproj(
    path: str | os.PathLike[str],
    layers: int = 24,
    width: int = 1024,
    heads: int = 16,
    out_width: int = 4096,
    kind: str = "F16",
    side: int = 1540,
) -> None:
    """The defaults are those of the real one, which takes 0.9 GB; out_width is that of the text model it goes with."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(os.fspath(path), "clip")
    keys(writer, layers, width, heads, out_width, side)
    for name, ne in plan(layers, width, out_width):
        if len(ne) == 1:
            writer.add_tensor(f"{name}.weight", np.ones(ne, np.float32))
            continue
        here = kind if ne[0] % BLOCKS[IDS[kind]].weights == 0 else "F16"
        n_inputs = int(np.prod(ne[:-1]))
        raw = random_blocks(rng, here, int(np.prod(ne)), n_inputs**-0.5)
        shape = (*reversed(ne[1:]), len(raw) // int(np.prod(ne[1:])))
        writer.add_tensor(f"{name}.weight", raw.reshape(shape), raw_dtype=gguf.GGMLQuantizationType(IDS[here]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
