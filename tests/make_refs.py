"""Writes what transformers computes from the weights of tests/data: the logits and image rows that ms4 is held to.

    pip install -e ".[train]";  python tests/make_refs.py

The weights of bravo-Q4_K_M.gguf and of its tower, dequantized, go through a folder in Hugging Face layout (make_hf.py)
into transformers' own model, which computes in float64 as far as it lets itself be told.  Nothing of ms4's arithmetic
takes part but the decoders of block types, which tests/test_blocks.py compares with the PyPI package gguf.
"""

import tempfile
from pathlib import Path

import make_hf
import numpy as np
import torch
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from ms4.models.image import load_image, preprocess
from ms4.models.pixtral import Tower

DATA = Path(__file__).parent / "data"
MODEL, MMPROJ, IMAGE = (DATA / f"bravo-{name}" for name in ("Q4_K_M.gguf", "mmproj-f16.gguf", "image.png"))


def load(folder: Path) -> Mistral3ForConditionalGeneration:
    settings = make_hf.bravo_config() | {"image_token_index": 10}
    settings["text_config"] |= {"num_key_value_heads": settings["text_config"]["num_attention_heads"]}
    make_hf.write_hf(folder, MODEL, MMPROJ, settings)
    config = Mistral3Config.from_pretrained(folder)
    model, report = Mistral3ForConditionalGeneration.from_pretrained(
        folder,
        config=config,
        dtype=torch.float64,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    wrong = {name: found for name, found in report.items() if found}
    assert not wrong, wrong
    return model.eval()


@torch.no_grad()
def logits(model: Mistral3ForConditionalGeneration, ids: np.ndarray, pixels: np.ndarray | None = None) -> np.ndarray:
    """float64 [n, n_vocab]."""
    image = {}
    if pixels is not None:
        image = {"pixel_values": torch.tensor(pixels[None]).double(), "image_sizes": torch.tensor([pixels.shape[1:]])}
    return model(input_ids=torch.tensor(ids[None].astype(np.int64)), use_cache=False, **image).logits[0].numpy()


@torch.no_grad()
def features(model: Mistral3ForConditionalGeneration, pixels: np.ndarray) -> np.ndarray:
    """float64 [rows of the grid times columns, d_model]."""
    found = model.get_image_features(torch.tensor(pixels[None]).double(), torch.tensor([pixels.shape[1:]]))
    return torch.cat(list(getattr(found, "pooler_output", found))).numpy()


def main() -> None:
    refs, image_refs = (dict(np.load(DATA / f"bravo-{name}.npz")) for name in ("refs", "image-ref"))
    ids, positions, with_image, wanted = refs["ids"], refs["positions"], image_refs["ids"], image_refs["positions"]
    pixels = preprocess(load_image(IMAGE), rule=Tower.read(MMPROJ).rule).array
    with tempfile.TemporaryDirectory() as folder:
        model = load(Path(folder) / "hf")
    found = {"mscale2": logits(model, ids)}
    image = {"features": features(model, pixels), "logits": logits(model, with_image, pixels)[wanted]}
    for layer in model.model.language_model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    found["plain"] = logits(model, ids)
    found = {name: x[positions].astype(np.float32) for name, x in found.items()}
    np.savez_compressed(DATA / "bravo-refs.npz", ids=ids, positions=positions, **found)
    image = {name: x.astype(np.float32) for name, x in image.items()}
    np.savez_compressed(DATA / "bravo-image-ref.npz", ids=with_image, positions=wanted, **image)


if __name__ == "__main__":
    main()
