"""Mistral Small 4 before any of its files is here: its shape, and what a file of so many bytes would hold.

A plan for a file that is still on the hub needs no more than this.  Types are those of Q4_K_M: a smaller file's are
others, so its speed is an estimate, by the share of its bytes.
"""

from __future__ import annotations

from dataclasses import replace

import ms4
from ms4.models import mistral4
from ms4.models.clock import SMALL_4
from ms4.models.forecast import Model
from ms4.quant.blocks import BLOCKS, IDS

# docs/spec.md, 1.2; what no plan looks at (scales, frequencies) is left at 1.
SHAPE = ms4.Shape(
    n_layer=36,
    n_dense_layer=0,
    n_vocab=131072,
    n_ctx_train=1048576,  # as files say; the makers promise 262,144
    d_model=4096,
    d_dense=12288,
    d_expert=2048,
    d_shared=2048,
    n_head=32,
    d_nope=64,
    d_rope=64,
    d_value=128,
    q_rank=1024,
    kv_rank=256,
    n_expert=128,
    n_expert_used=4,
    norm_eps=1e-6,
    router_scale=1.0,
    router_norm=True,
    attn_scale=1.0,
    temp_beta=0.1,
    temp_length=8192,
    rope_freq=(1.0,) * 32,
)
LAYER = (
    *("attn_norm", "attn_q_a", "attn_q_a_norm", "attn_q_b", "attn_kv_a_mqa", "attn_kv_a_norm", "attn_k_b", "attn_v_b"),
    *("attn_output", "ffn_norm", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    *("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
)


def tensors() -> list[ms4.Tensor]:
    """The two kinds of layers that Q4_K_M has, and what stands beside the layers: enough to measure a machine with."""
    dims = mistral4.expected_dims(SHAPE)
    named = [("token_embd", -1), ("output_norm", -1), ("output", -1)]
    named += [(role, layer) for layer in (0, 1) for role in LAYER]
    made = []
    for role, layer in named:
        id = IDS[_type(role, layer)]
        _, weights, size = BLOCKS[id]
        columns, rows, parts = dims[role]
        made.append(ms4.Tensor(role, layer, id, 0, 0, columns * rows * parts // weights * size, dims[role]))
    return made


def _type(role: str, layer: int) -> str:
    if role in mistral4.NORMS or role == "ffn_gate_inp":
        return "F32"
    if role in ("attn_kv_a_mqa", "attn_k_b", "attn_v_b"):
        return "Q8_0"
    return "Q6_K" if role == "output" or (role.startswith("ffn_down") and layer == 0) else "Q4_K"


def model(n_bytes: int) -> Model:
    """What a file of so many bytes holds: all parts of Q4_K_M in proportion, but for the kv cache."""
    embedding = next(t.bytes for t in tensors() if t.role == "token_embd")
    part = n_bytes / (SMALL_4.experts + SMALL_4.every + SMALL_4.output + embedding)
    scaled = {name: part * getattr(SMALL_4, name) for name in ("expert", "every", "shared", "output")}
    return Model(SHAPE, replace(SMALL_4, **scaled), n_bytes, n_bytes)
