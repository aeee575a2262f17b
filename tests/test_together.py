"""Several answers in a real engine: each gives the bits it gives alone, none waits for a prompt, every stop holds."""

import threading
from random import Random

import numpy as np
import pytest
from conftest import SEED
from standins import tekken

import ms4
from ms4.models.answer import Answer, Done
from ms4.models.model import Model
from ms4.models.prompt import Prompt
from ms4.models.sampling import Choice, Sampler, SamplingParams
from ms4.models.scheduler import PROMPT_CHUNK, Scheduler
from ms4.models.timeline import BLOCK
from ms4.quant.tiny import Tiny, write_tiny

N_CTX = 8192


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("together") / "tiny.gguf", Tiny(n_context=N_CTX))[0]


@pytest.fixture
def model(path):
    with Model.open(path) as opened:
        yield opened


class Recorder:
    """Stands before an engine: notes the spans of every step, and calls `before` with them."""

    def __init__(self, engine):
        self.engine, self.n_batch = engine, engine.n_batch
        self.steps = []
        self.n_ended = 0
        self.before = lambda spans: None

    @property
    def note(self):
        return self.engine.note

    def session(self, n_ctx):
        return self.engine.session(n_ctx)

    def step(self, spans):
        self.steps.append(list(spans))
        self.before(spans)
        try:
            return self.engine.step(spans)
        finally:
            self.n_ended += 1

    def served(self, answer):
        """Of each step, how many tokens the answer had in it."""
        return [sum(len(span.ids) for span in step if span.stop is answer.stop_flag) for step in self.steps]


class Endless(Sampler):
    """Greedy among the ordinary tokens: no answer ends by itself.  It keeps what it was given, which is
    all logits."""

    n_highest = 0

    def __init__(self):
        super().__init__(SamplingParams(temperature=0.0))
        self.logits = []

    def pick(self, logits, n_top=None):
        self.logits.append(logits.copy())
        return Choice(1000 + int(logits[1000:].argmax()), 0.0)


def ids_of(n, seed):
    return np.random.default_rng(seed).integers(1000, 1400, n).tolist()


def make(ids, **options):
    return Answer(Prompt(ids), Endless(), tekken(), N_CTX, **options)


def given(answer):
    return np.array(answer._sampler.logits)


def alone(model, ids, most):
    """(ids, logits) of an answer, from a session of its own and no scheduler."""
    with model.session(N_CTX) as session:
        sampler, said = Endless(), []
        fed = ids
        while len(said) < most:
            said.append(sampler.pick(session.feed(fed)).id)
            fed = said[-1:]
    return said, np.array(sampler.logits)


def test_four_sessions_decoding_together_give_the_bits_that_each_gives_alone(model):
    prompts = [ids_of(n, n) for n in (3, 40, 200, 513)]
    engine = Recorder(model.engine)
    with Scheduler(engine) as scheduler:
        answers = [make(ids, max_tokens=40) for ids in prompts]
        lines = [scheduler.open(N_CTX) for _ in answers]
        gate = threading.Event()
        engine.before = lambda spans: gate.wait(60)
        handles = [scheduler.submit(answer, line) for answer, line in zip(answers, lines, strict=True)]
        gate.set()
        for handle in handles:
            assert list(handle)[-1].reason == "length"
    assert sum(len(step) == 4 for step in engine.steps) >= 35
    for ids, answer in zip(prompts, answers, strict=True):
        said, logits = alone(model, ids, 40)
        assert answer.ids == said and np.array_equal(given(answer), logits)


def test_while_a_prompt_is_read_another_decodes_in_every_step(model):
    engine = Recorder(model.engine)
    with Scheduler(engine) as scheduler:
        talker, reader = make(ids_of(9, 1), max_tokens=20), make(ids_of(6000, 2), max_tokens=2)
        lines, handles = [scheduler.open(N_CTX) for _ in range(2)], []
        engine.before = lambda spans: len(engine.steps) == 3 and handles.append(scheduler.submit(reader, lines[1]))
        list(scheduler.submit(talker, lines[0]))
        list(handles[0])
    table = np.array([engine.served(talker), engine.served(reader)]).T
    talking = table[: np.flatnonzero(table[:, 0])[-1] + 1]
    assert (talking[1:, 0] == 1).all() and len(talking) == 20
    assert talking[:, 1].max() == PROMPT_CHUNK and (talking[3:, 1] > 0).all()
    assert reader.ids == alone(model, ids_of(6000, 2), 2)[0]


def test_sessions_open_and_close_during_a_step(model):
    engine = Recorder(model.engine)
    with Scheduler(engine) as scheduler:
        running = scheduler.submit(make(ids_of(6000, 2), max_tokens=1), scheduler.open(N_CTX))
        n_during = 0
        while running.answer.reason is None:
            n_ended = engine.n_ended
            within = len(engine.steps) > n_ended
            scheduler.drop(scheduler.open(N_CTX))
            n_during += within and engine.n_ended == n_ended
        list(running)
    # Opened and closed while a step went on.  Who waits for its end would do that never, or once if the end came late.
    assert n_during > 2 * len(engine.steps)


def test_a_thousand_stops_at_random_moments_are_all_honoured(model):
    random = Random(SEED)
    lines, live, n_stopped, n_waiting = [], [], 0, 0
    with Scheduler(model.engine) as scheduler:
        lines += [scheduler.open(N_CTX) for _ in range(4)]
        while n_stopped < 1000:
            while len(live) < 12:  # three for a timeline, so that most of them wait
                answer = make(ids_of(random.randint(1, 500), random.randint(0, 9)))
                if random.random() < 0.1:
                    answer.stop_flag.set()
                live.append(scheduler.submit(answer, random.choice(lines)))
            chosen = [live.pop(random.randrange(len(live))) for _ in range(random.randint(1, 4))]
            for running in chosen:
                for _ in range(random.randint(0, 3)):
                    if not running.begun or isinstance(next(running), Done):
                        break
                n_waiting += not running.begun
                running.cancel()
            for running in chosen:
                rest = list(running)
                assert running.answer.done.reason == "interrupted"
                assert rest == [] or (rest[-1] is running.answer.done and sum(isinstance(e, Done) for e in rest) == 1)
            n_stopped += len(chosen)
        for line in lines:
            scheduler.drop(line)
        for running in live:
            assert list(running)[-1].reason == "interrupted"
        assert 100 < n_waiting < n_stopped - 100
        # The engine is as good as before.
        answer = make(ids_of(50, 1), max_tokens=9)
        list(scheduler.submit(answer, scheduler.open(N_CTX)))
        assert answer.ids == alone(model, ids_of(50, 1), 9)[0]


def test_two_sessions_with_a_common_prefix_hold_it_once(model):
    common = ids_of(4000, 5)
    with Scheduler(model.engine) as scheduler:
        answers = [make(common + ids_of(50, seed), max_tokens=20) for seed in (6, 7)]
        handles = [scheduler.submit(answer, scheduler.open(N_CTX)) for answer in answers]
        for handle in handles:
            list(handle)
        assert sum(answer.n_cached for answer in answers) >= 4000 - 1
        # Both hold 4,000 positions in common, and each has an end of its own.
        n_blocks = model.engine.stats().kv_blocks
        assert n_blocks <= -(-4000 // BLOCK) + 2 * (1 + -(-70 // BLOCK))
    for seed, answer in zip((6, 7), answers, strict=True):
        said, logits = alone(model, common + ids_of(50, seed), 20)
        assert answer.ids == said and np.array_equal(given(answer), logits)


def test_an_error_of_one_answer_is_not_that_of_another(model):
    with Scheduler(model.engine) as scheduler:
        bad, good = make(ids_of(20, 1)), make(ids_of(20, 2), max_tokens=9)
        bad.prompt.tokens[3] = 10**9  # no token of this model
        handles = [scheduler.submit(answer, scheduler.open(N_CTX)) for answer in (bad, good)]
        with pytest.raises((ValueError, ms4.EngineError)):
            list(handles[0])
        assert list(handles[1])[-1].reason == "length"
    assert good.ids == alone(model, ids_of(20, 2), 9)[0]
