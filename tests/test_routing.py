"""Traces of routing: what the engine says of its router, and the file that keeps it."""

import io
import threading
import zipfile

import numpy as np
import pytest
from fixtures import bravo

import ms4
from ms4 import Span, StopFlag
from ms4.models import routing
from ms4.models.model import Model
from ms4.models.routing import Recorder, Skew, TraceError, synthetic
from ms4.quant.tiny import Tiny, write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = write_tiny(tmp_path_factory.mktemp("routing") / "t.gguf", Tiny(n_dense=1, n_layer=4, n_expert=9, n_used=3))[
        0
    ]
    with Model.open(path, threads=2) as opened:
        yield opened


def ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, 1000, n).astype(np.int32)


def recorded(model, *parts, n_logits=1):
    """The trace of a session that is fed these parts."""
    with model.session(1024) as session, Recorder(model.engine) as recorder:
        for part in parts:
            session.feed(part, n_logits=n_logits)
    return recorder.trace()


def test_a_step_leaves_the_choice_of_every_token_in_every_layer_with_experts(model):
    trace = recorded(model, ids(7), ids(1))
    assert (trace.n_layer, trace.n_expert, trace.n_used) == (4, 9, 3)
    assert trace.rows.tolist() == [[0, 7, 7, 1], [0, 1, 1, 1]]  # dense; the last layer computes what is wanted
    prompt, token = trace.steps()
    assert [len(picks) for picks in prompt] == [0, 7, 7, 1]
    assert all((picks[:, 1:] > picks[:, :-1]).all() for picks in (*prompt, *token))
    assert trace.n_decode == 1


def test_the_choice_is_that_of_the_router(model):
    """One token at a time or all at once: the same experts, as the bits are the same."""
    whole = recorded(model, ids(5), n_logits=5)
    single = recorded(model, *(ids(5)[i : i + 1] for i in range(5)))
    together = next(whole.steps())
    for layer in range(1, 4):
        one_by_one = np.concatenate([step[layer] for step in single.steps()])
        np.testing.assert_array_equal(together[layer], one_by_one)
    assert len({tuple(row) for row in together[1].tolist()}) > 1


def test_choices_are_counted_like_the_pairs_of_the_engine(model):
    before = model.engine.stats().experts_used
    trace = recorded(model, ids(30), ids(1), ids(2))
    assert trace.picks.size == model.engine.stats().experts_used - before


def test_a_step_that_was_stopped_leaves_no_entry(model):
    stop = StopFlag()
    stop.set()
    with model.session(64) as session, Recorder(model.engine) as recorder:
        with pytest.raises(ms4.Canceled):
            session.feed(ids(3), stop=stop)
        session.feed(ids(2))
    assert recorder.trace().rows.tolist() == [[0, 2, 2, 1]]


def test_a_step_that_is_stopped_on_its_way_leaves_no_entry(model):
    stop = StopFlag()
    seen = []

    def routed(layer, picks):
        seen.append(layer)
        stop.set()

    with model.session(64) as session:
        model.engine.watch(routed)
        try:
            with pytest.raises(ms4.Canceled):
                session.feed(ids(40), stop=stop)
        finally:
            model.engine.watch(None)
        assert seen and seen[0] == 1 and -1 not in seen
        recorder = Recorder(model.engine)
        for layer in seen:
            recorder._routed(layer, np.zeros((40, 3), np.int32))
        with recorder:
            session.feed(ids(2))
    assert recorder.trace().rows.tolist() == [[0, 2, 2, 1]]


def test_nobody_is_told_any_more_after_the_end(model):
    with model.session(64) as session:
        with Recorder(model.engine) as recorder:
            session.feed(ids(1))
        session.feed(ids(1))
    assert len(recorder.trace().rows) == 1


def test_watching_begins_between_two_steps_of_another_thread(model):
    over = threading.Event()

    def work():
        with model.session(1024) as session:
            while not over.is_set():
                session.rewind(0)
                model.engine.step([Span(session, ids(9))])

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for _ in range(20):
            with Recorder(model.engine) as recorder:
                pass
            assert all(row == [0, 9, 9, 1] for row in recorder.trace().rows.tolist())
    finally:
        over.set()
        thread.join()


def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = synthetic(Skew(topic=1), 40, n_layer=3, n_expert=20, n_used=2, seed=1)
    with open(tmp_path / "t", "wb") as file:
        trace.save(file)
    back = routing.load(tmp_path / "t")
    assert back.n_expert == 20 and back.n_decode == 40
    np.testing.assert_array_equal(back.rows, trace.rows)
    np.testing.assert_array_equal(back.picks, trace.picks)


def test_more_than_256_experts_take_two_bytes():
    trace = synthetic(Skew(), 20, n_layer=2, n_expert=300, n_used=2)
    assert trace.picks.dtype == np.uint16 and trace.picks.max() >= 256


def arrays(**changed):
    good = {
        "format": np.int32(1),
        "n_expert": np.int32(4),
        "rows": np.array([[1, 2], [0, 1]], np.int32),
        "picks": np.array([[0, 1], [0, 3], [1, 2], [2, 3]], np.uint8),
    }
    return good | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"format": np.int32(2)}, "format 2; this version reads 1"),
        ({"format": np.float32(1)}, "float32"),
        ({"n_expert": np.int32(3)}, "not below 3"),
        ({"n_expert": np.int32(0)}, "2 of 0 experts"),
        ({"n_expert": np.int32(1 << 20)}, "experts"),
        ({"rows": np.array([[1, 2], [0, 2]], np.int32)}, "4 tokens' picks for 5"),
        ({"rows": np.array([[5, 0], [0, -1]], np.int32)}, "picks for"),
        ({"rows": np.array([1, 3], np.int32)}, "rows is int32"),
        ({"rows": np.empty((2, 0), np.int32)}, "0 layers"),
        ({"picks": np.array([[0, 1], [3, 0], [1, 2], [2, 3]], np.uint8)}, "not ascending"),
        ({"picks": np.array([[0, 1], [3, 3], [1, 2], [2, 3]], np.uint8)}, "not ascending"),
        ({"picks": np.zeros((4, 2), np.float32)}, "picks is float32"),
        ({"picks": np.empty((4, 0), np.uint8)}, "0 of 4"),
        ({"rows": np.zeros((2, 2), np.int32), "picks": np.empty((0, 2), np.uint8)}, "empty"),
        ({"more": np.int32(1)}, "no trace of ms4"),
        ({"rows": np.array([[{}]], object)}, "no trace of ms4, or damaged"),
    ],
)
def test_forged_traces_are_refused(tmp_path, changed, said):
    np.savez_compressed(tmp_path / "t.npz", **arrays(**changed))
    with pytest.raises(TraceError, match=said):
        routing.load(tmp_path / "t.npz")


def test_damaged_files_end_in_one_clear_error(tmp_path, rng):
    file = io.BytesIO()
    synthetic(Skew(), 50, n_layer=2, n_expert=8, n_used=2).save(file)
    good = file.getvalue()
    path = tmp_path / "t"
    for data in (b"", b"PK", b"no archive at all", good[:100], good[: len(good) // 2], good[:-1]):
        path.write_bytes(data)
        with pytest.raises(TraceError):
            routing.load(path)
    for _ in range(60):
        forged = bytearray(good)
        forged[int(rng.integers(len(good)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(forged)
        try:
            np.testing.assert_array_equal(routing.load(path).picks.shape, (100, 2))  # a bit that says nothing
        except TraceError:
            pass


def test_an_archive_that_unpacks_to_more_than_a_trace_may_hold_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "MOST_BYTES", 1000)
    np.savez_compressed(tmp_path / "t.npz", **arrays(picks=np.zeros((500, 2), np.uint8)))
    with pytest.raises(TraceError, match="holds more than"):
        routing.load(tmp_path / "t.npz")


def test_a_missing_file_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError):
        routing.load(tmp_path / "none")


def test_an_archive_of_other_things_is_no_trace(tmp_path):
    with zipfile.ZipFile(tmp_path / "t.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(TraceError, match="is no trace of ms4"):
        routing.load(tmp_path / "t.zip")


def test_synthetic_traces_have_the_stated_skew():
    def repeats(skew):
        trace = synthetic(skew, 300, n_layer=6, seed=3)
        picks = trace.picks.reshape(300, 6, 4)
        return np.mean([len(np.intersect1d(a, b)) / 4 for a, b in zip(picks[1:, 0], picks[:-1, 0], strict=True)])

    def share_of_the_most_used(skew):
        counts = np.bincount(synthetic(skew, 300, n_layer=1, seed=3).picks.ravel(), minlength=128)
        return np.sort(counts)[-13:].sum() / counts.sum()

    assert repeats(Skew()) < 0.06 < 0.2 < repeats(routing.SKEWS["coherent"])
    assert share_of_the_most_used(Skew()) < 0.2 < 0.5 < share_of_the_most_used(Skew(lasting=2))


def test_a_synthetic_trace_may_begin_with_a_prompt():
    single, first = (synthetic(Skew(), 30, n_prompt=n, n_layer=2, n_expert=9, n_used=3, seed=4) for n in (0, 10))
    assert first.rows.tolist() == [[10, 10], *[[1, 1]] * 20] and first.n_decode == 20
    tokens, (prompt, *others) = list(single.steps()), first.steps()
    for layer in range(2):
        np.testing.assert_array_equal(prompt[layer], np.concatenate([step[layer] for step in tokens[:10]]))
    assert all((a[i] == b[i]).all() for a, b in zip(others, tokens[10:], strict=True) for i in range(2))


def test_a_real_file_of_the_architecture_is_recorded():
    with Model.open(bravo(), threads=2) as opened:
        trace = recorded(opened, ids(12) % 500, ids(1) % 500)
    assert trace.n_decode == 1 and trace.n_used == opened.shape.n_expert_used
