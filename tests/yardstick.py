"""How tests compare logits and feature rows: at every position, and saying which positions are wrong."""

import numpy as np

from ms4.models import mistral4, reference_bits
from ms4.models.model import Model
from ms4.quant.gguf_file import GgufFile


def errors(got, want):
    """The relative error of each position."""
    want = want.astype(np.float64)
    return np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)


def assert_near(got, want, bound, ties=(), tie_bound=0.0):
    """Every position is within `bound`; those named as near ties of two experts, within `tie_bound`."""
    error = errors(got, want)
    most = np.where(np.isin(np.arange(len(error)), list(ties)), tie_bound, bound)
    wrong = np.flatnonzero(~(error <= most))
    listed = ", ".join(f"{i}: {error[i]:.2e}" for i in wrong[:20])
    assert not len(wrong), f"{len(wrong)} of {len(error)} positions differ by more than {bound:.1e}: {listed}"


def assert_same_bits(got, want, gaps=()):
    """Equal float32 numbers; else which positions differ, by how much, and how near two experts were there."""
    assert got.dtype == want.dtype == np.float32
    wrong = np.flatnonzero((got != want).any(axis=1))
    if len(wrong):
        error = errors(got, want)
        gap = np.min(gaps, axis=0) if len(gaps) else np.full(len(got), np.inf)
        listed = ", ".join(f"{i}: {error[i]:.1e} (experts {gap[i]:.1e} apart)" for i in wrong[:20])
        raise AssertionError(f"{len(wrong)} of {len(got)} positions do not have the bits of the reference: {listed}")


def assert_engine_has_the_bits(path, ids, attn_scale="plain", **options):
    """The engine's logits of all ids but the last in one step, then of the last, against reference_bits.py."""
    gguf, gaps = GgufFile.open(path), []
    shape = mistral4.shape_of(gguf, attn_scale)
    want = reference_bits.forward(reference_bits.load_weights(gguf), shape, ids, gaps=gaps)
    with Model.open(path, attn_scale=attn_scale, **options) as model, model.session(len(ids)) as session:
        got = np.concatenate([session.feed(ids[:-1], all_logits=True), [session.feed(ids[-1:])]])
    assert_same_bits(got, want, gaps)
