"""The engine against logits that transformers computed from the same files' weights (tests/data/README.md)."""

import numpy as np
import pytest
from fixtures import bravo, references
from yardstick import assert_near, errors

from ms4.models.model import Model

REFS = references()


# How far any position may be from transformers: little more than was measured.  Float weights leave the 16-bit kv
# cache, whose rounding the larger attention scale feels twice as much; other weights leave 8-bit activations, 1/254 of
# the largest of 256 at most, in nine products one after the other.  test_bits.py has the roundings themselves.
MOST = {("F32", "mscale2"): 3e-4, ("F32", "plain"): 2e-4, ("Q4_K_M", "mscale2"): 3.5e-2, ("Q4_K_M", "plain"): 3.5e-2}


def logits(name: str, attn_scale: str, **options: int) -> np.ndarray:
    with Model.open(bravo(name), attn_scale=attn_scale, **options) as model:
        with model.session(256) as session:
            return session.feed(REFS["ids"], all_logits=True).astype(np.float64)


@pytest.mark.parametrize("name, scale", MOST)
def test_every_position_is_near_transformers(name, scale):
    assert_near(logits(name, scale)[REFS["positions"]], REFS[scale], MOST[name, scale])


def test_the_wrong_attention_scale_is_noticed_at_every_position():
    got = logits("F32", "plain")[REFS["positions"]]
    assert errors(got, REFS["mscale2"]).min() > 10 * MOST["F32", "mscale2"]


@pytest.mark.parametrize("name", ["Q4_K_M", *(pytest.param(name, marks=pytest.mark.slow) for name in ("F32", "F16"))])
def test_any_batch_and_any_number_of_threads_give_the_same_bits(name):
    want = logits(name, "mscale2")
    for threads, n_batch in ((0, 1), (0, 7), (0, 64), (1, 0), (5, 0), (3, 1)):
        assert np.array_equal(logits(name, "mscale2", threads=threads, n_batch=n_batch), want)
