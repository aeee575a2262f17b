"""Files are whole or not there, whatever happens while they are written; and a full disk is said in one way."""

import contextlib
import errno
import io
import os
import stat

import pytest

from ms4.cli import config_command, errors, state, streams
from ms4.models import atomic, gpu_code
from ms4.models.hf_cache import Cached
from ms4.models.part import write_journal
from ms4.models.sessions import Recorder


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
@pytest.mark.parametrize("before", [None, b"old"])
def test_an_error_leaves_what_was_there_and_nothing_beside_it(tmp_path, fault, before):
    path = tmp_path / "file"
    if before is not None:
        path.write_bytes(before)
    with pytest.raises(type(fault)) as caught, atomic.replacing(path) as file:
        file.write(b"half")
        assert not path.exists() if before is None else path.read_bytes() == before
        raise fault
    assert [*tmp_path.iterdir()] == ([] if before is None else [path])
    if isinstance(fault, OSError):
        assert errors.describe(caught.value) == (1, f"{path}: No space left on device", "")


@pytest.mark.parametrize("durable", [False, True])
def test_a_file_has_its_rights_and_a_link_leads_to_the_new_one(tmp_path, durable, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(stat.S_IFMT(os.fstat(fd).st_mode)), sync(fd)))
    (tmp_path / "link").symlink_to("there")
    for text in (b"one", b"two"):
        with atomic.replacing(tmp_path / "link", 0o600, durable=durable) as file:
            file.write(text)
        assert (tmp_path / "there").read_bytes() == text and (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o600 and len([*tmp_path.iterdir()]) == 2
    assert synced == ([stat.S_IFREG, stat.S_IFDIR] * 2 if durable else [])


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, number in (("pipe", errno.EINVAL), ("folder", errno.EISDIR)):
        with pytest.raises(OSError, match=name) as caught, atomic.renamed(tmp_path / name) as part:
            raise AssertionError(part)
        assert caught.value.errno == number and not (tmp_path / name).is_file()
    with streams.open_bytes(os.devnull) as file:
        file.write(b"nothing")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)


def test_what_a_killed_process_has_left_is_no_obstacle_and_no_way_to_another_file(tmp_path):
    (tmp_path / "other").write_bytes(b"other")
    (tmp_path / "file.part").symlink_to("other")
    with atomic.replacing(tmp_path / "file", part=str(tmp_path / "file.part")) as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and (tmp_path / "other").read_bytes() == b"other"
    assert not (tmp_path / "file.part").is_symlink()


def forked(path):
    one = Recorder("m", "1", None, "none", path.parent)
    one.turn("Hi", [2], "", "", "end")
    one.fork()


def compiled(path, monkeypatch):
    class Compiler:
        version = (12, 8)

        def __init__(self, driver):
            pass

        def target(self, capability):
            return "sm_86"

        def compile(self, files, target):
            return b"code"

    monkeypatch.setenv("XDG_CACHE_HOME", str(path.parent))
    monkeypatch.setattr(gpu_code, "Nvrtc", Compiler)
    gpu_code.kept(86, print)


WRITERS = {
    "config": lambda path, _: config_command.write(path, "effort = 'high'\n"),
    "output": lambda path, _: streams_write(path),
    "journal": lambda path, _: write_journal(path, {}, []),
    "refs": lambda path, _: Cached("a/b", path.parent).set_main("c" * 40),
    "link": lambda path, _: Cached("a/b", path.parent).link("c" * 40, "m.gguf", "d" * 64),
    "session": lambda path, _: forked(path),
    "kernels": compiled,
}


def streams_write(path):
    with streams.open_bytes(str(path)) as file:
        file.write(b"x")


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_said_in_the_same_words_wherever_it_is_met(writer, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError) as caught:
        WRITERS[writer](tmp_path / "file", monkeypatch)
    code, text, _ = errors.describe(caught.value)
    assert code == 1 and text.startswith(str(tmp_path)) and text.endswith(": No space left on device")
    assert ".new" not in text and ".part" not in text
    left = [path for path in tmp_path.rglob("*") if path.is_file() or path.is_symlink()]
    assert left == [path for path in left if path.suffix == ".jsonl"], "the session that was forked, and nothing more"


def test_what_is_only_remembered_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", full)
    state.keep(tmp_path / "file", b"x")
    assert not [*tmp_path.iterdir()]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert state.first_today("tips") and state.first_today("tips")
    assert said.getvalue() == ""


def test_a_new_file_replaces_nothing_and_half_of_it_is_never_there(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError, match="No space"), atomic.creating(path) as file:
        file.write(b"half")
        full()
    assert [*tmp_path.iterdir()] == []
    with atomic.creating(path) as file:
        file.write(b"whole")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for name in (path, link, tmp_path):
        with pytest.raises(FileExistsError), atomic.creating(name):
            pytest.fail("it is there already")
    assert path.read_bytes() == b"whole"
