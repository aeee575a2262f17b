"""Logits to one token."""

import math

import numpy as np
import pytest
from standins import highest

import ms4
from ms4 import NotFinite
from ms4.models.sampling import (
    DEFAULTS,
    Choice,
    Sampler,
    SamplingError,
    SamplingParams,
    choose,
    log_probabilities,
    uniform_numbers,
)

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits(*probabilities):
    return np.log(np.array(probabilities)).astype(np.float32)


def drawn(values, n=400, seed=7, **settings):
    sampler = Sampler(SamplingParams(**{**OFF, **settings}, seed=seed))
    return [sampler.pick(values).id for _ in range(n)]


def definition(values, temperature, top_k, top_p, min_p):
    """The set that may be drawn from, by sorting: {id: probability}."""
    weights = np.exp((values.astype(np.float64) - values.max()) / temperature)
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))[: top_k or None]
    wanted, kept, total = top_p * sum(weights[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        total += weights[i]
        if total >= wanted and top_p < 1:
            break
    kept = [i for i in kept if weights[i] >= min_p]
    return {i: weights[i] / sum(weights[j] for j in kept) for i in kept}


def test_temperature_zero_takes_the_highest_and_of_equals_the_first():
    sampler = Sampler(SamplingParams(temperature=0.0))
    assert sampler.pick(np.float32([0, 3, 1, 3])).id == 1
    assert math.isnan(sampler.pick(np.float32([0, 3])).logprob)


def test_log_probabilities_are_those_of_the_model():
    choice = Sampler(SamplingParams(temperature=0.0)).pick(logits(0.1, 0.6, 0.1, 0.2), 3)
    assert choice.id == 1 and choice.logprob == pytest.approx(math.log(0.6), abs=1e-6)
    assert [id for id, _ in choice.top] == [1, 3, 0]
    assert [math.exp(p) for _, p in choice.top] == pytest.approx([0.6, 0.2, 0.1], abs=1e-6)
    # Temperature and cuts change what is chosen, not what is reported.
    hot = Sampler(SamplingParams(temperature=2.0, top_k=1, seed=1)).pick(logits(0.1, 0.6, 0.1, 0.2), 0)
    assert hot == Choice(1, pytest.approx(math.log(0.6), abs=1e-6))
    assert len(Sampler(SamplingParams(temperature=0.0)).pick(logits(0.5, 0.5), 9).top) == 2


@pytest.mark.parametrize(
    "settings, allowed",
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {0, 1, 2}),  # of the equals 1 and 3, the first
        ({"top_p": 0.39}, {2}),
        ({"top_p": 0.41}, {0, 2}),
        ({"top_p": 0.8}, {0, 1, 2}),
        ({"top_k": 2, "top_p": 0.5}, {2}),  # 0.4 of the 0.7 that top-k leaves
        ({"min_p": 0.6}, {0, 2}),
        ({"min_p": 1.0}, {2}),
        ({}, {0, 1, 2, 3, 4}),
    ],
)
def test_what_may_be_drawn_by_hand(settings, allowed):
    assert set(drawn(logits(0.3, 0.125, 0.4, 0.125, 0.05), **settings)) == allowed


def test_frequencies_are_the_probabilities():
    n = 8000
    counts = np.bincount(drawn(logits(0.5, 0.3, 0.2), n), minlength=3) / n
    assert counts == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    squared = np.bincount(drawn(logits(0.5, 0.3, 0.2), n, temperature=0.5), minlength=3) / n
    assert squared == pytest.approx(np.array([0.25, 0.09, 0.04]) / 0.38, abs=0.02)
    # Here half of the weight lies in tokens that are each unlikely.
    many = np.zeros(40001, np.float32)
    many[7] = math.log(40000)
    assert np.mean(np.array(drawn(many, 1000)) == 7) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 8.0])
def test_every_draw_is_in_the_set_that_sorting_gives(rng, spread):
    for _ in range(40):
        values = (rng.normal(0, 1, int(rng.integers(1, 300))) * spread).astype(np.float32)
        values = np.round(values, 1) if rng.random() < 0.5 else values  # many equals
        settings = {
            "temperature": float(rng.choice([0.2, 1.0, 3.0])),
            "top_k": int(rng.choice([0, 1, 5, 1000])),
            "top_p": float(rng.choice([0.01, 0.5, 0.95, 0.9999, 1.0])),
            "min_p": float(rng.choice([0.0, 1e-4, 0.1, 1.0])),
        }
        allowed = definition(values, **settings)
        got = drawn(values, 60, seed=int(rng.integers(2**32)), **settings)
        assert set(got) <= set(allowed), settings
        likely = {i for i, p in allowed.items() if p > 0.5}
        assert likely <= set(got)


def test_the_same_seed_gives_the_same_tokens():
    values = np.linspace(0, 3, 1000, dtype=np.float32)
    assert drawn(values, seed=5) == drawn(values, seed=5)
    assert drawn(values, seed=5) != drawn(values, seed=6)
    # Of equal tokens the one is taken at which the random number points.  Written down, because it must hold on every
    # machine and in every release.
    assert drawn(np.zeros(1000, np.float32), 8, seed=5) == [805, 807, 515, 285, 53, 383, 408, 45]


def test_a_seed_is_drawn_and_told_when_none_is_given():
    a, b = Sampler(SamplingParams()), Sampler(SamplingParams())
    assert a.seed != b.seed
    values = np.zeros(1000, np.float32)
    assert a.pick(values).id == Sampler(SamplingParams(seed=a.seed)).pick(values).id


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_logit_that_is_not_finite_is_an_error_and_never_a_token(bad, temperature):
    values = np.zeros(1000, np.float32)
    values[500] = bad
    with pytest.raises(NotFinite, match="not a finite"):
        Sampler(SamplingParams(temperature=temperature, seed=1)).pick(values)


@pytest.mark.parametrize(
    "name, value",
    [("temperature", v) for v in (math.nan, math.inf, -1, 10.1, "1", True)]
    + [("top_k", v) for v in (-1, 2**31, 1.5, math.nan)]
    + [("top_p", v) for v in (0, 1.1, -0.1, math.nan)]
    + [("min_p", v) for v in (-0.1, 1.1, math.inf)]
    + [("seed", v) for v in (-1, 2**64, 1.0, 10**5000)],
    ids=lambda value: str(value)[:9] if isinstance(value, (str, float)) else "",
)
def test_settings_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(SamplingError, match=name.replace("_", "-") + " is .*must be .* ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 200


def test_defaults_follow_the_effort_and_what_is_given_goes_first():
    assert SamplingParams.for_effort("none") == SamplingParams(temperature=DEFAULTS["none"]["temperature"])
    assert SamplingParams.for_effort("high") == SamplingParams(temperature=0.7, top_p=0.95)
    assert SamplingParams.for_effort("high", top_p=0.5, seed=3) == SamplingParams(0.7, top_p=0.5, seed=3)
    assert SamplingParams.for_effort("high", temperature=0.0).temperature == 0
    assert SamplingParams.for_effort("none", greedy=True).temperature == 0
    with pytest.raises(SamplingError, match="exclude"):
        SamplingParams.for_effort("none", greedy=True, temperature=0.5)


def test_extreme_settings_still_give_a_token():
    values = np.float32([-3e38, 3e38, 0])
    for settings in ({"temperature": 1e-300}, {"temperature": 10.0}, {"top_p": 1e-300}, {"top_k": 2**31 - 1}):
        assert set(drawn(values, 5, **settings)) == {1}
    assert set(drawn(np.float32([5]), 5, top_p=0.5, top_k=3, min_p=0.5)) == {0}


# --- the core against its definition ---


def core(values, params, uniforms):
    """What the C core draws from one row with each of the numbers."""
    how = {name: getattr(params, name) for name in OFF}
    return [int(ms4.sample(values[None], uniforms[i : i + 1], **how).ids[0]) for i in range(len(uniforms))]


def some_logits(rng, kind, n):
    """Logits as a model gives them, or as it should not."""
    values = rng.normal(0, 2.6, n)
    if kind in ("likely", "ties"):
        few = rng.choice(n, min(n, 60), replace=False)
        values[few] = 6 + np.sort(rng.exponential(4, len(few)))
    elif kind == "flat":
        values = rng.normal(0, 0.05, n)
    elif kind == "equal":
        values = np.full(n, 3.0)
    elif kind == "peaked":
        values[rng.integers(n)] = 90
    return (np.round(values * 2) / 2 if kind == "ties" else values).astype(np.float32)


KINDS = ("likely", "ties", "flat", "equal", "peaked")
CUTS = [
    {},
    {"top_k": 40},
    {"top_k": 1500, "min_p": 1e-4},
    {"top_p": 0.95},
    {"top_p": 0.5},
    {"min_p": 0.05},
    {"min_p": 1e-9, "top_p": 0.999},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


def test_from_the_highest_alone_come_the_same_tokens(rng):
    settings = [{"temperature": 0.0, "top_k": 7}, {"top_k": 1}, {"top_k": 40}, {"top_k": 50, "top_p": 0.9}]
    settings += [{"top_k": 256, "top_p": 0.5, "min_p": 0.02}, {"top_k": 40, "min_p": 0.3, "temperature": 0.1}]
    for how in settings:
        for kind in KINDS:
            values = some_logits(rng, kind, 3000) - np.float32(3)  # of equal ones some may be 0 and some -0
            values[rng.random(3000) < 0.1] *= -1
            all_of_them, few = (Sampler(SamplingParams(**{**OFF, **how}, seed=5)) for _ in range(2))
            (given,) = highest(values[None], few.n_highest, 3000).ids
            for _ in range(40):
                assert few.pick_highest(ms4.Highest(values[given], given)) == all_of_them.pick(values), (how, kind)
            assert few.n_drawn == all_of_them.n_drawn


@pytest.mark.parametrize("how", [{}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 257}])
def test_what_depends_on_all_logits_is_not_drawn_from_few(how):
    assert Sampler(SamplingParams(**how)).n_highest == 0


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0])
def test_ten_thousand_draws_from_a_whole_vocabulary(rng, temperature, cut):
    params = SamplingParams(temperature, **cut)
    for kind in KINDS:
        for _ in range(4):
            values, uniforms = some_logits(rng, kind, 131072), rng.random(500)
            assert core(values, params, uniforms) == choose(values, params, uniforms).tolist(), kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_core_draws_what_the_definition_says(rng, kind):
    for n in (1, 2, 3, 127, 128, 129, 300, 3000, 131072):
        for cut in CUTS if n > 1000 else [*CUTS, {"top_k": n}, {"top_k": 1}, {"top_p": 1e-300}, {"min_p": 1.0}]:
            params = SamplingParams(float(rng.choice([1e-300, 0.1, 0.3, 1.0, 10.0])), **cut)
            values, uniforms = some_logits(rng, kind, n), np.append(rng.random(10), 0.0)
            assert core(values, params, uniforms) == choose(values, params, uniforms).tolist(), params


def test_small_vocabularies_of_many_equals(rng):
    for _ in range(400):
        n, step = int(rng.integers(1, 400)), rng.choice([1, 2, 4])
        values = (np.round(rng.normal(0, 1, n) * step * rng.choice([0.1, 1, 8])) / step).astype(np.float32)
        values[values == 0] *= rng.choice([-1, 1])  # zeros of both signs are equal
        params = SamplingParams(
            float(rng.choice([0.1, 0.5, 1.0, 2.0])),
            int(rng.choice([0, 1, 2, 5, 40])),
            float(rng.choice([0.01, 0.5, 0.95, 1.0, 1.0])),
            float(rng.choice([0.0, 0.0, 1e-4, 0.1, 1.0])),
        )
        uniforms = rng.random(8)
        assert core(values, params, uniforms) == choose(values, params, uniforms).tolist(), (values, params)


def test_the_largest_random_number_draws_one_of_those_allowed(rng):
    for _ in range(300):
        values = some_logits(rng, rng.choice(KINDS), int(rng.integers(1, 500)))
        how = {"temperature": 1.0, "top_k": 30, "top_p": float(rng.choice([0.3, 1.0])), "min_p": 0.01}
        (id,) = core(values, SamplingParams(**how), np.array([1 - 2.0**-53]))
        assert id in definition(values, **how)


def test_logits_to_the_end_of_memory_and_no_further(guarded, rng):
    for n in (1, 15, 16, 100, 128, 1000):
        values = guarded(some_logits(rng, "likely", n))
        for cut in CUTS:
            params = SamplingParams(0.7, **cut)
            assert core(values, params, np.array([0.3])) == choose(values, params, np.array([0.3])).tolist()


def test_log_probabilities_and_the_most_likely_are_those_of_the_definition(rng):
    for kind in KINDS:
        for n in (1, 7, 200, 131072):
            values = some_logits(rng, kind, n)
            want, n_top = log_probabilities(values), int(rng.integers(0, 30))
            choice = Sampler(SamplingParams(1.0, seed=n)).pick(values, n_top)
            order = np.argsort(-values, kind="stable")[:n_top]
            assert choice.logprob == pytest.approx(want[choice.id], abs=1e-12)
            assert [id for id, _ in choice.top] == order.tolist()
            assert [p for _, p in choice.top] == pytest.approx(want[order].tolist(), abs=1e-12)
    everything = Sampler(SamplingParams(0.0)).pick(values, n)
    assert len(everything.top) == n and len({id for id, _ in everything.top}) == n


def test_rows_chosen_together_are_those_chosen_one_after_the_other(rng):
    rows = np.stack([some_logits(rng, kind, 5000) for kind in KINDS])
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 100}):
        together, alone = (Sampler(SamplingParams(**settings, seed=3)) for _ in range(2))
        assert together.pick_rows(rows, 2) == [alone.pick(row, 2) for row in rows]
        assert [c.id for c in together.pick_rows(rows)] == [alone.pick(row).id for row in rows]
    assert Sampler(SamplingParams(1.0)).pick_rows(rows[:0]) == []


def test_a_logit_that_is_not_finite_is_found_wherever_it_is(rng):
    for n in (1, 16, 127, 128, 129, 1000):
        for at in {0, 1, n // 2, n - 1} & set(range(n)):
            for bad in (math.nan, -math.nan, math.inf, -math.inf):
                rows = np.stack([some_logits(rng, "likely", n) for _ in range(2)])
                rows[1, at] = bad
                for settings in ({"temperature": 0.0}, {"temperature": 1.0, "top_k": 3, "top_p": 0.5}):
                    with pytest.raises(NotFinite):
                        Sampler(SamplingParams(**settings)).pick_rows(rows, 0)


def test_every_failing_allocation_is_an_error_and_no_token(monkeypatch, rng):
    values = some_logits(rng, "likely", 3000)
    for settings in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 30, "top_p": 0.9}):
        sampler = Sampler(SamplingParams(**settings))
        sampler.pick(values, 3)
        for n in range(1, 20):
            monkeypatch.setenv("MS4_FAIL_ALLOC", str(n))
            try:
                sampler.pick(values, 3)
            except MemoryError as error:
                assert "to choose a token" in str(error)
                continue
            finally:
                monkeypatch.delenv("MS4_FAIL_ALLOC")
                Sampler(SamplingParams(0.0)).pick(values)  # the count begins anew
            break
        assert 3 < n < 15


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": math.nan}, {"temperature": math.inf}, {"top_k": -1}, {"top_p": 0.0}]
    + [{"top_p": 1.1}, {"top_p": math.nan}, {"min_p": -0.1}, {"min_p": 2.0}, {"min_p": math.nan}, {"n_top": -1}]
    + [{"uniforms": np.array([1.0])}, {"uniforms": np.array([-0.1])}, {"uniforms": np.array([math.nan])}]
    + [{"uniforms": None}, {"uniforms": np.zeros(2)}, {"logits": np.zeros((1, 0), np.float32)}],
    ids=str,
)
def test_the_core_refuses_what_no_sampler_asks_for(wrong):
    right = {"logits": np.zeros((1, 9), np.float32), "uniforms": np.array([0.5]), "temperature": 1.0}
    assert ms4.sample(**right).ids.tolist() == [4]
    with pytest.raises(ValueError):
        ms4.sample(**{**right, **wrong})


def test_random_numbers_are_the_raw_ones_of_the_seed():
    random, raw = np.random.PCG64(11), np.random.PCG64(11).random_raw(4)
    assert uniform_numbers(random, 3).tolist() == [int(number) // 2**11 / 2**53 for number in raw[:3]]
    assert uniform_numbers(random, 1).tolist() == [int(raw[3]) // 2**11 / 2**53]
