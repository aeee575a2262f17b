"""More of the kinds of faults that users met with files: pipes, devices, addresses, bytes that are no text."""

import os

import test_cli
from PIL import Image as Pillow
from test_faults_files import TELLS, shown

from ms4.cli import attachments
from ms4.models.image import Image

command = test_cli.ms4  # command(arguments..., stdin=bytes) -> its exit code and what it wrote


def test_b12_no_option_waits_for_a_pipe_that_nobody_writes_to(command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for option, name in (("--messages", pipe), ("--tools", pipe), ("--schema", pipe), ("-s", f"@{pipe}")):
        got = command("run", "-m", test_cli.MODEL, "--format", "json", option, name, "Hi")
        assert got.code == 7 and "nothing came out of it" in got.err, option


def test_b12_the_answer_can_go_to_what_is_no_plain_file(command, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    plain = command("run", "-m", test_cli.MODEL, "--greedy", "-n", 3, "Hi")
    assert command("run", "-m", test_cli.MODEL, "--greedy", "-n", 3, "-o", pipe, "Hi").code == 0
    assert os.read(reader, 4096).decode() == plain.out
    os.close(reader)
    assert command("run", "-m", test_cli.MODEL, "--show-prompt", "-o", "/dev/null", "Hi").code == 0
    full = command("run", "-m", test_cli.MODEL, "--show-prompt", "-o", "/dev/full", "Hi")
    assert full.code == 1 and "No space left on device" in full.err


def test_b11_utf16_without_a_mark_is_no_text_wherever_it_comes_from(command, tmp_path):
    path = tmp_path / "a.txt"
    data = "naive".encode("utf-16-le")  # without a mark, so it is UTF-8, too
    path.write_bytes(data)
    for arguments, stdin in (((), data), (("-f", path, "x"), b""), (("-s", f"@{path}", "x"), b"")):
        got = command("run", "-m", test_cli.MODEL, "--show-prompt", *arguments, stdin=stdin)
        assert got.code == 7 and "NUL bytes" in got.err and TELLS in got.err
        assert "naive" in shown(command, "--encoding", "utf-16", *arguments, stdin=stdin)
        assert "n\ufffda\ufffdi" in shown(command, "--lossy", *arguments, stdin=stdin)
    got = command("run", "-m", test_cli.MODEL, "--show-prompt", stdin="naïve".encode("utf-32"))
    assert got.code == 7 and "stdin is UTF-32" in got.err


def test_b13_options_take_addresses_of_files_and_what_the_shell_leaves_of_a_home(command, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    Pillow.new("RGB", (9, 7)).save(tmp_path / "my \u202fimage.png")
    (tmp_path / "a.txt").write_text("in a file")
    for name in (f"file://{tmp_path}/my%20%E2%80%AFimage.png", "~/my \u202fimage.png"):
        assert attachments.open_image(name).picture.size == (9, 7)
        assert isinstance(attachments.open_file(name)[0], Image)
    assert "in a file" in shown(command, "-f", f"file://localhost{tmp_path}/a.txt", "x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~").mkdir()
    (tmp_path / "~" / "a.txt").write_text("another")
    assert "another" in shown(command, "--file=~/a.txt", "x")
    got = command("run", "-m", test_cli.MODEL, "--count", "-i", "", "x")
    assert got.code == 7 and "'': no such file" in got.err
