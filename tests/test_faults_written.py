"""Where files lie and where bytes go: faults of the kinds that users met, each test named after its row."""

import io
import os
import pwd
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import test_cli

from ms4.cli import streams
from ms4.models import hf_cache, places
from ms4.models.convert import Plan
from ms4.models.hf_folder import ConvertError
from ms4.quant.gguf_file import GgufError, GgufFile
from ms4.quant.tiny import Tiny, write_tiny

# --- B2: split models


def test_b2_parts_are_found_behind_a_link_and_in_capitals(tmp_path):
    names = [f"Tiny-{i:05}-OF-00002.GGUF" for i in (1, 2)]
    write_tiny(tmp_path / "tiny.gguf", Tiny(parts=2))
    for i, name in enumerate(names, 1):
        (tmp_path / f"tiny-{i:05}-of-00002.gguf").rename(tmp_path / name)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "second.gguf").symlink_to("first.gguf")
    (tmp_path / "other" / "first.gguf").symlink_to(f"../{names[0]}")
    whole = GgufFile.open(tmp_path / names[0])
    assert len(whole.paths) == 2
    for name in ("first", "second"):
        assert GgufFile.open(tmp_path / "other" / f"{name}.gguf").tensors == whole.tensors
    (tmp_path / "other" / "loop.gguf").symlink_to("loop.gguf")
    with pytest.raises(GgufError):
        GgufFile.open(tmp_path / "other" / "loop.gguf")


# --- C12, D2: what is written where


def test_c12_a_device_or_a_link_is_not_replaced(ms4, tmp_path):
    """-o /dev/null of `ms4 trace` made a file of the device."""
    trace = ("trace", "--synthetic", "mid", "-n", "16", "-q", "-o")
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert ms4(*trace, pipe)[0] == 0 and stat.S_ISFIFO(os.stat(pipe).st_mode) and os.read(reader, 4)
    os.close(reader)
    link.symlink_to("real")
    assert ms4(*trace, link)[0] == 0 and link.is_symlink() and (tmp_path / "real").stat().st_size > 100
    assert sorted(os.listdir(tmp_path)) == ["link", "pipe", "real"]
    with pytest.raises(ConvertError, match="not a regular file"):
        Plan(None, []).write(str(pipe), None, None)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="no second file system")
def test_c12_a_link_may_lead_to_another_disk(ms4, tmp_path):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        (tmp_path / "link").symlink_to(f"{folder}/real")
        assert ms4("trace", "--synthetic", "mid", "-n", "16", "-q", "-o", tmp_path / "link") == (0, "", "")
        assert os.listdir(folder) == ["real"] and os.listdir(tmp_path) == ["link"]


@pytest.mark.slow
def test_d2_a_full_disk_is_said_by_every_command_that_writes(ms4, tmp_path):
    (tmp_path / "prompts").write_text("Hi\n")
    prompts, ids = tmp_path / "prompts", tmp_path / "ids"
    ids.write_text("[1, 2, 3]")
    for arguments in (
        ("run", "-m", test_cli.MODEL, "--greedy", "-n", "3", "-o", "/dev/full", "Hi"),
        ("batch", prompts, "-m", test_cli.MODEL, "-n", "2", "-o", "/dev/full"),
        ("trace", "--synthetic", "mid", "-n", "2000", "-o", "/dev/full"),
        ("logits", "-m", test_cli.MODEL, "--ids", ids, "-o", "/dev/full"),
    ):
        code, out, err = ms4(*arguments)
        assert (code, out) == (1, "") and "No space left on device" in err and err.count("\n") <= 2, (arguments, err)
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "chat"])
def test_d2_stdin_that_does_not_block_is_read_to_its_end(command):
    """As pipes of other programs are: a moment without data was taken for the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    code = "import sys; from ms4.cli.start import main; sys.exit(main())"
    arguments = {"run": ["--show-prompt"], "chat": ["-n", "2", "--greedy", "--no-session"]}[command]
    call = [sys.executable, "-c", code, command, "-m", test_cli.MODEL, *arguments]
    with subprocess.Popen(call, stdin=reader, stdout=subprocess.PIPE) as process:
        os.close(reader)
        for piece in (b"one ", b"two\n", b"three\n"):
            time.sleep(1)
            os.write(writer, piece)
        os.close(writer)
        out = process.stdout.read().decode()
    assert process.returncode == 0
    assert out.endswith("[INST]one two\nthree[/INST]\n") if command == "run" else out.count("\n") == 2


@pytest.mark.slow
def test_a11_a_loop_of_the_shell_answers_every_line(tmp_path):
    (tmp_path / "list").write_text("one\ntwo\nthree\n")
    code = "import sys; from ms4.cli.start import main; sys.exit(main())"
    call = [sys.executable, "-c", code, "run", "-m", test_cli.MODEL, "--count"]
    for more, end in (("--no-stdin", ""), ("", "</dev/null")):
        loop = f'while read -r w; do "$@" {more} "$w" {end}; done <list'
        out = subprocess.run(["bash", "-ec", loop, "-", *call], cwd=tmp_path, stdout=subprocess.PIPE, check=True).stdout
        assert len(out.split()) == 3


def test_d2_reading_waits_where_nothing_is_there_yet():
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    pieces = [b"one ", b"two\n", b"three"]

    def write():
        for piece in pieces:
            time.sleep(0.05)
            os.write(writer, piece)
        os.close(writer)

    thread = threading.Thread(target=write)
    thread.start()
    with io.BufferedReader(streams.PatientInput(reader)) as file:
        assert file.readline() == b"one two\n" and file.read() == b"three"
    thread.join()
    os.close(reader)


# --- folders of a user


@pytest.mark.parametrize("name", ["CACHE", "CONFIG", "DATA", "STATE"])
def test_b12_folders_are_never_below_where_somebody_stands(name, monkeypatch, tmp_path):
    monkeypatch.setenv(f"XDG_{name}_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert places.folder(name) == tmp_path.joinpath(*places.KINDS[name])
    for home in ("", "relative"):
        monkeypatch.setenv("HOME", home)
        assert places.folder(name) == Path(pwd.getpwuid(os.getuid()).pw_dir).joinpath(*places.KINDS[name])

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME")
    assert places.folder(name) == Path("/").joinpath(*places.KINDS[name])
    monkeypatch.setenv("HF_HOME", "~/hub")
    hf_cache.root()  # no error


def test_b12_a_home_that_is_no_folder_holds_no_options(ms4, monkeypatch):
    for name in ("CONFIG", "STATE", "CACHE", "DATA"):
        monkeypatch.delenv(f"XDG_{name}_HOME", raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    code, out, err = ms4("run", "-m", test_cli.MODEL, "--greedy", "-n", "2", "Hi")
    assert code == 0 and err.count("\n") <= 1
    assert ms4("config", "set", "effort", "high")[0] == 1


def test_b11_a_file_of_options_may_begin_with_a_mark(ms4, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "ms4").mkdir()
    (tmp_path / "ms4" / "config.toml").write_bytes(b"\xef\xbb\xbfsystem = 'Be brief.'\r\n")
    assert "Be brief." in ms4("run", "-m", test_cli.MODEL, "--show-prompt", "Hi")[1]
