"""Traces against slots: each policy against a definition that fits on a screen."""

from itertools import combinations
from random import Random

import numpy as np
import pytest

from ms4 import Policy
from ms4.cli.options import DEMO
from ms4.models.answer import Answer
from ms4.models.clock import sizes_of
from ms4.models.mistral4 import tensors_of
from ms4.models.model import Model
from ms4.models.replay import NAMES, POLICIES, Decayed, Furthest, Outcome, Room, replay
from ms4.models.routing import SKEWS, Recorder, Skew, Trace, synthetic
from ms4.models.sampling import Sampler, SamplingParams
from ms4.models.tokenizer import Tokenizer
from ms4.models.training.skills import KINDS, questions

N_LAYER, N_EXPERT = 3, 12
N = N_LAYER * N_EXPERT


def drawn(rng, n_steps=150, prompts=True):
    """A trace with prompts in it, whose last layer computes one token."""
    rows, picks = [], []
    for _ in range(n_steps):
        n = int(rng.integers(2, 9)) if prompts and rng.random() < 0.05 else 1
        rows.append([n] * (N_LAYER - 1) + [1])
        favourite = rng.integers(N_EXPERT, size=3)
        for _ in range(sum(rows[-1])):
            weights = np.ones(N_EXPERT)
            weights[favourite] += 5
            picks.append(np.sort(rng.choice(N_EXPERT, 2, replace=False, p=weights / weights.sum())))
    return Trace(N_EXPERT, np.array(rows, np.int32), np.array(picks, np.uint8))


def used(trace):
    """Of each step: is it one token, and for each layer the ids."""
    for rows, step in zip(trace.rows, trace.steps(), strict=True):
        yield rows.max() == 1, [sorted({i * N_EXPERT + int(e) for e in p.ravel()}) for i, p in enumerate(step)]


def test_lru_is_the_textbook_one(rng):
    trace, n_vram = drawn(rng), 10
    order, misses = [], []
    for single, layers in used(trace):
        found = []
        for ids in layers:
            found.append(sum(id not in order[-n_vram:] for id in ids))
            order = [id for id in order if id not in ids] + ids
        if single:
            misses.append(found)
    got = replay(trace, "lru", Room(n_vram, N))
    assert got.misses.tolist() == misses and not got.reads.any()
    assert got.uploads.sum() == got.misses.sum()


def test_lru_over_two_places_reads_what_one_of_both_together_would_miss(rng):
    trace = drawn(rng)
    both = replay(trace, "lru", Room(6, 9))
    assert both.reads.tolist() == replay(trace, "lru", Room(15, N)).misses.tolist()
    assert both.misses.tolist() == replay(trace, "lru", Room(6, N)).misses.tolist()
    no_card = replay(trace, "lru", Room(0, 15))
    assert no_card.reads.tolist() == both.reads.tolist() and (no_card.misses == 2).all()


def test_static_holds_what_the_tokens_use_most(rng):
    trace = drawn(rng, prompts=False)
    counts = np.bincount([id for _, layers in used(trace) for ids in layers for id in ids], minlength=N)
    got = replay(trace, "static", Room(7, N))
    assert counts.sum() - got.misses.sum() == np.sort(counts)[-7:].sum()
    tiers = replay(trace, "static", Room(7, 5))
    assert counts.sum() - tiers.reads.sum() == np.sort(counts)[-12:].sum()


def fewest_misses(events, n):
    """By trying every set that n places can hold after every use."""
    costs = {frozenset(): 0}
    for id in events:
        after = {}
        for held, cost in costs.items():
            if id in held:
                options = [held]
            else:
                cost += 1
                options = [held] + [frozenset(k) | {id} for k in combinations(held, min(len(held), n - 1))]
            for option in options:
                after[option] = min(after.get(option, 1 << 30), cost)
        costs = after
    return min(costs.values())


def test_the_optimum_misses_as_few_as_any_choice_could(rng):
    for _ in range(20):
        events, n = rng.integers(0, 6, 14).tolist(), int(rng.integers(1, 4))
        places, misses = Furthest(n), 0
        for i, id in enumerate(events):
            later = [j for j in range(i + 1, len(events)) if events[j] == id]
            misses += not places.use(id, later[0] if later else 1 << 60)
            assert len(places.next) <= n
        assert misses == fewest_misses(events, n)


@pytest.mark.parametrize("name", NAMES)
def test_nobody_beats_the_optimum(rng, name):
    trace = drawn(rng, prompts=False)
    for n_vram, n_ram in ((5, N), (20, N), (5, 9), (0, 9)):
        room = Room(n_vram, n_ram)
        best, got = replay(trace, "optimum", room), replay(trace, name, room)
        if name != "static":  # whose places are filled before the first token
            assert best.misses.sum() <= got.misses.sum() and best.reads.sum() <= got.reads.sum()
        assert got.misses.shape == (150, N_LAYER) and (got.reads <= got.misses).all()


@pytest.mark.parametrize("name", NAMES)
def test_where_all_fits_only_first_uses_miss(rng, name):
    trace = drawn(rng, prompts=False)
    got = replay(trace, name, Room(N, N))
    n_first = len({id for _, layers in used(trace) for ids in layers for id in ids})
    assert got.misses.sum() == (0 if name == "static" else n_first)


def test_the_policy_of_the_engine_keeps_to_the_room_and_uses_all_of_it(rng):
    trace = drawn(rng)
    room = Room(6, 9, budget=1)
    places = Decayed(trace, room)
    for rows, step in zip(trace.rows, trace.steps(), strict=True):
        for layer, picks in enumerate(step):
            ids = sorted({layer * N_EXPERT + int(e) for e in picks.ravel()})
            places.use(layer, ids, [1] * len(ids), len(picks))
            assert ((places.where & Policy.RAM) > 0).sum() == places.n_ram <= 9
        held = (places.where > 0).sum()
        places.end(rows.max() > 1)
        assert (places.where > 0).sum() == held  # nobody is lost on the way
        assert ((places.where & Policy.VRAM) > 0).sum() == places.n_vram <= 6
        assert ((places.where & Policy.RAM) > 0).sum() == places.n_ram <= 9
    assert places.n_vram == 6 and (places.where > 0).sum() == 15


def test_the_policy_of_the_engine_stays_within_its_budget(rng):
    trace = drawn(rng, 400, prompts=False)
    for budget in (0.25, 1, 3):
        got = replay(trace, "decayed", Room(12, N, budget))
        assert 0 < got.uploads.sum() <= 400 * budget + 2
        assert got.uploads.max() <= max(budget, 2)


def test_experts_that_are_used_every_time_come_to_stay():
    rows = np.ones((200, 1), np.int32)
    picks = np.array([[0, 1 + t % 11] for t in range(200)], np.uint8)
    got = replay(Trace(12, rows, picks), "decayed", Room(1, 12, 1))
    assert got.misses[:2, 0].tolist() == [2, 1] and (got.misses[2:, 0] == 1).all()


def test_a_prompt_fills_the_slots_for_the_tokens_after_it():
    rows = np.array([[60], *[[1]] * 10], np.int32)
    picks = np.array([[3, 7]] * 50 + [[0, 1]] * 10 + [[3, 7]] * 10, np.uint8)
    got = replay(Trace(12, rows, picks), "decayed", Room(2, 12, 0.1))
    assert not got.misses.any() and got.misses.shape == (10, 1)


@pytest.mark.slow
def test_the_default_policy_is_good_on_coherent_traces_and_safe_on_uniform_ones():
    """With the bytes that a bus has left, 12 experts a token of 36 layers: near LRU, which copies three times as
    many; and never worse than LRU where nothing can be learnt."""
    coherent = synthetic(SKEWS["coherent"], 900, n_prompt=200, n_layer=12, seed=1)
    n = 12 * 128
    room = Room(round(0.27 * n), n, 4)
    lru, ours = replay(coherent, "lru", room), replay(coherent, "decayed", room)
    assert ours.hit_rate > lru.hit_rate - 0.1 and ours.uploads.sum() < lru.uploads.sum() / 3
    uniform = synthetic(Skew(), 500, n_prompt=200, n_layer=12, seed=1)
    lru, ours = replay(uniform, "lru", room), replay(uniform, "decayed", room)
    assert abs(ours.hit_rate - lru.hit_rate) < 0.03 and ours.uploads_per_token <= 4.1


def test_rates_are_of_all_choices():
    outcome = Outcome("x", np.array([[1, 0], [0, 1]]), np.array([[1, 0], [0, 0]]), np.array([3, 1]), 2)
    assert (outcome.hit_rate, outcome.read_rate, outcome.uploads_per_token) == (0.75, 0.125, 2)
    assert set(NAMES) == set(POLICIES)


@pytest.mark.slow
def test_the_engine_reads_from_the_disk_as_often_as_the_replay_says():
    """The demonstration with slots for 40 and 60 % of its experts: within a tenth of the replay of its own trace."""
    for share in (0.4, 0.6):
        with Model.open(DEMO, load="stream", threads=1) as model, model.session(2048) as session:
            tokenizer, sampler = Tokenizer(model.vocabulary), Sampler(SamplingParams(temperature=0))
            sizes = sizes_of(model.shape, tensors_of(model.gguf, model.shape))
            model.engine.fix_slots(int(share * sizes.experts))
            random, read, wanted = Random(11), 0, 0
            with Recorder(model.engine) as recorder:
                for kind in KINDS:
                    *_, question = questions(KINDS[kind](random))
                    answer = Answer(question.prompt(tokenizer), sampler, tokenizer, 2048, max_tokens=150)
                    session.rewind(0)
                    answer.choose(session.feed(answer.prompt.ids))
                    before = model.engine.stats()
                    while answer.reason is None:
                        answer.choose(session.feed(answer.ids[-1:]))
                    after = model.engine.stats()
                    read += after.experts_read - before.experts_read
                    wanted += after.experts_wanted - before.experts_wanted
        trace = recorder.trace()
        said = replay(trace, "decayed", Room(0, after.slots)).read_rate
        assert read / wanted == pytest.approx(said, rel=0.1)
