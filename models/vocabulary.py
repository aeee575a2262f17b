"""The vocabulary in a GGUF file, checked: tokens, their types, the control tokens, bos and eos.

How text becomes tokens is the business of `ms4.models.tokenizer`; here are only the bytes that each token stands for.
Everything works on whole arrays, because a start may not wait for 131,072 tokens and 269,443 merges one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ms4.models.merge_check import first_unknown
from ms4.models.mistral4 import ModelError
from ms4.quant.gguf_file import GgufFile, Strings, shown
from ms4.quant.spelling import NEWLINE, unspell_lines

MAX_TOKEN_BYTES = 64 * 1024
NORMAL, UNUSED, BYTE = 1, 5, 6  # token types; those of control, unknown and added tokens lie between
PADDING = re.compile(rb"\[PAD\d*\]")  # what converters fill a vocabulary with, up to the rows of the embedding
PREFIX = "tokenizer.ggml."
SPACE = 32


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """What the file says about tokens.  bos and eos are -1 where the file has none."""

    path: str
    model: str  # "gpt2" or "llama", as GGUF names them
    pre: str
    n_vocab: int
    n_control: int  # ids below are control tokens
    n_used: int  # ids from here on fill up the vocabulary, and are never produced
    bos: int
    eos: int
    strings: Strings
    types: np.ndarray
    notes: tuple[str, ...] = ()  # keys that are wrong and not needed

    @classmethod
    def from_gguf(cls, gguf: GgufFile) -> Vocabulary:
        """Reads and checks the tokenizer keys.  ModelError if they are damaged."""
        strings = _tokens(gguf)
        n = len(strings)
        model, pre = _names(gguf)
        types = _numbers(gguf, "token_type", n, ("int32",))
        if types is None:
            raise ModelError(gguf.path, f"the key {PREFIX}token_type is missing")
        if len(types) and not 1 <= int(types.min()) <= int(types.max()) <= BYTE:
            wrong = types[(types < 1) | (types > BYTE)][0]
            raise ModelError(gguf.path, f"{PREFIX}token_type holds {wrong}; the range is 1 to {BYTE}")
        bos, eos = _special(gguf, "bos", n), _special(gguf, "eos", n)
        ordinary = np.flatnonzero((types == NORMAL) | (types == BYTE))
        n_control = int(ordinary[0]) if len(ordinary) else n
        n_used = n
        while n_used > n_control and (types[n_used - 1] == UNUSED or _is_padding(strings, types, n_used - 1)):
            n_used -= 1
        found = cls(gguf.path, model, pre, n, n_control, n_used, bos, eos, strings, types, tuple(_notes(gguf, n)))
        found.mergeable_ranks()
        if model == "gpt2":
            found._check_merges(gguf.metadata.get(PREFIX + "merges"))
        return found

    def require_text(self) -> None:
        """Raises ModelError unless text can be turned into these tokens and back."""
        if self.problem:
            raise ModelError(self.path, self.problem)

    @cached_property
    def _spelled(self) -> bytes:
        """The ordinary tokens as the file spells them, a newline before each."""
        ends, first = self.strings.ends[: self.n_used], self.n_control
        begin = int(ends[first - 1]) if first else 0
        raw = self.strings.raw[begin : int(ends[-1]) if len(ends) else begin]
        joined = Strings(raw, ends[first:] - begin).joined()
        if joined is None:
            raise ModelError(self.path, f"{PREFIX}tokens: a token holds a control character, not its GPT-2 spelling")
        return joined

    @cached_property
    def _ranks(self) -> dict[bytes, int]:
        """Bytes of each ordinary token -> id - n_control, in that order."""
        if self.model == "gpt2":
            try:
                tokens = unspell_lines(self._spelled)
            except ValueError as e:
                raise ModelError(self.path, f"{PREFIX}tokens: {e}") from e
        else:
            tokens = [self.strings[i] for i in range(self.n_control, self.n_used)]
        ranks = dict(zip(tokens, range(len(tokens)), strict=True))
        if len(ranks) < len(tokens):
            rank = next(i for i, token in enumerate(tokens) if ranks[token] != i)
            twin = self.n_control + ranks[tokens[rank]]
            raise ModelError(self.path, f"duplicate tokens: {self.n_control + rank} and {twin} are the same text")
        control = [self.strings[i] for i in range(self.n_control)]
        for i, name in enumerate(control):
            if name in ranks:
                raise ModelError(
                    self.path, f"duplicate tokens: {i} and {self.n_control + ranks[name]} are the same text"
                )
        if len(set(control)) < len(control):
            raise ModelError(self.path, "duplicate tokens: two control tokens have the same text")
        return ranks

    def mergeable_ranks(self) -> dict[bytes, int]:
        """Bytes of each ordinary token -> its rank (id - n_control): what byte-pair encoding works by."""
        return self._ranks

    @cached_property
    def _bytes(self) -> list[bytes]:
        return list(self._ranks)

    def is_control(self, token: int) -> bool:
        return 0 <= token < self.n_control

    def spelling(self, token: int) -> bytes:
        """The bytes of an ordinary token; the name of a control token."""
        if not 0 <= token < self.n_vocab:
            raise IndexError(f"token {token} of a vocabulary of {self.n_vocab}")
        named = token < self.n_control or token >= self.n_used
        return self.strings[token] if named else self._bytes[token - self.n_control]

    @cached_property
    def problem(self) -> str | None:
        """Why text cannot be turned into these tokens and back, or None."""
        if self.model != "gpt2":
            return None
        if not self._has_all_bytes():
            reason = "it lacks some of the 256 single bytes"
        elif bool((self.types[self.n_control : self.n_used] != NORMAL).any()):
            reason = "control tokens stand among the ordinary ones"
        elif self.bos < 0 or self.eos < 0:
            reason = f"{PREFIX}bos_token_id or eos_token_id is missing"
        else:
            return None
        return f"no usable text vocabulary: {reason}; only token ids work with this file"

    def _check_merges(self, merges: Any) -> None:
        """Each merge must be two pieces with one space between, both of them tokens."""
        if merges is None:
            raise ModelError(self.path, f"the key {PREFIX}merges is missing")
        if not isinstance(merges, Strings):
            raise ModelError(self.path, f"{PREFIX}merges has the wrong type; an array of strings was expected")
        if not len(merges):
            return
        joined = merges.joined()
        # Newlines and spaces must take turns, so that each merge has one space; and no piece is empty.
        if joined is None or not _takes_turns(joined):
            raise ModelError(self.path, f"{PREFIX}merges: each merge must be two pieces with one space between them")
        piece = first_unknown(joined.replace(b" ", b"\n"), self._spelled)
        if piece is not None and self._has_all_bytes():
            raise ModelError(self.path, f"{PREFIX}merges: the piece '{shown(piece)}' is not a token")

    def _has_all_bytes(self) -> bool:
        return all(bytes([b]) in self._ranks for b in range(256))


def _takes_turns(joined: bytes) -> bool:
    flat = np.frombuffer(joined, np.uint8)
    at = np.flatnonzero((flat == NEWLINE) | (flat == SPACE))
    marks = flat[at]
    right = not len(at) % 2 and (marks[0::2] == NEWLINE).all() and (marks[1::2] == SPACE).all()
    return bool(right and (np.diff(at, append=len(flat)) > 1).all())


def _tokens(gguf: GgufFile) -> Strings:
    key = PREFIX + "tokens"
    value = gguf.metadata.get(key)
    if value is None:
        raise ModelError(gguf.path, f"the key {key} is missing: the file has no vocabulary")
    if not isinstance(value, Strings):
        raise ModelError(gguf.path, f"{key} has the wrong type; an array of strings was expected")
    if len(value) == 0:
        raise ModelError(gguf.path, f"{key} is empty")
    lengths = np.diff(value.ends, prepend=0) - 8
    if int(lengths.min()) < 1:
        raise ModelError(gguf.path, f"{key}: token {int(lengths.argmin())} is empty")
    if int(lengths.max()) > MAX_TOKEN_BYTES:
        raise ModelError(
            gguf.path,
            f"{key}: token {int(lengths.argmax())} has a length of {lengths.max()}; at most {MAX_TOKEN_BYTES}",
        )
    embedding = gguf.tensors.get("token_embd.weight")
    if embedding is not None and embedding.dims[1:] != (len(value),):
        rows = embedding.dims[1] if len(embedding.dims) > 1 else 1
        raise ModelError(gguf.path, f"{key} has {len(value)} entries, but token_embd.weight has {rows} rows")
    return value


def _names(gguf: GgufFile) -> tuple[str, str]:
    model, pre = gguf.metadata.get(PREFIX + "model"), gguf.metadata.get(PREFIX + "pre", "")
    if model not in ("gpt2", "llama") or type(model) is not str:
        raise ModelError(gguf.path, f"{PREFIX}model is '{shown(str(model))}'; the tokenizer gpt2 or llama was expected")
    if model == "gpt2" and pre != "tekken":
        raise ModelError(gguf.path, f"{PREFIX}pre is '{shown(str(pre))}'; tekken was expected")
    return model, str(pre)


def _numbers(gguf: GgufFile, name: str, n: int, types: tuple[str, ...]) -> np.ndarray | None:
    key = PREFIX + name
    values = gguf.metadata.get(key)
    if values is None:
        return None
    if not isinstance(values, np.ndarray) or values.dtype not in [np.dtype(t) for t in types]:
        raise ModelError(gguf.path, f"{key} has the wrong type; an array of {' or '.join(types)} was expected")
    if len(values) != n:
        raise ModelError(gguf.path, f"{key} has a length of {len(values)}; there are {n} tokens")
    return values


def _is_padding(strings: Strings, types: np.ndarray, token: int) -> bool:
    return types[token] != NORMAL and PADDING.fullmatch(strings[token]) is not None


def _notes(gguf: GgufFile, n: int) -> Iterator[str]:
    """What is wrong with keys that ms4 has no use for: no reason to refuse a file."""
    try:
        scores = _numbers(gguf, "scores", n, ("float32", "int32"))
        if scores is not None and not np.isfinite(scores).all():
            yield f"{PREFIX}scores holds numbers that are not finite; not needed"
    except ModelError as e:
        yield f"{e.reason}; not needed"
    for name in ("unknown", "padding", "separator", "cls", "mask", "eot", "eom"):
        try:
            _special(gguf, name, n)
        except ModelError as e:
            yield f"{e.reason}; not needed"


def _special(gguf: GgufFile, name: str, n: int) -> int:
    key = f"{PREFIX}{name}_token_id"
    value = gguf.metadata.get(key, -1)
    if type(value) is not int:
        raise ModelError(gguf.path, f"{key} has the wrong type; an integer was expected")
    if key in gguf.metadata and not 0 <= value < n:
        raise ModelError(gguf.path, f"{key} is {value}, out of range: there are {n} tokens")
    return value
