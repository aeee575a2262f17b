"""The engine against logits that transformers computed from the same files' weights (tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest

from ms4.models.model import Model

DATA = Path(__file__).parent / "data"
REFS = np.load(DATA / "bravo-refs.npz")


def errors(got: np.ndarray, want: np.ndarray) -> np.ndarray:
    """Relative error of each position."""
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


def logits(name: str, attn_scale: str, **options: int) -> np.ndarray:
    with Model.open(DATA / f"bravo-{name}.gguf", attn_scale=attn_scale, **options) as model:
        with model.session(256) as session:
            return session.feed(REFS["ids"], all_logits=True).astype(np.float64)


@pytest.mark.parametrize("name, scale", [("f16", "mscale2"), ("f16_plain", "plain")])
def test_float_files_agree_to_a_thousandth(name, scale):
    got = logits("f16", scale)[REFS["positions"]]
    assert np.median(errors(got, REFS[name].astype(np.float64))) <= 1e-3


@pytest.mark.parametrize("name, scale", [("Q4_K_M", "mscale2"), ("Q4_K_M_plain", "plain"), ("IQ3_S", "mscale2")])
def test_quantised_files_agree_as_well_as_8_bit_activations_allow(name, scale):
    got, want = logits(name.removesuffix("_plain"), scale)[REFS["positions"]], REFS[name].astype(np.float64)
    assert np.median(errors(got, want)) <= 3.2e-2
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 5e-2


def test_the_wrong_attention_scale_is_noticed():
    got = logits("f16", "plain")[REFS["positions"]]
    assert np.median(errors(got, REFS["f16"].astype(np.float64))) > 1e-2


@pytest.mark.parametrize("name", ["f16", "Q4_K_M", "IQ3_S"])
def test_any_batch_and_any_number_of_threads_give_the_same_bits(name):
    want = logits(name, "mscale2")
    for n_batch in (1, 7, 64):
        assert np.array_equal(logits(name, "mscale2", n_batch=n_batch), want)
    for threads in (1, 3, 5):
        assert np.array_equal(logits(name, "mscale2", threads=threads), want)
        assert np.array_equal(logits(name, "mscale2", threads=threads, n_batch=1), want)
