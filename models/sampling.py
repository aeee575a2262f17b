"""Logits to one token: temperature, then top-k, top-p and min-p, each on what the one before left.

The same seed and the same logits give the same tokens everywhere: the arithmetic is float64, the order of the
candidates is fixed (by logit, then by id), and the random numbers are the raw ones of PCG64.  The work is done by the
C core; `choose` says what it is.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

import ms4

# What the model card recommends for effort high; for none it gives the range 0 to 0.7, of which this is our choice.
DEFAULTS: dict[str, dict[str, float]] = {
    "none": {"temperature": 0.3},
    "high": {"temperature": 0.7, "top_p": 0.95},
}
MAX_TEMPERATURE = 10.0
MAX_TOP_K = 2**31 - 1
MAX_SEED = 2**64 - 1
LIKELY = 1e-3  # relative to the best
CLASSES_PER_NAT = 64.0
LAST_CLASS = 4095.0


class SamplingError(ValueError):
    """A setting out of its range."""


@dataclass(frozen=True)
class SamplingParams:
    """How to choose; temperature 0 is greedy, top_k 0 and top_p 1 and min_p 0 are off, without a seed one is drawn."""

    temperature: float = DEFAULTS["none"]["temperature"]
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, 0.0, MAX_TEMPERATURE)
        check_range("top-k", self.top_k, 0, MAX_TOP_K, whole=True)
        check_range("top-p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise SamplingError("top-p is 0; it must be more than 0 and at most 1")
        check_range("min-p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            check_range("seed", self.seed, 0, MAX_SEED, whole=True)

    @classmethod
    def for_effort(
        cls,
        effort: str,
        *,
        greedy: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int | None = None,
    ) -> SamplingParams:
        """The defaults of an effort, with what was asked for in their place."""
        if greedy and temperature:
            raise SamplingError("greedy and a temperature above 0 exclude each other")
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        settings: dict[str, float] = {**DEFAULTS[effort], **{k: v for k, v in given.items() if v is not None}}
        if greedy:
            settings["temperature"] = 0.0
        return cls(seed=seed, **settings)  # type: ignore[arg-type]


def check_range(name: str, value: float, low: float, high: float, whole: bool = False) -> None:
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        kind = "a whole number" if whole else "a number"
        huge = isinstance(value, int) and abs(value) > 10**30
        shown = "too large" if huge else repr(value)[:40]
        raise SamplingError(f"{name} is {shown}; it must be {kind} from {low:g} to {high if whole else f'{high:g}'}")


@dataclass(frozen=True)
class Choice:
    """A token; the log-probabilities are those of the model itself, before temperature and cuts."""

    id: int
    logprob: float  # nan where they were not asked for
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses tokens; its random numbers go on from answer to answer.

    n_drawn: how many of them were used before, by a sampler of the same seed that this one takes the place of.
    """

    def __init__(self, params: SamplingParams, n_drawn: int = 0) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self.n_drawn = n_drawn
        self._random = np.random.PCG64(self.seed)
        self._random.advance(n_drawn)

    @property
    def n_highest(self) -> int:
        """On so many of the highest logits alone depends what it picks; 0: on all, or on more than a step can give."""
        if self.params.temperature == 0:
            return 1
        return self.params.top_k if self.params.top_k <= ms4.MOST_HIGHEST else 0

    def pick(self, logits: np.ndarray, n_top: int | None = None) -> Choice:
        """The next token.  n_top: also its log-probability, and those of the n_top most likely."""
        return self.pick_rows(logits[None], n_top)[0]

    def pick_highest(self, highest: ms4.Highest) -> Choice:
        """The same token, from the `n_highest` alone."""
        return Choice(int(highest.ids[self.pick(highest.logits).id]), math.nan)

    def pick_rows(self, logits: np.ndarray, n_top: int | None = None) -> list[Choice]:
        """A token for each row, with the random numbers that picking one after the other would take."""
        p = self.params
        uniforms = None
        if p.temperature > 0:
            uniforms = uniform_numbers(self._random, len(logits))
            self.n_drawn += len(logits)
        got = ms4.sample(
            logits, uniforms, temperature=p.temperature, top_k=p.top_k, top_p=p.top_p, min_p=p.min_p, n_top=n_top
        )
        ids = got.ids.tolist()
        if got.logprobs is None or got.top_ids is None or got.top_logprobs is None:
            return [Choice(id, math.nan) for id in ids]
        tops = zip(got.top_ids.tolist(), got.top_logprobs.tolist(), strict=True)
        chosen = zip(ids, got.logprobs.tolist(), tops, strict=True)
        return [Choice(id, logprob, tuple(zip(*top, strict=True))) for id, logprob, top in chosen]


def described(id: int, logits: np.ndarray, n_top: int) -> Choice:
    """A token that was chosen in another way, with the log-probabilities that `Sampler.pick` would give it."""
    logprob = float(log_probabilities(logits)[id])
    return Choice(id, logprob, Sampler(SamplingParams(temperature=0, seed=0)).pick(logits, n_top).top)


def uniform_numbers(random: np.random.PCG64, n: int) -> np.ndarray:
    """The next n in [0, 1), of 53 bits each."""
    return (random.random_raw(n) >> np.uint64(11)) * 2.0**-53


# What csrc/sample.c computes, as a definition that the tests hold it to.


def choose(logits: np.ndarray, params: SamplingParams, uniforms: np.ndarray) -> np.ndarray:
    """The tokens that random numbers in [0, 1) stand for, all of one row of logits."""
    if params.temperature == 0:
        return np.full(len(uniforms), logits.argmax())  # of equal ones the first
    ids = highest_k(logits, params.top_k) if 0 < params.top_k < len(logits) else np.arange(len(logits))
    with np.errstate(over="ignore"):  # of a temperature near 0: all but the best become -inf
        nats = (logits[ids].astype(np.float64) - float(logits.max())) / params.temperature
    weights = np.exp(nats)  # relative to the best
    total = float(weights.sum())
    # Nearly always all that matters is likely, and a small part of the vocabulary.
    likely = weights >= (params.min_p or LIKELY)
    if params.top_p < 1:
        wanted = params.top_p * total
        some = np.flatnonzero(likely if params.min_p or float(weights[likely].sum()) >= wanted else weights >= 0)
        order = some[nucleus(nats[some], weights[some], wanted)]
    elif params.min_p:
        order = np.flatnonzero(likely)
    else:
        order = np.concatenate([np.flatnonzero(likely), np.flatnonzero(~likely)])
    sums = np.cumsum(weights[order])
    return np.asarray(ids[order[np.minimum(np.searchsorted(sums, uniforms * sums[-1], side="right"), len(order) - 1)]])


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Of a row, float64: those of the model itself, before temperature and cuts."""
    nats = logits.astype(np.float64) - float(logits.max())
    return np.asarray(nats - math.log(float(np.exp(nats).sum())))


def surprise(logits: np.ndarray, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """-log p of each id, float64 [n], under its row of `logits` [n, n_vocab]."""
    rows = logits.astype(np.float64)
    rows -= rows.max(axis=1, keepdims=True)
    return np.asarray(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), ids])


def highest_k(values: np.ndarray, k: int) -> np.ndarray:
    """Where the k highest are, in ascending order; of equal ones the first."""
    least = np.partition(values, len(values) - k)[len(values) - k]
    above = np.flatnonzero(values > least)
    equal = np.flatnonzero(values == least)[: k - len(above)]
    return np.sort(np.concatenate([above, equal]))


def nucleus(nats: np.ndarray, weights: np.ndarray, wanted: float) -> np.ndarray:
    """Where the smallest set of the most likely is that weighs `wanted`; of equal ones the first.

    weights = e^nats.  Sorting a vocabulary would take many milliseconds.  So the weight is summed by classes of
    likelihood, and only the class in which the limit is reached gets sorted: its members come last, most likely first.
    """
    classes = np.minimum(nats * -CLASSES_PER_NAT, LAST_CLASS).astype(np.int64)
    sums = np.cumsum(np.bincount(classes, weights=weights))
    edge = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    last = np.flatnonzero(classes == edge)
    last = last[np.argsort(-nats[last], kind="stable")]
    before = float(sums[edge - 1]) if edge else 0.0
    n = int(np.searchsorted(before + np.cumsum(weights[last]), wanted)) + 1
    return np.concatenate([np.flatnonzero(classes < edge), last[:n]])
