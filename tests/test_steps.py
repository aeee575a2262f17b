"""Steps of several sessions, shared and saved kv caches, experts on a second device: nothing of it shows in a bit."""

import os
import struct
import threading
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import ms4
from ms4 import Span, StopFlag
from ms4.models.model import Model
from ms4.quant.tiny import Tiny, write_tiny

N_VOCAB = 1400
# Real attention widths would be slow here; two layers, a dense one among them, are enough for every path.
SHAPES = {
    "experts": Tiny(n_expert=9, n_used=3),
    "dense layer": Tiny(n_dense=1, n_layer=3),
    "floats": Tiny(types=dict.fromkeys(("attention", "experts", "shared", "output"), "F16"), n_shared=0),
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    path = write_tiny(tmp_path_factory.mktemp("steps") / "t.gguf", SHAPES[request.param])[0]
    with Model.open(path, threads=3) as opened:
        yield opened


def ids(seed, n):
    return np.random.default_rng(seed).integers(0, N_VOCAB, n).astype(np.int32)


def alone(model, *parts):
    """The logits of the parts, fed one after another to a session of its own: of every position."""
    with model.session(1024) as session:
        return [session.feed(part, all_logits=True) for part in parts]


# --- several sessions in a step


@given(data=st.data())
def test_a_session_gets_the_same_bits_in_any_company(model, data):
    n_sessions = data.draw(st.integers(1, 5))
    steps = data.draw(st.lists(st.lists(st.integers(0, 140), min_size=n_sessions, max_size=n_sessions), max_size=4))
    with ExitStack() as stack:
        sessions = [stack.enter_context(model.session(1024)) for _ in range(n_sessions)]
        fed = run_steps(model, data, sessions, steps)
    for parts in fed:
        for (_, k, got), want in zip(parts, alone(model, *(part for part, _, _ in parts)), strict=True):
            assert np.array_equal(got, want[len(want) - k :])


def run_steps(model, data, sessions, steps):
    """What each session was fed in each step: the ids, how many logits were wanted, and those."""
    fed = [[] for _ in sessions]
    for number, lengths in enumerate(steps):
        present = [i for i, n in enumerate(lengths) if n]
        if not present:
            continue
        wanted = [data.draw(st.integers(0, lengths[i])) for i in present]
        new = [ids((number, i), lengths[i]) for i in present]
        got = model.engine.step(
            [Span(sessions[i], part, n_logits=k) for i, part, k in zip(present, new, wanted, strict=True)]
        )
        for i, part, k, logits in zip(present, new, wanted, got, strict=True):
            fed[i].append((part, k, logits))
    return fed


def test_four_sessions_decode_together_as_each_alone(model):
    starts = [ids(seed, n) for seed, n in enumerate((1, 7, 130, 300))]
    sessions = [model.session(400) for _ in starts]
    got = [[session.feed(start)] for session, start in zip(sessions, starts, strict=True)]
    for _ in range(20):
        next_ids = [rows[-1].argmax() for rows in got]
        step = model.engine.step([Span(s, np.array([id])) for s, id in zip(sessions, next_ids, strict=True)])
        for rows, logits in zip(got, step, strict=True):
            rows.append(logits[0])
    for session, start, rows in zip(sessions, starts, got, strict=True):
        session.rewind(0)
        want = session.feed(start)
        for logits in rows:
            assert np.array_equal(logits, want)
            want = session.feed([int(logits.argmax())])
        session.close()


def test_a_stopped_span_is_left_as_it_was_and_the_others_go_on(model):
    stop = StopFlag()
    stop.set()
    with model.session(64) as one, model.session(64) as two:
        one.feed([1, 2, 3])
        got = model.engine.step([Span(one, ids(1, 5), stop=stop), Span(two, ids(2, 5), stop=StopFlag())])
        assert isinstance(got[0], ms4.Canceled) and one.length == 3
        assert np.array_equal(got[1][0], alone(model, ids(2, 5))[0][-1]) and two.length == 5
        with pytest.raises(ms4.Canceled):
            one.feed([4], stop=stop)
        assert np.array_equal(one.feed([4]), alone(model, [1, 2, 3], [4])[1][0])


@pytest.mark.parametrize("k", [0, 1, 20])
def test_a_number_that_is_not_finite_harms_only_its_own_span(model, k):
    rows = np.full((1, model.shape.d_model), np.nan, np.float32)
    with model.session(64) as one, model.session(64) as two:
        spoilt = Span(one, np.array([ms4.ROW]), rows, n_highest=k, n_among=k)
        got = model.engine.step([spoilt, Span(two, ids(2, 5))])
        assert isinstance(got[0], ms4.NotFinite) and one.length == 0
        assert np.array_equal(got[1][0], alone(model, ids(2, 5))[0][-1])


def test_a_span_that_wants_the_highest_logits_gets_those_in_any_company(model):
    wants = [(1, N_VOCAB), (40, N_VOCAB), (0, 0), (256, 999), (1, 1), (40, N_VOCAB)]
    parts = [ids(seed, 3 + seed) for seed in range(len(wants))]
    with ExitStack() as stack:
        sessions = [stack.enter_context(model.session(64)) for _ in wants]
        together = zip(sessions, parts, wants, strict=True)
        got = model.engine.step([Span(s, part, n_logits=2, n_highest=k, n_among=n) for s, part, (k, n) in together])
    for part, (k, n), found in zip(parts, wants, got, strict=True):
        want = alone(model, part)[0][-2:]
        if not k:
            assert np.array_equal(found, want)
            continue
        assert found.ids.shape == found.logits.shape == (2, k)
        for row, these, logits in zip(want, found.ids, found.logits, strict=True):
            assert np.array_equal(these, np.sort(np.argsort(-row[:n], kind="stable")[:k]))
            assert logits.tobytes() == row[these].tobytes()


def test_wrong_steps_are_refused_whole(model):
    with model.session(64) as one, model.session(64) as two:
        fine = Span(two, ids(1, 3))
        for spans, says in (
            ([], "without a span"),
            ([fine, fine], "twice"),
            ([fine, Span(one, np.array([N_VOCAB]))], "token id 1400"),
            ([fine, Span(one, ids(0, 3), n_logits=4)], "logits of 4 of 3"),
            ([fine, Span(one, ids(0, 3), n_highest=257, n_among=999)], "the 257 highest of 999 logits; at most 256"),
            ([fine, Span(one, ids(0, 3), n_highest=9, n_among=8)], "9 highest of 8"),
            ([fine, Span(one, ids(0, 3), n_highest=9, n_among=N_VOCAB + 1)], "of 1401"),
            ([fine, Span(one, np.array([], np.int32))], "one or more"),
        ):
            with pytest.raises(ValueError, match=says):
                model.engine.step(spans)
        with pytest.raises(ms4.ContextFull):
            model.engine.step([fine, Span(one, ids(0, 65))])
        assert one.length == two.length == 0
    with Model.open(model.gguf.path, n_batch=8) as small, small.session(64) as one, small.session(64) as two:
        with pytest.raises(ValueError, match="9 tokens in a step; at most 8"):
            small.engine.step([Span(one, ids(0, 4)), Span(two, ids(1, 5))])


def test_opening_and_closing_waits_for_no_feed(tmp_path):
    path = write_tiny(tmp_path / "t.gguf", Tiny(n_layer=4, d_model=512, n_context=65536))[0]
    with Model.open(path, n_batch=64) as model, model.session(60000) as long:
        stop, ended = StopFlag(), threading.Event()

        def feed():
            with pytest.raises(ms4.Canceled):
                long.feed(ids(1, 50000), stop=stop)  # takes minutes
            ended.set()

        thread = threading.Thread(target=feed)
        thread.start()
        while not long.progress()[0]:
            pass
        for _ in range(20):
            with model.session(100) as short:
                short.feed([1])  # between two steps of the other
        assert not ended.is_set()
        stop.set()
        thread.join()
        assert long.length == 0


# --- the kv cache


def blocks(model):
    return model.engine.stats().kv_blocks


def test_a_shared_prefix_is_held_once_and_copied_when_written(model):
    prefix, ends = ids(1, 700), [ids(seed, 90) for seed in (2, 3, 4)]
    assert blocks(model) == 0
    with model.session(1024) as one, model.session(1024) as two, model.session(1024) as three:
        one.feed(prefix)
        assert blocks(model) == 6
        two.share(one, 700)
        three.share(two, 650)
        assert blocks(model) == 6 and two.length == 700 and three.length == 650
        want = [alone(model, prefix, end)[1][-1] for end in ends[:2]] + [alone(model, prefix[:650], ends[2])[1][-1]]
        for session, end, logits in zip((one, two, three), ends, want, strict=True):
            assert np.array_equal(session.feed(end), logits)
        # Of each an own end: positions 640 to 789 lie in two blocks, those of the third (650 + 90) in one.
        assert blocks(model) == 5 + 2 + 2 + 1
        one.rewind(0)
        two.rewind(640)
        assert blocks(model) == 5 + 1
    assert blocks(model) == 0


def test_a_rewound_session_does_not_write_into_what_others_share(model):
    with model.session(300) as one, model.session(300) as two:
        one.feed(ids(1, 200))
        two.share(one, 200)
        one.rewind(150)
        one.feed(ids(2, 50))
        want = alone(model, ids(1, 200), ids(3, 5))[1][-1]
        assert np.array_equal(two.feed(ids(3, 5)), want)


def test_sharing_is_refused_where_it_makes_no_sense(model):
    with model.session(300) as one, model.session(100) as small:
        one.feed(ids(1, 200))
        with pytest.raises(ValueError, match="201 positions of a session of 200"):
            small.share(one, 201)
        with pytest.raises(ms4.ContextFull, match="150 tokens do not fit into a context of 100"):
            small.share(one, 150)
        with pytest.raises(ValueError, match="another one"):
            one.share(one, 3)


def saved(session, path):
    with open(path, "wb", buffering=0) as file:
        file.write(b"caller's header\n")
        session.save(file.fileno())
    return path.read_bytes()


def load(session, path):
    with open(path, "rb", buffering=0) as file:
        assert file.read(16) == b"caller's header\n"
        return session.load(file.fileno())


def test_a_saved_session_goes_on_with_the_same_bits(model, tmp_path):
    with model.session(1024) as one, model.session(600) as two:
        for n in (0, 1, 128, 500):
            one.rewind(0)
            if n:
                one.feed(ids(1, n))
            saved(one, tmp_path / "s")
            two.feed([9])  # what it held is forgotten
            assert load(two, tmp_path / "s") == n == two.length
            assert np.array_equal(two.feed(ids(2, 40)), one.feed(ids(2, 40)))


def test_a_session_of_another_model_is_refused(model, tmp_path):
    other = write_tiny(tmp_path / "t.gguf", Tiny(n_expert=9, seed=1))[0]
    with model.session(64) as one, Model.open(other) as stranger, stranger.session(64) as two:
        one.feed(ids(1, 10))
        saved(one, tmp_path / "s")
        with pytest.raises(ms4.EngineError, match="another model"):
            load(two, tmp_path / "s")
        assert two.length == 0
        two.feed([1])


def test_damaged_and_forged_files_give_one_clear_error_each(model, tmp_path, rng):
    path = tmp_path / "s"
    with model.session(300) as one, model.session(300) as two:
        one.feed(ids(1, 200))
        good = bytearray(saved(one, path))
        header, seen = 16, set()
        for i in range(170):
            bad = bytearray(good)
            if i % 4 == 0:
                bad = bad[: rng.integers(header, len(bad))]
            elif i % 4 == 1:
                at = int(rng.integers(header, len(bad)))
                bad[at] ^= 1 << int(rng.integers(0, 8))
            elif i % 4 == 2:  # a number of the header
                at = header + 8 + 4 * int(rng.integers(0, 6))
                bad[at : at + 4] = struct.pack("<I", int(rng.integers(0, 1 << 32)))
            else:
                at = int(rng.integers(header, len(bad) - 8))
                bad[at : at + 8] = rng.bytes(8)
            if bad == good:
                continue
            path.write_bytes(bad)
            with pytest.raises(ms4.EngineError) as caught:
                load(two, path)
            assert "saved session" in str(caught.value) and two.length == 0
            seen.add(str(caught.value).split(";")[0][:40])
        assert len(seen) >= 3
        path.write_bytes(good)
        assert load(two, path) == 200
    assert blocks(model) == 0


def checksum(h, data):
    """kv_cache.c's."""
    h ^= len(data)
    for at in range(0, len(data), 8):
        h = (h ^ int.from_bytes(data[at : at + 8], "little")) * 0x9E3779B97F4A7C15 % (1 << 64)
        h ^= h >> 29
    return h


@pytest.mark.parametrize("scale, value", [(0, np.nan), (0, -1), (1, np.inf), (2, 1), (2, np.nan), (2, 40000)])
def test_forged_numbers_under_right_checksums_are_refused(model, tmp_path, scale, value):
    n, rows, path = 10, 2 * (model.shape.kv_rank + model.shape.d_rope), tmp_path / "s"
    layer = n * (rows + 12)
    with model.session(20) as one, model.session(20) as two:
        one.feed(ids(1, n))
        head, body = (whole := saved(one, path))[:64], bytearray(whole[64:-8])
        places = range(0, len(body), layer)
        for forged in (False, True):
            if forged:
                struct.pack_into("<f", body, layer + n * rows + 3 * 12 + 4 * scale, value)  # layer 1, position 3
            total = int.from_bytes(head[-8:], "little")
            for at in places:
                total = checksum(checksum(total, body[at : at + n * rows]), body[at + n * rows : at + layer])
            path.write_bytes(head + body + struct.pack("<Q", total))
            if not forged:
                assert path.read_bytes() == whole and load(two, path) == n
        with pytest.raises(ms4.EngineError, match="numbers that this engine cannot have written"):
            load(two, path)
        assert two.length == 0


def test_a_saved_session_that_does_not_fit_says_so(model, tmp_path):
    with model.session(300) as one, model.session(100) as small:
        one.feed(ids(1, 200))
        saved(one, tmp_path / "s")
        with pytest.raises(ms4.ContextFull, match="200 tokens; the context holds 100"):
            load(small, tmp_path / "s")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk_is_an_error(model):
    with model.session(300) as one, open("/dev/full", "wb", buffering=0) as file:
        one.feed(ids(1, 200))
        with pytest.raises(ms4.EngineError, match="cannot be written"):
            one.save(file.fileno())


# --- experts on a second device


@given(data=st.data())
def test_where_experts_are_computed_never_shows(model, data):
    shape = model.shape
    kind = data.draw(st.sampled_from(["random", "all", "one", "none"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30)))
    place = np.zeros((shape.n_layer, shape.n_expert), np.uint8)
    if kind == "random":
        place = rng.integers(0, 2, place.shape).astype(np.uint8)
    elif kind == "all":
        place[:] = 1
    elif kind == "one":
        place[:, rng.integers(0, shape.n_expert)] = 1
    lengths = data.draw(st.lists(st.sampled_from([1, 2, 7, 8, 65, 129, 300]), min_size=1, max_size=3))
    parts = [ids((i, 5), n) for i, n in enumerate(lengths)]
    rows = rng.standard_normal((len(parts[0]), shape.d_model)).astype(np.float32)
    parts[0][::2] = ms4.ROW  # as an image's

    def logits():
        with model.session(1024) as session:
            first = session.feed(parts[0], rows[: np.count_nonzero(parts[0] == ms4.ROW)], all_logits=True)
            return [first, *(session.feed(part, all_logits=True) for part in parts[1:])]

    want = logits()
    model.engine.place_experts(place)
    try:
        assert all(np.array_equal(got, logits) for got, logits in zip(logits(), want, strict=True))
    finally:
        model.engine.place_experts(None)
