"""Stand-ins for the tests of models/: a vocabulary without a file, an engine and sessions without a model."""

from __future__ import annotations

import dataclasses
import io
import lzma
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from ms4 import ROW, Canceled, EngineError, Highest
from ms4.models.answer import Statistics
from ms4.models.control import Control
from ms4.models.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"


class Vocabulary:
    """The 131,072 tokens of Tekken; `tekken.xz` holds the ordinary ones, a byte of length before each."""

    def __init__(self, model="gpt2", pre="tekken", n_control=1000, tokens=None):
        self.model, self.pre, self.n_control = model, pre, n_control
        self.tokens = read_tokens() if tokens is None else tokens
        self.n_vocab = self.n_used = n_control + len(self.tokens)

    def mergeable_ranks(self):
        return {token: rank for rank, token in enumerate(self.tokens)}

    def spelling(self, token):
        if token >= self.n_control:
            return self.tokens[token - self.n_control]
        return Control(token).name.encode() if token in list(Control) else b"<SPECIAL_%d>" % token


@cache
def read_tokens():
    packed = lzma.decompress((DATA / "tekken.xz").read_bytes())
    tokens, at = [], 0
    while at < len(packed):
        tokens.append(packed[at + 1 : at + 1 + packed[at]])
        at += 1 + packed[at]
    return tokens


@cache
def tekken():
    return Tokenizer(Vocabulary())


@cache
def few_tokens():
    """A tokenizer whose ordinary tokens are the single bytes."""
    return Tokenizer(Vocabulary(tokens=[bytes([byte]) for byte in range(256)]))


def cut(text, rng=None):
    """A text in the pieces in which a model might write it; without random numbers in one."""
    at = 0
    while at < len(text):
        n = rng.randint(1, 7) if rng else len(text)
        yield text[at : at + n]
        at += n


def logits_for(id, n_vocab=131072):
    """0 but for one token, which has 9: greedy sampling takes it."""
    logits = np.zeros(n_vocab, np.float32)
    logits[id] = 9
    return logits


class ScriptedSession:
    """What a session holds, and what it says next.

    With a script, that is the script's tokens one after another, whatever is fed.  Without one, everything that the
    session holds decides, so that a token which is lost, repeated or meant for another session changes all that follow.
    """

    def __init__(self, n_ctx=512, script=None, n_vocab=131072):
        self.n_ctx, self.n_vocab = n_ctx, n_vocab
        self.script = None if script is None else list(script)
        self.held = []
        self.fed = []  # the ids of each feed
        self.rows = []  # and its rows
        self.sums = [0]  # of what is held up to each position
        self.said = 0
        self.parts = 0, 0  # done and in all of the running step
        self.closed = False

    @property
    def length(self):
        return len(self.held)

    def feed(self, ids, rows=None, *, n_logits=1, stop=None):
        ids = [int(id) for id in ids]
        assert not self.closed and ids and len(self.held) + len(ids) <= self.n_ctx
        assert ids.count(ROW) == (0 if rows is None else len(rows))
        if stop is not None and stop.is_set():
            raise Canceled("canceled", -7)
        self.fed.append(ids)
        self.rows.append(rows)
        given = iter(() if rows is None else rows)
        for id in ids:
            what = b"row %r" % next(given).tolist() if id == ROW else b"%d" % id
            self.sums.append(zlib.crc32(what, self.sums[-1]))
        self.held += ids
        if not n_logits:
            return np.empty((0, self.n_vocab), np.float32)
        self.said += 1
        return logits_for(self.says(), self.n_vocab)[None]

    def says(self):
        if self.script is not None:
            return self.script[min(self.said - 1, len(self.script) - 1)]
        number = self.sums[-1] // 7
        return Control.EOS if number % 24 == 0 else 1000 + number % (self.n_vocab - 1000)

    def rewind(self, length):
        assert not self.closed and 0 <= length <= len(self.held)
        del self.held[length:], self.sums[length + 1 :]

    def share(self, other, n):
        assert not self.closed and not other.closed and 0 <= n <= other.length and n <= self.n_ctx
        self.held, self.sums = other.held[:n], other.sums[: n + 1]

    def progress(self):
        return self.parts

    def close(self):
        self.closed = True


class ScriptedEngine:
    """Steps of scripted sessions; `before` is called at the beginning of each with its spans, in the thread that asked
    for it.  What no caller may do is noted in `faults`: the scheduler would hand an exception on as an answer's."""

    def __init__(self, script=None, n_batch=2048, n_vocab=131072):
        self.script, self.n_batch, self.n_vocab = script, n_batch, n_vocab
        self.steps = []  # the spans of each
        self.faults = []
        self.sessions = []
        self.before = lambda spans: None
        self.on_gpu, self.left = False, []  # what leave_gpu was told

    def session(self, n_ctx):
        self.sessions.append(ScriptedSession(n_ctx, self.script, self.n_vocab))
        return self.sessions[-1]

    def leave_gpu(self, why):
        if any(session.length and not session.closed for session in self.sessions):
            self.faults.append("the GPU is left while a session holds something there")
        self.on_gpu = False
        self.left.append(why)

    @property
    def note(self):
        return "; ".join(self.left)

    def stats(self):
        return SimpleNamespace(note=self.note)

    def step(self, spans):
        self.steps.append(list(spans))
        if not 0 < sum(len(span.ids) for span in spans) <= self.n_batch:
            self.faults.append("a step of no tokens, or of too many")
        if len({id(span.session) for span in spans}) < len(spans):
            self.faults.append("a session twice in a step")
        self.before(spans)
        return [self.result(span) for span in spans]

    def result(self, span):
        try:
            logits = span.session.feed(span.ids, span.rows, n_logits=span.n_logits, stop=span.stop)
        except EngineError as error:
            return error
        except AssertionError as error:
            self.faults.append(error)
            raise
        return highest(logits, span.n_highest, span.n_among) if span.n_highest else logits


def highest(logits, k, among):
    """What a step gives to a span that wants no more."""
    rows = [row[:among] for row in logits]
    found = [[np.argmax(row)] if k == 1 else np.sort(np.argsort(-row, kind="stable")[:k]) for row in rows]
    ids = np.array(found, np.int32).reshape(len(rows), k)
    return Highest(np.take_along_axis(logits, ids, 1), ids)


class Stream(io.TextIOWrapper):
    """A standard stream of this process, which may say that it is a terminal."""

    def __init__(self, data=b"", terminal=False):
        super().__init__(io.BytesIO(data), encoding="ascii")
        self._terminal = terminal

    def isatty(self):
        return self._terminal


def statistics(**more):
    values = dict.fromkeys((field.name for field in dataclasses.fields(Statistics)), 0) | {"n_ctx": 32768}
    return Statistics(**(values | more))


def fail_every_allocation(once, monkeypatch, least):
    """once() with the first allocation of the engine failing, the second, and so on, until none fails: each failure is
    a MemoryError, after which an ordinary run is possible, and there are more than `least` of them."""
    want = once()
    for n in range(1, 400):
        monkeypatch.setenv("MS4_FAIL_ALLOC", str(n))
        try:
            got = once()
        except MemoryError:
            continue
        finally:
            monkeypatch.delenv("MS4_FAIL_ALLOC")
            once()  # an ordinary run afterwards, and the count begins anew
        assert np.array_equal(got, want)
        assert n > least
        return
    raise AssertionError("400 allocations to open a tiny model?")
