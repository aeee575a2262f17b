"""Many answers in one engine: whose turn it is, what is shared, how they stop, and what each of them gets."""

import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import ScriptedEngine, ScriptedSession, logits_for, tekken

from ms4 import ROW, DeviceError, NotFinite
from ms4.models.answer import Answer, Done, Note, Prefill
from ms4.models.answer_parser import Text
from ms4.models.control import Control
from ms4.models.prompt import ImagePlace, Prompt
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.scheduler import PROMPT_CHUNK, Scheduler
from ms4.models.timeline import BLOCK

N_VOCAB = 1300
N_CTX = 8192


def make(ids, n_ctx=N_CTX, **options):
    prompt = ids if isinstance(ids, Prompt) else Prompt(list(ids))
    return Answer(prompt, Sampler(SamplingParams(temperature=0.0)), tekken(), n_ctx, **options)


def numbers(n, seed=0):
    return np.random.default_rng(seed).integers(1000, N_VOCAB, n).tolist()


@pytest.fixture
def desk():
    """desk(script or None, n_batch) -> (engine, scheduler); nothing may have been asked of the engine that is wrong."""
    opened = []

    def open(script=None, n_batch=2048):
        engine = ScriptedEngine(script, n_batch, N_VOCAB)
        opened.append((engine, Scheduler(engine)))
        return opened[-1]

    yield open
    for engine, scheduler in opened:
        scheduler.close()
        assert not engine.faults


def ask(scheduler, timeline, ids, image_rows=None, **options):
    """(events, answer) of a prompt to its end"""
    one = make(ids, timeline.n_ctx, **options)
    return list(scheduler.submit(one, timeline, image_rows)), one


def alone(ids, most):
    """What the stand-in says after these ids, without a scheduler."""
    session, said = ScriptedSession(N_CTX, None, N_VOCAB), []
    session.feed(ids)
    while len(said) < most:
        said.append(session.says())
        if said[-1] == Control.EOS:
            break
        session.feed(said[-1:])
    return said


def talkative(n, least):
    """A prompt of n tokens to which the stand-in says at least so many."""
    return next(ids for seed in range(999) if len(alone(ids := numbers(n, 50 + seed), least)) >= least)


def served(engine, *answers):
    """Of each step, how many tokens each of these answers had in it."""
    flags = [answer.stop_flag for answer in answers]
    return [[sum(len(s.ids) for s in step if s.stop is flag) for flag in flags] for step in engine.steps]


# --- one answer after another


def test_an_answer_from_beginning_to_end(desk):
    engine, scheduler = desk()
    timeline = scheduler.open(N_CTX)
    events, answer = ask(scheduler, timeline, numbers(20), max_tokens=9)
    assert events[0] == Prefill(20, 0) and answer.ids == alone(numbers(20), 9)
    s = events[-1].statistics
    assert (s.n_prompt, s.n_cached, s.n_answer, s.n_decode) == (20, 0, 9, 8)
    assert s.n_context == timeline.length == timeline.session.length == 28  # the last token is never fed
    assert s.s_prefill > 0 and s.s_decode > 0
    spans = [span for step in engine.steps for span in step]
    assert [[len(span.ids), span.n_logits] for span in spans] == [[20, 1]] + [[1, 1]] * 8
    assert {(span.n_highest, span.n_among) for span in spans} == {(1, 131072)}  # it is a greedy one


def test_events_end_after_done(desk):
    _, scheduler = desk([1097, Control.EOS])
    running = scheduler.submit(make([1]), scheduler.open(9000))
    assert [type(event) for event in running] == [Prefill, Text, Done]
    assert list(running) == []


def test_only_what_differs_is_computed_again(desk):
    engine, scheduler = desk([1097])
    timeline = scheduler.open(N_CTX)
    session = timeline.session
    ask(scheduler, timeline, [1, 1100, 1101, 1102], max_tokens=2)
    assert session.held == [1, 1100, 1101, 1102, 1097] and timeline.length == 5
    events, _ = ask(scheduler, timeline, [1, 1100, 1101, 1102, 1097, 1200], max_tokens=1)
    assert events[0] == Prefill(6, 5) and session.fed[-1] == [1200]
    events, _ = ask(scheduler, timeline, [1, 1100, 1300], max_tokens=1)
    assert events[0] == Prefill(3, 2) and session.fed[-1] == [1300]
    assert events[-1].statistics.n_cached == 2 and session.held == [1, 1100, 1300]
    # The last token is always computed, because its logits are wanted.
    assert ask(scheduler, timeline, [1, 1100, 1300], max_tokens=1)[0][0] == Prefill(3, 2)
    assert ask(scheduler, timeline, [1, 1100], max_tokens=1)[0][0] == Prefill(2, 1)


def test_the_progress_of_a_prompt_counts_what_is_computed(desk):
    engine, scheduler = desk([1097], n_batch=100)
    timeline, seen = scheduler.open(N_CTX), []
    ask(scheduler, timeline, numbers(50), max_tokens=1)
    gate, ready = threading.Event(), threading.Event()
    engine.before = lambda spans: (ready.set(), gate.wait(60))
    waiting = scheduler.submit(make(numbers(20, 1), max_tokens=1), timeline)
    assert ready.wait(60)
    running = scheduler.submit(make(numbers(350), max_tokens=1), other := scheduler.open(N_CTX))
    seen.append(running.progress())
    other.session.parts = 6, 12
    engine.before = lambda spans: len(spans[0].ids) == 100 and seen.append(running.progress())
    gate.set()
    list(waiting), list(running)
    assert seen == [(0, 350), (50, 350), (150, 350), (250, 350)]


def image_prompt(digest, before=2):
    ids = [1] * before + [Control.IMG, Control.IMG, Control.IMG_BREAK, Control.IMG, Control.IMG, Control.IMG_END, 1100]
    return Prompt(ids, (ImagePlace(before, 2, 2, digest, {}),))


def test_image_positions_take_rows_and_are_cached_by_content(desk):
    _, scheduler = desk([1097])
    timeline = scheduler.open(N_CTX)
    session, rows = timeline.session, np.arange(4, dtype=np.float32)[:, None]
    ask(scheduler, timeline, image_prompt(b"one"), rows, max_tokens=1)
    assert session.fed[-1] == [1, 1, ROW, ROW, Control.IMG_BREAK, ROW, ROW, Control.IMG_END, 1100]
    assert session.rows[-1][:, 0].tolist() == [0, 1, 2, 3]
    events, _ = ask(scheduler, timeline, image_prompt(b"one"), rows, max_tokens=1)
    assert events[0].cached == 8 and session.rows[-1] is None
    events, _ = ask(scheduler, timeline, image_prompt(b"two"), rows, max_tokens=1)
    assert events[0].cached == 2 and len(session.rows[-1]) == 4
    # A cut in the middle of an image: the rows before it are not sent again.
    timeline.rewind(4)
    ask(scheduler, timeline, image_prompt(b"two"), rows, max_tokens=1)
    assert session.rows[-1][:, 0].tolist() == [2, 3]
    for wrong, n in ((rows[:3], 3), (None, 0)):
        with pytest.raises(ValueError, match=f"4 image positions, but {n} rows"):
            scheduler.submit(make(image_prompt(b"two")), timeline, wrong)


def test_the_rows_of_an_image_come_in_the_chunks_of_their_positions(desk):
    _, scheduler = desk([1097], n_batch=4)
    timeline = scheduler.open(N_CTX)
    ask(scheduler, timeline, image_prompt(b"one", before=0), np.arange(4, dtype=np.float32)[:, None], max_tokens=1)
    assert [None if rows is None else rows[:, 0].tolist() for rows in timeline.session.rows] == [[0, 1, 2], [3]]


# --- faults


def test_an_error_reaches_its_answer_only_and_the_timeline_stays_usable(desk):
    engine, scheduler = desk()
    lines = [scheduler.open(N_CTX) for _ in range(2)]
    result = engine.result
    engine.result = lambda span: (
        NotFinite("not finite", -8) if span.session is lines[0].session and len(engine.steps) > 3 else result(span)
    )
    bad, good = make(numbers(30, 1), max_tokens=12), make(numbers(30, 2), max_tokens=12)
    handles = [scheduler.submit(answer, line) for answer, line in zip((bad, good), lines, strict=True)]
    with pytest.raises(NotFinite):
        list(handles[0])
    assert list(handles[0]) == [] and bad.done is None
    assert list(handles[1])[-1].reason == "length" and good.ids == alone(numbers(30, 2), 12)
    engine.result = result
    assert lines[0].length == lines[0].session.length > 30
    assert ask(scheduler, lines[0], numbers(30, 1), max_tokens=12)[1].ids == alone(numbers(30, 1), 12)


def test_a_step_that_fails_as_a_whole_is_taken_apart(desk):
    engine, scheduler = desk()
    lines = [scheduler.open(N_CTX) for _ in range(3)]
    step = engine.step

    def refusing(spans):
        if any(span.session is lines[1].session for span in spans):
            raise MemoryError("no room for a block")
        return step(spans)

    engine.step = refusing
    answers = [make(numbers(30, seed), max_tokens=5) for seed in range(3)]
    handles = [scheduler.submit(answer, line) for answer, line in zip(answers, lines, strict=True)]
    with pytest.raises(MemoryError):
        list(handles[1])
    for seed in (0, 2):
        assert list(handles[seed])[-1].reason == "length" and answers[seed].ids == alone(numbers(30, seed), 5)


def test_a_logit_that_is_not_finite_is_its_answers_error(desk):
    engine, scheduler = desk()
    engine.result = lambda span: np.full((1, N_VOCAB), np.nan, np.float32)
    running = scheduler.submit(make([1]), scheduler.open(N_CTX))
    assert isinstance(next(running), Prefill)
    with pytest.raises(NotFinite):
        next(running)


def test_a_mistake_of_the_scheduler_is_heard_by_everybody(desk, monkeypatch):
    engine, scheduler = desk()
    monkeypatch.setattr(scheduler, "_plan", lambda: {}["gone"])
    running = scheduler.submit(make([1]), scheduler.open(N_CTX))
    with pytest.raises(KeyError, match="gone"):
        next(running)
    scheduler.close()
    with pytest.raises(ValueError, match="the scheduler is closed"):
        scheduler.open(N_CTX)


def test_what_cannot_be_submitted(desk):
    _, scheduler = desk([Control.EOS])
    timeline = scheduler.open(100)
    with pytest.raises(ValueError, match="context of 200 on a timeline of 100"):
        scheduler.submit(make([1], 200), timeline)
    scheduler.drop(timeline)
    scheduler.drop(timeline)
    assert timeline.session.closed
    with pytest.raises(ValueError, match="closed, or not of this scheduler"):
        scheduler.submit(make([1], 100), timeline)


# --- stopping


def test_a_stop_before_during_and_between_steps_ends_in_done_once(desk):
    engine, scheduler = desk([1097])
    for when in range(4):
        timeline, answer = scheduler.open(N_CTX), make(numbers(4000, when))
        first = len(engine.steps)
        if when == 0:
            answer.stop_flag.set()
        engine.before = lambda spans, at=first + when, flag=answer.stop_flag: len(engine.steps) == at and flag.set()
        events = list(scheduler.submit(answer, timeline))
        assert [event.reason for event in events if isinstance(event, Done)] == ["interrupted"]
        assert timeline.length == timeline.session.length == (0, 0, 2048, 4000)[when]
        assert len(answer.ids) == (1 if when == 3 else 0)
    engine.before = lambda spans: None


def test_a_waiting_answer_can_be_stopped(desk):
    engine, scheduler = desk([1097])
    timeline = scheduler.open(N_CTX)
    first, waiting, last = (make([1, 1100], max_tokens=50) for _ in range(3))
    handles = []
    # In the first step of the first answer two more are submitted to its timeline, and one of them is stopped.
    engine.before = lambda spans: (
        len(engine.steps) == 1
        and (
            handles.extend(scheduler.submit(answer, timeline) for answer in (waiting, last)),
            waiting.stop_flag.set(),
        )
    )
    assert list(scheduler.submit(first, timeline))[-1].reason == "length"
    assert [type(event) for event in handles[0]] == [Done] and waiting.done.reason == "interrupted"
    assert list(handles[1])[-1].reason == "length" and served(engine, waiting) == [[0]] * len(engine.steps)


def test_a_stop_keeps_what_there_is(desk):
    engine, scheduler = desk()
    answer = make(numbers(50), max_tokens=100)
    running = scheduler.submit(answer, timeline := scheduler.open(N_CTX))
    engine.before = lambda spans: len(engine.steps) == 5 and running.cancel()
    assert list(running)[-1].reason == "interrupted"
    assert answer.ids == alone(numbers(50), 4) and timeline.length == 53


def test_closing_ends_everything(desk):
    engine, scheduler = desk([1097])
    lines = [scheduler.open(N_CTX) for _ in range(3)]
    gate, reached = threading.Event(), threading.Event()
    engine.before = lambda spans: (reached.set(), gate.wait(60))
    handles = [scheduler.submit(make([1, 1100 + i]), lines[i % 3]) for i in range(6)]
    assert reached.wait(60)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not all(handle.answer.stop_flag.is_set() for handle in handles):
        pass
    gate.set()
    closing.join()
    assert [list(handle)[-1].reason for handle in handles] == ["interrupted"] * 6
    assert all(line.session.closed for line in lines)
    for wrong in (lambda: scheduler.open(9), lambda: scheduler.submit(make([1]), lines[0])):
        with pytest.raises(ValueError, match="the scheduler is closed"):
            wrong()


def test_a_timeline_that_is_dropped_interrupts_its_answers_and_closes_after_them(desk):
    engine, scheduler = desk([1097])
    timeline, other = scheduler.open(N_CTX), scheduler.open(N_CTX)
    seen, handles = [], []

    def drop(spans):
        if len(engine.steps) == 2:
            handles.append(scheduler.submit(make([1, 1100]), timeline))
            scheduler.drop(timeline)
            seen.append(timeline.session.closed)

    engine.before = drop
    assert list(scheduler.submit(make([1, 1100]), timeline))[-1].reason == "interrupted"
    assert list(handles[0])[-1].reason == "interrupted"
    assert ask(scheduler, other, [1], max_tokens=2)[0][-1].reason == "length"
    assert seen == [False] and timeline.session.closed and not other.session.closed


# --- several at once


def test_decodes_go_on_while_a_prompt_is_read_and_nobody_waits_for_it(desk):
    engine, scheduler = desk()
    ids = talkative(9, 20)
    talker, reader = make(ids, max_tokens=20), make(numbers(6000, 2), max_tokens=3)
    lines = [scheduler.open(N_CTX) for _ in range(2)]
    handles, opened = [], []

    def arrive(spans):
        if len(engine.steps) == 3:
            handles.append(scheduler.submit(reader, lines[1]))
        if len(engine.steps) == 8:  # in the middle of a step
            opened.append(scheduler.open(N_CTX))
            scheduler.drop(opened[0])
            opened.append(opened[0].session.closed)

    engine.before = arrive
    said = alone(ids, 20)
    list(scheduler.submit(talker, lines[0]))
    list(handles[0])
    table = served(engine, talker, reader)
    talking = [row for row in table if row[0]]
    # One token in every step, and with it at most a chunk of the prompt.
    assert table[: len(talking)] == talking and len(talking) == len(said)
    assert all(row[1] <= PROMPT_CHUNK for row in talking) and sum(row[1] == PROMPT_CHUNK for row in talking) > 15
    assert [row[1] for row in table if not row[0]][0] > PROMPT_CHUNK  # as soon as nobody decodes
    assert opened[1] is True  # an opened timeline was closed at once, during a step
    assert talker.ids == said and reader.ids == alone(numbers(6000, 2), 3)


def test_a_short_prompt_does_not_wait_for_a_long_one(desk):
    engine, scheduler = desk(n_batch=256)
    long, short = make(numbers(6000, 1), max_tokens=1), make(numbers(40, 2), max_tokens=1)
    handles = []
    engine.before = lambda spans: (
        len(engine.steps) == 1 and handles.append(scheduler.submit(short, scheduler.open(N_CTX)))
    )
    list(scheduler.submit(long, scheduler.open(N_CTX)))
    list(handles[0])
    assert served(engine, short, long)[:3] == [[0, 256], [40, 216], [0, 256]]


def test_more_decodes_than_a_step_holds_take_turns_and_a_prompt_keeps_its_place(desk):
    engine, scheduler = desk([1097], n_batch=4)
    answers = [make([1, 1100 + i], max_tokens=30) for i in range(6)]
    lines = [scheduler.open(N_CTX) for _ in answers]
    handles = [scheduler.submit(answer, line) for answer, line in zip(answers, lines, strict=True)]
    for handle in handles:
        list(handle)
    table = np.array(served(engine, *answers))
    assert table.sum(1).max() <= 4 and (table.sum(0) == 2 + 29).all()
    for one in table.T:
        at = np.flatnonzero(one)
        assert np.diff(at).max() <= 3


def test_equal_prompts_are_read_once(desk):
    engine, scheduler = desk()
    lines = [scheduler.open(N_CTX) for _ in range(3)]
    ids = numbers(1000)
    answers = [make(ids, max_tokens=5) for _ in lines]
    gate = threading.Event()
    engine.before = lambda spans: gate.wait(60)
    handles = [scheduler.submit(answer, line) for answer, line in zip(answers, lines, strict=True)]
    gate.set()
    for handle, answer in zip(handles, answers, strict=True):
        list(handle)
        assert answer.ids == alone(ids, 5)
    # 1,000 for the first; of the others the last position, which gives their logits; then four tokens each.
    assert sum(sum(row) for row in served(engine, *answers)) == 1000 + 2 + 3 * (len(alone(ids, 5)) - 1)
    assert sorted(answer.n_cached for answer in answers) == [0, 999, 999]


def test_long_prompts_that_begin_alike_are_read_once_together(desk):
    engine, scheduler = desk()
    common = numbers(4000)
    answers = [make(common + numbers(100, seed), max_tokens=4) for seed in range(1, 4)]
    lines = [scheduler.open(N_CTX) for _ in answers]
    gate = threading.Event()
    engine.before = lambda spans: gate.wait(60)
    handles = [scheduler.submit(answer, line) for answer, line in zip(answers, lines, strict=True)]
    gate.set()
    for seed, (handle, answer) in enumerate(zip(handles, answers, strict=True), 1):
        list(handle)
        assert answer.ids == alone(common + numbers(100, seed), 4)
    table = np.array(served(engine, *answers))
    n_prompts = table.sum() - sum(len(answer.ids) - 1 for answer in answers)
    assert 4300 <= n_prompts <= 4300 + 3 * BLOCK
    assert sum(answer.n_cached for answer in answers) == 3 * 4100 - n_prompts


@pytest.mark.parametrize("n, shared", [(BLOCK - 1, 0), (BLOCK, BLOCK)])
def test_less_than_a_block_is_not_worth_sharing(desk, n, shared):
    _, scheduler = desk()
    ids = numbers(n)
    ask(scheduler, scheduler.open(N_CTX), [*ids, 1001], max_tokens=1)
    events, answer = ask(scheduler, scheduler.open(N_CTX), [*ids, 1002, 1003], max_tokens=9)
    assert events[0] == Prefill(n + 2, shared) and answer.ids == alone([*ids, 1002, 1003], 9)


def test_a_timeline_prefers_what_it_holds_itself(desk):
    _, scheduler = desk()
    one, other = scheduler.open(N_CTX), scheduler.open(N_CTX)
    ids = numbers(600)
    ask(scheduler, one, ids, max_tokens=1)
    ask(scheduler, other, ids[:500], max_tokens=1)
    other.session.share = None  # calling it would be an error
    assert ask(scheduler, other, ids[:590], max_tokens=1)[0][0] == Prefill(590, 500)


# --- anything


@dataclass
class Arrival:
    """An answer that is submitted in a step, perhaps to be stopped in another."""

    ids: list
    line: int
    step: int
    most: int
    stop: int | None
    answer: Answer = None
    handle: object = None
    stopped: bool = False


@dataclass
class Play:
    """Answers that come and are stopped at their steps."""

    engine: ScriptedEngine
    scheduler: Scheduler
    arrivals: list
    lines: list
    waiting: list = field(default_factory=list)
    steps: list = field(default_factory=list)  # of each, the number of tokens by arrival: of prompts, of decodes

    def before(self, spans):
        now, n = len(self.engine.steps), np.zeros((2, len(self.arrivals)), int)
        flags = [arrival.answer and arrival.answer.stop_flag for arrival in self.arrivals]
        for span in spans:
            i = flags.index(span.stop)
            n[int(self.arrivals[i].handle.decoding), i] += len(span.ids)
        self.steps.append(n)
        while self.waiting and self.waiting[0].step <= now:
            self.submit(self.waiting.pop(0))
        for arrival in self.arrivals:
            if arrival.handle is not None and arrival.stop == now:
                arrival.stopped = arrival.answer.reason is None
                arrival.handle.cancel()

    def submit(self, arrival):
        arrival.answer = make(arrival.ids, max_tokens=arrival.most)
        arrival.handle = self.scheduler.submit(arrival.answer, self.lines[arrival.line])

    def run(self):
        self.waiting = sorted(self.arrivals, key=lambda arrival: arrival.step)
        self.engine.before = self.before
        for arrival in list(self.waiting):
            if arrival.handle is None:  # everything before it is over, so no step will bring it
                self.waiting.remove(arrival)
                self.submit(arrival)
            arrival.events = list(arrival.handle)


STORIES = [numbers(700, 100 + i) for i in range(3)]


@st.composite
def arrivals(draw):
    # Prompts that begin alike for a while, and then have an end of their own.
    story, n = draw(st.sampled_from(STORIES)), draw(st.integers(0, 600))
    ids = story[:n] + numbers(draw(st.integers(1, 40)), draw(st.integers(0, 5)))
    return Arrival(
        ids,
        line=draw(st.integers(0, 3)),
        step=draw(st.integers(0, 12)),
        most=draw(st.integers(1, 25)),
        stop=draw(st.one_of(st.none(), st.integers(0, 30))),
    )


@settings(max_examples=examples(80), deadline=None)
@given(st.lists(arrivals(), min_size=1, max_size=8), st.sampled_from([1, 2, 5, 64, 300, 2048]))
def test_whatever_comes_every_answer_gets_what_it_gets_alone(plan, n_batch):
    engine = ScriptedEngine(None, n_batch, N_VOCAB)
    with Scheduler(engine) as scheduler:
        play = Play(engine, scheduler, plan, [scheduler.open(N_CTX) for _ in range(4)])
        play.run()
        lengths = [(line.length, line.session.length) for line in play.lines]
    assert engine.faults == [] and all(one == other for one, other in lengths)
    for arrival in plan:
        reasons = [event.reason for event in arrival.events if isinstance(event, Done)]
        assert len(reasons) == 1 and arrival.events[-1] is arrival.answer.done
        want, got = alone(arrival.ids, arrival.most), arrival.answer.ids
        if reasons == ["interrupted"]:
            assert arrival.stop is not None and got == want[: len(got)] and len(got) < len(want)
        else:
            assert got == want and not arrival.stopped
    check_turns(np.array(play.steps), n_batch)


def check_turns(steps, n_batch):
    """steps: [step, of prompts or decodes, answer]"""
    prompts, decodes = steps[:, 0].sum(1), steps[:, 1].sum(1)
    assert (prompts[decodes > 0] <= PROMPT_CHUNK).all() and steps[:, 1].max() <= 1
    if n_batch > 1:  # else a prompt waits until nobody decodes
        for column in steps.sum(1).T:
            at = np.flatnonzero(column)
            assert len(at) == 0 or np.diff(at).max(initial=1) <= steps.shape[2]


def test_the_stand_in_hears_every_token():
    one, other = (ScriptedSession(99, None, N_VOCAB) for _ in range(2))
    one.feed([1, 2, 3])
    other.feed([1, 3])
    assert one.says() != other.says()
    other.rewind(1)
    other.feed([2])
    other.feed([3])
    assert one.says() == other.says() and logits_for(7, 9).argmax() == 7


@pytest.mark.parametrize("step", range(7))
@pytest.mark.parametrize("error", [DeviceError("it fell off the bus", -9), MemoryError("it fell off the bus")])
def test_a_gpu_that_fails_costs_no_token(step, error, desk):
    """Two answers, one with an image, and the GPU fails in some step: both read again what they held, and go on."""
    engine, scheduler = desk(n_batch=400)
    prompt = Prompt([1, *numbers(40), *[Control.IMG] * 2, *numbers(500, 1)], (ImagePlace(41, 2, 1, b"one", {}),))
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    said = []
    for fails in (False, True):
        first, second = scheduler.open(N_CTX), scheduler.open(N_CTX)
        count = iter(range(1000))

        def before(_, fails=fails, count=count):
            if fails and next(count) >= step and engine.on_gpu:
                raise error

        engine.before, engine.on_gpu = before, fails
        answers = [make(prompt, max_tokens=6), make(numbers(300, 2), max_tokens=9)]
        running = [scheduler.submit(answers[0], first, rows), scheduler.submit(answers[1], second)]
        events = [list(one) for one in running]
        said.append([answer.ids for answer in answers])
        told = [event.text for one in events for event in one if isinstance(event, Note)]
        assert told and set(told) == {"it fell off the bus"} if fails else not told
        scheduler.drop(first)
        scheduler.drop(second)
    assert said[0] == said[1] and engine.left == ["it fell off the bus"]


def test_a_cpu_that_has_no_memory_fails_the_answer(desk):
    engine, scheduler = desk()

    def before(_):
        raise MemoryError("none")

    engine.before = before
    with pytest.raises(MemoryError):
        ask(scheduler, scheduler.open(N_CTX), numbers(3))
    assert not engine.left
