"""Writes an mmproj GGUF with the shapes of the real vision tower and random weights, to measure speed with.

    python tests/make_mmproj.py OUT.gguf [--layers 24] [--width 1024] [--heads 16] [--out-width 4096] [--type F16]

With the defaults it takes 0.9 GB.  --out-width is the hidden size of the text model it shall go with.
"""

import argparse
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--out-width", type=int, default=4096)
    parser.add_argument("--type", default="F16")
    a = parser.parse_args()
    write_mmproj(a.out, a.layers, a.width, a.heads, a.out_width, a.type)


if __name__ == "__main__":
    main()
