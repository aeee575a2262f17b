"""Which experts deserve a fast place: counts that fade, and the moves that pay."""

import math

import numpy as np
import pytest

from ms4 import EngineError, Policy

N_LAYER, N_EXPERT = 3, 16


def ids(*values):
    return np.array(values, np.int32)


def places(policy, ram=(), vram=(), busy=()):
    where = np.zeros(policy.n_layer * policy.n_expert, np.uint8)
    for bit, members in ((Policy.RAM, ram), (Policy.VRAM, vram), (Policy.BUSY, busy)):
        where[list(members)] |= bit
    return where


def use(policy, *experts, layer=0, times=1):
    for _ in range(times):
        policy.count(layer, ids(*experts), np.ones(len(experts), np.int32), 1)


def test_a_use_counts_half_after_the_half_life():
    with Policy(1, 4, half_life=8) as policy:
        use(policy, 2)
        assert policy.value(0, 2) == 1 and policy.value(0, 1) == 0
        use(policy, 1, times=8)
        assert policy.value(0, 2) == pytest.approx(0.5)


def test_counts_fade_as_the_definition_says_for_any_history(rng):
    """Also over so many tokens that the worth of a use is brought down many times, and over steps of many tokens."""
    half_life = float(rng.uniform(0.5, 200))
    with Policy(N_LAYER, N_EXPERT, half_life=half_life) as policy:
        want = np.zeros((N_LAYER, N_EXPERT))
        for _ in range(900):
            layer = int(rng.integers(N_LAYER))
            n_tokens = int(rng.choice([1, 1, 1, 1, 2, 7, 100, 5000]))
            experts = rng.permutation(N_EXPERT)[: rng.integers(0, 5)].astype(np.int32)
            pairs = rng.integers(1, n_tokens + 1, experts.size).astype(np.int32)
            policy.count(layer, experts, pairs, n_tokens)
            want[layer] *= 0.5 ** (n_tokens / half_life)
            want[layer, experts] += pairs / n_tokens * sum(0.5 ** (i / half_life) for i in range(n_tokens))
        got = [[policy.value(layer, e) for e in range(N_EXPERT)] for layer in range(N_LAYER)]
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-15)


def test_a_steady_rate_tends_to_what_the_header_says():
    with Policy(1, 2) as policy:
        for i in range(4000):
            use(policy, *([0, 1] if i % 4 == 0 else [0]))
        lasting = 48 / math.log(2)
        assert policy.value(0, 0) == pytest.approx(lasting, rel=0.01)
        assert policy.value(0, 1) == pytest.approx(lasting / 4, rel=0.03)


def test_a_prompt_counts_like_its_tokens_spread_evenly():
    with Policy(1, 3) as prompt, Policy(1, 3) as tokens:
        prompt.count(0, ids(0, 2), ids(1000, 250), 1000)
        for i in range(1000):
            use(tokens, *([0, 2] if i % 4 == 1 else [0]))
        assert prompt.value(0, 0) == pytest.approx(tokens.value(0, 0))
        assert prompt.value(0, 2) == pytest.approx(tokens.value(0, 2), rel=0.02)


def test_the_victim_is_worth_least_and_of_equals_the_first():
    with Policy(N_LAYER, N_EXPERT) as policy:
        use(policy, 3, 4, times=2)
        use(policy, 4, 5)
        use(policy, 1, layer=2)
        assert policy.victim(ids(4, 3, 5)) == 2
        assert policy.victim(ids(4, 3, 5, 7, 9, 6)) == 3
        assert policy.victim(ids(4, 2 * N_EXPERT + 1, 3)) == 1
        assert policy.victim(ids()) == -1


def test_free_slots_take_what_was_used_most_and_nothing_that_was_not():
    with Policy(N_LAYER, N_EXPERT) as policy:
        use(policy, 3)
        use(policy, 5, layer=1, times=3)
        everywhere = places(policy, ram=range(N_LAYER * N_EXPERT))
        assert policy.moves(everywhere, [9], [10], 1000) == [(N_EXPERT + 5, -1, False), (3, -1, False)]
        assert policy.moves(everywhere, [1], [10], 1000) == [(N_EXPERT + 5, -1, False)]
        assert policy.moves(everywhere, [9], [10], 19) == [(N_EXPERT + 5, -1, False)]
        assert policy.moves(everywhere, [9], [10], 9) == []
        assert policy.moves(everywhere, [9], [10], 1000, most=0) == []


def test_only_what_is_in_memory_moves_and_nothing_that_is_busy():
    with Policy(1, N_EXPERT) as policy:
        use(policy, 1, 2, 3, times=5)
        assert policy.moves(places(policy, ram=[3]), [9], [1], 99) == [(3, -1, False)]
        assert policy.moves(places(policy, ram=[3], busy=[3]), [9], [1], 99) == []
        full = places(policy, ram=[3], vram=[7, 8], busy=[7])
        assert policy.moves(full, [0], [1], 99) == [(3, 8, False)]
        assert policy.moves(places(policy, ram=[3], vram=[7], busy=[7]), [0], [1], 99) == []


def test_a_move_needs_a_margin_and_a_pay_back():
    with Policy(1, 8, half_life=1e6, margin=1.5, pay_back=2) as policy:
        where = places(policy, ram=range(8), vram=[0])
        use(policy, 1)
        assert policy.moves(where, [0], [1], 99) == []  # no margin over nothing, but one use only
        use(policy, 1, times=1)
        use(policy, 1, times=1)
        assert policy.moves(where, [0], [1], 99) == [(1, 0, False)]
        use(policy, 0, times=7)
        use(policy, 1, times=7)
        assert policy.value(0, 1) > policy.value(0, 0) + 2  # 10 to 7: worth the bytes, but below the margin
        assert policy.moves(where, [0], [1], 99) == []


def test_where_ram_is_short_what_leaves_comes_down_at_the_price_of_its_bytes():
    with Policy(1, 8, pay_back=0.5) as policy:
        use(policy, 1, 2, times=4)
        where = places(policy, ram=[1, 2], vram=[6, 7])
        assert policy.moves(where, [0], [10], 40, exclusive=True) == [(1, 6, True), (2, 7, True)]
        assert policy.moves(where, [0], [10], 39, exclusive=True) == [(1, 6, True)]
        where = places(policy, ram=[1, 2, 6], vram=[6, 7])
        assert policy.moves(where, [0], [10], 30, exclusive=True) == [(1, 6, False), (2, 7, True)]
        assert policy.moves(where, [0], [10], 30) == [(1, 6, False), (2, 7, False)]


def test_slots_of_different_sizes_do_not_mix_and_share_the_budget_by_what_a_byte_earns():
    with Policy(N_LAYER, N_EXPERT) as policy:
        use(policy, 1, layer=0, times=4)
        use(policy, 1, layer=1, times=5)
        use(policy, 1, layer=2, times=9)
        where = places(policy, ram=range(N_LAYER * N_EXPERT))
        pool = ids(0, 1, -1)
        small, large = (1, -1, False), (N_EXPERT + 1, -1, False)
        assert policy.moves(where, [1, 1], [10, 20], 100, pool=pool) == [small, large]
        assert policy.moves(where, [1, 0], [10, 20], 100, pool=pool) == [small]
        assert policy.moves(where, [0, 1], [10, 20], 100, pool=pool) == [large]
        assert policy.moves(where, [1, 1], [30, 20], 49, pool=pool) == [large]
        assert policy.moves(where, [1, 1], [30, 20], 50, pool=pool) == [large, small]


def definition(value, where, pool, free, size, budget, exclusive):
    found = []
    for k in range(len(free)):
        here = [i for i, bits in enumerate(where) if pool[i // 64] == k and not bits & Policy.BUSY]
        come = sorted((i for i in here if where[i] == Policy.RAM and value[i] > 0), key=lambda i: -value[i])
        leave = sorted((i for i in here if where[i] & Policy.VRAM), key=lambda i: value[i])
        for i, out in zip(come, [-1] * free[k] + leave, strict=False):
            left = value[out] if out >= 0 else 0.0
            if out >= 0 and not (value[i] > 1.25 * left and value[i] >= left + 1):
                break
            down = out >= 0 and exclusive and not where[out] & Policy.RAM
            cost = size[k] * (1 + bool(down))
            found.append(((value[i] - left) / cost, cost, (i, out, bool(down))))
    moves = []
    for _, cost, move in sorted(found, key=lambda entry: -entry[0]):
        if cost <= budget:
            budget -= cost
            moves.append(move)
    return moves


def test_moves_keep_their_rules_for_any_places(rng):
    """They are those of a definition that sorts, and no id is in two of them."""
    with Policy(4, 64, half_life=30) as policy:
        for _ in range(60):
            for layer in range(4):
                chosen = rng.permutation(64)[:4].astype(np.int32)
                policy.count(layer, chosen, ids(1, 1, 1, 1), 1)
            value = [policy.value(i // 64, i % 64) for i in range(256)]
            where, pool = rng.integers(0, 8, 256).astype(np.uint8), rng.integers(0, 2, 4).astype(np.int32)
            free, size = rng.integers(0, 3, 2).tolist(), rng.integers(1, 20, 2).tolist()
            budget, exclusive = int(rng.integers(0, 300)), bool(rng.integers(2))
            moves = policy.moves(where, free, size, budget, pool=pool, exclusive=exclusive)
            moved = [i for move in moves for i in move[:2] if i >= 0]
            assert len(moved) == len(set(moved)) and not any(where[i] & Policy.BUSY for i in moved)
            assert moves == definition(value, where, pool, free, size, budget, exclusive)


MIB = 1 << 20


def test_rates_are_those_of_what_was_seen_and_forget():
    with Policy(1, 2) as policy:
        assert policy.rates() == (0, 32)  # nothing is known: a guess
        policy.saw(10 * MIB, 1e6)
        policy.saw(10 * MIB, 3e6)
        assert policy.rates()[0] == pytest.approx(20 * MIB / 4e-3, rel=0.01)
        for _ in range(600):
            policy.saw(MIB, 1e6)
        assert policy.rates()[0] == pytest.approx(MIB / 1e-3, rel=1e-3)
        policy.saw(MIB, 0)
        policy.saw(0, 5)
        assert policy.rates()[0] == pytest.approx(MIB / 1e-3, rel=1e-3)


def cpu(policy, rows, fixed, of_row, n=3):
    """Steps in which the CPU takes so many ns for each MiB of an expert, and for each row of it."""
    for _ in range(n):
        policy.saw(7 * MIB, 7 * (fixed + of_row * rows), row_bytes=7 * MIB * rows)


def test_an_expert_is_brought_from_where_the_bus_is_faster_than_the_cpu(rng):
    """Both lines are straight here, so that the answer is known; few rows and many are measured far from it."""
    for _ in range(50):
        fixed, of_row, bus = rng.uniform(1e3, 1e6), rng.uniform(1e2, 1e5), rng.uniform(1e4, 4e6)
        with Policy(1, 2) as policy:
            cpu(policy, 1, fixed, of_row)
            cpu(policy, rng.uniform(4, 40), fixed, of_row)
            assert policy.rates()[1] == 32  # the bus is not known yet
            policy.saw(MIB, bus)
            want = min(max(math.ceil((bus - fixed) / of_row), 2), 4096)
            assert abs(policy.rates()[1] - want) <= 1


def test_without_the_work_of_a_prompt_the_guess_stays_and_with_nothing_else_the_line_is_from_nothing():
    with Policy(1, 2) as policy:
        policy.saw(MIB, 5e5)
        cpu(policy, 1, 1e4, 1e4)
        cpu(policy, 2.5, 1e4, 1e4)  # neither one row nor many
        assert policy.rates()[1] == 32
    with Policy(1, 2) as policy:
        policy.saw(MIB, 5e5)
        cpu(policy, 10, 0, 1e4)
        assert policy.rates()[1] == 50
        cpu(policy, 1, 2e5, 0)  # one row took longer than ten: no line to go by
        assert policy.rates()[1] == 50


def test_rates_by_hand_stand_until_they_are_taken_back():
    with Policy(1, 2) as policy:
        policy.saw(MIB, 1e6)
        policy.fix(5e9, 7)
        assert policy.rates() == (5e9, 7)
        policy.fix(0)
        assert policy.rates() == (pytest.approx(MIB / 1e-3), 32)


def test_what_may_be_brought_is_what_the_bus_carries_while_the_cpu_rests():
    with Policy(1, 2) as policy:
        assert policy.allow(1e9, 0, 0, 10) == 10 and policy.allow(1e9, 0, 1, 10) == 0  # the first one measures it
        policy.fix(1e9)  # a byte a ns
        assert policy.allow(1000, 700, 0, 10) == 300
        policy.spend(300)
        assert policy.allow(1000, 700, 120, 10) == 180  # what was asked for before is late
        policy.spend(180)
        assert policy.allow(500, 700, 0, 10) == 20  # saved up, to two of the largest
        policy.spend(1000)
        assert policy.allow(500, 700, 0, 10) == 0


def test_a_budget_below_one_expert_is_saved_up():
    with Policy(1, 2) as policy:
        policy.fix(1e9)
        moved = 0
        for _ in range(100):
            if policy.allow(30, 0, 0, 100) >= 100:
                policy.spend(100)
                moved += 1
        assert moved == 30
        for _ in range(100):
            allowed = policy.allow(30, 0, 0, 100)
        assert allowed == 200


def test_packed_counts_come_back_and_go_on_fading():
    with Policy(N_LAYER, N_EXPERT) as policy, Policy(N_LAYER, N_EXPERT) as other:
        use(policy, 3, 4, times=5)
        use(policy, 7, layer=2)
        packed = policy.pack(0xFEEDBEEF)
        assert len(packed) == 40 + 4 * N_LAYER * N_EXPERT
        use(other, 1, times=9)
        other.unpack(0xFEEDBEEF, packed)
        assert other.value(0, 1) == 0
        for layer in range(N_LAYER):
            for expert in range(N_EXPERT):
                assert other.value(layer, expert) == pytest.approx(policy.value(layer, expert), rel=1e-6)
        use(other, 9, times=48)
        assert other.value(0, 3) == pytest.approx(policy.value(0, 3) / 2, rel=1e-6)
        assert other.pack(0xFEEDBEEF) != packed


def test_foreign_and_damaged_counts_are_refused_and_change_nothing(rng):
    with Policy(N_LAYER, N_EXPERT) as policy, Policy(N_LAYER, N_EXPERT + 1) as larger:
        use(policy, 3, times=5)
        good = policy.pack(1)
        use(policy, 4)
        before = policy.pack(1)
        with pytest.raises(EngineError, match="another model"):
            policy.unpack(2, good)
        with pytest.raises(EngineError, match="another model"):
            larger.unpack(1, good)
        with pytest.raises(EngineError, match="format 2; this version reads 1"):
            policy.unpack(1, good[:8] + b"\2" + good[9:])
        for n in range(len(good)):
            with pytest.raises(EngineError):
                policy.unpack(1, good[:n])
        with pytest.raises(EngineError, match="damaged"):
            policy.unpack(1, good + b"\0")
        for at in range(len(good)):
            forged = bytearray(good)
            forged[at] ^= 1 << int(rng.integers(8))
            with pytest.raises(EngineError):
                policy.unpack(1, bytes(forged))
        assert policy.pack(1) == before


def test_an_allocation_that_fails_is_an_error_and_leaves_nothing(monkeypatch):
    for n in (1, 2, 3):
        monkeypatch.setenv("MS4_FAIL_ALLOC", str(n))
        with pytest.raises(MemoryError, match="counts of experts"):
            Policy(2, 3)
        monkeypatch.delenv("MS4_FAIL_ALLOC")
        Policy(2, 3).close()  # counting begins anew


def test_settings_that_make_no_sense_are_refused():
    for settings in ({"half_life": -1}, {"half_life": math.nan}, {"margin": math.inf}, {"pay_back": -0.5}):
        with pytest.raises(ValueError, match="half-life"):
            Policy(1, 1, **settings)
    for n_layer, n_expert in ((0, 1), (1, 0), (65536, 65536)):
        with pytest.raises(ValueError, match="layers of"):
            Policy(n_layer, n_expert)
