"""What can be typed in a chat beside messages: commands, what they take, and what they leave."""

import base64
import dataclasses
import json
import os
import re
import select
import signal
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from ms4 import StopFlag
from ms4.cli import chat_attached, chat_commands, chat_compact, chat_kept, remembered, repl, session_list, streams
from ms4.cli.chat_commands import COMMANDS, PATH, completions
from ms4.cli.image_notes import ImageOptions
from ms4.cli.loading import usable
from ms4.cli.options import EngineOptions
from ms4.cli.render import StatusLine
from ms4.models import kv_files, sessions
from ms4.models.control import Control
from ms4.models.dialogue import Dialogue, said
from ms4.models.model import Model
from ms4.models.sampling import Choice
from ms4.models.scheduler import Scheduler
from ms4.models.vision import ImageInput

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")


@pytest.fixture(scope="module")
def scheduler():
    with Model.open(MODEL) as model, Scheduler(model.engine) as scheduler:
        scheduler.tokenizer = usable(model.vocabulary)
        yield scheduler


@pytest.fixture
def talk(scheduler, monkeypatch, tmp_path):
    """talk(settings...) -> a chat at a terminal, in an empty folder; `said` has what it says beside the answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / ".data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
    monkeypatch.delenv("MS4_NO_HISTORY", raising=False)
    made = []

    def start(n_ctx=1024, session=None, off=False, **settings):
        sampling = repl.Sampling(greedy=True)
        images = ImageInput(MODEL)
        dialogue = Dialogue(scheduler.tokenizer, None, "none", images.measure)
        memory = remembered.Memory(EngineOptions(MODEL), ImageOptions(), print, off=off, session=session)
        one = repl.Talk(
            repl.ChatSettings(sampling, **{"max_tokens": 6} | settings),
            dialogue,
            scheduler,
            scheduler.open(n_ctx),
            streams.Output(),
            StatusLine(True),
            images,
            True,
            memory,
        )
        one.said = []
        one.tell = one.said.append
        one.open(session, None)
        made.append(one)
        return one

    yield start
    for one in made:
        one.memory.close()
        scheduler.drop(one.timeline)


@pytest.mark.parametrize(
    ("before", "begun", "words"),
    [
        ("/ef", "/ef", ["/effort"]),
        ("/effort ", "", ["none", "low", "medium", "high"]),
        ("/effort m", "m", ["medium"]),
        ("/think s", "s", ["show"]),
        ("/file ~/a b", "~/a b", [PATH]),
        ("look at @/tmp/x", "/tmp/x", [PATH]),
        ("me@home", "", []),
        ("/new x", "x", []),
        ("hello /ef", "", []),
    ],
)
def test_what_tab_offers(before, begun, words):
    found = completions(before)
    assert (found[0], list(found[1])) == (begun, words)


def test_every_command_is_in_the_help_and_does_something():
    talk = repl.Talk.__new__(repl.Talk)
    talk.__init__(repl.ChatSettings(repl.Sampling()), *[None] * 6, False, None)
    assert [c.name for c in COMMANDS] == list(talk.commands)
    for command in COMMANDS:
        assert f"\n{command.name}" in "\n" + chat_commands.HELP and command.does
        assert completions(command.name)[1][command.name] == command.does


@pytest.mark.parametrize("words", ["exit", "quit", "/exit", "/quit", "/bye"])
def test_the_words_that_leave_elsewhere_leave(talk, words):
    one = talk()
    assert one.command(words) and one.over and not one.said


# --- /file *.txt


def test_a_pattern_attaches_all_that_match_and_says_what_they_cost(talk, tmp_path):
    (tmp_path / "b.txt").write_text("two words")
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "noise.txt").write_bytes(b"\0\1\2")
    one = talk()
    one.command("/file *.txt")
    assert one.attached == ["a.txt:\none", "b.txt:\ntwo words"]
    costs = [len(one.dialogue.tokenizer.encode(part)) for part in one.attached]
    assert one.said == [
        "left out: noise.txt: neither a PDF, a picture nor text (it holds NUL bytes)",
        f"2 files, {sum(costs)} tokens: a.txt {costs[0]}, b.txt {costs[1]}",
        "goes with the next message; /drop leaves it out",
    ]
    one.command("/drop")
    one.command("/file **/c.txt")
    assert one.attached == ["sub/c.txt:\nthree"]
    one.said.clear()
    one.command("/file *.md")
    assert one.said == [f"no file matches *.md; in {tmp_path}"]


def test_a_file_whose_name_is_a_pattern_is_that_file(talk, tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("bracket")
    (tmp_path / "a1.txt").write_text("digit")
    one = talk()
    one.command("/file a[1].txt")
    assert one.attached == ["a[1].txt:\nbracket"]
    monkeypatch.setattr(chat_attached, "MOST_FILES", 1)
    one.command("/file *.txt")
    assert one.said[-1] == "*.txt matches 2 files; at most 1 at once" and len(one.attached) == 1


# --- !command


def test_a_command_and_what_it_prints_go_into_the_next_message(talk, capsys):
    one = talk()
    one.command("!echo out; echo '```' >&2; printf '\\033[31mred\\033[0m'; exit 3")
    (text,) = one.attached
    assert text == (
        "````\n$ echo out; echo '```' >&2; printf '\\033[31mred\\033[0m'; exit 3\nout\n```\nred\n[exit status 3]\n````"
    )
    assert "out\n" in capsys.readouterr().err
    n = len(one.dialogue.tokenizer.encode(text))
    assert one.said[0] == f"exit status 3; command and output, {n} tokens"
    one.command("!true")
    assert one.attached[1] == "```\n$ true\n```"


def test_what_is_no_command_of_the_shell(talk):
    one = talk()
    for line in ("![alt](x.png)", "!= is not ==", "!", "! ", "!a\nb", "hello !ls", "!(x)"):
        assert not one.command(line) and not one.attached
    one.interactive = False
    assert not one.command("!echo a")


def test_much_output_is_cut_in_the_middle_and_endless_output_ended(talk, monkeypatch):
    text, ending = chat_attached.printed("seq 1 100000")
    assert ending == "" and text.startswith("1\n2\n") and text.endswith("\n100000\n")
    assert "bytes left out]\n" in text and len(text) < 2 * chat_attached.MOST_KEPT + 100
    monkeypatch.setattr(chat_attached, "MOST_PRINTED", 1 << 18)
    text, ending = chat_attached.printed("yes")
    assert ending == "ended after 0 MiB of output" and len(text) < 2 * chat_attached.MOST_KEPT + 100


def test_what_runs_on_in_the_background_is_not_waited_for(talk):
    begun = time.monotonic()
    assert chat_attached.printed("sleep 30 & echo $!")[1] == ""
    assert time.monotonic() - begun < 20


def test_ctrl_c_ends_a_command_and_all_that_it_started(talk, tmp_path):
    def press():
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().endswith("\n"):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    one = talk()
    assert one.command("!echo begun; sh -c 'echo $$ > pid; exec sleep 60'; echo never")
    assert one.said[0].startswith("stopped; ") and "begun\n[stopped]" in one.attached[0]
    assert "never" not in one.attached[0].replace("echo never", "")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(500):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            break
        if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
            break
        time.sleep(0.01)
    else:
        raise AssertionError("it still runs")


# --- /fork, /save, /export


def test_a_fork_goes_on_alone_and_the_old_session_stays(talk):
    one = talk()
    one.command("/fork")
    assert one.said == ["nothing is on disk yet that could be forked"]
    one.send("Hi")
    old = one.memory.path
    before = old.read_bytes()
    one.command("/fork")
    one.send("more")
    new = one.memory.path
    assert old != new and old.read_bytes() == before
    assert f"{old.stem} stays as it was" in " ".join(one.said)
    forked, stayed = sessions.read(new), sessions.read(old)
    assert [t.message for t in forked.turns] == ["Hi", "more"] and forked.turns[0].answer == stayed.turns[0].answer
    assert json.loads(new.read_bytes().split(b"\n")[0])["forked"] == old.stem
    assert new.stat().st_mode & 0o777 == 0o600 and not list(new.parent.glob("*.new"))
    one.command("/undo")
    one.memory.close()
    assert [t.message for t in talk(session=sessions.read(new)).dialogue.turns] == ["Hi"]


def test_a_session_has_the_name_that_it_was_given(talk):
    one = talk()
    one.command("/save taxes 2025")
    one.send("Hi")
    one.command("/save")
    path = one.memory.path
    assert one.said[-1] == f"session {path.stem}: saved by itself, turn by turn; /save NAME names it"
    assert sessions.read(path).title == "taxes 2025" and sessions.find("taxes 2025") == path
    one.command("/save other")
    assert sessions.find("other") == path
    with pytest.raises(sessions.SessionError):
        sessions.find("taxes 2025")
    one.command("/save " + "x" * 81)
    assert one.said[-1] == "a name is one line of at most 80 characters"
    hidden = talk(off=True)
    hidden.command("/save a")
    assert hidden.said == ["this conversation is not kept on disk; /export FILE writes it to a file"]


@pytest.mark.parametrize("off", [False, True])
def test_a_conversation_is_exported(talk, tmp_path, off):
    one = talk(off=off)
    one.command("/export a.md")
    assert one.said == ["there is nothing to export yet"]
    one.send("What is 3+4?")
    answer = said(one.dialogue.turns[0].answer, one.dialogue.tokenizer)[0]
    one.command("/export 'my chat.md'")
    assert one.said[-1] == "my chat.md: 1 turn"
    text = (tmp_path / "my chat.md").read_text()
    assert "**You:** What is 3+4?\n" in text and f"**Model:** {answer.strip()}" in text
    one.command("/export a.json")
    messages = json.loads((tmp_path / "a.json").read_text())["messages"]
    assert messages == [{"role": "user", "content": "What is 3+4?"}, {"role": "assistant", "content": answer}]
    one.command("/export a.json")
    assert one.said[-1] == "a.json is there already; another name"
    one.command("/export a.txt")
    assert one.said[-1] == "/export FILE.md writes Markdown, /export FILE.json messages"
    one.command("/export none/a.md")
    assert one.said[-1] == "none/a.md: No such file or directory"


def test_from_a_pipe_a_failed_export_ends_the_chat(talk):
    one = talk()
    one.interactive = False
    with pytest.raises(repl.UsageError):
        one.command("/export a.txt")


# --- /copy


def test_the_bottom_line_counts_the_conversation_not_what_was_read_before(talk):
    one = talk()
    one.send("one two three")
    first = one.timeline.length
    one.send("four five six")
    assert f"ctx {one.timeline.length}/" in one.bar() and one.timeline.length > first
    one.undo("")
    assert first <= one.n_context <= first + 2 and f"ctx {one.n_context}/" in one.bar()
    one.new("")
    assert "ctx 0/" in one.bar()
    one.send("seven")
    assert f"ctx {one.timeline.length}/" in one.bar()


def test_that_little_will_be_read_again_is_not_said(talk, monkeypatch, capsys):
    one = talk()
    one.send("one two three")
    capsys.readouterr()
    monkeypatch.setattr(kv_files.KvFiles, "keep", lambda self, timeline: "the disk is full")
    one.memory.keep(one.timeline)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(remembered, "WORTH_A_WORD", one.timeline.length)
    one.memory.keep(one.timeline)
    assert capsys.readouterr().out == "what was read is not kept on disk: the disk is full\n"


def test_tab_goes_into_a_folder(tmp_path, monkeypatch):
    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document

    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes.txt").touch()
    found = chat_commands.completer().get_completions(Document("Read @no"), CompleteEvent())
    assert sorted(one.text for one in found) == ["tes.txt", "tes/"]


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """copied(names of programs) -> what the stand-ins for them got; only these are there."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def install(name, script='/bin/cat > "$0.got"; echo "$@" > "$0.args"'):
        (folder / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / name).chmod(0o755)
        return folder / f"{name}.got"

    return install


@pytest.mark.parametrize(("name", "encoding"), [(c[0][0], c[1]) for c in chat_kept.COPIERS])
def test_an_answer_is_copied_by_the_program_that_is_there(talk, copied, name, encoding):
    one = talk()
    one.command("/copy")
    assert one.said == ["there is no answer yet"]
    one.send("What is 3+4?")
    got = copied(name)
    one.command("/copy")
    answer = said(one.dialogue.turns[0].answer, one.dialogue.tokenizer)[0].strip("\n")
    assert got.read_bytes() == answer.encode(encoding)
    assert one.said[-1] == f"the last answer is on the clipboard: {len(answer)} characters"
    one.command("/copy code")
    assert one.said[-1] == "the last answer has no block of code"


def test_the_last_block_of_code_is_copied(talk, copied):
    one = talk()
    one.dialogue.ask("Hi")
    one.dialogue.answered(one.dialogue.tokenizer.encode("Look:\n```py\nprint('é')\n```\nDone."))
    got = copied("wl-copy")
    one.command("/copy code")
    assert got.read_text() == "print('é')"


@pytest.mark.parametrize("why", ["none", "fails", "far"])
def test_a_terminal_has_a_clipboard_itself(copied, monkeypatch, capsys, why):
    if why == "fails":
        copied("wl-copy", "exit 1")
    elif why == "far":
        copied("xclip")
        monkeypatch.setenv("SSH_CONNECTION", "1")
        monkeypatch.delenv("DISPLAY", raising=False)
        monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert chat_kept.to_clipboard("Grüße", True) == ", if this terminal allows it"
    assert capsys.readouterr().err == f"\x1b]52;c;{base64.b64encode('Grüße'.encode()).decode()}\x07"
    with pytest.raises(repl.UsageError, match="more than terminals take"):
        chat_kept.to_clipboard("x" * 80_000, True)
    with pytest.raises(chat_kept.MissingError):
        chat_kept.to_clipboard("x", False)


# --- /set


def test_what_is_set_is_shown_and_changed(talk):
    one = talk(max_tokens=None)
    one.settings = dataclasses.replace(one.settings, sampling=repl.Sampling())
    one.sampler = one.settings.sampling.sampler()
    one.command("/set")
    shown = dict(line.split(None, 1) for line in one.said[0].splitlines())
    assert list(shown) == list(chat_commands.SETTINGS)
    assert shown["temperature"] == "0.3 (default)" and shown["max-tokens"] == "no limit" and shown["system"] == "none"
    assert shown["seed"] == f"{one.sampler.seed} (default)"
    for typed, answer in {
        "temp 0.9": "temperature is 0.9",
        "top_p=0.5": "top-p is 0.5",
        "seed 7": "seed is 7",
        "max-tokens 2K": "max-tokens is 2048",
        "think-budget 100": "think-budget is 100",
        "answer-now-after 2.5": "answer-now-after is 2.5",
        "think hide": "thoughts: hide",
        "effort high": "effort high",
        "system Be kind = good.": "system prompt set",
    }.items():
        one.command(f"/set {typed}")
        assert one.said[-1] == answer
    params = one.sampler.params
    assert (params.temperature, params.top_p, params.seed) == (0.9, 0.5, 7)
    assert one.settings.max_tokens == 2048 and one.dialogue.system == "Be kind = good."
    one.command("/set temperature default")
    assert one.said[-1] == "temperature is 0.7 (default)"
    before = one.sampler
    for typed, answer in {
        "temperature 11": "temperature: 11 is outside 0 to 10",
        "top-k x": "top-k: x is not a whole number such as 32768, 32k or 32K, 0 to 1048576",
        "nothing 3": "no setting nothing; /set lists them",
        "effort": "effort is high",
    }.items():
        one.command(f"/set {typed}")
        assert one.said[-1] == answer and one.sampler is before


def test_what_is_set_holds_for_the_next_answer(talk):
    one = talk()
    one.command("/set max-tokens 3")
    one.send("What is 3+4?")
    assert one.last.n_answer <= 3 and one.settings.sampling.greedy
    one.command("/set temperature 2")
    assert not one.settings.sampling.greedy and one.sampler.params.temperature == 2


# --- /compact


class Scripted:
    """Chooses the ids of some texts, one answer after the other."""

    n_drawn = n_highest = 0

    def __init__(self, tokenizer, *texts):
        self.ids = [id for text in texts for id in (*tokenizer.encode(text), int(Control.EOS))]

    def pick(self, logits, n_top=None):
        return Choice(self.ids.pop(0), 0.0)


SUMMARY = "They counted to ten; the number is 47."
LONG = "one two three four five six seven eight nine ten " * 8


def told_much(talk, *answers, **more):
    one = talk(n_ctx=1024, **{"max_tokens": None} | more)
    one.sampler = Scripted(one.dialogue.tokenizer, *answers)
    return one


def test_older_turns_become_a_summary_that_the_session_knows(talk):
    one = told_much(talk, "First.", "Second.", "Third.", SUMMARY, "Fourth.")
    for message in (LONG + "1", LONG + "2", "3"):
        one.send(message)
    before = [turn.answer for turn in one.dialogue.turns]
    one.said.clear()
    one.command("/compact keep the number")
    assert re.fullmatch(r"compacted: \d+ -> \d+ tokens; this summary takes the place of 2 turns:", one.said[0])
    n_before, n_after = map(int, re.findall(r"\d+", one.said[0])[:2])
    assert n_after < n_before / 2 and one.said[1] == SUMMARY
    summary, newest = one.dialogue.turns
    assert newest.message == "3" and newest.answer == before[2]
    assert [turn.answer for turn in summary.older] == before[:2] and "keep the number" in summary.message
    prompt = one.dialogue.tokenizer.decode([id for id in one.dialogue.ask("x").ids if id > 999]).decode()
    one.dialogue.answered([])
    assert SUMMARY in prompt and "eight nine" not in prompt
    one.send("4")
    session = sessions.read(one.memory.path)
    assert [turn.text for turn in session.turns] == [SUMMARY, "Third.", "Fourth."]
    assert [turn.message for turn in session.all_turns] == [LONG + "1", LONG + "2", "3", "4"]
    assert session.title.startswith("one two") and SUMMARY not in session_list.as_markdown(session, False)
    path = one.memory.path
    one.close()
    again = talk(session=session)
    assert again.dialogue.turns == one.dialogue.turns
    assert again.dialogue.prompt().ids == one.dialogue.prompt().ids
    again.command("/undo 3")
    assert [turn.answer for turn in again.dialogue.turns] == before[:2]
    assert [turn.message for turn in sessions.read(path).turns] == [LONG + "1", LONG + "2"]


def test_what_cannot_be_made_shorter_stays(talk):
    one = told_much(talk, "First.", "Second.", "a longer text than what was said " * 5)
    one.command("/compact")
    one.send("1")
    one.command("/compact")
    assert one.said[-1].startswith("nothing is older than the newest turn") and one.said.count(one.said[-1]) == 2
    one.send("2")
    turns = list(one.dialogue.turns)
    one.command("/compact")
    assert "makes nothing shorter" in one.said[-1] and one.dialogue.turns == turns
    assert b"compact" not in one.memory.path.read_bytes()


def test_a_summary_can_be_stopped(talk):
    one = told_much(talk, "First.", "Second.", SUMMARY)
    one.send(LONG)
    one.send("2")
    turns, pick = list(one.dialogue.turns), one.sampler.pick

    def stopping(*args):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        return pick(*args)

    one.sampler.pick = stopping
    one.command("/compact")
    assert one.said[-1] == "stopped; nothing was changed" and one.dialogue.turns == turns


def test_a_full_context_is_said_in_time_and_compacted(talk):
    one = told_much(talk, *["Yes."] * 40, compact=False)
    full = []
    while not full:
        one.send("one two three four five six seven eight nine ten")
        full = [line for line in one.said if "% full" in line]
    percent = int(re.search(r"(\d+) % full", full[0])[1])
    one.sampler = Scripted(one.dialogue.tokenizer, SUMMARY)
    assert 80 <= percent < 90 and "/compact" in full[0]
    one.command("/compact")
    assert one.said[-3].startswith("compacted: ") and one.warned == 0
    one.sampler = Scripted(one.dialogue.tokenizer, "On.")
    one.send("go on")
    assert said(one.dialogue.turns[-1].answer, one.dialogue.tokenizer)[0] == "On."


NEARLY = "with this message the context is nearly full"


@pytest.mark.slow
def test_a_context_that_is_nearly_full_is_compacted_by_itself_unless_that_is_not_wanted(talk):
    one = told_much(talk, *["Yes."] * 40)
    tokenizer, sent = one.dialogue.tokenizer, []
    while not any(NEARLY in line for line in one.said):
        sent.append(f"{LONG} {len(sent)}")
        one.send(sent[-1])
        if one.timeline.length + 2 * len(tokenizer.encode(sent[-1])) > 0.8 * one.timeline.n_ctx:
            one.sampler = Scripted(tokenizer, SUMMARY, "On.")
    at = next(n for n, line in enumerate(one.said) if NEARLY in line)
    n = int(re.search(r"\((\d+) of 1024 tokens\)", one.said[at])[1])
    assert 0.8 * 1024 < n and one.said[at + 1].startswith("compacted: ") and one.said[at + 2] == SUMMARY
    assert said(one.dialogue.turns[-1].answer, tokenizer)[0] == "On." and one.dialogue.turns[0].older
    assert [turn.message for turn in sessions.read(one.memory.path).all_turns] == sent
    for command in (None, "/set compact off"):
        other = told_much(talk, *["Yes."] * 40, compact=bool(command))
        other.command(command or "/stats")
        for message in sent:
            other.send(message)
        assert not any(NEARLY in line for line in other.said)


def test_what_cannot_be_compacted_is_tried_once_and_the_message_sent(talk, monkeypatch):
    one = told_much(talk, "a", "b", "c", "d", "e")
    tried = []
    monkeypatch.setattr(chat_compact, "compact", lambda talk, hint: tried.append(len(talk.dialogue.turns)) or False)
    monkeypatch.setattr(chat_compact, "CROWDED", 0.01)
    for n in range(3):
        one.send(f"{n}")
    one.send("x" * 6000)  # which no summary helps
    assert tried == [2] and len(one.dialogue.turns) == 3 and "the context holds" in one.said[-1]


@pytest.mark.slow
def test_an_answer_that_fills_the_context_goes_on_behind_a_summary(talk):
    def ask(one):
        for message in (LONG, LONG, "count"):
            one.send(message)

    full = told_much(talk, "Yes.", "Yes.", "one two three " * 300, compact=False)
    ask(full)
    before, tokenizer = full.cut.ids, full.dialogue.tokenizer
    one = told_much(talk, "Yes.", "Yes.")
    one.sampler.ids += [*before, *Scripted(tokenizer, SUMMARY, " The end.").ids]
    ask(one)
    assert any(line.startswith("so that the answer can go on: ") for line in one.said)
    summary, newest = one.dialogue.turns
    assert newest.answer == (*before, *Scripted(tokenizer, " The end.").ids) and len(summary.older) == 2
    kept = sessions.read(one.memory.path).turns[-1]
    assert (kept.answer, kept.cut) == (newest.answer, None) and not one.sampler.ids


def test_a_mark_is_said_once():
    class Talk:
        warned, said, settings = 0, [], repl.ChatSettings(repl.Sampling())

        def say(self, text):
            self.said.append(text)

    one = Talk()
    for share in (0.5, 0.79, 0.8, 0.9, 0.95, 0.99, 0.3, 0.85):
        chat_compact.warn(one, SimpleNamespace(n_context=1000 * share, n_ctx=1000))
    assert [int(re.search(r"(\d+) %", text)[1]) for text in one.said] == [80, 95, 85]


# --- Ctrl-C


@pytest.mark.parametrize("n", [1, 2])
def test_ctrl_c_while_a_kept_prompt_is_read_takes_the_message_back(talk, monkeypatch, n):
    one = talk()
    one.send("Hi")
    restore = one.memory.restore

    def stopped(timeline, prompt):
        for _ in range(n):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        return restore(timeline, prompt)

    monkeypatch.setattr(one.memory, "restore", stopped)
    if n == 1:
        one.send("more")
        assert "stopped; the message is taken back" in one.said
    else:  # as at the prompt, once the file is read
        with pytest.raises(KeyboardInterrupt):
            one.send("more")
    monkeypatch.undo()
    assert len(one.dialogue.turns) == 1 and one.timeline.length == len(one.timeline.keys)
    one.send("more")
    assert [turn.message for turn in sessions.read(one.memory.path).turns] == ["Hi", "more"]


def test_what_a_command_had_printed_when_it_was_stopped_is_read():
    stop = StopFlag()
    with subprocess.Popen(["sh", "-c", "echo begun; exec sleep 60"], stdout=subprocess.PIPE) as process:
        select.select([process.stdout], [], [])
        stop.set()
        assert [*chat_attached.read_output(process, stop)] == [b"begun\n"]
        process.kill()


def test_a_command_that_is_stopped_leaves_what_it_has_shown(talk, monkeypatch):
    one = talk()
    show, taken = chat_attached.show, []

    def stopped(data, before):
        show(data, before)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat_attached, "show", stopped)
    monkeypatch.setattr(one, "take", lambda parts, prices: taken.extend(parts))
    assert one.command("!echo one; sleep 60; echo never")
    assert taken == ["```\n$ echo one; sleep 60; echo never\none\n[stopped]\n```"]


# --- the price of a switch


def test_the_price_of_a_switch_is_what_is_then_read(talk):
    one = talk()
    one.send("Hi")
    n_message = len(one.dialogue.ask("more").ids)
    one.dialogue.answered([])
    n_message -= len(one.dialogue.prompt().ids) + len(one.dialogue.turns[-1].answer)
    one.said.clear()
    one.command("/effort high")
    one.command("/effort none")
    one.command("/system")
    assert one.said[1:] == ["effort none", "no system prompt"], "there and back is free"
    for switch in ("/effort high", "/system Be kind."):
        one.command(switch)
        price = int(re.search(r"reads the conversation again \((\d+) tokens", one.said[-1])[1])
        one.send("more")
        assert one.last.n_prompt - one.last.n_cached == price + n_message
        one.command("/undo")
