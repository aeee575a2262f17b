"""The shape and the vocabulary of the demonstration checkpoint, and its folder in Hugging Face layout.

The architecture is Mistral Small 4's, only narrow: MLA, 128 experts with 4 active and a shared one, a Pixtral tower.
YaRN has a factor of 1, so that the plain softmax scale and the one with YaRN's correction are the same number and the
query temperature stays 1: every engine computes the same model, whatever it makes of those two.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ms4.models.control import Control
from ms4.models.tokenizer import PATTERN, Tokenizer

N_CONTROL = 1000
# The 256 bytes and the first 24 merges: words are spelled nearly letter by letter, which is what spelling, sorting
# and reading need of a network this small.
N_ORDINARY = 280
N_VOCAB = N_CONTROL + N_ORDINARY
N_CTX = 4096
D_MODEL = 256
N_LAYER = 3
PATCH, MERGE = 14, 2
MAX_SIDE = 336  # of an image, in pixels
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

NAMES = {
    Control.UNKNOWN: "<unk>",
    Control.BOS: "<s>",
    Control.EOS: "</s>",
    Control.PAD: "<pad>",
    Control.INST: "[INST]",
    Control.INST_END: "[/INST]",
    Control.TOOLS: "[AVAILABLE_TOOLS]",
    Control.TOOLS_END: "[/AVAILABLE_TOOLS]",
    Control.TOOL_RESULTS: "[TOOL_RESULTS]",
    Control.TOOL_RESULTS_END: "[/TOOL_RESULTS]",
    Control.TOOL_CALLS: "[TOOL_CALLS]",
    Control.IMG: "[IMG]",
    Control.IMG_BREAK: "[IMG_BREAK]",
    Control.IMG_END: "[IMG_END]",
    Control.SYSTEM: "[SYSTEM_PROMPT]",
    Control.SYSTEM_END: "[/SYSTEM_PROMPT]",
    Control.ARGS: "[ARGS]",
    Control.THINK: "[THINK]",
    Control.THINK_END: "[/THINK]",
    Control.SETTINGS: "[MODEL_SETTINGS]",
    Control.SETTINGS_END: "[/MODEL_SETTINGS]",
}
UNUSED = {14: "[PREFIX]", 15: "[MIDDLE]", 16: "[SUFFIX]", 19: "[TOOL_CONTENT]", 33: "[CALL_ID]"}


def text_config() -> dict[str, Any]:
    return {
        "model_type": "mistral4",
        "vocab_size": N_VOCAB,
        "hidden_size": D_MODEL,
        "intermediate_size": 512,
        "num_hidden_layers": N_LAYER,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 256,
        "kv_lora_rank": 256,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "qk_head_dim": 128,
        "head_dim": 128,
        "attention_bias": False,
        "first_k_dense_replace": 0,
        "n_routed_experts": 128,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": N_CTX,
        "bos_token_id": int(Control.BOS),
        "eos_token_id": int(Control.EOS),
        "pad_token_id": int(Control.PAD),
        "rope_interleave": True,
        "rope_parameters": {
            "type": "yarn",
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 1.0,
            "original_max_position_embeddings": N_CTX,
            "max_position_embeddings": N_CTX,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        },
    }


def vision_config() -> dict[str, Any]:
    return {
        "model_type": "pixtral",
        "hidden_size": D_MODEL,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 64,
        "num_channels": 3,
        "image_size": MAX_SIDE,
        "patch_size": PATCH,
        "hidden_act": "silu",
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "axial"},
    }


def config() -> dict[str, Any]:
    """What config.json says."""
    return {
        "architectures": ["Mistral3ForConditionalGeneration"],
        "model_type": "mistral3",
        "dtype": "float32",
        "image_token_index": int(Control.IMG),
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu",
        "spatial_merge_size": MERGE,
        "vision_feature_layer": -1,
        "tie_word_embeddings": False,
        "text_config": text_config(),
        "vision_config": vision_config(),
    }


def preprocessor() -> dict[str, Any]:
    """What preprocessor_config.json says."""
    return {
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "size": {"longest_edge": MAX_SIDE},
        "patch_size": PATCH,
    }


@cache
def ordinary() -> tuple[bytes, ...]:
    """The ordinary tokens: the first ranks of Tekken, as mistral-common ships it."""
    import mistral_common

    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    entries = json.loads(path.read_text(encoding="utf-8"))["vocab"][:N_ORDINARY]
    assert [entry["rank"] for entry in entries] == list(range(N_ORDINARY))
    return tuple(base64.b64decode(entry["token_bytes"]) for entry in entries)


def control_name(id: int) -> str:
    named = {int(key): name for key, name in NAMES.items()} | UNUSED
    return named.get(id, f"<SPECIAL_{id}>")


class Tokens:
    """The vocabulary as `Tokenizer` wants it."""

    model, pre = "gpt2", "tekken"
    n_vocab, n_control, n_used = N_VOCAB, N_CONTROL, N_VOCAB

    def __init__(self, ordinary: tuple[bytes, ...]) -> None:
        self.ordinary = ordinary

    def mergeable_ranks(self) -> dict[bytes, int]:
        return {token: rank for rank, token in enumerate(self.ordinary)}

    def spelling(self, token: int, /) -> bytes:
        return control_name(token).encode() if token < N_CONTROL else self.ordinary[token - N_CONTROL]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(Tokens(ordinary()))


def tekken() -> dict[str, Any]:
    """What tekken.json says."""
    return {
        "config": {
            "pattern": PATTERN,
            "num_vocab_tokens": N_ORDINARY,
            "default_vocab_size": N_VOCAB,
            "default_num_special_tokens": N_CONTROL,
            "version": "v15",
        },
        "vocab": [
            {
                "rank": rank,
                "token_bytes": base64.b64encode(token).decode(),
                "token_str": token.decode("utf-8", "replace"),
            }
            for rank, token in enumerate(ordinary())
        ],
        "special_tokens": [
            {"rank": id, "token_str": control_name(id), "is_control": True} for id in range(max(Control) + 1)
        ],
        "image": {"image_patch_size": PATCH, "max_image_size": MAX_SIDE, "spatial_merge_size": MERGE},
        "model_settings_builder": {
            "reasoning_effort": {
                "type": "enum",
                "values": ["none", "high"],
                "accepts_none": True,
                "default": "none",
            }
        },
    }


def build(seed: int) -> Any:
    """A new network with random weights: transformers' Mistral3ForConditionalGeneration, float32."""
    import torch
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    torch.manual_seed(seed)
    model = Mistral3ForConditionalGeneration(Mistral3Config(**config()))
    start_weights(model, torch.Generator().manual_seed(seed))
    return model.float()


def start_weights(model: Any, generator: Any) -> None:
    """Draws every matrix with a deviation of one over the root of its inputs.

    What writes into the residual stream is divided by the root of the number of writers (two a layer); the router
    starts small, so that at first all experts get some tokens.
    """
    writers = {"o_proj", "down_proj"}
    for name, weight in model.named_parameters():
        parts = name.split(".")
        if weight.dim() == 1:
            weight.data.fill_(1.0)
            continue
        inputs = weight.shape[1:].numel() if "patch_conv" in name else weight.shape[-1]
        deviation = inputs**-0.5
        if "embed_tokens" in name:
            deviation = 0.5
        elif parts[-2] == "gate" or "lm_head" in name:
            deviation = 0.02
        elif writers & set(parts):
            layers = N_LAYER if "language_model" in name else vision_config()["num_hidden_layers"]
            deviation *= (2 * layers) ** -0.5
        weight.data.normal_(0.0, deviation, generator=generator)


def file_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """The weights under the names that checkpoint files use: the text model and the tower at the top."""
    renamed = {}
    for name, weight in state.items():
        if name == "lm_head.weight":
            name = "language_model.lm_head.weight"
        elif name.startswith("model.language_model."):
            name = "language_model.model." + name.removeprefix("model.language_model.")
        else:
            name = name.removeprefix("model.")
        renamed[name] = weight.detach().float().contiguous()
    return renamed


def load(folder: Path) -> dict[str, Any]:
    """What `export` wrote, as a state_dict."""
    from safetensors.torch import load_file

    renamed = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        name = name.replace("language_model.model.", "language_model.")
        renamed[name.removeprefix("language_model.") if "lm_head" in name else f"model.{name}"] = weight
    return renamed


def export(state: Mapping[str, Any], folder: Path) -> None:
    """Writes a network (its state_dict) as a Hugging Face folder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(file_names(state), folder / "model.safetensors", metadata={"format": "pt"})
    for name, content in (
        ("config.json", config()),
        ("tekken.json", tekken()),
        ("preprocessor_config.json", preprocessor()),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
