"""Logits to one token: temperature, then top-k, top-p and min-p, each on what the one before left.

The same seed and the same logits give the same tokens everywhere: the arithmetic is float64, the order of the
candidates is fixed (by logit, then by id), and the random numbers are the raw ones of PCG64.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


class LogitsError(ArithmeticError):
    """The model gave a logit that is not a finite number."""


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
    """Chooses tokens; its random numbers go on from answer to answer."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._random = np.random.PCG64(self.seed) if params.temperature > 0 else None
        self._room = np.empty(0)

    def pick(self, logits: np.ndarray, n_top: int | None = None) -> Choice:
        """The next token.  n_top: also its log-probability, and those of the n_top most likely."""
        best = int(logits.argmax())  # of equal ones the first; a NaN wins
        highest = float(logits[best])
        if not math.isfinite(highest) or not math.isfinite(logits.min()):
            raise LogitsError("the model gave a logit that is not finite; the file may be damaged")
        id = best if self._random is None else self._draw(logits, highest)
        if n_top is None:
            return Choice(id, math.nan)
        total = math.log(float(self._weights(logits, highest, 1.0).sum())) + highest
        top = highest_k(logits, min(n_top, len(logits))) if n_top > 0 else np.empty(0, np.int64)
        top = top[np.argsort(-logits[top], kind="stable")]
        return Choice(id, float(logits[id]) - total, tuple((int(i), float(logits[i]) - total) for i in top))

    def _draw(self, logits: np.ndarray, highest: float) -> int:
        params = self.params
        ids = highest_k(logits, params.top_k) if 0 < params.top_k < len(logits) else None
        weights = self._weights(logits if ids is None else logits[ids], highest, params.temperature)
        total = float(weights.sum())
        # Nearly always all that matters is likely, and a small part of the vocabulary.
        least = params.min_p or LIKELY
        head = np.flatnonzero(weights >= least)
        some = weights[head]
        if params.top_p < 1:
            wanted = params.top_p * total
            if not params.min_p and float(some.sum()) < wanted:
                head, some = np.arange(len(weights)), weights
            kept = nucleus(some, wanted)
            head, some = head[kept], some[kept]
        sums = np.cumsum(some)
        cut = params.top_p < 1 or params.min_p > 0
        uniform = (self._random.random_raw() >> 11) * 2.0**-53  # type: ignore[union-attr]
        goal = uniform * (float(sums[-1]) if cut else total)
        if goal >= sums[-1] and not cut and len(head) < len(weights):
            head = np.flatnonzero(weights < least)
            sums = sums[-1] + np.cumsum(weights[head])
        at = int(head[min(int(np.searchsorted(sums, goal, side="right")), len(head) - 1)])
        return at if ids is None else int(ids[at])

    def _weights(self, logits: np.ndarray, highest: float, temperature: float) -> np.ndarray:
        """Probabilities relative to that of the best.  They stand in memory that the next call takes again."""
        if len(self._room) < len(logits):
            self._room = np.empty(len(logits))
        weights = self._room[: len(logits)]
        np.subtract(logits, highest, out=weights, dtype=np.float64)
        with np.errstate(over="ignore"):  # of a temperature near 0: all but the best become -inf
            weights /= temperature
        return np.exp(weights, out=weights)


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


def nucleus(weights: np.ndarray, wanted: float) -> np.ndarray:
    """Where the smallest set of the most likely is that weighs `wanted`; of equal ones the first.

    Sorting a vocabulary would take many milliseconds.  So the weight is summed by classes of likelihood, and only the
    class in which the limit is reached gets sorted.
    """
    with np.errstate(divide="ignore"):
        classes = np.minimum(np.log(weights) * -CLASSES_PER_NAT, LAST_CLASS).astype(np.int64)
    sums = np.cumsum(np.bincount(classes, weights=weights))
    edge = min(int(np.searchsorted(sums, wanted)), len(sums) - 1)
    last = np.flatnonzero(classes == edge)
    last = last[np.argsort(-weights[last], kind="stable")]
    before = float(sums[edge - 1]) if edge else 0.0
    n = int(np.searchsorted(before + np.cumsum(weights[last]), wanted)) + 1
    return np.concatenate([np.flatnonzero(classes < edge), last[:n]])
