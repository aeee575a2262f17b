"""What can be typed in a chat beside messages: commands, what they take, and what they leave."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ms4.cli import chat_attached, chat_commands, remembered, repl, streams
from ms4.cli.chat_commands import COMMANDS, PATH, completions
from ms4.cli.image_notes import ImageOptions
from ms4.cli.loading import usable
from ms4.cli.options import EngineOptions
from ms4.cli.render import StatusLine
from ms4.models.dialogue import Dialogue
from ms4.models.model import Model
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
