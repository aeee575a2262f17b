"""The checkpoint in tests/data, its tower, and what transformers computes from them (tests/data/README.md).

The same weights in float types are made from the stored file when a test first asks for them: they would be the largest
files of the repository.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
from requantize import requantize

DATA = Path(__file__).parent / "data"
MODEL, MMPROJ, IMAGE = (DATA / f"bravo-{name}" for name in ("Q4_K_M.gguf", "mmproj-f16.gguf", "image.png"))
_made = tempfile.TemporaryDirectory(prefix="ms4-tests-")
(Path(_made.name) / MMPROJ.name).symlink_to(MMPROJ)  # beside the models made there, as its own model has it


@cache
def bravo(preset: str = "Q4_K_M") -> Path:
    """The checkpoint as it is stored, or its dequantized weights written as F32, F16 or BF16."""
    if preset == "Q4_K_M":
        return MODEL
    requantize(str(MODEL), path := Path(_made.name) / f"bravo-{preset}.gguf", preset)
    return path


@cache
def references() -> dict[str, np.ndarray]:
    """ids, positions, and the logits at those positions: `mscale2`, and `plain` with the plain softmax scale."""
    return dict(np.load(DATA / "bravo-refs.npz"))


@cache
def image_references() -> dict[str, np.ndarray]:
    """ids (the image's places included), the projector's rows as `features`, positions, and the logits there."""
    return dict(np.load(DATA / "bravo-image-ref.npz"))
