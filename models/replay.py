"""Replays a trace of routing against slots in VRAM and places in RAM, under one policy or another.

An expert is in VRAM, in RAM, in both, or on disk.  What a step uses and does not find in VRAM is a miss, which the CPU
computes; what is not in RAM either has to be read first.  Slots hold copies as long as RAM has room for everybody; then
the copies in RAM go, and what leaves VRAM without one takes the place in RAM of what comes.

    lru       every miss moves into VRAM at once; whoever was used longest ago leaves
    decayed   ms4's: csrc/policy.c decides, between tokens and within a budget of bytes
    static    the experts that the whole trace uses most, for ever: the best fixed choice, in hindsight
    optimum   whoever is used again last leaves or does not come (Belady): knows the future, a bound for all others

Only the steps of one token are counted; prompts fill the places, too.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ms4 import Policy
from ms4.models.clock import MS4, Engine, Machine, Sizes, Terms, decode
from ms4.models.routing import Trace

NEVER = 1 << 60


@dataclass(frozen=True)
class Room:
    """Experts that fit.  budget: experts that may be copied up between two tokens (of the policy that keeps one)."""

    n_vram: int
    n_ram: int
    budget: float = float("inf")


@dataclass(frozen=True)
class Outcome:
    """What the tokens of a trace found: int32 [tokens, layers with experts] each."""

    policy: str
    misses: np.ndarray  # not in VRAM
    reads: np.ndarray  # of them, on disk
    uploads: np.ndarray  # experts copied up after the token: [tokens]
    n_used: int

    @property
    def hit_rate(self) -> float:
        """Of all choices, those found in VRAM."""
        return 1 - float(self.misses.mean()) / self.n_used

    @property
    def read_rate(self) -> float:
        return float(self.reads.mean()) / self.n_used

    @property
    def uploads_per_token(self) -> float:
        return float(self.uploads.mean())


def predict(outcome: Outcome, sizes: Sizes, machine: Machine, engine: Engine = MS4, *, n_context: float = 0.0) -> Terms:
    """The time of a token of this model on this machine, if its routing is like the trace's, layer by layer.

    A trace of fewer layers stands for all: they take turns.
    """
    n_layer = outcome.misses.shape[1]
    turns = np.arange(sizes.n_layer) % n_layer
    scale = sizes.n_used / outcome.n_used
    uploads = outcome.uploads_per_token * sizes.n_layer / n_layer * scale * sizes.expert
    misses, reads = scale * outcome.misses[:, turns], scale * outcome.reads[:, turns]
    return decode(sizes, machine, engine, misses, reads=reads, uploads=uploads, n_context=n_context)


class Places(Protocol):
    """Where experts are, by id: layer * n_expert + expert."""

    def use(self, layer: int, ids: list[int], counts: list[int], n_tokens: int) -> tuple[int, int]:
        """A layer of a step uses these, ascending: (misses, reads)."""

    def end(self, prompt: bool) -> int:
        """The step is over: how many move up."""


def replay(trace: Trace, policy: str, room: Room, **settings: float) -> Outcome:
    """settings: those of `ms4.Policy`, for "decayed"."""
    return run(trace, policy, POLICIES[policy](trace, room, **settings))


def run(trace: Trace, name: str, places: Places) -> Outcome:
    misses, reads, uploads = [], [], []
    layers = np.flatnonzero(trace.rows.any(axis=0)).tolist()
    for picks, n_tokens in zip(trace.steps(), trace.rows.max(axis=1).tolist(), strict=True):
        found = []
        for layer in layers:
            if not len(picks[layer]):
                found.append((0, 0))
                continue
            ids, counts = distinct(picks[layer], layer * trace.n_expert)
            found.append(places.use(layer, ids, counts, len(picks[layer])))
        moved = places.end(n_tokens > 1)
        if n_tokens == 1:
            misses.append([miss for miss, _ in found])
            reads.append([read for _, read in found])
            uploads.append(moved)
    found_misses, found_reads = (np.array(rows, np.int32).reshape(-1, len(layers)) for rows in (misses, reads))
    return Outcome(name, found_misses, found_reads, np.array(uploads, np.int32), trace.n_used)


def distinct(picks: np.ndarray, first: int) -> tuple[list[int], list[int]]:
    """(ids, how often each), ascending."""
    if len(picks) == 1:
        return [first + int(e) for e in picks[0]], [1] * picks.shape[1]
    experts, counts = np.unique(picks, return_counts=True)
    return (first + experts.astype(int)).tolist(), counts.tolist()


@dataclass
class Recency:
    """`lru`: one order for each place, the first is the next to leave."""

    room: Room
    all_in_ram: bool
    vram: OrderedDict[int, None] = field(default_factory=OrderedDict)
    ram: OrderedDict[int, None] = field(default_factory=OrderedDict)
    moved: int = 0

    def use(self, layer: int, ids: list[int], counts: list[int], n_tokens: int) -> tuple[int, int]:
        missed = [id for id in ids if id not in self.vram]
        read = [] if self.all_in_ram else [id for id in missed if id not in self.ram]
        for id in ids:
            self.ram.pop(id, None)
            if self.room.n_vram:
                self.vram[id] = None
                self.vram.move_to_end(id)
            elif not self.all_in_ram:
                self.ram[id] = None
        while len(self.vram) > self.room.n_vram:
            out, _ = self.vram.popitem(last=False)
            if not self.all_in_ram:
                self.ram[out] = None
        while len(self.ram) > self.room.n_ram:
            self.ram.popitem(last=False)
        self.moved += len(missed) if self.room.n_vram else 0
        return len(missed), len(read)

    def end(self, prompt: bool) -> int:
        moved, self.moved = self.moved, 0
        return moved


@dataclass
class Fixed:
    """`static`: two sets that never change."""

    vram: frozenset[int]
    ram: frozenset[int]

    def use(self, layer: int, ids: list[int], counts: list[int], n_tokens: int) -> tuple[int, int]:
        missed = [id for id in ids if id not in self.vram]
        return len(missed), sum(id not in self.ram for id in missed)

    def end(self, prompt: bool) -> int:
        return 0


class Decayed:
    """`decayed`: the engine's own policy."""

    def __init__(self, trace: Trace, room: Room, **settings: float) -> None:
        self.policy = Policy(trace.n_layer, trace.n_expert, **settings)
        self.room, self.n_expert = room, trace.n_expert
        n = trace.n_layer * trace.n_expert
        self.all_in_ram = room.n_ram >= n
        self.where = np.full(n, Policy.RAM if self.all_in_ram else 0, np.uint8)
        self.n_vram = 0
        self.policy.fix(room.budget or 1e-9)  # the unit of bytes is an expert, and a token takes a second
        self.n_ram = n if self.all_in_ram else 0

    def use(self, layer: int, ids: list[int], counts: list[int], n_tokens: int) -> tuple[int, int]:
        chosen = np.array(ids, np.int32)
        self.policy.count(layer, chosen - layer * self.n_expert, np.array(counts, np.int32), n_tokens)
        bits = self.where[chosen]
        missed = chosen[bits & Policy.VRAM == 0]
        read = missed[self.where[missed] & Policy.RAM == 0]
        for id in read.tolist():
            self.read(id, chosen)
        return len(missed), len(read)

    def read(self, id: int, used: np.ndarray) -> None:
        """From disk into RAM, where somebody leaves who is not in use: a copy of what is in VRAM, too, if there is one,
        and of those the one whose slot is the safest."""
        if self.n_ram >= self.room.n_ram:
            copies = np.flatnonzero(self.where == Policy.RAM | Policy.VRAM).tolist()
            alone = self.where == Policy.RAM
            alone[used] = False
            others = np.flatnonzero(alone).astype(np.int32)
            if not copies and not len(others):
                return  # through a place of its own, and gone
            out = max(copies, key=self.value) if copies else int(others[self.policy.victim(others)])
            self.where[out] ^= Policy.RAM
            self.n_ram -= 1
        self.where[id] = Policy.RAM
        self.n_ram += 1

    def value(self, id: int) -> float:
        return self.policy.value(id // self.n_expert, id % self.n_expert)

    def end(self, prompt: bool) -> int:
        """Moves within the budget; while a prompt is read, there is time for all that pay."""
        allowed, moved = self.policy.allow(1e9, 0, 0, 1), 0
        budget = NEVER if prompt else allowed
        while True:
            free = self.room.n_vram - self.n_vram
            moves = self.policy.moves(self.where, [free], [1], budget, exclusive=not self.all_in_ram)
            for id, out, down in moves:
                self.move(id, out, down)
            spent = 0 if prompt else len(moves) + sum(down for _, _, down in moves)
            self.policy.spend(spent)
            budget -= spent
            moved += len(moves)
            if not moves or budget < 1:
                return moved

    def move(self, id: int, out: int, down: bool) -> None:
        """Up; what leaves has its copy in RAM, or comes down into the place of the other's."""
        self.where[id] |= Policy.VRAM
        self.n_vram += out < 0
        if down:
            self.where[id] = Policy.VRAM
        if out >= 0:
            self.where[out] = Policy.RAM


class Furthest:
    """The ids that n places hold if whoever is used again last leaves, or does not come."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.next: dict[int, int] = {}
        self.heap: list[tuple[int, int]] = []  # (-next use, id), some of them stale

    def use(self, id: int, next_use: int) -> bool:
        """Was it there?"""
        there = id in self.next
        if not there and len(self.next) >= self.n:
            while self.heap and self.next.get(self.heap[0][1]) != -self.heap[0][0]:
                heapq.heappop(self.heap)
            if not self.heap or -self.heap[0][0] <= next_use:
                return False
            del self.next[heapq.heappop(self.heap)[1]]
        self.next[id] = next_use
        heapq.heappush(self.heap, (-next_use, id))
        return there


class Future:
    """`optimum`: of VRAM alone, and of VRAM and RAM together."""

    def __init__(self, trace: Trace, room: Room) -> None:
        n = trace.n_layer * trace.n_expert
        self.vram = Furthest(room.n_vram)
        self.both = None if room.n_ram >= n else Furthest(room.n_vram + room.n_ram)
        last: dict[int, int] = {}
        self.next: list[int] = []
        events = [
            id
            for picks in trace.steps()
            for layer in range(trace.n_layer)
            if len(picks[layer])
            for id in distinct(picks[layer], layer * trace.n_expert)[0]
        ]
        self.next = [NEVER] * len(events)
        for i in range(len(events) - 1, -1, -1):
            self.next[i] = last.get(events[i], NEVER + i)
            last[events[i]] = i
        self.at = 0

    def use(self, layer: int, ids: list[int], counts: list[int], n_tokens: int) -> tuple[int, int]:
        missed = read = 0
        for id in ids:
            hit = self.vram.use(id, self.next[self.at])
            kept = hit if self.both is None else self.both.use(id, self.next[self.at])
            missed += not hit
            read += not hit and self.both is not None and not kept
            self.at += 1
        return missed, read

    def end(self, prompt: bool) -> int:
        return 0


def lru(trace: Trace, room: Room) -> Places:
    return Recency(room, room.n_ram >= trace.n_layer * trace.n_expert)


def static(trace: Trace, room: Room) -> Places:
    counts = np.zeros(trace.n_layer * trace.n_expert, int)
    for picks, n in zip(trace.steps(), trace.rows.max(axis=1).tolist(), strict=True):
        for layer in range(trace.n_layer if n == 1 else 0):
            counts[layer * trace.n_expert + picks[layer].ravel().astype(int)] += 1
    order = np.argsort(-counts, kind="stable").tolist()
    in_ram = order[room.n_vram : room.n_vram + room.n_ram] if room.n_ram < len(order) else order
    return Fixed(frozenset(order[: room.n_vram]), frozenset(in_ram))


POLICIES: dict[str, Callable[..., Places]] = {"lru": lru, "decayed": Decayed, "static": static, "optimum": Future}
NAMES: Sequence[str] = tuple(POLICIES)
