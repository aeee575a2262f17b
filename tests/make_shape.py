"""Writes a GGUF with the real model's tensor shapes and random weights, to measure speed with.

    python tests/make_shape.py OUT.gguf [--layers 6] [--gate-up Q4_K] [--down MIX] [--vocab 22016] [--kv-b Q8_0]

MIX is Q4_K with Q6_K in every other layer, as in Q4_K_M.  A layer takes 1.9 GB.  6 layers and 22,016 tokens keep the
proportions of 36 and 131,072: the full model's tokens/s is about the measured one divided by 6.
"""

import argparse

import gguf
import numpy as np

from ms4.quant.blocks import BLOCKS, IDS
from ms4.quant.tiny import random_blocks

D, D_EXPERT, N_HEAD, D_NOPE, D_ROPE, D_VALUE, Q_RANK, KV_RANK, N_EXPERT = 4096, 2048, 32, 64, 64, 128, 1024, 256, 128
PIECE = 1 << 22  # weights that are drawn; longer tensors repeat them


def keys(w: gguf.GGUFWriter, layers: int, vocab: int) -> None:
    k = "mistral4."
    for name, value in {
        "block_count": layers, "context_length": 262144, "embedding_length": D, "feed_forward_length": 12288,
        "vocab_size": vocab, "attention.head_count": N_HEAD, "attention.head_count_kv": 1,
        "attention.q_lora_rank": Q_RANK, "attention.kv_lora_rank": KV_RANK, "rope.dimension_count": D_ROPE,
        "attention.key_length": KV_RANK + D_ROPE, "attention.value_length": KV_RANK,
        "attention.key_length_mla": D_NOPE + D_ROPE, "attention.value_length_mla": D_VALUE,
        "rope.scaling.original_context_length": 8192, "leading_dense_block_count": 0, "expert_count": N_EXPERT,
        "expert_used_count": 4, "expert_shared_count": 1, "expert_group_count": 1, "expert_group_used_count": 1,
        "expert_feed_forward_length": D_EXPERT, "attention.temperature_length": 8192,
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


def plan(layers: int, vocab: int, gate_up: str, down: str, kv_b: str) -> list[tuple[str, str, tuple[int, ...]]]:
    """(name, type, ne) of every tensor."""
    out = [("token_embd", "Q4_K", (D, vocab)), ("output_norm", "F32", (D,)), ("output", "Q6_K", (D, vocab))]
    for i in range(layers):
        this = ("Q6_K" if i % 2 == 0 else "Q4_K") if down == "MIX" else down
        dense = "Q4_K" if gate_up.startswith(("IQ", "MXFP4")) else gate_up
        last = "Q6_K" if this.startswith(("IQ", "MXFP4")) else this
        out += [
            (f"blk.{i}.{name}", kind, ne)
            for name, kind, ne in (
                ("attn_norm", "F32", (D,)),
                ("attn_q_a", dense, (D, Q_RANK)),
                ("attn_q_a_norm", "F32", (Q_RANK,)),
                ("attn_q_b", dense, (Q_RANK, N_HEAD * (D_NOPE + D_ROPE))),
                ("attn_kv_a_mqa", "Q8_0", (D, KV_RANK + D_ROPE)),
                ("attn_kv_a_norm", "F32", (KV_RANK,)),
                ("attn_k_b", kv_b, (D_NOPE, KV_RANK, N_HEAD)),
                ("attn_v_b", kv_b, (KV_RANK, D_VALUE, N_HEAD)),
                ("attn_output", dense, (N_HEAD * D_VALUE, D)),
                ("ffn_norm", "F32", (D,)),
                ("ffn_gate_inp", "F32", (D, N_EXPERT)),
                ("ffn_gate_exps", gate_up, (D, D_EXPERT, N_EXPERT)),
                ("ffn_up_exps", gate_up, (D, D_EXPERT, N_EXPERT)),
                ("ffn_down_exps", this, (D_EXPERT, D, N_EXPERT)),
                ("ffn_gate_shexp", dense, (D, D_EXPERT)),
                ("ffn_up_shexp", dense, (D, D_EXPERT)),
                ("ffn_down_shexp", last, (D_EXPERT, D)),
            )
        ]
    return out


def data(rng: np.random.Generator, name: str, kind: str, ne: tuple[int, ...]) -> np.ndarray:
    n = int(np.prod(ne))
    if kind == "F32":
        values = np.ones(n) if name.endswith("norm") else rng.standard_normal(n) * 0.02
        return values.astype(np.float32).reshape(ne[::-1])
    _, weights, size = BLOCKS[IDS[kind]]
    drawn = random_blocks(rng, kind, min(n, PIECE), 1.0 if name == "token_embd" else 0.02).view(np.uint8).reshape(-1)
    row = ne[0] // weights * size
    return np.resize(drawn, n // weights * size).reshape(*ne[:0:-1], row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=22016)
    parser.add_argument("--gate-up", default="Q4_K")
    parser.add_argument("--down", default="MIX")
    parser.add_argument("--kv-b", default="Q8_0")
    a = parser.parse_args()
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(a.out, "mistral4")
    keys(writer, a.layers, a.vocab)
    tensors = plan(a.layers, a.vocab, a.gate_up, a.down, a.kv_b)
    for name, kind, ne in tensors:
        _, weights, size = BLOCKS[IDS[kind]]
        n_bytes = int(np.prod(ne)) // weights * size
        shape = ne[::-1] if kind == "F32" else (*ne[:0:-1], ne[0] // weights * size)
        dtype = np.dtype(np.float32 if kind == "F32" else np.uint8)
        writer.add_tensor_info(f"{name}.weight", shape, dtype, n_bytes, gguf.GGMLQuantizationType(IDS[kind]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, kind, ne in tensors:
        writer.write_tensor_data(data(rng, name, kind, ne))
    writer.close()


if __name__ == "__main__":
    main()
