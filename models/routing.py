"""Traces of routing: which experts each token chose, layer by layer.  No text, no token ids, no weights.

A trace file is a NumPy .npz archive (a zip of .npy arrays, deflated) with these members and no others:

    format    int32 []                1
    n_expert  int32 []                experts of a layer
    rows      int32 [steps, layers]   tokens that the layer computed in this step.  1: a token was written (decode);
                                      more: a prompt was read.  0: none, as in a dense layer.  The last layer of a
                                      prompt computes only what the next token needs.
    picks     uint8 [pairs, k]        the experts of each token, ascending: step after step, in a step layer after
                                      layer, in a layer token after token.  uint16 if there are more than 256 experts.

Steps are in the order in which an engine computed them; several conversations may follow one another.  At k = 4 of 128
experts an entry of 36 layers takes about 110 bytes in the file.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    import ms4

FORMAT = 1
MEMBERS = ("format.npy", "n_expert.npy", "picks.npy", "rows.npy")
MOST_BYTES = 1 << 30  # of a trace, unpacked
MOST_EXPERTS = 1 << 16


class TraceError(Exception):
    """The file is no trace; the message names it and says why."""


@dataclass(frozen=True)
class Trace:
    """rows: int32 [steps, layers]; picks: uint8 or uint16 [pairs, k]; as in the file."""

    n_expert: int
    rows: np.ndarray
    picks: np.ndarray

    @property
    def n_layer(self) -> int:
        return int(self.rows.shape[1])

    @property
    def n_used(self) -> int:
        return int(self.picks.shape[1])

    @property
    def n_id(self) -> int:
        """Ids of experts, layer * n_expert + expert, go up to this."""
        return self.n_layer * self.n_expert

    @property
    def n_layer_used(self) -> int:
        """Layers that have experts."""
        return int(self.rows.any(axis=0).sum())

    @property
    def n_decode(self) -> int:
        """Steps of one token."""
        return int((self.rows.max(axis=1) == 1).sum())

    def steps(self) -> Iterator[list[np.ndarray]]:
        """For each step a list over the layers: picks [tokens, k]."""
        ends = np.cumsum(self.rows, axis=1) + np.concatenate([[0], np.cumsum(self.rows.sum(axis=1))])[:-1, None]
        for end, n in zip(ends.tolist(), self.rows.tolist(), strict=True):
            yield [self.picks[e - k : e] for e, k in zip(end, n, strict=True)]

    def save(self, file: BinaryIO) -> None:
        np.savez_compressed(
            file, format=np.int32(FORMAT), n_expert=np.int32(self.n_expert), rows=self.rows, picks=self.picks
        )


def load(path: str | os.PathLike[str]) -> Trace:
    """Reads a trace and checks all that is said in it; TraceError, or an OSError."""
    name = os.fspath(path)
    with open(path, "rb") as file:
        data = io.BytesIO(file.read(MOST_BYTES + 1))
    try:
        with zipfile.ZipFile(data) as archive:
            members = sorted((entry.filename, entry.file_size) for entry in archive.infolist())
        if tuple(member for member, _ in members) != MEMBERS:
            raise TraceError(f"{name} is no trace of ms4")
        if sum(n for _, n in members) > MOST_BYTES:
            raise TraceError(f"{name} holds more than {MOST_BYTES >> 30} GiB")
        data.seek(0)
        with np.load(data, allow_pickle=False) as arrays:
            found = {member: arrays[member] for member in ("format", "n_expert", "rows", "picks")}
    except TraceError:
        raise
    except Exception as error:  # of what is damaged, zipfile, zlib and NumPy raise nearly anything
        raise TraceError(f"{name} is no trace of ms4, or damaged: {error}") from None
    return checked(name, **found)


def checked(name: str, format: np.ndarray, n_expert: np.ndarray, rows: np.ndarray, picks: np.ndarray) -> Trace:
    """The trace that these arrays are."""
    wanted = {
        "format": (format, 0, "i"),
        "n_expert": (n_expert, 0, "i"),
        "rows": (rows, 2, "i"),
        "picks": (picks, 2, "u"),
    }
    for member, (array, n_dims, kind) in wanted.items():
        if array.ndim != n_dims or array.dtype.kind != kind:
            raise TraceError(f"{name}: {member} is {array.dtype} of {array.shape}")
    if int(format) != FORMAT:
        raise TraceError(f"{name} has format {int(format)}; this version reads {FORMAT}")
    if not 1 <= int(n_expert) <= MOST_EXPERTS or not 1 <= picks.shape[1] <= int(n_expert) or not rows.shape[1]:
        raise TraceError(f"{name}: {picks.shape[1]} of {int(n_expert)} experts in {rows.shape[1]} layers")
    if rows.size and (rows.min() < 0 or int(rows.sum(dtype=np.int64)) != len(picks)):
        raise TraceError(f"{name}: {len(picks)} tokens' picks for {int(rows.sum(dtype=np.int64))}")
    if not len(picks):
        raise TraceError(f"{name} is empty")
    if int(picks.max()) >= int(n_expert) or (picks[:, 1:] <= picks[:, :-1]).any():
        raise TraceError(f"{name}: experts that are not ascending, or not below {int(n_expert)}")
    return Trace(int(n_expert), rows.astype(np.int32), picks)


class Recorder:
    """What an engine's router chooses while `with Recorder(engine) as recorder` lasts; then `recorder.trace()`.

    Steps that failed or were stopped leave no entry.
    """

    def __init__(self, engine: ms4.Engine) -> None:
        shape = engine.shape
        self._engine = engine
        self._n_expert, self._n_used, self._n_layer = shape.n_expert, shape.n_expert_used, shape.n_layer
        self._type = np.uint8 if shape.n_expert <= 256 else np.uint16
        self._rows: list[np.ndarray] = []
        self._picks: list[np.ndarray] = []
        self._step: dict[int, np.ndarray] = {}

    def __enter__(self) -> Recorder:
        self._engine.watch(self._routed)
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.watch(None)

    def _routed(self, layer: int, ids: np.ndarray | None) -> None:
        if ids is not None:
            if layer <= max(self._step, default=-1):  # the step before did not end well
                self._step = {}
            self._step[layer] = ids.astype(self._type)
            return
        rows = np.zeros(self._n_layer, np.int32)
        for layer, picks in self._step.items():
            rows[layer] = len(picks)
        self._rows.append(rows)
        self._picks += self._step.values()
        self._step = {}

    def trace(self) -> Trace:
        rows = np.array(self._rows, np.int32).reshape(-1, self._n_layer)
        picks = np.concatenate([np.empty((0, self._n_used), self._type), *self._picks])
        return Trace(self._n_expert, rows, picks)


@dataclass(frozen=True)
class Skew:
    """How a synthetic router chooses.  The score of an expert is the sum of normal numbers times these factors, and a
    Gumbel number; the k highest are chosen.  All 0: uniform.

    lasting: of the layer, for ever (some experts are popular).  topic: drawn anew every topic_tokens.  drift: slowly
    changing, with a correlation of `memory` between neighbouring tokens.
    """

    lasting: float = 0.0
    topic: float = 0.0
    drift: float = 0.0
    memory: float = 0.95
    topic_tokens: int = 256


# Named after what comes out.  At a cache of 6, 12, 25 and 33 per cent of the experts, LRU hits about as often in
# `coherent` as published curves of real models say (40, 64, 79, 85 per cent).
SKEWS = {
    "uniform": Skew(),
    "flat": Skew(0.3, 0.8, 1.2),
    "mid": Skew(0.6, 1.0, 1.5),
    "coherent": Skew(1.0, 1.2, 1.8),
}


def synthetic(
    skew: Skew,
    n_tokens: int,
    *,
    n_prompt: int = 0,
    n_layer: int = 36,
    n_expert: int = 128,
    n_used: int = 4,
    seed: int = 0,
) -> Trace:
    """A trace of n_tokens, the first n_prompt of them as one prompt, every layer drawn independently."""
    random = np.random.default_rng(seed)
    shape = (n_layer, n_expert)
    lasting = skew.lasting * random.normal(size=shape)
    topic, drift = np.zeros(shape), random.normal(size=shape)
    picks = np.empty((n_tokens, n_layer, n_used), np.uint8 if n_expert <= 256 else np.uint16)
    for t in range(n_tokens):
        if t % skew.topic_tokens == 0:
            topic = skew.topic * random.normal(size=shape)
        drift = skew.memory * drift + np.sqrt(1 - skew.memory**2) * random.normal(size=shape)
        score = lasting + topic + skew.drift * drift + random.gumbel(size=shape)
        picks[t] = np.sort(np.argpartition(-score, n_used - 1, axis=1)[:, :n_used], axis=1)
    rows = np.ones((n_tokens - n_prompt + (n_prompt > 0), n_layer), np.int32)
    rows[: n_prompt > 0] = n_prompt
    prompt = picks[:n_prompt].transpose(1, 0, 2)  # layer after layer
    return Trace(n_expert, rows, np.concatenate([prompt.reshape(-1, n_used), picks[n_prompt:].reshape(-1, n_used)]))
