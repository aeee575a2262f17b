"""The engine against logits that transformers computed from the same files' weights (tests/data/README.md)."""

from pathlib import Path

import numpy as np
import pytest
from yardstick import assert_near, errors

from ms4.models import reference
from ms4.models.mistral4 import shape_of
from ms4.models.model import Model
from ms4.quant.gguf_file import GgufFile

DATA = Path(__file__).parent / "data"
REFS = np.load(DATA / "bravo-refs.npz")


# How far any position may be from transformers: little more than was measured.  Float weights leave the 16-bit kv
# cache, whose rounding the larger attention scale feels twice as much; other weights leave 8-bit activations, 1/254 of
# the largest of 256 at most, in nine products one after the other.  test_bits.py has the roundings themselves.
MOST = {"f16": 3e-4, "f16_plain": 1.5e-4, "Q4_K_M": 3.8e-2, "Q4_K_M_plain": 3.5e-2, "IQ3_S": 4.8e-2}
# Positions where two experts nearly tie, so that 8 bits choose the other one: the router's logits of the last chosen
# and of the next are less than GAP apart.
NEAR_TIES = {"IQ3_S": (3, 24, 80)}
GAP, MOST_AT_A_TIE = 0.05, 0.1


def logits(name: str, attn_scale: str, **options: int) -> np.ndarray:
    with Model.open(DATA / f"bravo-{name}.gguf", attn_scale=attn_scale, **options) as model:
        with model.session(256) as session:
            return session.feed(REFS["ids"], all_logits=True).astype(np.float64)


@pytest.mark.parametrize("name", MOST)
def test_every_position_is_near_transformers(name):
    got = logits(name.removesuffix("_plain"), "plain" if name.endswith("_plain") else "mscale2")[REFS["positions"]]
    ties = np.flatnonzero(np.isin(REFS["positions"], NEAR_TIES.get(name, ())))
    assert_near(got, REFS[name], MOST[name], ties, MOST_AT_A_TIE)


@pytest.mark.parametrize("name", NEAR_TIES)
def test_the_positions_named_as_near_ties_are_such(name):
    file, gaps = GgufFile.open(DATA / f"bravo-{name}.gguf"), []
    ids = REFS["ids"][: max(NEAR_TIES[name]) + 1]
    reference.forward(reference.load_weights(file), shape_of(file, "mscale2"), ids, gaps=gaps)
    assert (np.min(gaps, axis=0)[list(NEAR_TIES[name])] < GAP).all()


def test_the_wrong_attention_scale_is_noticed_at_every_position():
    got = logits("f16", "plain")[REFS["positions"]]
    assert errors(got, REFS["f16"]).min() > 10 * MOST["f16"]


@pytest.mark.parametrize("name", ["f16", "Q4_K_M", "IQ3_S"])
def test_any_batch_and_any_number_of_threads_give_the_same_bits(name):
    want = logits(name, "mscale2")
    for n_batch in (1, 7, 64):
        assert np.array_equal(logits(name, "mscale2", n_batch=n_batch), want)
    for threads in (1, 3, 5):
        assert np.array_equal(logits(name, "mscale2", threads=threads), want)
        assert np.array_equal(logits(name, "mscale2", threads=threads, n_batch=1), want)
