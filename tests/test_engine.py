"""The engine on small checkpoints: near the float64 reference, and where it must refuse, stop or start again.

That it has every bit of its own arithmetic, with all block types: test_bits.py."""

import os
import threading

import numpy as np
import pytest
from standins import fail_every_allocation
from yardstick import assert_near

import ms4
from ms4.models import mistral4, reference
from ms4.models.model import Model
from ms4.quant.gguf_file import GgufFile
from ms4.quant.tiny import Tiny, write_tiny

FLOAT = dict.fromkeys(("embedding", "output", "attention", "experts", "shared"), "F32")
VARIANTS = {
    "fused": Tiny(types=FLOAT),
    "separate": Tiny(types=FLOAT, fused=False, architecture="deepseek2", temperature_keys=True),
    "joined kv_b": Tiny(types=FLOAT, joined_kv_b=True),
    "dense layer, tied output": Tiny(types=FLOAT, n_dense=1, tied=True),
    "two shared experts": Tiny(types=FLOAT, n_shared=2),
    "no shared expert": Tiny(types=FLOAT, n_shared=0),
    "split": Tiny(types=FLOAT, parts=3),
    "bf16": Tiny(types=dict.fromkeys(FLOAT, "BF16")),
}


# At every position: float weights leave the rounding of the 16-bit kv cache, two layers deep.
MOST = 4e-4


def fixed_ids(n):
    """Always the same: where two experts nearly tie, rounding may choose the other one, and that is no error."""
    return np.random.default_rng(7).integers(0, 1400, n)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.gguf"
    write_tiny(path)
    return path


@pytest.mark.parametrize("isa", [ms4.probe().isa, "ref"])
@pytest.mark.parametrize("name", VARIANTS)
def test_float_weights_give_the_reference_logits(name, isa, tmp_path, monkeypatch):
    monkeypatch.setenv("MS4_ISA", isa)
    path = write_tiny(tmp_path / "t.gguf", VARIANTS[name])[0]
    gguf = GgufFile.open(path)
    shape, ids = mistral4.shape_of(gguf), fixed_ids(60)
    want = reference.forward(reference.load_weights(gguf), shape, ids)
    with Model.open(path) as model, model.session(400) as session:
        assert_near(session.feed(ids, all_logits=True), want, MOST)


def test_a_prompt_of_several_segments_in_any_steps_gives_the_reference_logits_and_the_same_bits(tmp_path):
    path = write_tiny(tmp_path / "t.gguf", VARIANTS["fused"])[0]
    gguf = GgufFile.open(path)
    ids = fixed_ids(420)  # attention works on segments of 128 keys
    want = reference.forward(reference.load_weights(gguf), mistral4.shape_of(gguf), ids)
    with Model.open(path) as model, model.session(500) as session:
        got = session.feed(ids, all_logits=True)
        assert_near(got, want, MOST)
        for n in (1, 70, 129):
            session.rewind(0)
            steps = [session.feed(ids[i : i + n], all_logits=True) for i in range(0, 420, n)]
            assert np.array_equal(np.concatenate(steps), got)
    for n_batch in (1, 50, 300):
        with Model.open(path, n_batch=n_batch) as model, model.session(500) as session:
            assert np.array_equal(session.feed(ids, all_logits=True), got)


def test_groups_of_segments_give_a_token_the_same_bits_alone_and_in_a_chunk(tiny, rng):
    ids = rng.integers(0, 1400, 1300)  # a group is 8 segments: the second begins at 1024
    with Model.open(tiny, threads=2) as model, model.session(1400) as session:
        want = session.feed(ids, all_logits=True)
    for threads in (1, 3):
        with Model.open(tiny, threads=threads) as model, model.session(1400) as session:
            session.feed(ids[:1020])
            steps = (1, 1, 1, 1, 1, 3, 9, 250, 2)
            got = [session.feed(part, all_logits=True) for part in np.split(ids[1020:1289], np.cumsum(steps)[:-1])]
            assert np.array_equal(np.concatenate(got), want[1020:1289])


def test_rewound_and_fed_again_gives_the_same_bits(tiny, rng):
    ids = rng.integers(0, 1400, 60)
    with Model.open(tiny) as model, model.session(64) as session:
        want = session.feed(ids)
        session.rewind(20)
        assert session.length == 20
        assert np.array_equal(session.feed(ids[20:]), want)


@pytest.mark.parametrize("n_batch", [0, 9])
def test_the_last_logits_are_the_same_bits_whether_or_not_all_are_wanted(tiny, rng, n_batch):
    ids = rng.integers(0, 1400, 300)  # for one token's logits the last layer does less
    with Model.open(tiny, n_batch=n_batch) as model, model.session(400) as session:
        every = session.feed(ids, all_logits=True)
        after = session.feed([5])
        session.rewind(0)
        assert np.array_equal(session.feed(ids), every[-1])
        assert np.array_equal(session.feed([5]), after)


def test_sessions_do_not_see_each_other(tiny, rng):
    a, b = rng.integers(0, 1400, (2, 30))
    with Model.open(tiny) as model, model.session(64) as one, model.session(64) as two:
        one.feed(a[:15])
        two.feed(b)
        got = one.feed(a[15:])
        two.rewind(0)
        assert np.array_equal(two.feed(a), got)


def test_rows_take_the_place_of_embeddings(tiny, rng):
    ids = rng.integers(0, 1400, 12)
    table = reference.load_weights(GgufFile.open(tiny))["token_embd.weight"].astype(np.float32)
    mixed, rows = ids.copy(), table[ids[4:9]]
    mixed[4:9] = ms4.ROW
    with Model.open(tiny) as model, model.session(64) as session:
        want = session.feed(ids)
        session.rewind(0)
        assert np.array_equal(session.feed(mixed, rows), want)
        with pytest.raises(ValueError, match="5 positions take a row, but there are 4"):
            session.feed(mixed, rows[:4])


def test_wrong_calls_are_refused_and_change_nothing(tiny):
    with Model.open(tiny) as model, model.session(16) as session:
        session.feed([1, 2, 3])
        with pytest.raises(ValueError, match="token id 1400: the vocabulary has 0 to 1399"):
            session.feed([5, 1400])
        with pytest.raises(ms4.ContextFull, match="14 tokens after 3 do not fit into a context of 16"):
            session.feed([1] * 14)
        with pytest.raises(ValueError, match="rewind to 4 of 3"):
            session.rewind(4)
        assert session.length == 3
        with pytest.raises(ValueError, match="1 to 2048"):
            model.session(4096)
    with pytest.raises(ValueError, match="closed"):
        session.feed([1])


def test_cancel_ends_a_feed_and_the_session_is_as_before(tmp_path):
    big = Tiny(n_layer=6, d_model=512, d_expert=512, n_context=65536, n_original=4096)
    path = write_tiny(tmp_path / "t.gguf", big)[0]
    with Model.open(path) as model, model.session(60000) as session:
        session.feed([1, 2, 3])
        stop = ms4.StopFlag()
        timer = threading.Timer(0.05, stop.set)
        timer.start()
        with pytest.raises(ms4.Canceled):
            session.feed([7] * 50000, stop=stop)
        timer.join()
        assert session.length == 3
        session.feed([4])


def test_a_table_that_points_outside_the_file_is_refused(tiny):
    gguf = GgufFile.open(tiny)
    shape = mistral4.shape_of(gguf)
    table = mistral4.tensors_of(gguf, shape)
    size = os.path.getsize(tiny)
    outside = {"offset": size}, {"offset": (1 << 64) - 8}, {"file": 3}
    for change in (*outside, {"type": 99}, {"dims": (0, 1, 1)}, {"layer": 77}):
        broken = [ms4.Tensor(**{**table[0].__dict__, **change}), *table[1:]]
        with pytest.raises(ms4.EngineError) as error:
            ms4.Engine.open(shape, broken, [tiny]).close()
        assert error.value.status == -3
    with pytest.raises(ms4.EngineError, match="twice"):
        ms4.Engine.open(shape, [*table, table[0]], [tiny])
    with pytest.raises(ms4.EngineError, match="missing"):
        ms4.Engine.open(shape, table[1:], [tiny])


def test_the_weights_that_a_feed_needs_are_counted_once(tmp_path, monkeypatch):
    """Those of the attention and the shared expert, of each expert that some token chose, and the output matrix."""
    path = write_tiny(tmp_path / "t.gguf", Tiny(types=FLOAT, n_expert=24, n_used=2))[0]
    gguf = GgufFile.open(path)
    chosen = []  # by layer, by token

    def moe(layer, shape, x, gaps, original=reference.moe):
        chosen.append(np.argsort(-(x @ layer["ffn_gate_inp"].T))[:, : shape.n_expert_used])
        return original(layer, shape, x, gaps)

    monkeypatch.setattr(reference, "moe", moe)
    shape, ids = mistral4.shape_of(gguf), fixed_ids(9)
    reference.forward(reference.load_weights(gguf), shape, ids)
    layers = [{n.split(".", 2)[2]: t for n, t in gguf.tensors.items() if n.startswith(f"blk.{i}.")} for i in (0, 1)]
    one = sum(t.bytes for n, t in layers[0].items() if "_exps" in n) // 24
    always = sum(t.bytes for n, t in layers[0].items() if "_exps" not in n and "norm" not in n)
    out, row = gguf.tensors["output.weight"].bytes, gguf.tensors["token_embd.weight"].bytes // shape.n_vocab
    distinct = len(np.unique(chosen[0][:8])) + len(np.unique(chosen[1][7]))  # in the last layer for the last token
    assert 4 < distinct < 18
    with Model.open(path) as model, model.session(9) as session:
        session.feed(ids[:8])
        read = model.engine.stats()
        session.feed(ids[8:])
        both = model.engine.stats()
    assert read.bytes_prefill == both.bytes_prefill == 2 * always + distinct * one + out + 8 * row
    assert both.bytes_decode == 2 * always + 4 * one + out + row and read.bytes_decode == 0
    assert (read.experts_used, both.experts_used) == (2 * 8 + 2, 2 * 8 + 2 + 4)


@pytest.mark.parametrize("load", ["map", "copy"])
def test_both_ways_of_loading_give_the_same_bits(load, tiny):
    with Model.open(tiny, load=load) as model, model.session(8) as session:
        assert model.engine.stats().load == load
        got = session.feed([3, 1, 2])
    with Model.open(tiny) as model, model.session(8) as session:
        assert np.array_equal(session.feed([3, 1, 2]), got)


def test_a_mapped_file_that_shrinks_is_an_error_and_not_a_crash(tmp_path):
    path = write_tiny(tmp_path / "t.gguf")[0]
    with Model.open(path, load="map") as model, model.session(8) as session:
        session.feed([1])
        os.truncate(path, 20000)
        with pytest.raises(ms4.EngineError, match="shorter"):
            session.feed([2])


def test_a_number_that_is_not_finite_is_an_error(tiny):
    with Model.open(tiny) as model, model.session(8) as session:
        session.feed([1])
        with pytest.raises(ms4.NotFinite):
            session.feed([ms4.ROW], np.full((1, model.shape.d_model), np.nan, np.float32))
        assert session.length == 1
        assert np.isfinite(session.feed([2])).all()


def test_every_failing_allocation_is_reported(tiny, monkeypatch):
    def once():
        with Model.open(tiny, threads=2) as model, model.session(32) as session:
            return session.feed([5, 6, 7])

    fail_every_allocation(once, monkeypatch, 20)


def test_sessions_of_many_threads_take_turns(tiny, rng):
    ids = rng.integers(0, 1400, (4, 20))
    with Model.open(tiny) as model:
        with model.session(32) as session:
            want = []
            for row in ids:
                session.rewind(0)
                want.append(session.feed(row))
        got = [None] * 4

        def work(i):
            with model.session(32) as mine:
                for _ in range(5):
                    mine.rewind(0)
                    got[i] = mine.feed(ids[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert all(np.array_equal(g, w) for g, w in zip(got, want, strict=True))


def test_progress_of_a_copy_can_end_it(tiny):
    with pytest.raises(ms4.Canceled):
        Model.open(tiny, load="copy", progress=lambda done, total: True)


def test_the_cache_takes_what_is_said_of_it(tiny):
    with Model.open(tiny) as model, model.session(400) as session:
        session.feed(fixed_ids(130))
        stats = model.engine.stats()
        assert stats.kv_blocks == 2 and stats.kv_bytes == mistral4.kv_bytes(model.shape, 2 * 128)
