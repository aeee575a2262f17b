"""Writes a GGUF with the real model's tensor shapes and random weights, to measure speed with.

    python tests/make_shape.py OUT.gguf [--layers 6] [--gate-up Q4_K] [--down MIX] [--vocab 22016] [--kv-b Q8_0]
        [--small]

MIX is Q4_K with Q6_K in every other layer, as in Q4_K_M.  A layer takes 1.9 GB.  6 layers and 22,016 tokens keep the
proportions of 36 and 131,072: the full model's tokens/s is about the measured one divided by 6.  --small: the same
tensors, but narrow, to try out what is to measure.
"""

import argparse
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import gguf
import numpy as np

from ms4.quant.blocks import BLOCKS, IDS
from ms4.quant.tiny import random_blocks


@dataclass(frozen=True)
class Widths:
    """The names are those of ms4.Shape; the file's keys say the same in words."""

    d_model: int = 4096
    d_expert: int = 2048
    d_dense: int = 12288
    n_head: int = 32
    d_nope: int = 64
    d_rope: int = 64
    d_value: int = 128
    q_rank: int = 1024
    kv_rank: int = 256
    n_expert: int = 128


REAL = Widths()
SMALL = Widths(d_model=512, d_expert=256, d_dense=512, n_head=4, q_rank=256, n_expert=16)
PIECE = 1 << 22  # weights that are drawn; longer tensors repeat them
AT_ONCE = 1 << 26  # bytes that are written by one call


def keys(w: gguf.GGUFWriter, s: Widths, layers: int, vocab: int) -> None:
    k = "mistral4."
    for name, value in {
        "block_count": layers, "context_length": 1048576, "embedding_length": s.d_model,
        "feed_forward_length": s.d_dense, "vocab_size": vocab,
        "attention.head_count": s.n_head, "attention.head_count_kv": 1,
        "attention.q_lora_rank": s.q_rank, "attention.kv_lora_rank": s.kv_rank, "rope.dimension_count": s.d_rope,
        "attention.key_length": s.kv_rank + s.d_rope, "attention.value_length": s.kv_rank,
        "attention.key_length_mla": s.d_nope + s.d_rope, "attention.value_length_mla": s.d_value,
        "rope.scaling.original_context_length": 8192, "leading_dense_block_count": 0, "expert_count": s.n_expert,
        "expert_used_count": 4, "expert_shared_count": 1, "expert_group_count": 1, "expert_group_used_count": 1,
        "expert_feed_forward_length": s.d_expert, "attention.temperature_length": 8192,
    }.items():  # fmt: skip
        w.add_uint32(k + name, value)
    for name, number in {
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 10000.0, "rope.scaling.factor": 128.0,
        "rope.scaling.yarn_beta_fast": 32.0, "rope.scaling.yarn_beta_slow": 1.0, "expert_weights_scale": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.1, "attention.temperature_scale": 0.1,
    }.items():  # fmt: skip
        w.add_float32(k + name, number)
    w.add_string(k + "rope.scaling.type", "yarn")
    w.add_bool(k + "expert_weights_norm", True)
    w.add_name(f"shape-{layers}L")
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("tekken")
    w.add_token_list([f"<t{i}>" for i in range(vocab)])
    w.add_token_types([1] * vocab)
    w.add_token_merges(["<t 1>"])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)


def plan(
    layers: int, vocab: int, gate_up: str, down: str, kv_b: str, s: Widths = REAL
) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, type, ne) of every tensor."""
    d, width = s.d_model, s.d_expert
    out = [("token_embd", "Q4_K", (d, vocab)), ("output_norm", "F32", (d,)), ("output", "Q6_K", (d, vocab))]
    for i in range(layers):
        this = ("Q6_K" if i % 2 == 0 else "Q4_K") if down == "MIX" else down
        dense = "Q4_K" if gate_up.startswith(("IQ", "MXFP4")) else gate_up
        last = "Q6_K" if this.startswith(("IQ", "MXFP4")) else this
        out += [
            (f"blk.{i}.{name}", kind, ne)
            for name, kind, ne in (
                ("attn_norm", "F32", (d,)),
                ("attn_q_a", dense, (d, s.q_rank)),
                ("attn_q_a_norm", "F32", (s.q_rank,)),
                ("attn_q_b", dense, (s.q_rank, s.n_head * (s.d_nope + s.d_rope))),
                ("attn_kv_a_mqa", "Q8_0", (d, s.kv_rank + s.d_rope)),
                ("attn_kv_a_norm", "F32", (s.kv_rank,)),
                ("attn_k_b", kv_b, (s.d_nope, s.kv_rank, s.n_head)),
                ("attn_v_b", kv_b, (s.kv_rank, s.d_value, s.n_head)),
                ("attn_output", dense, (s.n_head * s.d_value, d)),
                ("ffn_norm", "F32", (d,)),
                ("ffn_gate_inp", "F32", (d, s.n_expert)),
                ("ffn_gate_exps", gate_up, (d, width, s.n_expert)),
                ("ffn_up_exps", gate_up, (d, width, s.n_expert)),
                ("ffn_down_exps", this, (width, d, s.n_expert)),
                ("ffn_gate_shexp", dense, (d, width)),
                ("ffn_up_shexp", dense, (d, width)),
                ("ffn_down_shexp", last, (width, d)),
            )
        ]
    return out


@cache
def drawn(kind: str, n: int, std: float) -> np.ndarray:
    """Bytes of random blocks, so often in a row that a call writes many."""
    piece = random_blocks(np.random.default_rng(IDS[kind]), kind, n, std).view(np.uint8).reshape(-1)
    return np.tile(piece, max(1, AT_ONCE // piece.size)) if n == PIECE else piece


def write_data(file: BinaryIO, rng: np.random.Generator, name: str, kind: str, ne: tuple[int, ...]) -> None:
    """Behind what is there already, from a multiple of 32 bytes on.  Tensors of a kind begin at different blocks."""
    file.write(bytes(-file.tell() % 32))
    n = int(np.prod(ne))
    if kind == "F32":
        values = np.ones(n) if name.endswith("norm") else rng.standard_normal(n) * 0.02
        file.write(values.astype(np.float32).data)
        return
    _, weights, size = BLOCKS[IDS[kind]]
    blocks = drawn(kind, min(n, PIECE), 1.0 if name == "token_embd" else 0.02)
    left, at = n // weights * size, int(rng.integers(min(n, PIECE) // weights)) * size
    while left:
        left -= file.write(blocks[at : at + left].data)
        at = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=22016)
    parser.add_argument("--gate-up", default="Q4_K")
    parser.add_argument("--down", default="MIX")
    parser.add_argument("--kv-b", default="Q8_0")
    parser.add_argument("--small", action="store_true")
    a = parser.parse_args()
    widths = SMALL if a.small else REAL
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(a.out, "mistral4")
    keys(writer, widths, a.layers, a.vocab)
    tensors = plan(a.layers, a.vocab, a.gate_up, a.down, a.kv_b, widths)
    for name, kind, ne in tensors:
        _, weights, size = BLOCKS[IDS[kind]]
        n_bytes = int(np.prod(ne)) // weights * size
        shape = ne[::-1] if kind == "F32" else (*ne[:0:-1], ne[0] // weights * size)
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        writer.add_tensor_info(f"{name}.weight", shape, dtype, n_bytes, gguf.GGMLQuantizationType(IDS[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(a.out, "ab", buffering=0) as file:
        for name, kind, ne in tensors:
            write_data(file, rng, name, kind, ne)


if __name__ == "__main__":
    main()
