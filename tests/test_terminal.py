"""A chat on a terminal, as a person sees it: a real pty, whose screen pyte keeps.  Most of it is slow."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import pexpect
import pyte
import pytest

from ms4.cli.wrap import cells

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")
SLOW = pytest.mark.slow
# The answers of the small checkpoint are noise.  This one says what it was asked, as Markdown or not, and waits for as
# long as there is a file GATE.
TALKER = f"""
import json, os, sys, time
from ms4.cli import start
from ms4.models.answer import Answer
script = json.load(open(os.environ["SCRIPT"]))
take, gate = Answer.choose, os.environ["SCRIPT"] + ".gate"
def choose(self, logits):
    ids = self.__dict__.setdefault("planned", None)
    if ids is None:
        prompt = self._tokenizer.decode([i for i in self.prompt.ids if i > 999]).decode()
        with open(os.environ["SCRIPT"] + ".asked", "a+") as file:
            file.seek(0)
            n = len(file.readlines())
            file.write(json.dumps(prompt) + chr(10))
        text = script[min(n, len(script) - 1)]
        thought = [34] if text.startswith("<think>") else []
        self.planned = ids = [*thought, *self._tokenizer.encode(text.removeprefix("<think>")), 2]
    while len(self.ids) == 3 and os.path.exists(gate) and not self.stop_flag.is_set():
        time.sleep(0.01)
    logits[:] = -1e4
    logits[ids[min(len(self.ids), len(ids) - 1)]] = 1e4
    return take(self, logits)
Answer.choose, Answer.n_highest = choose, 0  # it takes all logits, to write over them
sys.argv = ["ms4", "chat", "-m", {MODEL!r}, "--greedy", "--ctx", "1024", *sys.argv[1:]]
sys.exit(start.main())
"""

MARKDOWN = (
    "# A title\n\nThere are **some bold words** in it.\n- one\n  - two\n\n```python\nx = 1\n```\n> quoted\n\n"
    "| Name | n |\n|---|--:|\n| many | 2 |\n\nEnd."
)


def ours(line):
    return line.startswith(("› ", "bravo-Q4_K_M"))


class Person:
    """Somebody at a terminal with a screen of so many columns."""

    def __init__(self, folder, script, width=80, height=24, options=(), **environment):
        self.script = folder / "script"
        self.script.write_text(json.dumps(script))
        self.gate = Path(f"{self.script}.gate")
        self.screen = pyte.HistoryScreen(width, height, history=5000, ratio=1)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        unset = ("NO_COLOR", "MS4_MODEL", "MS4_DEBUG", "MS4_NO_HISTORY")
        env = {k: v for k, v in os.environ.items() if k not in unset}
        env |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(folder)}
        env |= {"SCRIPT": str(self.script), **environment}
        command = ["-c", TALKER, "--no-session", *options]
        self.process = pexpect.spawn(sys.executable, command, env=env, dimensions=(height, width), timeout=60)
        self.process.delaybeforesend = None

    def sees(self, wanted):
        """Waits until the text on the screen, and of what was scrolled away, matches; returns it."""
        end = time.monotonic() + 60
        while not re.search(wanted, self.text, re.DOTALL):
            assert time.monotonic() < end and "internal error" not in self.text, self.text
            self.read(1)
        return self.text

    def read(self, seconds):
        try:
            data = self.process.read_nonblocking(65536, seconds)
        except (pexpect.TIMEOUT, pexpect.EOF):
            return False
        self.raw += data
        self.stream.feed(data)
        return True

    @property
    def text(self):
        above = ["".join(row[x].data for x in range(self.screen.columns)) for row in self.screen.history.top]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display] if not ours(line)).rstrip()

    @property
    def bottom(self):
        """The rows below the conversation: what is typed while an answer comes, and how things stand."""
        return [line.rstrip() for line in self.screen.display if ours(line)]

    @property
    def written(self):
        """What was written into the rows that scroll: all but the drawings of the two below."""
        return re.sub(rb"\x1b7.*?\x1b8(?:\x1b\[J)?|\x1bD\x1bD\x1b\[2A", b"", self.raw, flags=re.DOTALL)

    def types(self, keys):
        self.process.send(keys)

    def asked(self):
        """The last message, as the model got it: the text of the whole prompt."""
        return json.loads(self.asked_all()[-1])

    def asked_all(self):
        return Path(f"{self.script}.asked").read_text().splitlines()

    def resize(self, width, height=24):
        self.screen.resize(height, width)
        self.process.setwinsize(height, width)


@pytest.fixture
def person(tmp_path):
    started = []

    def start(*script, **more):
        started.append(Person(tmp_path, script or ("Yes.",), **more))
        started[-1].sees(r"leaves.*> ?$")
        return started[-1]

    yield start
    for one in started:
        one.process.close(force=True)


DONE = r"effort\s+none\n> ?$"
LINES = "\n".join(str(n) for n in range(1, 201))
PROSE = (
    "The quick brown fox jumps over the lazy dog, and then it waits.\n\n"
    "* an item that is longer than any narrow terminal\n\n"
    "| a | table of three | columns |\n|---|---|---|\n\n日本語の文章は、どこでも切れる。そして続く。\n"
)


def test_a9_a_long_paste_is_shown_folded_and_sent_whole(person):
    one = person()
    one.types(f"Look: \x1b[200~{LINES}\x1b[201~ ok?")
    shown = one.sees(r"ok\?$")
    assert shown.endswith("> Look: [pasted 200 lines: 1 … +199 lines] ok?")
    one.types("\x7f" * 4 + " \r")
    shown = one.sees(DONE)
    assert shown.count("[pasted 200 lines") == 1 and not re.search(r"^(2|177|200)$", shown, re.MULTILINE)
    assert f"Look: {LINES} " in one.asked()


@pytest.mark.parametrize("terminal", ["dumb", "xterm"])
@SLOW
def test_a9_a_paste_that_is_not_marked_is_one_message(person, terminal):
    one = person(TERM=terminal)
    one.types(LINES.replace("\n", "\r") + "\r")
    one.sees(r"effort none.*> ?$")
    assert LINES in one.asked() and len(one.asked_all()) == 1


@SLOW
def test_a9_two_pastes_of_one_size_stay_apart_and_one_is_taken_back_whole(person):
    one = person()
    first, second = ("".join(f"{word}{n}\n" for n in range(20)) for word in ("a", "b"))
    for text in (first, second, second.replace("b", "a")):
        one.types(f"\x1b[200~{text}\x1b[201~")
    one.sees(r"\[pasted 20 lines: a0 … \+19 lines\]\[pasted 20 lines: b0")
    one.types("\x7f\r")
    one.sees(DONE)
    assert f"{first}{second}" in one.asked() and f"{second}{first}" not in one.asked()


@SLOW
@pytest.mark.parametrize("terminal", ["dumb", "xterm", "", "unknown"])
def test_a8_what_is_typed_before_there_is_a_prompt_is_sent(tmp_path, terminal):
    one = Person(tmp_path, ["First.", "Second."], TERM=terminal)
    one.types("one\r")
    try:
        one.sees(r"> one\nFirst\..*> ?$")
        assert len(one.asked_all()) == 1 and one.asked().endswith("one")
    finally:
        one.process.close(force=True)


@SLOW
def test_b11_bytes_that_are_no_text_come_back_to_be_mended(person):
    one = person("Yes.")
    one.process.send(b"Gr\xfc\xdfe\r")
    one.sees(r"no UTF-8.*> Gr\ufffd\ufffde$")
    one.types("\x7f" * 3 + "eet\r")
    one.sees(DONE)
    assert one.asked().endswith("Greet")


@SLOW
def test_a8_what_is_typed_meanwhile_is_the_next_message(person):
    one = person("One two three four five six.", "Second.")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\nOne")
    one.types("and ")
    one.types("then?\r")
    one.types("half of a thi")
    time.sleep(0.3)
    one.gate.unlink()
    shown = one.sees(r"Second\..*> half of a thi$")
    assert "One two three four five six.\n" in shown, "the answer is not torn"
    assert shown.count("and then?") == 1 and "> and then?\nSecond." in shown
    assert one.asked().endswith("and then?")


@SLOW
def test_a8_ctrl_c_stops_the_answer_and_leaves_what_was_typed(person):
    one = person("One two three four five six.", "Second.")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\nOne")
    one.types("next")
    one.types("\x03")
    shown = one.sees(r"stopped; what there is is kept.*> next$")
    one.gate.unlink()
    assert "^C" not in shown
    one.types(" one\r")
    one.sees(rf"Second.*{DONE}")
    assert one.asked().endswith("next one")


@SLOW
def test_a8_a_paste_while_an_answer_comes_is_not_cut(person):
    one = person("One two three four five six.", "Second.")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\nOne")
    one.types(f"\x1b[200~{LINES}\x1b[201~")
    time.sleep(0.2)
    one.gate.unlink()
    one.sees(r"\[pasted 200 lines: 1 … \+199 lines\]$")
    one.types("\r")
    one.sees(rf"Second.*{DONE}")
    assert LINES in one.asked()


@SLOW
def test_a8_the_terminal_is_given_back_as_it_was(person):
    import termios

    one = person()
    one.types("\x04")
    one.process.expect(pexpect.EOF)
    modes = termios.tcgetattr(one.process.child_fd)[3]
    assert modes & termios.ECHO and modes & termios.ICANON and not modes & termios.NOFLSH


@SLOW
def test_the_terminal_is_given_back_when_the_chat_is_ended_from_outside(person):
    import termios

    one = person("One two three four five six.")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\nOne")
    assert one.screen.margins
    one.process.kill(signal.SIGTERM)
    until(lambda: not one.read(1) and not one.process.isalive())
    modes = termios.tcgetattr(one.process.child_fd)[3]
    assert modes & termios.ECHO and modes & termios.ICANON and not modes & termios.NOFLSH
    assert one.screen.margins is None and one.process.signalstatus == signal.SIGTERM


def test_what_a_killed_chat_has_left_of_the_terminal_is_mended():
    import termios

    from ms4.cli.terminal import mended, quietened

    parent, child = os.openpty()
    try:
        modes = termios.tcgetattr(child)
        assert mended(modes) == modes
        termios.tcsetattr(child, termios.TCSANOW, quietened(modes))
        left = termios.tcgetattr(child)
        assert left[3] & termios.ECHO == 0 and mended(left)[:4] == modes[:4]
    finally:
        os.close(parent)
        os.close(child)


@pytest.mark.parametrize("width", [20, 40, pytest.param(80, marks=SLOW), pytest.param(200, marks=SLOW)])
@SLOW
def test_c8_an_answer_is_broken_between_words(person, width):
    one = person(PROSE, width=width, height=60, options=("--plain",))
    one.types("Hi\r")
    shown = one.sees(DONE)
    answer = shown[shown.index("> Hi\n") + 5 : shown.index("ctx")]
    rows = answer.split("\n")
    for word in PROSE.split():
        assert not word.isascii() or "|" in word or any(word in row for row in rows), (word, answer)
    assert all(cells(row) <= width for row in rows)
    assert "".join(PROSE.split()) in "".join(answer.split())


MIXED = (
    "# A title\n\n| Name | n |\n|---|---|\n| 日本語日本語日本語日本語日本語 | 2 |\n\n```python\nprint('"
    + "a line of code, " * 6
    + "')\n```\n\n- item\n  - nested item of several words\n\n> "
    + "quoted " * 12
    + "\n\n"
    + " ".join(f"word{n:02}" for n in range(40))
    + " https://example.org/"
    + "x" * 60
)


@SLOW
@pytest.mark.parametrize("width", [20, 40, 80, 200])
@pytest.mark.parametrize(
    "environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"LC_ALL": "C"}, {"TERM": "unheard-of"}]
)
def test_c8_no_word_is_lost_at_any_width_on_any_terminal(person, width, environment):
    one = person(MIXED, "Second.", width=width, **environment)
    one.types("Hi\r")
    shown = one.sees(r"example.*x{5}.*> ?$")
    assert not [n for n in range(40) if f"word{n:02}" not in shown]
    assert not [line for line in shown.splitlines() if cells(line) > width]
    for other in (33, 61, 20, 120):
        one.resize(other)
    one.types("again\r")
    assert one.sees(r"Second\..*> ?$").count("> again") == 1


@pytest.mark.parametrize("width", [20, 60, 200])
@SLOW
def test_an_answer_is_rendered_as_the_markdown_it_is(person, width):
    one = person(MARKDOWN, width=width, height=60)
    one.types("Hi\r")
    shown = one.sees(DONE)
    answer = shown[shown.index("> Hi\n") + 5 :]
    for said in (
        "A title\n\n",
        "• one\n  ◦ two\n",
        "```python\nx = 1\n```\n",
        "│ quoted\n",
        "Name   n\n",
        "\nmany   2\n",
    ):
        assert said in answer, (said, answer)
    assert "some bold words in" in " ".join(answer.split()) and "**" not in answer
    assert not re.search(
        rb"\x1b\[[0-9;]*[A-HJKf]", one.written[one.written.index(b"title") : one.written.index(b"many")]
    )


@SLOW
def test_light_and_dark_terminals_get_the_same(person):
    raws = []
    for colours in ("0;15", "15;0"):
        one = person(MARKDOWN, COLORFGBG=colours)
        one.types("Hi\r")
        one.sees(DONE)
        raws.append(one.written[one.written.index(b"title") : one.written.index(b"many")])
    assert raws[0] == raws[1]


@SLOW
@pytest.mark.parametrize("environment", [{"TERM": "dumb"}, {"NO_COLOR": "1"}])
def test_no_colour_where_there_is_to_be_none(person, environment):
    one = person(PROSE, **environment)
    one.types("Hi\r")
    one.sees(r"effort none.*> ?$")
    assert not re.search(rb"\x1b\[[0-9;]*[1-9][0-9;]*m", one.raw)
    if environment.get("TERM"):
        assert b"\x1b" not in one.raw


@SLOW
def test_c9_resizing_keeps_one_prompt_and_every_word(person):
    one = person("One two three.", width=80)
    one.types("Hi\r")
    one.sees(DONE)
    one.types("some words of a message")
    one.sees("a message$")
    for width in (40, 60, 33, 120, 50, 200, 80):
        one.resize(width)
        while one.read(0.3):
            pass
    shown = one.sees("a message$")
    assert shown.count("> some words of a message") == 1 and shown.count("> Hi") == 1
    one.types("\r")
    one.sees(rf"a message\nOne two three.*{DONE}")
    assert one.asked().endswith("some words of a message")


@SLOW
def test_c9_resizing_while_an_answer_comes_loses_nothing(person):
    words = " ".join(f"word{n}" for n in range(60))
    one = person(words, height=60)
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi$")
    one.resize(40, 60)
    one.gate.unlink()
    shown = one.sees(DONE)
    assert "".join(words.split()) in "".join(shown.split())
    assert all(any(word in row.split() for row in shown.split("\n")) for word in words.split())


@SLOW
def test_edit_brings_the_last_message_back_into_the_editor(person):
    one = person("First.", "Second.")
    one.types("Hi there\r")
    one.sees(DONE)
    one.types("/edit\r")
    one.sees("> Hi there$")
    one.types(" again\r")
    one.sees(rf"Second.*{DONE}")
    assert one.asked().endswith("Hi there again") and "First" not in one.asked()


@SLOW
def test_ctrl_g_opens_the_editor_with_the_whole_text(person, tmp_path):
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\ncp $1 $1.seen\nmv $1.seen " + str(tmp_path / "seen") + "\necho changed > $1\n")
    editor.chmod(0o700)
    one = person(EDITOR=str(editor), VISUAL=str(editor))
    one.types(f"Look: \x1b[200~{LINES}\x1b[201~")
    one.sees(r"lines\]$")
    one.types("\x07")
    one.sees("> changed$")
    one.types("\r")
    one.sees(DONE)
    assert (tmp_path / "seen").read_text() == f"Look: {LINES}" and one.asked().endswith("changed")


@SLOW
def test_a_file_is_named_in_a_message_and_completed(person, tmp_path):
    (tmp_path / "notes_of_mine.txt").write_text("forty-two")
    one = person(width=200)
    one.types(f"What is in @{tmp_path}/notes_o\t")
    one.sees("notes_of_mine.txt$")
    one.types(" ?\r")
    shown = one.sees(DONE)
    assert "text of " in shown
    assert "forty-two" in one.asked() and one.asked().endswith("notes_of_mine.txt ?")


@SLOW
def test_enter_on_an_empty_line_ends_a_thought(person):
    one = person("<think>a b c d e f g h i j k l m n o p", NO_COLOR="1")
    one.types("/effort high\r")
    one.sees("effort high.*> ?$")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("thinking:\na")
    one.types("\r")
    time.sleep(0.5)
    one.gate.unlink()
    shown = one.sees(r"answer:\n.*effort high\n> ?$")
    assert re.search(r"answer:\n[^\n]* o p\n", shown), "what would have been thought is the answer"
    one.types("\r")
    assert one.sees(r"> ?$") and len(one.asked_all()) == 1


@SLOW
def test_ctrl_v_attaches_the_image_on_the_clipboard_and_the_line_stays(person, tmp_path):
    image = Path(MODEL).with_name("bravo-image.png")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "wl-paste").write_text(f"#!/bin/sh\n[ ! -e '{tmp_path}/text' ] && exec /bin/cat '{image}'\n")
    (programs / "wl-paste").chmod(0o755)
    one = person(PATH=str(programs))
    one.types("Total")
    one.sees(r"> Total$")
    one.types("\x16")
    shown = one.sees(r"18 tokens.*> Total$")
    assert "clipboard 140x84 -> 140x84, 18 tokens\ngoes with the next message" in shown
    one.types("\x1b[200~\x1b[201~")  # an empty paste
    one.sees(r"18 tokens.*18 tokens.*> Total$")
    (tmp_path / "text").write_text("")
    one.types("?\x16")
    one.sees(r"there is no image on the clipboard\n> Total\?$")
    one.types("\r")
    one.sees(DONE)
    assert one.asked().endswith("Total?")


def until(check):
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end


@SLOW
def test_the_next_message_is_seen_while_an_answer_comes(person):
    one = person("One two three four five six.", "Second.")
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\nOne")
    one.types("and thn")
    until(lambda: one.read(0.1) and one.bottom[0] == "› and thn")
    assert re.match(r"bravo-Q4_K_M · effort none · ctx \d+/1K ▕", one.bottom[1])
    one.types("\x1b[D")
    one.types("e")
    one.types("\r")
    one.types(f"\x1b[200~{LINES}\x1b[201~")
    until(lambda: one.read(0.1) and "and then ⏎ [pasted 200 lines: 1 …" in one.bottom[0])
    assert one.screen.display[-1].startswith("bravo") and one.screen.display[-2].startswith("› ")
    one.gate.unlink()
    shown = one.sees(r"> and then\nSecond\..*\+199 lines\]$")
    assert "One two three four five six.\n" in shown and one.asked().endswith("and then")


@SLOW
def test_the_rows_below_are_given_back(person):
    one = person(" ".join(f"word{n}" for n in range(150)), height=10)
    one.types("Hi\r")
    shown = one.sees(DONE)
    assert [int(n) for n in re.findall(r"word(\d+)", shown)] == [*range(150)], "what scrolled away is there"
    assert one.screen.margins is None and not [row for row in one.bottom if row.startswith("›")]


@SLOW
def test_ctrl_t_folds_thoughts_while_they_come_and_shows_them_whole(person):
    thoughts = "one two three four five six seven."
    one = person(f"<think>{thoughts}")
    one.gate.touch()
    one.types("/effort high\r")
    one.sees("effort high.*> ?$")
    one.types("Hi\r")
    one.sees("> Hi\none?")
    one.types("\x14")
    until(lambda: one.read(0.2) and re.search(r"thinking \d+ tokens \d+ s, Ctrl-T shows", one.bottom[-1]))
    one.gate.unlink()
    shown = one.sees(r"tok/s.*effort\s+high\n> ?$")
    assert re.search(r"\[thought \d+ tokens, \d+ s\]", shown) and "seven" not in shown
    one.gate.touch()
    one.types("Again\r")
    one.sees("> Again\none?")
    one.types("\x14")
    until(lambda: one.read(0.2) and "Ctrl-T shows" in one.bottom[-1])
    one.types("\x14")
    until(lambda: one.read(0.2) and "Ctrl-T folds" in one.bottom[-1])
    one.gate.unlink()
    shown = one.sees(r"> Again\n.*effort\s+high\n> ?$")
    assert thoughts in shown[shown.index("> Again") :]


@SLOW
def test_a_storm_of_sizes_during_an_answer_loses_no_word(person, rng):
    words = [f"word{n}" for n in range(150)]
    one = person("- " + "\n- ".join(words))
    one.gate.touch()
    one.types("Hi\r")
    one.sees("> Hi\n")
    for n in range(40):
        one.resize(int(rng.integers(20, 201)), int(rng.integers(4, 61)))
        one.read(0.02)
        if n == 20:
            one.gate.unlink()
    one.resize(80)
    until(lambda: not one.read(1) or b"effort none" in one.written)
    one.types("x")
    one.sees("> x$")
    assert [int(n) for n in re.findall(rb"word(\d+)", one.written)][-150:] == [*range(150)]


@pytest.mark.rare
def test_ctrl_c_at_forty_moments_keeps_the_chat_and_the_terminal(person, rng):
    one = person(" ".join(f"word{n}" for n in range(120)), height=12)
    for n in range(40):
        one.types(f"Turn {n}\r")
        one.sees(f"> Turn {n}\n")
        end = time.monotonic() + float(rng.uniform(0, 0.6))
        while time.monotonic() < end:
            one.read(0.01)
        one.types("\x03")
        time.sleep(0.3)
        one.types("/new\r")
        shown = one.sees(rf"> Turn {n}\n.*(?:> |\n)/new\n[^>]*> ?$")
        assert one.screen.margins is None
        said = shown[shown.index(f"> Turn {n}\n") :]
        words = [int(n) for n in re.findall(r"word(\d+)\b", said)]  # the last may be cut
        assert words[:-1] == [*range(max(len(words) - 1, 0))]


@pytest.mark.rare
def test_ctrl_c_ends_a_command_of_the_shell_and_not_the_chat(person):
    one = person()
    one.types("!echo one; sleep 60; echo never\r")
    one.sees(r"never\none$")
    one.types("\x03")
    shown = one.sees(r"stopped; command and output, \d+ tokens\ngoes with the next message.*> ?$")
    assert "once more" not in shown
    one.types("Why?\r")
    one.sees(DONE)
    assert "$ echo one; sleep 60; echo never\none\n[stopped]\n```\n\nWhy?" in one.asked()
