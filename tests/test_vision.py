"""Images: the tower against transformers' rows and the float64 reference, and mmproj files that must be refused."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import bad_gguf
import numpy as np
import pytest
from fixtures import IMAGE, MMPROJ, MODEL, bravo, image_references
from yardstick import assert_near

import ms4
from ms4.models import companion, pixtral, reference, vision
from ms4.models.image import load_image, preprocess
from ms4.models.mistral4 import ModelError
from ms4.models.model import Model
from ms4.models.vision import VisionEncoder
from ms4.quant.gguf_file import GgufFile

REF = image_references()


MOST_ROWS, MOST_LOGITS = 5e-6, 4e-4  # float32; and the 16-bit kv cache


@pytest.fixture(scope="module")
def model():
    with Model.open(bravo("F32"), attn_scale="mscale2") as opened:
        yield opened


def test_rows_and_logits_of_an_image_agree_with_transformers(model):
    encoder = VisionEncoder(model.engine, pixtral.Tower.read(MMPROJ))
    pixels = preprocess(load_image(IMAGE), rule=encoder.rule)
    rows = encoder.encode(pixels)
    assert_near(rows, REF["features"].reshape(rows.shape), MOST_ROWS)
    ids = np.where(REF["ids"] == 10, ms4.ROW, REF["ids"])
    with model.session(256) as session:
        got = session.feed(ids, rows, all_logits=True)
    assert_near(got[REF["positions"]], REF["logits"], MOST_LOGITS)


@pytest.mark.parametrize("size", [(28, 28), (252, 196), (28, 280)])
def test_rows_of_any_grid_agree_with_the_reference(model, size, rng):
    encoder = VisionEncoder(model.engine, pixtral.Tower.read(MMPROJ))
    s = encoder.vision.shape
    shape = reference.VisionShape(s.n_layer, s.n_head, s.patch_size, s.merge, s.eps, "gelu" if s.gelu else "silu")
    pixels = rng.standard_normal((3, *size)).astype(np.float32)
    want = reference.vision(reference.load_weights(GgufFile.open(MMPROJ)), shape, pixels)
    assert_near(encoder.vision.encode(pixels), want, 1e-6)


def test_pixels_that_do_not_fit_the_grid_are_refused(model):
    encoder = VisionEncoder(model.engine, pixtral.Tower.read(MMPROJ))
    with pytest.raises(ValueError, match="multiples of 28"):
        encoder.vision.encode(np.zeros((3, 28, 30), np.float32))


def test_the_mmproj_of_another_model_is_refused(tmp_path):
    from ms4.quant.tiny import write_tiny

    path = write_tiny(tmp_path / "other.gguf")[0]
    with Model.open(path) as other, pytest.raises(ModelError, match="belongs to another model"):
        VisionEncoder(other.engine, pixtral.Tower.read(MMPROJ))


def test_a_text_model_given_as_mmproj_is_refused_and_the_reverse():
    with pytest.raises(ModelError, match="not a vision tower"):
        pixtral.Tower.read(MODEL)
    with pytest.raises(ModelError, match="vision tower"):
        Model.open(MMPROJ)


def test_the_mmproj_beside_a_model_is_found(tmp_path):
    for name in ("m-119b-Q4_K_M.gguf", "mmproj-m-119b-F16.gguf"):
        (tmp_path / name).touch()
    assert companion.find(tmp_path / "m-119b-Q4_K_M.gguf") == tmp_path / "mmproj-m-119b-F16.gguf"
    (tmp_path / "mmproj-other-F16.gguf").touch()
    assert companion.find(tmp_path / "m-119b-Q4_K_M.gguf") == tmp_path / "mmproj-m-119b-F16.gguf"
    assert companion.find(tmp_path / "absent" / "m.gguf") is None


@pytest.mark.parametrize(
    ("key", "kind", "value", "says"),
    [
        ("clip.projector_type", bad_gguf.STR, "nosuch", "projector_type is nosuch"),
        ("clip.has_vision_encoder", bad_gguf.BOOL, 0, "has_vision_encoder is something else"),
        ("clip.use_gelu", bad_gguf.BOOL, 1, "one of clip.use_silu and clip.use_gelu"),
        ("clip.vision.patch_size", bad_gguf.U32, 0, "patch_size"),
        ("clip.vision.image_size", bad_gguf.U32, 0x7FFFFFFF, "image_size"),
        ("clip.vision.image_size", bad_gguf.U32, 27, "less than one token"),
        ("clip.vision.image_min_pixels", bad_gguf.U32, 2147395600, "image_min_pixels"),
        ("clip.vision.spatial_merge_size", bad_gguf.U32, 0, "spatial_merge_size"),
        ("clip.vision.attention.head_count", bad_gguf.U32, 0, "head_count"),
        ("clip.vision.attention.head_count", bad_gguf.U32, 3, "is not 3 heads"),
        ("clip.vision.attention.layer_norm_epsilon", bad_gguf.F32, float("nan"), "epsilon"),
        ("clip.vision.block_count", bad_gguf.U32, 2, "unexpected tensor v.blk.2"),
        ("clip.vision.block_count", bad_gguf.U32, 4, "v.blk.3.ln1.weight is missing"),
        ("clip.vision.feed_forward_length", bad_gguf.U32, 255, "the metadata says"),
        ("clip.vision.image_mean", bad_gguf.ARR, bad_gguf.array(bad_gguf.F32, [0.5, 0.5]), "three numbers"),
        ("clip.vision.image_std", bad_gguf.ARR, bad_gguf.array(bad_gguf.F32, [0.0] * 3), "out of range"),
    ],
)
def test_a_damaged_mmproj_is_refused_in_one_line(tmp_path, key, kind, value, says):
    image = bad_gguf.take_apart(MMPROJ.read_bytes())
    image.put(key, kind, value)
    (tmp_path / "bad.gguf").write_bytes(image.encoded())
    with pytest.raises(ModelError, match=says) as caught:
        pixtral.Tower.read(tmp_path / "bad.gguf")
    assert str(caught.value).isprintable()


class CountingEncoder:
    displaced = False

    """An encoder whose rows are the numbers of its calls."""

    n = 0

    def __init__(self, engine, tower):
        self.vision = SimpleNamespace(progress=lambda: (0, 1))

    def encode(self, pixels, stop=None):
        CountingEncoder.n += 1
        return np.full((pixels.gh * pixels.gw, 4), CountingEncoder.n, np.float32)


def test_the_rows_of_images_are_computed_once_and_forgotten_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr(vision, "VisionEncoder", CountingEncoder)
    images = vision.ImageInput(MODEL)
    places = []
    for digest in (b"a", b"b", b"c"):
        image = load_image(IMAGE)
        places.append(images.place(replace(image, digest=digest)))
    n = places[0].width * places[0].height
    a, b, c = places
    seen = []

    def watch(number, of, progress):
        seen.append((number, of))
        return nullcontext()

    def rows(*asked):
        got = images.rows(asked, None, None, watch)
        return got[::n, 0].tolist()

    CountingEncoder.n = 0
    assert images.rows([], None) is None
    assert rows(a, b, a) == [1, 2, 1] and seen == [(1, 3), (2, 3)]
    assert rows(c) == [3] and rows(b, a) == [2, 1]  # a prompt may leave them out and have them again
    # No room but for what the prompt at hand needs and one more: the one that was not used for the longest time goes.
    monkeypatch.setattr(vision, "CACHE_BYTES", n * 4 * 4)
    assert rows(b) == [2]
    assert rows(a, b) == [1, 2] and rows(c) == [4]


def test_the_price_of_an_image_is_that_of_its_place():
    images = vision.ImageInput(MODEL, max_tokens=6)
    image = load_image(IMAGE)
    size, place = images.size(image), images.place(image)
    assert (size.width, size.height, size.n_tokens) == (56, 56, 6)
    assert (place.width, place.height) == (2, 2)


def test_a_tower_that_is_not_there_has_an_error_of_its_own(tmp_path):
    for images in (vision.ImageInput(tmp_path / "m.gguf"), vision.ImageInput(MMPROJ, mmproj=str(tmp_path / "none"))):
        with pytest.raises(vision.NoTowerError):
            images.tower  # noqa: B018
