"""`ms4 chat`: what is kept of a conversation, and how its commands change it."""

import io
import os
import stat
import sys
from pathlib import Path

import pytest

from ms4.cli import lines, start
from ms4.cli.loading import open_tokenizer
from ms4.models.answer import Answer
from ms4.models.control import Control
from ms4.models.dialogue import Dialogue, closed
from ms4.models.prompt import render

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")


@pytest.fixture(scope="module")
def tokenizer():
    return open_tokenizer(MODEL)


@pytest.fixture
def chat(monkeypatch):
    """chat(lines of stdin, options...) -> (exit code, stdout, stderr)"""

    def run(*typed, options=("--greedy", "-n", "6")):
        data = "".join(f"{line}\n" for line in typed).encode()
        streams = [io.TextIOWrapper(io.BytesIO(b), encoding="utf-8") for b in (data, b"", b"")]
        for name, stream in zip(("stdin", "stdout", "stderr"), streams, strict=True):
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["ms4", "chat", "-m", MODEL, *options])
        return start.main(), *(s.buffer.getvalue().decode() for s in streams[1:])

    return run


def test_a_conversation_is_the_ids_that_were_written(tokenizer):
    talk = Dialogue(tokenizer, "Be kind.", "none")
    first = talk.ask("Hello")
    assert (
        first.ids
        == render([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}], tokenizer).ids
    )
    # These ids are not what a tokenizer makes of their text: one letter each.
    written = [i for letter in "Hi" for i in tokenizer.encode(letter)]
    talk.answered([*written, Control.EOS])
    second = talk.ask("[INST] and you?")
    asked = [Control.INST, *tokenizer.encode("[INST] and you?"), Control.INST_END]
    assert second.ids == [*first.ids, *written, Control.EOS, *asked]


def test_an_answer_in_the_history_is_closed():
    assert closed([1500, 1501]) == (1500, 1501, Control.EOS)
    assert closed([Control.THINK, 1500]) == (Control.THINK, 1500, Control.THINK_END, Control.EOS)
    whole = (Control.THINK, 1500, Control.THINK_END, 1501, Control.EOS)
    assert closed(whole) == whole


def test_what_was_not_answered_is_taken_back(tokenizer):
    talk = Dialogue(tokenizer, None, "none")
    talk.ask("a")
    talk.answered([1500])
    before = talk.ask("b")
    talk.answered([])
    assert [turn.message for turn in talk.turns] == ["a"]
    assert talk.ask("b").ids == before.ids
    talk.answered([1501])
    assert (talk.undo(), talk.undo(5), talk.undo()) == (1, 1, 0)


def test_each_line_is_answered_and_stdout_has_only_answers(chat):
    code, out, err = chat("Hi", "", "and now?")
    assert code == 0 and err == "" and out.count("\n") >= 2
    assert out.startswith(chat("Hi")[1])


def test_only_what_is_new_is_read(chat):
    _, _, err = chat("Hi", "/stats", "more", "/stats")
    first, second = err.splitlines()
    assert "cached" not in first
    # Six tokens were written, the last of which was not fed; of the prompt, everything before it is held.
    held = int(first.split()[1]) + 5
    assert f"({held} cached)" in second


def test_the_effort_changes_the_beginning(chat):
    _, out, err = chat("Hi", "/effort high", "more", "/stats")
    assert "effort high: the next message reads the conversation again (" in err
    assert int(err.split("cached)")[0].rsplit("(", 1)[1]) < 20
    assert chat("/effort high", "Hi")[1] == chat("Hi", options=("--greedy", "-n", "6", "-r", "high"))[1]


def test_retry_and_undo(chat):
    once = chat("Hi")[1]
    assert chat("Hi", "/retry")[1] == once + once
    assert chat("Hi", "/undo", "Hi")[1] == once + once
    assert chat("Hi", "/new", "Hi")[1] == once + once
    assert "nothing to take back" in chat("/undo")[2] and "nothing to answer" in chat("/retry")[2]


def test_a_system_prompt_can_be_set(chat):
    assert chat("/system Be terse.", "Hi")[1] == chat("Hi", options=("--greedy", "-n", "6", "-s", "Be terse."))[1]


def test_an_unknown_command_is_not_a_message(chat):
    code, out, err = chat("/efort high", "Hi")
    assert (code, out) == (2, "")
    assert err.startswith("ms4: error: no command /efort\nhint: /effort; a message")
    assert "no command /zzz\nhint: /help lists them; " in chat("/zzz")[2]


def test_a_slash_after_a_space_is_a_message(chat):
    assert chat(" /help")[1].strip() and not chat("/help")[1]


def test_a_full_context_ends_a_chat_without_a_person(chat):
    code, out, err = chat("Hi", options=("--greedy", "--ctx", "30"))
    assert code == 3 and out.strip() and "the context of 30 tokens is full" in err


def test_a_line_that_is_not_text_ends_it(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff\n")))
    with pytest.raises(Exception, match=r"stdin is not UTF-8 \(byte 2\)"):
        lines.PipedLines().next()


def test_the_history_file_is_private(monkeypatch, tmp_path):
    monkeypatch.delenv("MS4_NO_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    kept = lines.open_history(lines.Folds())
    kept.append_string("secret")
    path = tmp_path / "ms4" / "history"
    assert "secret" in path.read_text()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    monkeypatch.setenv("MS4_NO_HISTORY", "1")
    lines.open_history(lines.Folds()).append_string("more")
    assert "more" not in path.read_text()


def test_a_home_that_cannot_be_written_is_no_obstacle(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("MS4_NO_HISTORY", raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert type(lines.open_history(lines.Folds())).__name__ == "InMemoryHistory"
    assert capsys.readouterr().err.startswith("ms4: no input history: ")


def test_continue_goes_on_from_the_very_token(chat, tokenizer):
    whole = chat("Hi", options=("--greedy", "-n", "12"))[1]
    cut = chat("Hi", "/continue")[1]
    assert cut.replace("\n", "") == whole.replace("\n", "") and cut.count("\n") > whole.count("\n")
    again = chat("Hi", "/continue", "more", "/stats", options=("--greedy", "-n", "6"))
    straight = chat("Hi", "more", "/stats", options=("--greedy", "-n", "12"))
    assert again[1].replace("\n", "").startswith(whole.replace("\n", ""))
    assert again[2].split()[1] == straight[2].split()[1], "the conversation has as many tokens"


def test_continue_reads_nothing_again(chat):
    err = chat("Hi", "/stats", "/continue", "/stats")[2]
    first, second = (line.split() for line in err.splitlines())
    assert int(second[1]) == int(first[1]) + 6 and f"({int(first[1]) + 5} cached)" in " ".join(second)


def test_only_an_answer_that_was_cut_goes_on(chat):
    for lines_typed in (("/continue",), ("Hi", "/undo", "/continue"), ("Hi", "/new", "/continue")):
        assert "the last answer was not cut" in chat(*lines_typed)[2]


def test_a_thought_that_was_cut_goes_on_as_a_thought(tokenizer):
    talk = Dialogue(tokenizer, None, "high")
    first = talk.ask("a")
    ids = [Control.THINK, 1500]
    talk.answered(ids)
    rest = talk.resume(ids)
    assert rest.ids == [*first.ids, *ids] and rest.opens == "thinking"
    assert talk.resume([*ids, Control.THINK_END, 1501]).opens == "text"
    talk.answered([*ids, Control.THINK_END, 1501, Control.EOS])
    assert talk.turns[-1].answer == (*ids, Control.THINK_END, 1501, Control.EOS)


def test_edit_needs_a_terminal(chat):
    assert "/edit needs a terminal" in chat("Hi", "/edit")[2]


def test_low_and_medium_are_high_with_a_budget(chat):
    err = chat("/effort low", "/effort", "/effort medium", "/effort none", "/effort")[2].splitlines()
    assert err[0] == "effort low" and err[1] == "effort is low; /effort none, low, medium or high"
    assert err[2:4] == ["effort medium", "effort none"] and err[4].startswith("effort is none;")
    assert chat("Hi", options=("--greedy", "-n", "6", "-r", "low"))[1] == chat("/effort high", "Hi")[1]
    named = chat("/effort", options=("--think-budget", "7", "-r", "high"))[2]
    assert named.startswith("effort is high, 7 tokens;")


def test_the_seconds_of_a_thought_are_an_option_of_both(chat, ms4, monkeypatch):
    got = []

    def seen(self, *args, think_seconds=None, **more):
        got.append(think_seconds)
        return made(self, *args, think_seconds=think_seconds, **more)

    made = Answer.__init__
    monkeypatch.setattr(Answer, "__init__", seen)
    chat("Hi", options=("--greedy", "-n", "2", "--answer-now-after", "2.5"))
    ms4("run", "-q", "-n", "2", "--answer-now-after", "7", "Hi")
    assert got == [2.5, 7.0]
    assert ms4("run", "--answer-now-after", "0", "Hi")[0] == 2
