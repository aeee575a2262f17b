"""The `ms4` command as a process: pipes, full disks, closed streams, locales, Ctrl-C, what a start imports."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")
MS4 = [sys.executable, "-c", "import sys; from ms4.cli.start import main; sys.exit(main())"]
RUN = [*MS4, "run", "-m", MODEL, "--greedy"]


def spawn(*command, **more):
    return subprocess.Popen(command, stderr=subprocess.PIPE, **{"stdout": subprocess.PIPE, **more})


def test_a_reader_that_leaves_ends_it_quietly():
    process = spawn(*RUN, "-n", "500", "Hi")
    assert len(process.stdout.read(1)) == 1
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_is_an_error():
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*RUN, "-n", "4", "Hi"], stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"ms4: error: cannot write the answer: No space left on device\n")


def test_closed_streams_are_not_taken_for_files():
    shell = 'exec "$@" <&- 2>&-'
    done = subprocess.run(["sh", "-c", shell, "sh", *RUN, "-n", "4", "--stats", "Hi"], stdout=subprocess.PIPE)
    assert done.returncode == 0 and done.stdout.strip() and b"ms4:" not in done.stdout
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *RUN, "Hi"], stderr=subprocess.PIPE)
    assert done.returncode == 1 and done.stderr.startswith(b"ms4: error: stdout is closed")


def test_the_locale_does_not_matter():
    odd = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*RUN, "--show-prompt", "é 中"], env={**os.environ, **odd}, input="ü🙂".encode(), stdout=subprocess.PIPE
    )
    assert "[INST]ü🙂\n\né 中[/INST]" in done.stdout.decode()


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_a_start_imports_only_what_it_needs(option):
    code = (
        f"import sys; sys.argv = ['ms4', {option!r}]; from ms4.cli.start import main; main();"
        "print({'typer', 'rich', 'tiktoken', 'PIL', 'gguf', 'prompt_toolkit', 'numpy', 'httpx', 'ms4.models'}"
        " & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("set()\n")


def interrupted(process, after):
    """Sends Ctrl-C after so many seconds: the exit code."""
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    return process.wait()


def test_ctrl_c_ends_a_run_and_keeps_the_text():
    process = spawn(*RUN, "--ctx", "1024", "-n", "900", "Hi")
    assert len(process.stdout.read(1)) == 1
    assert interrupted(process, 0) == 130
    assert process.stdout.read().endswith(b"\n") and process.stderr.read() == b""


def test_ctrl_c_ends_a_prefill():
    words = "one two three four five six " * 120
    process = spawn(*MS4, "perplexity", "-", "-m", MODEL, "--ctx", "1000", "-t", "1", stdin=subprocess.PIPE)
    process.stdin.write(words.encode() * 200)
    process.stdin.close()
    assert interrupted(process, 1.5) == 130
    assert process.stdout.read() == process.stderr.read() == b""  # no result


@pytest.mark.parametrize("listens", [True, False], ids=["that stops", "stuck in a read"])
def test_ctrl_c_ends_an_opening(listens):
    code = f"""
import sys, time
from ms4.cli.start import main
from ms4.models import model
def opening(path, progress, **options):
    print("opening", flush=True)
    for _ in range(6000):
        time.sleep(0.1)
        if progress(1, 2) and {listens}:
            raise RuntimeError("stopped")
model.Model.open = opening
sys.argv = ["ms4", "run", "-m", {MODEL!r}, "Hi"]
sys.exit(main())
"""
    process = spawn(sys.executable, "-c", code)
    assert process.stdout.readline() == b"opening\n"
    assert interrupted(process, 0.1) == 130 and process.stderr.read() == b""


def test_a_terminal_sees_no_escape_sequences_of_a_model(monkeypatch):
    from ms4.cli import render, streams

    controller, terminal = pty.openpty()
    with open(terminal, "w") as file:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stdout", file)
        screen = render.Screen(streams.Output())
        screen.thinking("hm\n")
        screen.text("\n\nred \x1b[31m\n\n")
        screen.text("x\n\n\n")
        screen.end()
        shown = ""
        while not shown.endswith("x\n"):  # a terminal gives a line at a time
            shown += os.read(controller, 1000).decode().replace("\r\n", "\n")
    os.close(controller)
    assert shown == f"{render.DIM}hm{render.PLAIN}\n\nred \\x1b[31m\n\nx\n"


def test_d5_what_was_written_stays_where_a_library_ends_the_process(tmp_path):
    """As Rust does when it gets no memory."""
    code = f"""
import os, sys
from ms4.cli.start import main
from ms4.models import answer
step, calls = answer.Answer.choose, []
def choose(*arguments):
    calls.append(1)
    if len(calls) == 9:
        os.abort()
    return step(*arguments)
answer.Answer.choose = choose
sys.argv = ["ms4", "run", "-m", {MODEL!r}, "--greedy", "-n", "20", "-o", {str(tmp_path / "out")!r}, "Hi"]
sys.exit(main())
"""
    whole = subprocess.run([*RUN, "-n", "20", "Hi"], stdout=subprocess.PIPE, check=True).stdout
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE)
    kept = (tmp_path / "out").read_bytes()
    assert done.returncode == -signal.SIGABRT and len(kept) > 8 and whole.startswith(kept)


def test_d5_an_allocation_of_ours_that_fails_is_exit_code_6():
    done = subprocess.run([*RUN, "-n", "4", "Hi"], env={**os.environ, "MS4_FAIL_ALLOC": "3"}, capture_output=True)
    assert (done.returncode, done.stdout) == (6, b"") and done.stderr.startswith(b"ms4: error: no memory")
    assert done.stderr.count(b"\n") == 2  # the error and the hint
