"""Faults of what the command says, and where, that users met, each test named after its row in the list."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from standins import Stream, statistics

from ms4.cli import doctor, options, render, state, streams, writers
from ms4.cli import run as one_shot
from ms4.models import usage
from ms4.models.answer import Done
from ms4.models.answer_parser import ToolCall

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tests" / "data" / "bravo-Q4_K_M.gguf")


# --- C4: what is said when an answer ends


@pytest.mark.parametrize(
    "reason, answered, code, says",
    [
        ("stop", False, 3, "the model ended by itself after 7 tokens of thought, without an answer"),
        ("length", False, 3, "7 tokens of thought and no answer; allow more with --max-tokens"),
        ("context", False, 3, "the context of 32768 tokens is full; --ctx allows more"),
        ("interrupted", False, 130, ""),
        ("tool_calls", False, 0, ""),
        ("stop", True, 0, ""),
        ("length", True, 0, ""),
    ],
)
def test_c4_what_ended_a_thought_is_what_is_said(reason, answered, code, says):
    done = Done(reason, statistics(n_thinking=7, n_answer=7))
    assert one_shot.verdict(done, answered, strict=False, most=1 << 18) == (code, says)


def test_c4_no_context_is_advised_that_the_model_does_not_have():
    said = one_shot.verdict(Done("context", statistics()), True, strict=False, most=32768)[1]
    assert said == "the context of 32768 tokens is full; the model itself holds no more"


@pytest.mark.slow
def test_c4_nor_in_a_chat(ms4):
    code, _, err = ms4("chat", "-q", "-m", MODEL, "--greedy", "--no-session", stdin=b"Spell the word planet.\n")
    assert code == 3 and err.endswith("the context of 1024 tokens is full\nhint: the model itself holds no more\n")


# --- C7: the note about the demonstration


@pytest.fixture
def demo(ms4, monkeypatch, tmp_path):
    """Two calls of ms4 on the demonstration: their stderr."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return lambda *arguments, n=2: [ms4(*arguments)[2] for _ in range(n)]


def test_c7_the_note_is_short_and_comes_once_a_day_and_terminal(demo, monkeypatch, tmp_path):
    run = ("run", "--greedy", "-n", "1", "Hi")
    first, second = demo(*run)
    assert first.startswith("ms4: ") and "demonstration" in first and "-m FILE" in first
    assert first.count("\n") == 1 and len(first) <= 80 and second == ""
    monkeypatch.setattr(state, "terminal", lambda: "/dev/pts/7")
    assert demo(*run, n=3) == [first, "", ""]
    monkeypatch.setattr(state.time, "strftime", lambda form: "2026-01-01")
    assert demo(*run) == [first, ""]
    monkeypatch.setattr(state, "terminal", lambda: "none")
    assert demo(*run) == [first, ""]
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["demo-noted"]


@pytest.mark.parametrize("more", [["-q"], ["--count"], ["--show-prompt"]])
def test_c7_never_where_it_is_not_asked_for(demo, more):
    assert demo("run", "--greedy", "-n", "1", *more, "Hi", n=1) == [""]
    assert "demonstration" in demo("run", "--greedy", "-n", "1", "Hi")[0], "it was not used up"


def test_c7_a_folder_that_cannot_be_written_is_no_obstacle(demo, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert all("demonstration" in said for said in demo("run", "--greedy", "-n", "1", "Hi"))


# --- C11: numbers


def test_c11_sizes_are_shown_as_they_are_typed():
    shown = {n: render.short(n) for n in (0, 812, 1000, 1024, 2400, 4096, 10_000, 32_000, 32_768, 33_100, 1 << 20)}
    assert [*shown.values()] == ["0", "812", "1.0k", "1K", "2.4k", "4K", "10k", "32k", "32K", "33k", "1024K"]
    for text, value in (("32K", 32768), ("32k", 32000)):
        assert options.size(text) == value and render.short(value) == text
    assert render.statistics(statistics()).endswith("ctx 0/32K")


def test_c11_one_token_has_no_rate():
    assert " · wrote 1 tok · ctx" in render.statistics(statistics(n_answer=1, s_decode=0.0))
    assert " · wrote 1 tok (1 thinking) · ctx" in render.statistics(statistics(n_answer=1, n_thinking=1))
    assert " · wrote 3 tok 4.0 tok/s · ctx" in render.statistics(statistics(n_answer=3, n_decode=2, s_decode=0.5))


def test_c11_units_fit(ms4):
    given = (0, 1023, 1024, 300 << 10, 5 << 20, (1 << 30) - 1, 1 << 30, 70 << 30)
    wanted = ["0.0 GiB", "1023 bytes", "1.0 KiB", "300.0 KiB", "5.0 MiB", "1024.0 MiB", "1.0 GiB", "70.0 GiB"]
    assert [doctor.gib(n) for n in given] == wanted
    assert "0.0 GiB" not in next(line for line in ms4("doctor", "-m", MODEL)[1].splitlines() if " model " in line)


# --- C12: shapes


def test_c12_tool_calls_carry_an_id():
    calls = [ToolCall(n, "f", "{}", True) for n in range(100)]
    said = usage.message("", calls=calls)["tool_calls"]
    assert [call["id"] for call in said] == [call.id for call in calls] and len({call["id"] for call in said}) == 100
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", call["id"]) for call in said)
    assert {*said[0]} == {"id", "type", "function"} and said[0]["type"] == "function"


def test_c12_the_stream_carries_it_too(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    writer = writers.JsonlWriter(streams.Output(), writers.About("m", "0", "none", 1, "", 0))
    call = ToolCall(0, "f", "{}", True)
    writer.event(call)
    assert json.loads(stream.buffer.getvalue().splitlines()[-1])["id"] == call.id


def test_c12_alternatives_say_their_token(ms4):
    out = ms4("run", "-m", MODEL, "--greedy", "-n", "3", "--format", "json", "--logprobs", "3", "Hi")[1]
    for token in json.loads(out)["choices"][0]["logprobs"]["content"]:
        for one in (token, *token["top_logprobs"]):
            assert bytes(one["bytes"]).decode("utf-8", "replace") == one["token"]
        assert len(token["top_logprobs"]) == 3 and token["top_logprobs"][0]["token"] == token["token"]


def test_c12_a_dash_after_o_is_stdout(ms4, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = ("run", "-m", MODEL, "--greedy", "-n", "3", "Hi")
    assert ms4(*run, "-o", "-") == ms4(*run) and ms4(*run, "--show-prompt", "-o", "-")[1]
    with open("out", "wb") as file:
        command = "import sys; from ms4.cli.start import main; sys.exit(main())"
        logits = [sys.executable, "-c", command, "logits", "-m", MODEL, "--ids", "-", "-o"]
        subprocess.run([*logits, "-"], input=b"[1, 2]", stdout=file, check=True)
        subprocess.run([*logits, "file"], input=b"[1, 2]", check=True)
    assert Path("out").read_bytes() == Path("file").read_bytes()
    assert sorted(os.listdir()) == ["file", "out"]


@pytest.mark.parametrize(
    "arguments, code",
    [
        (("run", "-f", "folder", "Hi"), 7),
        (("run", "-i", "folder", "Hi"), 7),
        (("run", "-s", "@folder", "Hi"), 7),
        (("run", "-o", "folder", "Hi"), 1),
        (("run", "-m", "folder", "Hi"), 5),
        (("info", "folder"), 5),
        (("chat", "folder"), 7),
        (("perplexity", "folder"), 7),
        (("tokenize", "--chat", "folder"), 7),
        (("logits", "--ids", "folder", "-o", "x"), 7),
    ],
)
def test_c12_a_folder_in_the_place_of_a_file_is_said_in_one_line(ms4, tmp_path, monkeypatch, arguments, code):
    """But for stdin: `ms4 run < folder` never gets to us, as Python itself ends with 1 and says why."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    got, out, err = ms4(*arguments)
    assert (got, out) == (code, "") and re.match("ms4: error: folder: is a directory", err, re.IGNORECASE)
