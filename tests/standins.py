"""Stand-ins for the tests of models/: a vocabulary without a file, a session without a model."""

from __future__ import annotations

import lzma
import time
from functools import cache
from pathlib import Path

import numpy as np

from ms4 import ROW, Canceled
from ms4.models.control import Control
from ms4.models.tokenizer import Tokenizer

DATA = Path(__file__).parent / "data"


class Vocabulary:
    """The 131,072 tokens of Tekken; `tekken.xz` holds the ordinary ones, a byte of length before each."""

    def __init__(self, model="gpt2", pre="tekken", n_control=1000, tokens=None):
        self.model, self.pre, self.n_control = model, pre, n_control
        self.tokens = read_tokens() if tokens is None else tokens
        self.n_vocab = n_control + len(self.tokens)

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


class ScriptedSession:
    """Says what it was told to say: after the position of the first token of `script`, its tokens one after another.

    The logits are 0 but for the scripted token, which has 9, so that greedy sampling follows the script.
    """

    def __init__(self, script, n_ctx=512, n_vocab=131072, slow=0.0):
        self.script, self.n_ctx, self.n_vocab, self.slow = list(script), n_ctx, n_vocab, slow
        self.held = []
        self.fed = []  # one list a call
        self.rows = []
        self.said = 0

    @property
    def length(self):
        return len(self.held)

    def feed(self, ids, rows=None, *, stop=None):
        ids = [int(id) for id in ids]
        assert len(self.held) + len(ids) <= self.n_ctx
        assert ids.count(ROW) == (0 if rows is None else len(rows))
        self.fed.append(ids)
        self.rows.append(rows)
        end = time.monotonic() + self.slow
        while time.monotonic() < end and not (stop and stop.is_set()):
            time.sleep(0.001)
        if stop and stop.is_set():
            raise Canceled("canceled", -7)
        self.held += ids
        logits = np.zeros(self.n_vocab, np.float32)
        logits[self.script[min(self.said, len(self.script) - 1)]] = 9
        self.said += 1
        return logits

    def rewind(self, length):
        assert 0 <= length <= len(self.held)
        del self.held[length:]
