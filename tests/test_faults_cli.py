"""Faults of the command line and the terminal that users met, each test named after its row in the list."""

import fcntl
import json
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import termios
from contextlib import contextmanager
from pathlib import Path

import pytest
from standins import Stream, statistics

from ms4 import StopFlag
from ms4.cli import elsewhere, errors, main, render, repl, start, streams, writers
from ms4.cli.follow import follow
from ms4.models import untrusted
from ms4.models.answer import Done, Prefill
from ms4.models.answer_parser import Text, Thinking
from ms4.quant import gguf_file, visible

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tests" / "data" / "bravo-Q4_K_M.gguf")


# --- A1: characters of somebody's language are no control characters

LEGITIMATE = [
    "Voil\u00e0\u00a0: 12\u202f000",
    "\u6771\u4eac\u3000\u5927\u962a",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "\u200f\u05e9\u05dc\u05d5\u05dd\u200e \u061c",
    "soft\u00adhyphen zero\u200bwidth \u2060joiner",
    "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "private \ue0b0 use, variation \u2764\ufe0f, new \U0001fae9",
]
COMMANDS = {
    "\x1b[2J": r"\x1b[2J",
    "\r\b\x00\x7f": r"\x0d\x08\x00\x7f",
    "\x85\x9b1m": r"\x85\x9b1m",
    "\u202egnp.exe\u202c": r"\u{202e}gnp.exe\u{202c}",
    "\u2066a\u2069": r"\u{2066}a\u{2069}",
    "\ud83d \udcff": r"\u{d83d} \xff",
}


@pytest.mark.parametrize("text", LEGITIMATE)
def test_a1_characters_of_a_language_stay(text):
    assert visible.text(text) == visible.line(text) == errors.escape(text) == untrusted.shown(text) == text
    assert gguf_file.shown(text) == gguf_file.shown(text.encode()) == text


@pytest.mark.parametrize("given", COMMANDS)
def test_a1_what_commands_a_terminal_is_made_visible(given):
    for show in (visible.text, visible.line, errors.escape, untrusted.shown, gguf_file.shown):
        assert show(f"a{given}b") == f"a{COMMANDS[given]}b"


def test_a1_every_control_character_is_made_visible():
    for code in [*range(32), *range(127, 160)]:
        kept = {"\n", "\t"} & {chr(code)}
        assert (chr(code) in visible.text(chr(code))) == bool(kept)
        assert chr(code) not in visible.line(chr(code))


def test_a1_a_terminal_gets_the_characters(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Stream(terminal=True)
    stream.reconfigure(encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    for text in [*LEGITIMATE, "\x1b[31m"]:
        screen = render.Screen(streams.Output())
        screen.text(text)
        screen.end()
    assert stream.buffer.getvalue().decode() == "\n".join(LEGITIMATE) + "\n\\x1b[31m\n"


def test_a1_json_stays_what_it_is_on_a_terminal(terminal, monkeypatch):
    value = {"text": "".join(LEGITIMATE) + "\x1b[2J\x85\u202e\x7f\n"}
    monkeypatch.setattr(sys, "stdout", terminal.stream())
    writers.write_json(streams.Output(), value)
    shown = terminal.rest().removesuffix("\r\n")
    assert json.loads(shown) == value and visible.line(shown) == shown and LEGITIMATE[0] in shown


# --- A2: the last line end of a text is not part of it


@pytest.mark.parametrize(
    "given, kept",
    [
        (b"a\n", "a"),
        (b"a\r\n", "a"),
        (b"a", "a"),
        (b"a\n\n", "a\n"),
        (b"a\r\n\r\n", "a\r\n"),
        (b"a\r\nb\n", "a\r\nb"),
        (b" a \n", " a "),
        (b"a\r", "a\r"),
        (b"a\n\r", "a\n\r"),
    ],
)
def test_a2_one_line_end_is_dropped_and_the_rest_stays(ms4, tmp_path, given, kept):
    file = tmp_path / "text"
    file.write_bytes(given)
    show = ("run", "-m", MODEL, "--show-prompt")
    assert f"[INST]{kept}[/INST]" in ms4(*show, stdin=given)[1]
    assert f"[INST]{kept}\n\nand this[/INST]" in ms4(*show, "and this", stdin=given)[1]
    assert f"[SYSTEM_PROMPT]{kept}[/SYSTEM_PROMPT]" in ms4(*show, "-s", f"@{file}", "x")[1]
    assert f"[INST]{file}:\n{kept}[/INST]" in ms4(*show, "-f", file)[1]
    assert f"[INST]stdin:\n{kept}\n\nx[/INST]" in ms4(*show, "-f", "-", "x", stdin=given)[1]


def test_a2_an_argument_is_taken_as_it_is(ms4):
    assert "[INST]a\n[/INST]" in ms4("run", "-m", MODEL, "--show-prompt", "a\n")[1]


def test_a2_tokenize_keeps_every_byte(ms4):
    assert ms4("tokenize", "-m", MODEL, stdin=b"a\r\n")[1] != ms4("tokenize", "-m", MODEL, stdin=b"a")[1]


# --- A5: a prefill and what continues it


@pytest.mark.parametrize("prefill", ["apple ", "apple", "apple   ", "\n\napple ", "    ", "\n", "apple\n"])
def test_a5_stdout_is_the_prefill_and_its_continuation(ms4, prefill):
    def answer(given, *more):
        code, out, _ = ms4("run", "-q", "--greedy", "-n", "12", "--prefill", given, *more, "Repeat: apple fig")
        assert code == 0
        return out

    went_on = json.loads(answer(prefill.rstrip(" ") or "", "--format", "json"))["choices"][0]["message"]["content"]
    went_on = went_on.removeprefix(prefill.rstrip(" "))
    blanks = len(prefill) - len(prefill.rstrip(" "))
    expected = prefill + went_on[min(blanks, len(went_on) - len(went_on.lstrip(" "))) :]
    assert went_on.strip() and answer(prefill) == expected.rstrip("\n") + "\n"
    assert json.loads(answer(prefill, "--format", "json"))["choices"][0]["message"]["content"] == expected
    events = map(json.loads, answer(prefill, "--format", "jsonl").splitlines())
    assert "".join(event["text"] for event in events if event["event"] == "text") == expected


def test_a5_a_prefill_is_written_where_no_status_wipes_it_away(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(sys, "stdout", stream)
    writer = writers.TextWriter(streams.Output(), "auto", "apple")
    writer.event(Prefill(9, 0))
    assert stream.buffer.getvalue() == b""
    writer.event(Text(" fig"))
    writer.done(None, 0)
    assert stream.buffer.getvalue() == b"apple fig\n"


def test_a5_a_blank_at_the_end_is_not_doubled(ms4):
    said = {ms4("run", "-q", "--greedy", "Repeat: apple fig", "--prefill", text)[1] for text in ("apple", "apple ")}
    assert said == {"apple fig\n"}


def test_a5_blanks_are_left_out_across_events_but_never_more_than_were_given():
    def written(prefill, *events):
        continuation = writers.Continuation(prefill)
        return [made for event in events if (made := continuation.event(event))]

    assert written("a  ", Text(" "), Text("  b"), Text("  c")) == [Text(" b"), Text("  c")]
    assert written("a  ", Text("b"), Text(" c")) == [Text("b"), Text(" c")]
    assert written("a  ", Thinking("t"), Text(" c")) == [Thinking("t"), Text(" c")]
    assert written("a\n\t", Text(" b")) == [Text(" b")]


# --- A10: slashes from a pipe


@pytest.fixture
def chat(ms4):
    def run(*lines, options=("--greedy", "-n", "4")):
        return ms4("chat", "-m", MODEL, *options, stdin="".join(f"{line}\n" for line in lines).encode())

    return run


@pytest.mark.parametrize("line", ["// x", "/* x */", "/usr/bin/env: what is it?", "/", "/ x", "/2", "/etc"])
def test_a10_a_line_that_only_begins_with_a_slash_is_a_message(chat, line):
    answered = chat(line)
    if line == "/etc":
        assert answered[:2] == (2, "") and "no command /etc" in answered[2]
        line = f" {line}"
        answered = chat(line)
    assert answered[0] == 0 and answered[1].strip() and answered[2] == ""
    # It is one turn with exactly this text: the same as `ms4 run` answers to it.
    assert answered[1] == chat(line, "/undo", "/stats")[1]


def test_a10_an_unknown_command_from_a_pipe_ends_it(chat):
    code, out, err = chat("Hi", "/effrot high", "more")
    assert code == 2 and out == chat("Hi")[1]
    assert "ms4: error: no command /effrot\nhint: /effort; a message" in err


def test_a10_known_commands_work_from_a_pipe(chat):
    assert chat("/effort high")[::2] == (0, "effort high\n")
    for leave in ("/exit", "/quit", "/bye", "/exit now"):
        assert chat(leave, "Hi") == (0, "", "")
    assert chat("Hi", "/clear", "Hi")[1] == 2 * chat("Hi")[1]
    assert chat("exit")[1].strip(), "from a pipe this is a message"


# --- A11: a list on stdin, and ms4 in the loop over it


def test_a11_no_stdin_leaves_the_list_alone(ms4):
    show = ("run", "-m", MODEL, "--show-prompt")
    code, out, err = ms4(*show, "--no-stdin", "one", stdin=b"two\nthree\n")
    assert (code, err) == (0, "") and out.endswith("[INST]one[/INST]\n")
    assert sys.stdin.buffer.read() == b"two\nthree\n"
    assert ms4(*show, "one", stdin=b"two\nthree\n")[1].endswith("[INST]two\nthree\n\none[/INST]\n")
    code, out, err = ms4(*show, "--no-stdin", stdin=b"two\n")
    assert (code, out) == (2, "") and "no prompt" in err
    code, out, err = ms4(*show, "--no-stdin", "-f", "-", stdin=b"two\n")
    assert (code, out) == (2, "") and "--no-stdin" in err


def test_a11_the_readme_says_so():
    text = (ROOT / "README.md").read_text()
    assert "--no-stdin" in text and "</dev/null" in text


# --- C5: what people type elsewhere

OURS = {name: main.spellings(main.command(name).params) for name in start.COMMANDS}
ROWS = [(spelling, row) for row in elsewhere.OPTIONS for spelling in row.spellings]
NOT_OURS = [(*row, command) for row in ROWS for command in ("run", "chat", "bench") if row[0] not in OURS[command]]


@pytest.mark.parametrize("spelling, row, command", NOT_OURS)
def test_c5_an_option_of_another_program_is_refused_with_what_it_is_here(ms4, command, spelling, row):
    forms = ([spelling, "99"], [f"{spelling}=99"], ["x", spelling])
    for arguments in forms if command == "run" else forms[:1]:
        code, out, err = ms4(command, "-m", MODEL, *arguments)
        assert (code, out) == (2, "") and err.startswith(f"ms4: error: no such option: {spelling}\nhint: "), err
        if set(row.options) <= {*OURS[command], "--version"}:
            assert f"hint: {row.ours}; ms4 {command} --help\n" in err
        else:
            assert f"ms4 {command} --help" in err and row.ours not in err


def test_c5_the_table_names_options_and_commands_that_there_are():
    everywhere = {option for options in OURS.values() for option in options} | {"--version"}
    for row in (*elsewhere.OPTIONS, *elsewhere.COMMANDS):
        assert set(row.options) <= everywhere, row
        assert set(re.findall(r"\bms4 (\w+)(?= (?:FILE|\")|$)", row.ours)) <= {*start.COMMANDS}, row
    for rows in (elsewhere.OPTIONS, elsewhere.COMMANDS):
        spellings = [spelling for row in rows for spelling in row.spellings]
        assert len(spellings) == len(set(spellings))
    assert not {spelling for row in elsewhere.COMMANDS for spelling in row.spellings} & {*start.COMMANDS}
    for option in ("-c", "-ngl", "-p", "-hf", "--temperature", "--ctx-size", "--n-predict", "--mmproj-url"):
        assert option in dict(ROWS)


@pytest.mark.parametrize("word, row", [(word, row) for row in elsewhere.COMMANDS for word in row.spellings])
def test_c5_a_command_of_another_program_is_refused_with_what_it_is_here(ms4, word, row):
    assert ms4(word, "x") == (2, "", f"ms4: error: no such command {word}\nhint: {row.ours}; ms4 --help\n")


def test_c5_the_page_is_made_from_the_table():
    assert (ROOT / "docs" / "coming-from.md").read_text() == elsewhere.page()


@pytest.mark.parametrize(
    "arguments, hint",
    [
        (["question"], 'ms4 run "question"'),
        (["What is it?"], 'ms4 run "What is it?"'),
        (["what", "is", "it?"], 'ms4 run "what is it?"'),
        (["It costs $5"], "ms4 run 'It costs $5'"),
        (["rnu", "hi"], "ms4 run hi"),
        (["model.gguf"], "ms4 chat -m model.gguf"),
        (["-m", "a.gguf", "hi"], "ms4 run -m a.gguf hi"),
        (["-p", "hi"], 'ms4 run "your question"'),
        (["help", "rnu"], "ms4 run"),
        (["run", "--max-time", "60", "hi"], "--timeout S"),
        (["run", "--max-toks", "3"], "--max-tokens?"),
        (["run", "--temp-erature", "3"], "--temp?"),
        (["run", "--frobnicate"], "ms4 run --help; text that begins with - goes after --"),
        (["run", "-qh"], "ms4 run --help"),
        (["run", "-nfoo"], "ms4 run --help"),
        (["run", "-rextreme"], "ms4 run --help"),
        # C12
        (["run", "- item"], 'ms4 run -- "- item"'),
        (["run", "-q", "-5 + 3 = ?"], 'ms4 run -- "-5 + 3 = ?"'),
        (["run", "-hx"], "ms4 run --help"),
    ],
)
def test_c5_what_cannot_be_meant_says_what_can(ms4, arguments, hint):
    code, out, err = ms4(*arguments)
    assert (code, out) == (2, "") and err.startswith("ms4: error: no such ")
    assert hint in err.splitlines()[1] and err.count("\n") == 2
    assert "--image" not in err


@pytest.mark.parametrize("arguments", [["-n3"], ["-qn3"], ["-q", "-n", "3"], ["-rhigh", "-n3"], ["-sBe terse.", "-n3"]])
def test_c5_options_of_ours_may_be_written_in_one_word(ms4, arguments):
    assert ms4("run", "-m", MODEL, "--greedy", *arguments, "Hi")[0] == 0
    shown = ms4("run", "-m", MODEL, "--show-prompt", "--", *arguments)[1]
    assert shown.endswith(f"[INST]{' '.join(arguments)}[/INST]\n")


def test_c5_a_value_may_begin_with_a_dash(ms4):
    assert "[SYSTEM_PROMPT]-hf[/SYSTEM_PROMPT]" in ms4("run", "-m", MODEL, "--show-prompt", "-s", "-hf", "x")[1]
    assert "[SYSTEM_PROMPT]-ngl[/SYSTEM_PROMPT]" in ms4("run", "-m", MODEL, "--show-prompt", "--system=-ngl", "x")[1]


def test_c5_help_and_version_are_commands_too(ms4):
    assert ms4("help") == ms4("--help") and ms4("version") == ms4("--version")
    for command in start.COMMANDS:
        assert ms4("help", command) == ms4(command, "--help")


def test_c5_what_is_no_number_is_not_outside_a_range(ms4):
    for option in ("--temp", "--top-p", "--min-p"):
        assert f"{option}: abc is not a number" in ms4("run", "x", option, "abc")[2]


# --- C1, C2, D2: streams

MS4 = [sys.executable, "-c", "import sys; from ms4.cli.start import main; sys.exit(main())"]
RUN = [*MS4, "run", "-m", MODEL, "--greedy"]


class Terminal:
    """A terminal of a given width; `text` is all that was written to it."""

    def __init__(self, width=80):
        self.controller, self.fd = pty.openpty()
        self.resize(width)
        self.text = ""

    def resize(self, width):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", 24, width, 0, 0))

    def until(self, wanted):
        """Reads until the text matches, or for half a minute."""
        while not re.search(wanted, self.text, re.DOTALL):
            assert select.select([self.controller], [], [], 30)[0], self.text
            self.text += os.read(self.controller, 4096).decode("utf-8", "replace")
        return self.text

    def rest(self):
        """All that is written; for when nobody else writes."""
        while select.select([self.controller], [], [], 0)[0]:
            self.text += os.read(self.controller, 4096).decode("utf-8", "replace")
        return self.text

    def stream(self):
        return open(self.fd, "w", encoding="utf-8", closefd=False)


@pytest.fixture
def terminal():
    made = Terminal()
    yield made
    os.close(made.controller)
    os.close(made.fd)


def test_c1_a_person_is_told_that_stdin_is_waited_for(terminal):
    process = subprocess.Popen(
        [*RUN, "-n", "1", "hi"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=terminal.fd
    )
    terminal.until(r"ms4: reading stdin; Ctrl-D ends it\r\n")
    assert process.poll() is None
    process.communicate(b"more")
    assert process.returncode == 0


def test_c1_nobody_is_told_who_has_asked_for_quiet_or_does_not_look(monkeypatch):
    reader, writer = os.pipe()
    asked = []
    monkeypatch.setattr(streams, "PATIENCE", 0.0)
    monkeypatch.setattr(streams, "note", lambda text: (asked.append(text), os.write(writer, b"x"), os.close(writer)))
    monkeypatch.setattr(sys, "stdin", open(reader))
    monkeypatch.setattr(sys, "stderr", Stream(terminal=True))
    assert streams.read_bytes() == b"x" and len(asked) == 1, "it ends only once the note is there"
    for quiet, seen in ((True, True), (False, False)):
        monkeypatch.setattr(sys, "stdin", Stream(b"abc"))
        monkeypatch.setattr(sys, "stderr", Stream(terminal=seen))
        monkeypatch.setattr(streams.threading.Timer, "start", lambda self: asked.append("started"))
        assert streams.read_bytes(quiet=quiet) == b"abc" and len(asked) == 1


@pytest.mark.parametrize("width", [1, 2, 10, 20, 40, 80, 200])
def test_c2_the_status_is_cut_to_the_width_whatever_it_is(terminal, monkeypatch, width):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", terminal.stream())
    status = render.StatusLine()
    for now in (width, 40, width):  # it changes, too
        terminal.resize(now)
        for text in ("reading 33 %  12345/45678 tokens  123 s left, and more of it" * 4, "読む 東京大阪" * 30, "short"):
            terminal.text = ""
            status.show(text)
            shown = re.fullmatch(r"\r\x1b\[K\x1b\[2m(.*)\x1b\[0m", terminal.rest())[1]
            assert text.startswith(shown) and cells(shown) < max(now, 2)
            assert shown == text or cells(text[: len(shown) + 1]) >= now


def cells(text):
    return sum(2 if ord(c) > 0x2E80 else 1 for c in text)


def test_c2_no_color_is_respected(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stderr", terminal.stream())
    render.StatusLine().show("reading")
    assert terminal.rest() == "\r\x1b[Kreading"


def test_c6_the_price_is_what_will_be_read(chat, ms4):
    assert chat("Hi", "/system", "/effort none")[2] == "no system prompt\neffort none\n"
    there, back = chat("Hi", "/effort high", "/effort none")[2].splitlines()
    assert "reads the conversation again" in there and back == "effort none"
    assert chat("Hi", "/system Be terse.", "/system")[2].splitlines()[1] == "no system prompt"
    _, _, err = chat("Hi", "/system Be terse.", "more", "/stats", options=("--greedy", "-n", "6"))
    price, stats = err.splitlines()
    read, cached = (int(n) for n in re.search(r"read (\d+) tok \((\d+) cached\)", stats).groups())
    # Besides what is read again there is the new message: its [INST], its text, its [/INST].
    n_new = 2 + int(ms4("tokenize", "-m", MODEL, "--count", stdin=b"more")[1])
    assert int(re.search(r"\((\d+) tokens", price)[1]) == read - cached - n_new


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "form, unbuffered",
    [("json", "1"), *(pytest.param(*pair, marks=SLOW) for pair in (("text", ""), ("jsonl", ""), ("jsonl", "1")))],
)
def test_d2_all_arrives_through_writes_that_take_a_part(form, unbuffered):
    """A pipe of one page that does not block: the kernel takes parts, and then nothing for a while."""
    command = [*RUN, "-n", "30", "--format", form, "--seed", "1", "Hi"]
    if form == "text":
        command = [*RUN, "--show-prompt", "word " * 20_000]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    whole = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(writer, False)
    process = subprocess.Popen(command, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    got = b""
    while piece := os.read(reader, 700):
        got += piece
    assert process.wait() == 0 and process.stderr.read() == b""
    assert re.sub(rb'_?(ms|second)": ?[\d.]+', b"", got) == re.sub(rb'_?(ms|second)": ?[\d.]+', b"", whole)


# --- D3: Ctrl-C before there is anything to interrupt


@pytest.mark.parametrize("where", ["ms4/__init__.py", "ms4/cli/__init__.py", "ms4/cli/start.py"])
def test_d3_ctrl_c_during_the_imports_is_130_and_silence(tmp_path, where):
    """A package of the same name, in which Ctrl-C is pressed at each of its imports."""
    for name in ("ms4/__init__.py", "ms4/cli/__init__.py", "ms4/cli/start.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def main(): return 7\n")
    (tmp_path / where).write_text(
        "import os\nos.kill(os.getpid(), 2)\nfor _ in range(9**6): pass\nraise SystemExit(3)\n"
    )
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import ms4_command; sys.exit(ms4_command.main())"
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_d3_ctrl_c_at_the_end_is_too_late_to_be_seen(tmp_path):
    command = (
        "import atexit, os, sys; atexit.register(lambda: os.kill(os.getpid(), 2));"
        "sys.argv = ['ms4', '--version']; import ms4_command; sys.exit(ms4_command.main())"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout[:4], done.stderr) == (0, b"ms4 ", b"")


def test_d3_an_ignored_interrupt_stays_ignored():
    command = (
        "import os, signal, sys; signal.signal(2, signal.SIG_IGN); import ms4_command;"
        "sys.argv = ['ms4', '--version']; code = ms4_command.main(); os.kill(os.getpid(), 2); sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True).returncode == 0


def test_d3_it_is_what_the_command_runs():
    assert '\nms4 = "ms4_command:main"\n' in (ROOT / "pyproject.toml").read_text()
    imports = re.findall(r"^(?:import|from) (\w+)", (ROOT / "cli" / "ms4_command.py").read_text(), re.MULTILINE)
    assert imports == ["os", "_signal"]


# --- A7, C9: keys of a chat, on a terminal of its own

CHAT = [*MS4, "chat", "-m", MODEL, "--greedy", "-n", "3"]
READY = r"\?2004h[^>]*>.*\?25h"  # a prompt has been drawn
DRAWN = r"\?25h"


@pytest.fixture
def talk(terminal, tmp_path):
    """talk() starts a chat on the terminal; talk.stdout=... puts its answers elsewhere."""
    started = []

    def start(command=CHAT, **more):
        environment = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "MS4_MODEL", "MS4_DEBUG")}
        environment |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "XDG_STATE_HOME": str(tmp_path), "PS1": "$ "}
        fds = dict.fromkeys(("stdin", "stdout", "stderr"), terminal.fd) | more

        def own():
            fcntl.ioctl(terminal.fd, termios.TIOCSCTTY, 0)

        started.append(subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=own, **fds))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def typed(terminal, keys, then):
    """Types keys; waits for what comes after them."""
    terminal.text = ""
    os.write(terminal.controller, keys.encode())
    return terminal.until(then)


def test_a7_ctrl_c_clears_a_line_and_leaves_only_from_an_empty_one(talk, terminal):
    process = talk()
    terminal.until(READY)
    for text in ("one", "two", "three"):
        typed(terminal, text, text)
        typed(terminal, "\x03", DRAWN)
    typed(terminal, "Hi\r", rf"ctx \d+/1K.*effort none.*{READY}")
    typed(terminal, "\x03", rf"once more.*{READY}")
    typed(terminal, "word", "word")
    typed(terminal, "\x03", DRAWN)
    typed(terminal, "x", "x")
    assert process.poll() is None
    typed(terminal, "\x03", DRAWN)
    os.write(terminal.controller, b"\x03\x03")
    assert process.wait(60) == 130


def test_a7_the_second_ctrl_c_counts_for_two_seconds(monkeypatch):
    def left(*events):
        """The exit code, where an event is the time of a Ctrl-C at an empty prompt, or a message."""
        said, todo, now = [], list(events), [0.0]

        class Source:
            def next(self):
                if not todo:
                    return None
                event = todo.pop(0)
                if isinstance(event, str):
                    return event
                now[0] = event
                raise KeyboardInterrupt

        class Talk:
            over, interactive = False, True
            say = said.append
            command = staticmethod(lambda text: True)

        monkeypatch.setattr(repl.time, "monotonic", lambda: now[0])
        return repl.loop(Talk, Source()), len(todo)

    assert left(10.0, 11.9, "x") == (130, 1)
    assert left(10.0, 12.1, "x") == (0, 0)
    assert left(10.0, 12.1, 14.0) == (130, 0)
    assert left(10.0, "/stats", 10.5, "x") == (0, 0)


@pytest.mark.parametrize(
    "words", ["exit", *(pytest.param(word, marks=SLOW) for word in ("/bye", "quit", "/quit", "/exit"))]
)
def test_c9_the_words_that_leave_elsewhere_leave(talk, terminal, words):
    process = talk()
    terminal.until(READY)
    os.write(terminal.controller, f"{words}\r".encode())
    assert process.wait(60) == 0


def test_c9_the_prompt_is_on_stderr_where_stdout_is_no_terminal(talk, terminal, ms4):
    process = talk(stdout=subprocess.PIPE)
    terminal.until(READY)
    typed(terminal, "Hi\r", rf"effort none.*{READY}")
    os.write(terminal.controller, b"\x04")
    out = process.stdout.read().decode()
    assert process.wait(60) == 0 and out == ms4("chat", *CHAT[4:], stdin=b"Hi\n")[1]


def test_c9_ctrl_z_suspends(talk, terminal):
    shell = talk(["bash", "--norc", "--noprofile", "-i"])
    terminal.until(r"\$ ")
    typed(terminal, " ".join(map(shlex.quote, CHAT)) + "\r", READY)
    typed(terminal, "half", "half")
    assert "^Z" not in typed(terminal, "\x1a", "Stopped")
    typed(terminal, "fg\r", "> half")
    typed(terminal, "\x03", DRAWN)
    typed(terminal, "exit\r", r"\$ ")
    os.write(terminal.controller, b"exit\r")
    assert shell.wait(60) == 0


# --- C3, C10: thoughts


@pytest.mark.parametrize("no_color", ["", "1"])
def test_c10_thoughts_and_answer_are_told_apart_without_colour(terminal, monkeypatch, no_color):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys, "stdout", terminal.stream())
    writer = writers.TextWriter(streams.Output(), "auto", "")
    for event in (Thinking("hm,"), Thinking(" hm"), Text("\n\nYes"), Text(".\n")):
        writer.event(event)
    writer.done(None, 0)
    shown = terminal.rest().replace("\r\n", "\n")
    if no_color:
        assert shown == "thinking:\nhm, hm\n\nanswer:\nYes.\n"
    else:
        assert shown == "\x1b[2mhm,\x1b[0m\x1b[2m hm\x1b[0m\n\nYes.\n"


def test_every_word_of_a_thought_is_dim_however_it_comes(terminal, monkeypatch):
    """Also one that was held back until the line ended."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal.stream())
    screen = render.Screen(streams.Output())
    for letter in "one two\n3+4=7\n\nthree ":
        screen.thinking(letter)
    screen.text("Yes.")
    screen.end()
    shown = terminal.rest().replace("\r\n", "\n")
    dim = re.findall(r"\x1b\[2m(.*?)\x1b\[0m", shown, re.DOTALL)
    assert "".join(dim).split() == ["one", "two", "3+4=7", "three"]
    assert re.sub(r"\x1b\[2m.*?\x1b\[0m", "", shown, flags=re.DOTALL).split() == ["Yes."]


def test_c10_an_answer_alone_has_no_label(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", terminal.stream())
    screen = render.Screen(streams.Output())
    screen.text("Yes.")
    screen.end()
    assert terminal.rest().replace("\r\n", "\n") == "Yes.\n"


class Running(list):
    """What a scheduler gives for a submitted answer: its events."""

    progress = staticmethod(lambda: (1, 1))

    def submit(self, *_):
        return self


@pytest.mark.parametrize("hidden", [True, False])
def test_c3_a_hidden_thought_gives_a_sign_of_life(hidden):
    shown, seen = [], []

    class Status:
        @contextmanager
        def watching(self, look):
            seen.append(look())
            yield
            seen.append(look())

    class Ids(list):
        stop_flag = StopFlag()
        ids = []

    def show(event):
        shown.append(event)
        Ids.ids.append(1)

    done = Done("stop", statistics())
    events = [Prefill(9, 0), Thinking("a"), Thinking("b"), Thinking("c"), Text("d"), Thinking("e"), Text("f")]
    assert follow(Running([*events, done]), Ids(), None, None, Status(), show, hidden) is done
    assert shown == events
    thoughts = [text for text in seen if text.startswith("thinking")]
    assert thoughts == (["thinking  0 tokens  0 s", "thinking  2 tokens  0 s"] if hidden else [])


def test_c3_where_thoughts_are_hidden(terminal, monkeypatch):
    about = writers.About("m", "0", "high", 1, "", 0)
    for stream, shows in ((Stream(), ["show"]), (terminal.stream(), ["auto", "show"])):
        monkeypatch.setattr(sys, "stdout", stream)
        output = streams.Output()
        for think in ("auto", "show", "hide"):
            assert writers.TextWriter(output, think, "").hides_thoughts == (think not in shows)
        assert writers.JsonWriter(output, about).hides_thoughts
        assert not writers.JsonlWriter(output, about).hides_thoughts
    assert not writers.TextWriter(output, "hide", "The line on which the status would stand").hides_thoughts
