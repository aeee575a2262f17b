"""Writes a checkpoint in Hugging Face layout that holds the weights of a GGUF file: what the converter is tried on.

    python tests/make_hf.py MODEL.gguf MMPROJ.gguf FOLDER

does it for the demonstration checkpoint, whose training goes on from FOLDER (train_joint --from FOLDER).
The mapping is that of SPEC 4.4 and 4.9, read in the other direction than the converter goes.
"""

import base64
import json
import struct
import sys
from pathlib import Path

import numpy as np

from ms4.models.vocabulary import Vocabulary
from ms4.quant.blocks import dequantize
from ms4.quant.gguf_file import GgufFile

LAYER = {
    "attn_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "attn_q_a": "self_attn.q_a_proj.weight",
    "attn_q_a_norm": "self_attn.q_a_layernorm.weight",
    "attn_q_b": "self_attn.q_b_proj.weight",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa.weight",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm.weight",
    "attn_output": "self_attn.o_proj.weight",
    "ffn_gate_inp": "mlp.gate.weight",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj.weight",
    "ffn_up_shexp": "mlp.shared_experts.up_proj.weight",
    "ffn_down_shexp": "mlp.shared_experts.down_proj.weight",
}
TOWER_LAYER = {
    "ln1": "attention_norm",
    "ln2": "ffn_norm",
    "attn_q": "attention.q_proj",
    "attn_k": "attention.k_proj",
    "attn_v": "attention.v_proj",
    "attn_out": "attention.o_proj",
    "ffn_gate": "feed_forward.gate_proj",
    "ffn_up": "feed_forward.up_proj",
    "ffn_down": "feed_forward.down_proj",
}
WHOLE = {
    "token_embd": "language_model.model.embed_tokens.weight",
    "output": "language_model.lm_head.weight",
    "output_norm": "language_model.model.norm.weight",
    "v.patch_embd": "vision_tower.patch_conv.weight",
    "v.pre_ln": "vision_tower.ln_pre.weight",
    "mm.input_norm": "multi_modal_projector.norm.weight",
    "mm.patch_merger": "multi_modal_projector.patch_merger.merging_layer.weight",
    "mm.1": "multi_modal_projector.linear_1.weight",
    "mm.2": "multi_modal_projector.linear_2.weight",
}


def values(path):
    """name without .weight -> float32, in the order of NumPy's axes."""
    file = GgufFile.open(path)
    raw = Path(file.paths[0]).read_bytes()
    return {
        name.removesuffix(".weight"): dequantize(
            np.frombuffer(raw, np.uint8, t.bytes, t.offset), t.type, t.n_weights
        ).reshape(t.dims[::-1])
        for name, t in file.tensors.items()
    }


def hf_tensors(model, mmproj, tower_heads):
    """Both files' weights under their names in a Hugging Face checkpoint."""
    found = {}
    weights = values(model) | values(mmproj)
    for name, x in weights.items():
        if name == "v.token_embd.img_break":  # a row of token_embd
            continue
        if name in WHOLE:
            found[WHOLE[name]] = x
        elif name.startswith("v.blk."):
            _, _, layer, role = name.split(".")
            if role in ("attn_q", "attn_k"):  # rows 2 j and 2 j + 1 of a head were j and j + half
                x = x.reshape(tower_heads, -1, 2, x.shape[1]).transpose(0, 2, 1, 3).reshape(x.shape)
            found[f"vision_tower.transformer.layers.{layer}.{TOWER_LAYER[role]}.weight"] = x
        else:
            _, layer, role = name.split(".")
            prefix = f"language_model.model.layers.{layer}."
            if role == "attn_k_b":
                both = np.concatenate([x.transpose(0, 2, 1), weights[f"blk.{layer}.attn_v_b"]], axis=1)
                found[f"{prefix}self_attn.kv_b_proj.weight"] = both.reshape(-1, both.shape[2])
            elif role != "attn_v_b":
                found[prefix + LAYER[role]] = x
    return found


def write_safetensors(path, tensors, dtype="F32"):
    kinds = {"F32": "<f4", "F16": "<f2"}
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, x in tensors.items():
        data = (x.view("<u4") >> 16).astype("<u2") if dtype == "BF16" else x.astype(kinds[dtype])
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [at, at + data.nbytes]}
        parts.append(data.tobytes())
        at += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def tekken(model):
    """tekken.json, from the vocabulary of a GGUF file."""
    vocabulary = Vocabulary.from_gguf(GgufFile.open(model))
    ordinary = list(vocabulary.mergeable_ranks())
    control = [vocabulary.spelling(i).decode() for i in range(vocabulary.n_control)]
    return {
        "config": {
            "default_vocab_size": len(control) + len(ordinary),
            "default_num_special_tokens": len(control),
            "version": "v15",
        },
        "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(ordinary)],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(control[:38])],
    }


def bravo_config():
    """config.json of the checkpoint in tests/data, as far as it says something about the weights."""
    return {
        "model_type": "mistral3",
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": 2,
        "text_config": {
            "model_type": "mistral4", "hidden_act": "silu", "attention_bias": False, "first_k_dense_replace": 0,
            "hidden_size": 256, "intermediate_size": 512, "kv_lora_rank": 256, "max_position_embeddings": 1024,
            "moe_intermediate_size": 256, "n_group": 1, "topk_group": 1, "n_routed_experts": 8, "n_shared_experts": 1,
            "norm_topk_prob": True, "num_attention_heads": 2, "num_experts_per_tok": 4, "num_hidden_layers": 3,
            "q_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64, "v_head_dim": 128,
            "rms_norm_eps": 1e-6, "rope_interleave": True, "routed_scaling_factor": 1.0,
            "tie_word_embeddings": False, "vocab_size": 2304,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
                "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 64,
                "llama_4_scaling_beta": 0.1,
            },
        },
        "vision_config": {
            "model_type": "pixtral", "hidden_act": "silu", "head_dim": 32, "hidden_size": 128, "image_size": 140,
            "intermediate_size": 256, "num_attention_heads": 4, "num_channels": 3, "num_hidden_layers": 3,
            "patch_size": 14,
        },
        "vision_feature_layer": -1,
    }  # fmt: skip


def write_hf(folder, model, mmproj, config=None, dtype="F32"):
    """The whole folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config or bravo_config()
    heads = config["vision_config"]["num_attention_heads"]
    write_safetensors(folder / "model.safetensors", hf_tensors(model, mmproj, heads), dtype)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tekken.json").write_text(json.dumps(tekken(model)))


if __name__ == "__main__":
    from ms4.models.training import network

    write_hf(Path(sys.argv[3]), sys.argv[1], sys.argv[2], network.config())
