"""Text to ids and back: the same ids as the model was trained with, no control ids, and no input that takes long."""

import json
import random
import subprocess
import sys

import pytest
from conftest import SEED, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from standins import DATA, Vocabulary, tekken

from ms4.models import tokenizer as module
from ms4.models.control import Control
from ms4.models.tokenizer import StreamDecoder, Tokenizer, TokenizerError, split_blanks

SPELLINGS = ["<s>", "</s>", "<unk>", "[INST]", "[/INST]", "[IMG]", "[THINK]", "[/THINK]", "[SYSTEM_PROMPT]", "[ARGS]"]


@pytest.mark.parametrize("text, ids", json.loads((DATA / "tokens.json").read_text("utf-8")))
def test_ids_are_those_of_mistral_common(text, ids):
    assert tekken().encode(text) == ids


def test_known_ids_by_hand():
    assert tekken().encode("Hello, world!") == [22177, 1044, 4304, 1033]
    assert tekken().encode("[IMG][THINK]") == [1091, 125250, 5371, 12001, 57142, 1093]
    assert tekken().encode("") == []


@given(st.text(st.characters(codec="utf-8")))
@settings(max_examples=examples(300), deadline=None)
def test_decoding_gives_the_text_back(text):
    ids = tekken().encode(text)
    assert all(id >= tekken().n_control for id in ids)
    assert tekken().decode(ids) == text.encode()
    assert tekken().text(ids) == text


@given(st.lists(st.one_of(st.sampled_from(SPELLINGS), st.text(st.characters(codec="utf-8"), max_size=3))))
@settings(max_examples=examples(300), deadline=None)
def test_no_spelling_of_a_control_token_becomes_one(parts):
    assert all(id >= tekken().n_control for id in tekken().encode("".join(parts)))


def test_every_control_spelling_is_ordinary_text():
    for id in range(tekken().n_control):
        name = tekken().spelling(id).decode()
        assert tekken().decode(tekken().encode(name)) == name.encode()


def test_control_tokens_print_nothing():
    assert tekken().decode([1, *tekken().encode("a"), 2, Control.THINK]) == b"a"
    assert tekken().piece(Control.THINK) == b""
    assert tekken().spelling(Control.THINK) == b"THINK"
    with pytest.raises(ValueError, match="0 to 131071"):
        tekken().piece(131072)


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(TokenizerError, match="character 2"):
        tekken().encode("ab\ud800")


def test_other_vocabularies_are_refused_in_one_sentence():
    with pytest.raises(TokenizerError, match="SentencePiece"):
        Tokenizer(Vocabulary(model="llama", tokens=[]))
    with pytest.raises(TokenizerError, match="'default'"):
        Tokenizer(Vocabulary(pre="default", tokens=[]))
    with pytest.raises(TokenizerError, match=r"byte 65 \(191 bytes"):
        Tokenizer(Vocabulary(tokens=[bytes([i]) for i in range(65)]))


UNITS = {
    "A": "A",
    "a": "a",
    "space": " ",
    "tab": "\t",
    "no-break space": "\u00a0",
    "newline": "\n",
    "space and newline": " \n",
    "dot": ".",
    "digit": "1",
    "Chinese": "中",
    "combining mark": "e\u0301",
    "emoji": "🙂",
    "joined emoji": "👩\u200d👧",
}
ENDS = {"spaces before a word": " x", "spaces before a newline": " \n"}  # a unit, and an end


@pytest.mark.parametrize("n_bytes", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [*UNITS, *ENDS])
def test_a_million_of_anything_is_encoded(name, n_bytes):
    """In about a second; a time that grows with the square of the length would be hours, and minutes of a tenth."""
    unit = UNITS.get(name) or ENDS[name][0]
    text = unit * (n_bytes // len(unit.encode())) + ENDS.get(name, "")[1:]
    assert tekken().decode(tekken().encode(text)) == text.encode()


def test_long_runs_of_blanks_are_cut_where_no_id_changes(monkeypatch):
    # The regex engine decides, as long as the runs are short enough for it.
    source = random.Random(SEED)
    blanks = [*module.BLANK, "\n", "\r", " ", "\t"]
    others = ["a", "B ", "é", "1", ".", "/", "'s", "🙂", "\x1c", "中"]
    cut = 0
    for _ in range(3000):
        parts = [
            source.choice([source.choice(blanks) * source.randrange(12), source.choice(others)])
            for _ in range(source.randrange(1, 9))
        ]
        text = "".join(parts)
        monkeypatch.setattr(module, "LONG", 10**9)
        want = tekken().encode(text)
        for long in (2, 3, 8):
            monkeypatch.setattr(module, "LONG", long)
            parts = list(split_blanks(text))
            cut += any(whole for _, whole in parts)
            assert "".join(part for part, _ in parts) == text
            assert tekken().encode(text) == want, repr(text)
    assert cut > 1000


def test_every_long_run_is_found(monkeypatch):
    monkeypatch.setattr(module, "LONG", 5)
    for before in range(12):
        for n in range(5, 17):
            text = "x" * before + " " * n + "y"
            assert (" " * (n - 1), True) in list(split_blanks(text))
            assert (" " * n, True) in list(split_blanks(text[:-1]))
            assert all(not whole for _, whole in split_blanks(text[:-1] + "\n"))


@given(st.lists(st.binary(max_size=5)))
@settings(max_examples=examples(300), deadline=None)
def test_streamed_text_is_the_whole_text_however_it_is_cut(chunks):
    decoder = StreamDecoder()
    text = "".join([decoder.feed(chunk) for chunk in chunks] + [decoder.flush()])
    assert text == b"".join(chunks).decode("utf-8", "replace")
    assert decoder.flush() == ""


def test_a_character_is_held_back_until_it_is_whole():
    decoder = StreamDecoder()
    assert [decoder.feed(bytes([byte])) for byte in "é".encode()] == ["", "é"]
    assert decoder.feed(b"\xf0\x9f") == ""
    assert decoder.flush() == "\ufffd"


def test_commands_without_text_do_not_load_tiktoken():
    code = "import sys, ms4.models.prompt; sys.exit('tiktoken' in sys.modules or 'PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
