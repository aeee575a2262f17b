"""Holds an answer to a JSON schema: before each token, which ones may come (llguidance says so).

    grammar = Grammar(schema)                  # refuses what it cannot keep to, without a model
    answer = Answer(..., constraint=Constraint(grammar, tokenizer))

The constraint is armed where answer text begins: thoughts are free.  Once the schema is fulfilled and nothing more may
come, only the end of the answer is left.
"""

from __future__ import annotations

import json
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from ms4.models.control import Control
from ms4.models.schema import SchemaError
from ms4.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLTokenizer

# One line, as json.dumps writes it: with free space between its parts a model can write blanks without end.
STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}

NEVER = np.float32(-1e30)  # of a token that may not come: so low that it weighs nothing, and finite


class ConstraintError(RuntimeError):
    """The grammar gave up in the middle of an answer (its limits); the message is one sentence."""


class Grammar:
    """A schema that answers can be held to; SchemaError says what of it cannot be kept to."""

    def __init__(self, schema: Any) -> None:
        from llguidance import LLMatcher

        try:
            self.text = str(LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=STYLE))
        except (ValueError, RecursionError) as error:
            raise SchemaError(f"no answer can be held to this schema: {one_line(error)}") from None
        if problem := LLMatcher.validate_grammar(self.text):
            raise SchemaError(f"no answer can be held to this schema: {one_line(problem)}")


def one_line(text: object) -> str:
    return " ".join(str(text).split())


class Pieces:
    """A vocabulary as llguidance wants it: the bytes of each token, and how text is cut into tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.eos_token_id = int(Control.EOS)
        self.bos_token_id = int(Control.BOS)
        self.special_token_ids = list(range(tokenizer.n_control))
        self.tokens = [
            tokenizer.spelling(id) if id < tokenizer.n_control else tokenizer.piece(id)
            for id in range(tokenizer.n_used)
        ]
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode("utf-8", "replace"))


OPENING = threading.Lock()  # whoever comes second finds it open


@lru_cache(maxsize=1)
def open_vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    from llguidance import LLTokenizer, TokenizerWrapper

    return LLTokenizer(TokenizerWrapper(Pieces(tokenizer)), slices=LLTokenizer.json_slices())


class Constraint:
    """The state of one answer.

    Opening a vocabulary of 131,072 tokens takes a second or two, once: it begins in a thread when this is made, and the
    first token waits for what is left of it.  may_think: the answer may begin with a thought, one.
    """

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer, *, may_think: bool = False) -> None:
        self.complete = False  # what was taken is an answer that keeps to the schema
        self._may_think = may_think
        self._n_used = tokenizer.n_used
        self._matcher: Any = None
        self._failed: BaseException | None = None
        self._opening = threading.Thread(target=self._open, args=(grammar, tokenizer), daemon=True)
        self._opening.start()

    def _open(self, grammar: Grammar, tokenizer: Tokenizer) -> None:
        try:
            from llguidance import LLMatcher

            with OPENING:
                opened = open_vocabulary(tokenizer)
            self._matcher = LLMatcher(opened, grammar.text)
        except BaseException as error:  # told to whoever waits
            self._failed = error

    def _ready(self) -> Any:
        self._opening.join()
        if self._failed is not None:
            raise self._failed
        if self._matcher.is_error():
            raise ConstraintError(f"the schema gave up: {one_line(self._matcher.get_error())}")
        return self._matcher

    def narrow(self, logits: np.ndarray) -> np.ndarray:
        """Logits [n_used] of the next token of answer text, with NEVER where none may come."""
        matcher = self._ready()
        if matcher.is_stopped():
            allowed = np.zeros(self._n_used, bool)
            allowed[Control.EOS] = True
        else:
            bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
            self._ready()  # the mask may have been too much for it
            allowed = np.unpackbits(bits, bitorder="little")[: self._n_used].astype(bool)
        allowed[Control.THINK] = self._may_think
        return np.where(allowed, logits, NEVER)

    def take(self, id: int) -> None:
        """Notes a token that `narrow` let pass."""
        self._may_think = False
        if id == Control.THINK:
            return
        matcher = self._ready()
        if id != Control.EOS:
            matcher.consume_token(id)
            self._ready()
        self.complete = bool(matcher.is_accepting() or matcher.is_stopped())
