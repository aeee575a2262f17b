"""The bits of the logits, as SHA-256, of every kind of checkpoint: what no change of structure may move.

    python tests/test_hashes.py --write

writes tests/data/logits.sha256 anew.  Only a commit that changes the arithmetic on purpose may do that, and says by how
much the numbers moved.  Every kernel table but ref gives the same bits, so the file holds for all of them.
"""

import hashlib
import sys
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from fixtures import bravo, image_references, references

import ms4
from ms4.models import pixtral
from ms4.models.image import load_image, preprocess
from ms4.models.model import Model
from ms4.models.vision import VisionEncoder
from ms4.quant.blocks import BLOCKS
from ms4.quant.tiny import Tiny, write_tiny

DATA = Path(__file__).parent / "data"
HASHES = DATA / "logits.sha256"
IMAGE = image_references()["ids"]
FLOAT = dict.fromkeys(("embedding", "output", "attention", "experts", "shared"), "F32")
SHAPES = {
    "fused": Tiny(),
    "separate": Tiny(fused=False, architecture="deepseek2", temperature_keys=True),
    "joined kv_b": Tiny(joined_kv_b=True),
    "dense layer, tied output": Tiny(n_dense=1, tied=True),
    "two shared experts": Tiny(n_shared=2),
    "no shared expert": Tiny(n_shared=0),
    "split": Tiny(parts=3),
    "whole superblocks": Tiny(d_model=256, d_expert=256, q_rank=256, kv_rank=256, d_nope=64, d_rope=64, d_value=64),
}
WIDE = Tiny(d_model=256, d_expert=256, d_dense=256, q_rank=256, kv_rank=256, d_nope=64, d_rope=64, d_value=128)


def tiny_cases():
    for name, shape in SHAPES.items():
        yield f"{name}, Q8_0", shape
        yield f"{name}, F32", replace(shape, types=FLOAT)
    for kind, _, _ in BLOCKS.values():
        yield f"all {kind}", replace(WIDE, default_type=kind)


CASES = dict(tiny_cases())
FIXTURES = ("F32", "Q4_K_M")


def digest(logits):
    assert logits.dtype == np.float32
    return hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


def of_tiny(tiny):
    """A prompt at once, and one token more."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "t.gguf", tiny)[0]
        ids = np.random.default_rng(7).integers(0, 1400, 150)
        with Model.open(path) as model, model.session(200) as session:
            return digest(np.concatenate([session.feed(ids, all_logits=True), [session.feed([5])]]))


def of_chunks():
    """Two sessions in turns, whose chunks end anywhere: more than one group of segments."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_tiny(Path(folder) / "t.gguf")[0]
        ids, got = np.random.default_rng(8).integers(0, 1400, (2, 1300)), []
        with Model.open(path) as model, model.session(1400) as one, model.session(1400) as two:
            for first, end in ((0, 1), (1, 130), (130, 131), (131, 900), (900, 1299), (1299, 1300)):
                got += [one.feed(ids[0, first:end]), two.feed(ids[1, first:end])]
        return digest(np.array(got))


def of_fixture(name):
    ids = references()["ids"]
    with Model.open(bravo(name), attn_scale="mscale2") as model, model.session(256) as session:
        return digest(session.feed(ids, all_logits=True))


def of_image():
    """The rows of the tower, and the logits of a prompt with them."""
    with Model.open(DATA / "bravo-Q4_K_M.gguf", attn_scale="mscale2") as model, model.session(256) as session:
        encoder = VisionEncoder(model.engine, pixtral.Tower.read(DATA / "bravo-mmproj-f16.gguf"))
        rows = encoder.encode(preprocess(load_image(DATA / "bravo-image.png"), rule=encoder.rule))
        logits = session.feed(np.where(IMAGE == 10, ms4.ROW, IMAGE), rows, all_logits=True)
        return digest(np.concatenate([rows.reshape(-1), logits.reshape(-1)]))


def measure():
    """Every case and how to get its hash."""
    yield from ((name, lambda tiny=tiny: of_tiny(tiny)) for name, tiny in CASES.items())
    yield "two sessions in chunks", of_chunks
    yield from ((f"bravo {name}", lambda name=name: of_fixture(name)) for name in FIXTURES)
    yield "bravo image", of_image


@cache
def stored():
    rows = (line.split("  ", 1) for line in HASHES.read_text().splitlines())
    return {name: value for value, name in rows}


@pytest.mark.skipif(ms4.probe().isa == "ref", reason="ref sums in double: its bits are its own")
@pytest.mark.parametrize("name, run", [pytest.param(name, run, id=name) for name, run in measure()])
def test_the_logits_have_the_bits_that_they_had(name, run):
    assert run() == stored()[name]


def test_every_hash_belongs_to_a_case():
    assert list(stored()) == [name for name, _ in measure()]


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    HASHES.write_text("".join(f"{run()}  {name}\n" for name, run in measure()))
