"""Conversations on disk: every file can be read at any moment, and what goes on is what would have gone on."""

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import SEED
from PIL import Image as pillow

from ms4.models import kv_files, sessions
from ms4.models.image import load_image
from ms4.models.kv_files import KvFiles
from ms4.models.session_index import SessionIndex
from ms4.models.sessions import Recorder, SessionError

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tests" / "data" / "bravo-Q4_K_M.gguf")
LINES = ["My number is 47.\n", "What is my number?\n", "Spell the word planet.\n", "What is 3+4?\n"]


@pytest.fixture(autouse=True)
def own_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def files():
    return sessions.paths()


def recorded(n=3, where=None):
    recorder = Recorder("m.gguf", "0", "be brief", "none", where)
    for i in range(n):
        recorder.turn(f"question {i}", (5, 6, 2), f"answer {i}", "", "stop")
    recorder.close()
    return recorder.path


# --- the file


def test_what_was_written_is_replayed(tmp_path):
    recorder = Recorder("m.gguf", "0", None, "none", tmp_path)
    recorder.effort("high")
    assert not recorder.path.exists()
    recorder.turn("one\u2028two\r\n", (5, 2), "a", "hm", "stop")
    recorder.turn("b", (6, 2), "c", "", "length")
    recorder.undo(1)
    recorder.system("new")
    recorder.close()
    session = sessions.read(recorder.path)
    assert (session.effort, session.system, session.torn) == ("high", "new", False)
    assert [(t.message, t.answer, t.text, t.thinking) for t in session.turns] == [
        ("one\u2028two\r\n", (5, 2), "a", "hm")
    ]
    assert os.stat(recorder.path).st_mode & 0o777 == 0o600


def test_a_file_has_its_first_lines_before_it_has_its_name(monkeypatch):
    seen = []
    monkeypatch.setattr(sessions.os, "fsync", lambda fd: seen.append((files(), os.fstat(fd).st_size)))
    path = recorded(1)
    assert seen[0][0] == [] and seen[0][1] == path.stat().st_size and files() == [path]
    assert path.stat().st_mode & 0o777 == 0o600 and len(list(path.parent.iterdir())) == 1


def test_two_that_go_on_with_one_session_part_company():
    path = recorded(1)
    session = sessions.read(path)
    late = sessions.read(path)
    first, second = Recorder.onto(session), Recorder.onto(session)
    assert first.path == path and second.path != path
    first.turn("first", (5, 2), "", "", "stop")
    second.turn("second", (5, 2), "", "", "stop")
    first.close()
    third = Recorder.onto(late)  # which was read before the first one added to it
    third.turn("third", (5, 2), "", "", "stop")
    said = [[turn.message for turn in sessions.read(one.path).turns][1:] for one in (first, second, third)]
    assert said == [["first"], ["second"], ["third"]] and len(files()) == 3
    third.close()
    again = Recorder.onto(sessions.read(third.path))
    assert again.path == third.path


def test_an_empty_file_is_not_the_last_session():
    path = recorded(1)
    empty = path.with_name("20990101-000000-aaaa.jsonl")
    empty.touch()
    os.utime(path, (0, 0))
    assert sessions.find(None) == path
    path.unlink()
    with pytest.raises(sessions.UnknownSessionError, match="no session yet"):
        sessions.find(None)


def test_a_clock_that_was_ahead_does_not_hide_the_last_session():
    ahead, last = recorded(1), recorded(1)
    for hours, wanted in ((0.5, ahead), (48, last)):
        os.utime(ahead, (time.time() + 3600 * hours,) * 2)
        assert sessions.find(None) == wanted


def test_a_budget_of_thought_and_used_random_numbers_are_replayed(tmp_path):
    recorder = Recorder("m.gguf", "0", None, "high", tmp_path, budget=1024)
    recorder.turn("a", (5, 2), "b", "", "stop", drawn=(7, 2))
    recorder.turn("c", (5, 2), "d", "", "stop")
    recorder.undo(1)
    session = sessions.read(recorder.path)
    assert (session.effort, session.budget, session.seed, session.n_drawn) == ("high", 1024, 7, 2)
    recorder.effort("high")
    assert sessions.read(recorder.path).budget is None
    whole = recorder.path.read_text()
    for line in ('"budget": -1', '"budget": "x"', '"budget": true', f'"budget": {1 << 64}'):
        recorder.path.write_text(whole.replace('"budget": 1024', line))
        with pytest.raises(SessionError, match="line 1 is damaged"):
            sessions.read(recorder.path)


def test_an_image_comes_back_as_it_was(tmp_path):
    data = io.BytesIO()
    pillow.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)).save(data, "JPEG")
    image = load_image(data.getvalue(), "photo.jpg")
    recorder = Recorder("m.gguf", "0", None, "none", tmp_path)
    recorder.turn([{"type": "image", "image": image}, {"type": "text", "text": "what?"}], (5, 2), "a", "", "stop")
    back = sessions.read(recorder.path).turns[0].message[0]["image"]
    assert (back.digest, back.orientation, back.size, back.name) == (image.digest, 1, (30, 30), "photo.jpg")
    assert np.array_equal(np.asarray(back.picture), np.asarray(image.picture))


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path):
    whole = recorded(where=tmp_path).read_bytes()
    last = len(whole.rstrip(b"\n").rpartition(b"\n")[0]) + 1
    path = tmp_path / "20260101-000000-torn.jsonl"
    for cut in range(last + 1, len(whole)):
        path.write_bytes(whole[:cut])
        session = sessions.read(path)
        assert session.torn and len(session.turns) == 2
    recorder = Recorder.onto(session)
    recorder.turn("again", (7, 2), "x", "", "stop")
    assert [turn.text for turn in sessions.read(path).turns] == ["answer 0", "answer 1", "x"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "{}\n",
        "[]\n[]\n",
        '{"event": "turn"}\n',
        '{"event": "begin", "format": 2, "created": 0, "model": "m", "effort": "none"}\n',
        '{"event": "begin", "format": 1, "created": 0, "model": "m", "effort": "odd"}\n',
        '{"event": "begin", "format": 1, "created": 0, "model": "m", "effort": "none"}\nx\n{"event": "undo", "n": 1}\n',
    ],
)
def test_what_is_no_session_is_said(tmp_path, text):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(SessionError, match="a.jsonl"):
        sessions.read(path)


def test_damage_in_the_middle_is_named_by_its_line(tmp_path, rng):
    whole = recorded(6, where=tmp_path).read_bytes()
    path = tmp_path / "b.jsonl"
    for _ in range(300):
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
        path.write_bytes(data)
        try:
            sessions.read(path)
        except SessionError as error:
            assert "b.jsonl" in str(error)


def test_ids_are_found_by_their_beginning(tmp_path):
    for name in ("20260101-000000-aaaa", "20260101-000001-bbbb"):
        os.link(recorded(1, where=tmp_path), tmp_path / f"{name}.jsonl")
    assert sessions.find("20260101-000001", tmp_path).stem.endswith("bbbb")
    assert sessions.find("aaaa", tmp_path).stem.endswith("aaaa")
    for name in ("2026", "nope"):
        with pytest.raises(SessionError):
            sessions.find(name, tmp_path)


# --- the commands


def chat(ms4, *arguments, lines=LINES):
    code, out, err = ms4("chat", "-q", "--greedy", *arguments, stdin="".join(lines).encode())
    assert code == 0, err
    return out


def test_a_chat_that_goes_on_says_what_an_uninterrupted_one_says(ms4):
    whole = chat(ms4)
    for cut in (1, 3):
        parts = chat(ms4, lines=LINES[:cut]) + chat(ms4, "-c", lines=LINES[cut:])
        assert parts == whole
    assert len(files()) == 3 and [len(s.turns) for s in sessions.sessions()] == [4, 4, 4]


def drawn(ms4, *arguments, lines=()):
    """What a chat with a temperature says; the demonstration needs a high one to say anything unlikely."""
    code, out, err = ms4("chat", "-q", "--temp", "3", *arguments, stdin="".join(lines).encode())
    assert code == 0, err
    return out


def only_turn_of(path):
    (turn,) = sessions.read(path).turns
    return turn


@pytest.mark.slow
def test_random_numbers_go_on_in_the_next_process(ms4):
    """Also without the seed, which is the session's then; another seed begins others."""
    more = ("-n", 9)
    whole = drawn(ms4, "--seed", 7, *more, lines=LINES[:2])
    first = drawn(ms4, "--seed", 7, *more, lines=LINES[:1])
    ids = only_turn_of(files()[0]).answer
    assert first + drawn(ms4, "-c", *more, lines=LINES[1:2]) == whole
    drawn(ms4, "--seed", 7, "-n", 4, lines=LINES[:1])
    drawn(ms4, "-c", "--seed", 7, "-n", 5, lines=["/continue\n"])
    assert only_turn_of(files()[0]).answer == ids
    code, out, err = ms4("run", "-q", "--temp", 3, "-c", *more, LINES[1].strip())
    assert (code, first + out) == (0, whole), err
    drawn(ms4, "--seed", 7, *more, lines=LINES[:1])
    assert first + drawn(ms4, "-c", "--seed", 8, *more, lines=LINES[1:2]) != whole


@pytest.mark.slow
def test_low_stays_low_in_the_next_process(ms4):
    chat(ms4, "-r", "low", "-n", 2, lines=LINES[:1])
    assert "effort is low" in ms4("chat", "-c", stdin=b"/effort\n")[2]
    assert ms4("run", "-q", "--greedy", "-c", "-n", 2, "Hi")[0] == 3  # thoughts alone are no answer
    assert next(sessions.sessions()).budget == 1024
    ms4("run", "-q", "--greedy", "-c", "-n", 2, "-r", "high", "Hi")
    assert "effort is high;" in ms4("chat", "-c", stdin=b"/effort\n")[2]
    assert "effort is high, 7 tokens" in ms4("chat", "-c", "--think-budget", "7", stdin=b"/effort\n")[2]
    assert "effort is none;" in ms4("chat", "-c", "-r", "none", stdin=b"/effort\n")[2]
    assert "effort is medium;" in ms4("chat", "-c", "-r", "medium", stdin=b"/effort\n")[2]


def test_undo_retry_and_new_are_remembered(ms4):
    chat(ms4, lines=["a\n", "b\n", "/undo\n", "/retry\n", "/new\n", "c\n"])
    first, second = sorted(sessions.sessions(), key=lambda s: s.created)
    assert [t.message for t in first.turns] == ["a"] and [t.message for t in second.turns] == ["c"]


def test_run_goes_on_with_a_chat(ms4):
    chat(ms4, lines=LINES[:1])
    code, out, err = ms4("run", "-q", "--greedy", "-c", LINES[1].strip())
    assert (code, out.strip()) == (0, "47"), err
    (session,) = sessions.sessions()
    assert [t.text.strip() for t in session.turns][-1] == "47"
    code, out, err = ms4("run", "-q", "--greedy", "--resume", session.id, "-r", "high", "-n", "400", LINES[1].strip())
    assert code == 0 and next(sessions.sessions()).effort == "high"


@pytest.mark.parametrize("other", ["--messages", "--tools"])
def test_what_a_session_has_no_place_for_is_refused(ms4, tmp_path, other):
    (tmp_path / "a.json").write_text("[]")
    code, out, err = ms4("run", "-c", "--format", "json", other, tmp_path / "a.json", "hi")
    assert (code, out) == (2, "") and f"-c and {other} exclude each other" in err


def test_nothing_is_left_where_it_is_not_wanted(ms4, monkeypatch):
    chat(ms4, "--no-session", lines=LINES[:1])
    monkeypatch.setenv("MS4_NO_HISTORY", "1")
    chat(ms4, lines=LINES[:1])
    monkeypatch.delenv("MS4_NO_HISTORY")
    ms4("run", "-q", "hello")
    assert not files() and not list(kv_files.kept_bytes())


@pytest.mark.parametrize("arguments", [[], ["--resume"], ["--resume", "-q"]])
def test_an_option_that_is_left_out_or_stands_last(ms4, arguments):
    """Without arguments, a chat; where nobody can choose a session, one line."""
    code, out, err = ms4("chat", *arguments, stdin=b"")
    assert code == (2 if arguments and files() else 5 if arguments else 0) and "internal error" not in err


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["/new\n"]])
def test_a_short_conversation_is_not_read_again_either(ms4, more):
    """Neither by the next chat nor by run -c, each of which reads what is new."""
    chat(ms4, lines=["Spell the word planet.\n", *more])
    read = []
    for _ in range(2):
        code, out, _ = ms4("run", "-q", "-n", "4", "-c", "--format", "json", "More.")
        usage = json.loads(out)["usage"]
        read.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        assert code == 0 and usage["prompt_tokens"] > 60
    assert max(read) < 30, read


@pytest.mark.slow
def test_who_goes_on_with_a_session_that_is_open_is_told(ms4):
    chat(ms4, lines=LINES[:1])
    (path,) = files()
    other = Recorder.onto(sessions.read(path))
    code, _, err = ms4("run", "-n", "2", "-c", "More.")
    other.close()
    (copy,) = [p for p in files() if p != path]
    assert code == 0 and f"session {path.stem} goes on elsewhere; here it goes on as {copy.stem}" in err
    assert len(sessions.read(path).turns) == 1 and len(sessions.read(copy).turns) == 2


def test_a_number_behind_c_is_no_question(ms4):
    for command in ("run", "chat"):
        code, out, err = ms4(command, "-c", "32768", stdin=b"hi\n")
        assert (code, out) == (2, "") and "--ctx 32768" in err


def test_sessions_are_listed_shown_searched_and_removed(ms4):
    chat(ms4, lines=LINES[:2])
    chat(ms4, lines=["What is 3+4?\n"])
    code, out, _ = ms4("sessions")
    assert code == 0 and out.count("\n") == 2 and "My number is 47." in out
    code, out, _ = ms4("sessions", "ls", "--json")
    listed = json.loads(out)
    (older,) = [row for row in listed if row["title"] == "My number is 47."]
    assert {row["turns"] for row in listed} == {1, 2}
    code, out, _ = ms4("sessions", "search", "NUMBER", "47")
    assert code == 0 and out.split()[0] == older["id"] and out.count("\n") == 1
    code, out, _ = ms4("sessions", "show", older["id"])
    assert "**You:** My number is 47." in out
    code, out, err = ms4("sessions", "export", older["id"])
    turns = json.loads(out)["messages"]
    assert [turn["role"] for turn in turns] == ["user", "assistant"] * 2
    code, out, err = ms4("sessions", "rm", older["id"])
    assert code == 2 and "--yes" in err
    damaged = sessions.paths()[0].with_name("20200101-000000-aaaa.jsonl")
    damaged.write_text("nothing\n")
    code, out, err = ms4("sessions", "rm", "20200101", stdin=b"y\n", terminal=("stdin",))
    assert code == 0 and "line 1 is damaged" in err and not damaged.exists()
    code, out, err = ms4("sessions", "rm", "--yes", older["id"])
    assert (code, out) == (0, "") and len(files()) == 1
    code, out, err = ms4("sessions", "show", older["id"])
    assert code == 5 and "no session" in err
    assert ms4("sessions", "search", "47")[1:] == ("", "ms4: no session has all of these words\n")


def test_where_there_is_no_session_it_is_said_how_one_begins(ms4):
    assert ms4("sessions") == (0, "", "ms4: no session yet; ms4 chat begins one\n")
    assert ms4("sessions", "--json")[1:] == ("[]\n", "")
    for command in ("chat", "run"):
        code, _, err = ms4(command, "-c")
        assert code == 5 and err == "ms4: error: there is no session yet\nhint: ms4 chat begins one\n"


def test_an_export_can_be_asked(ms4, tmp_path):
    chat(ms4, lines=LINES[:1])
    code, out, _ = ms4("sessions", "export", sessions.find(None).stem)
    (tmp_path / "turns.json").write_text(out)
    code, out, err = ms4("run", "-q", "--greedy", "--messages", tmp_path / "turns.json", LINES[1].strip(), "--no-stdin")
    assert (code, out.strip()) == (0, "47"), err


def test_the_index_is_made_anew_when_it_is_damaged(tmp_path):
    recorded(2, where=tmp_path / "s")
    index = SessionIndex.open(tmp_path / "i.db", tmp_path / "s")
    assert len(index.search("answer 1")) == 1
    (tmp_path / "i.db").write_bytes(os.urandom(5000))
    assert len(index.search("answer 1")) == 1
    assert index.search('"; drop') == [] and index.search("answer OR nothing") == []


def test_a_full_disk_is_said_once_and_the_chat_goes_on(ms4, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    code, out, err = ms4("chat", "-q", "--greedy", stdin="".join(LINES[:2]).encode())
    assert code == 0 and out.strip().endswith("47")
    assert err.count("is not saved: No space left on device") == 1 and not files()


# --- answers that were cut


def only_turn():
    (session,) = sessions.sessions()
    return session.turns[-1]


def uninterrupted(ms4, monkeypatch, folder, n, *more):
    """The turn of a chat that nobody interrupts, in a place of its own."""
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "whole"))
    chat(ms4, "-n", n, *more, lines=LINES[:1])
    whole = only_turn()
    monkeypatch.setenv("XDG_DATA_HOME", str(folder / "cut"))
    return whole


@pytest.mark.parametrize("effort", ["none", "high"])
def test_an_answer_that_was_cut_goes_on_in_the_next_chat_and_in_run(ms4, monkeypatch, tmp_path, effort):
    whole = uninterrupted(ms4, monkeypatch, tmp_path, 9, "-r", effort)
    chat(ms4, "-n", 3, "-r", effort, lines=LINES[:1])
    assert only_turn().cut == 3
    chat(ms4, "-c", "-n", 4, lines=["/continue\n"])
    assert only_turn().cut == 7 and only_turn().answer[:7] == whole.answer[:7]
    code, out, err = ms4("run", "-q", "--greedy", "-c", "-n", 2)
    assert code == (3 if effort == "high" else 0), err  # thoughts alone are no answer
    turn = only_turn()
    assert (turn.message, turn.answer, turn.text, turn.thinking) == (
        whole.message,
        whole.answer,
        whole.text,
        whole.thinking,
    )
    shown = (whole.thinking + whole.text).strip()
    assert shown.endswith(out.strip())


def test_without_a_prompt_run_goes_on_only_with_what_was_cut(ms4):
    chat(ms4, lines=LINES[:1])
    code, out, err = ms4("run", "-q", "-c", "--no-stdin")
    assert (code, out) == (2, "") and "no prompt" in err
    chat(ms4, "-n", 2, lines=["Spell the word planet.\n"])
    before = only_turn() if len(files()) == 1 else sessions.read(files()[0]).turns[-1]
    code, out, err = ms4("run", "-q", "--greedy", "-c", stdin=LINES[3].encode())
    after = sessions.read(files()[0]).turns
    assert code == 0 and [t.message for t in after] == ["Spell the word planet.", "What is 3+4?"]
    assert after[0].answer == before.answer


# --- kv caches


@pytest.fixture(scope="module")
def engine():
    from ms4.models.model import Model

    with Model.open(MODEL) as model:
        yield model.engine


def timeline_of(engine, ids, n_ctx=1024):
    from ms4.models.timeline import Timeline

    timeline = Timeline(engine.session(n_ctx))
    if len(ids):
        timeline.session.feed(ids)
        timeline.append(np.array(ids, np.int64))
    return timeline


def some_ids(engine, n, seed=0):
    return np.random.default_rng(seed).integers(1000, engine.shape.n_vocab, n).tolist()


def test_what_was_kept_is_found_by_its_tokens(engine, tmp_path):
    kept = KvFiles.of(MODEL, where=tmp_path)
    ids = some_ids(engine, 400)
    assert kept.keep(timeline_of(engine, ids)) == ""
    for n in (400, 399, 300):
        other = [*ids[:n], *some_ids(engine, 20, 1)]
        timeline = timeline_of(engine, [])
        assert kept.restore(timeline, np.array(other)) == n == timeline.session.length
        assert np.array_equal(timeline.session.feed(other[n:]), timeline_of(engine, other[:n]).session.feed(other[n:]))
    assert kept.restore(timeline_of(engine, []), np.array(ids[:15])) == 0  # not worth it
    assert kept.restore(timeline_of(engine, []), np.array(some_ids(engine, 400, 2))) == 0
    assert KvFiles.of(MODEL, "another tower", where=tmp_path).restore(timeline_of(engine, []), np.array(ids)) == 0


def test_a_longer_one_takes_the_place_of_its_beginning(engine, tmp_path):
    kept = KvFiles.of(MODEL, where=tmp_path)
    ids = some_ids(engine, 500)
    for n in (300, 500, 400):
        assert kept.keep(timeline_of(engine, ids[:n])) == ""
    assert len(list(tmp_path.glob("*.kv"))) == 1
    assert kept.restore(timeline_of(engine, []), np.array(ids)) == 500


def test_the_oldest_leave_at_the_limit(engine, tmp_path):
    size = 0
    for i in range(4):
        kept = KvFiles.of(MODEL, where=tmp_path, limit=2 * size + 1000 if size else 1 << 40)
        assert kept.keep(timeline_of(engine, some_ids(engine, 300, i))) == ""
        newest = max(tmp_path.glob("*.kv"), key=lambda p: p.stat().st_mtime_ns)
        size = newest.stat().st_size
        os.utime(newest, ns=(i, i))
    assert len(list(tmp_path.glob("*.kv"))) == 2
    assert kept.restore(timeline_of(engine, []), np.array(some_ids(engine, 300, 3))) == 300
    assert kept.restore(timeline_of(engine, []), np.array(some_ids(engine, 300, 0))) == 0


def test_a_damaged_file_counts_as_nothing_and_goes(engine, tmp_path, rng):
    kept = KvFiles.of(MODEL, where=tmp_path)
    ids = some_ids(engine, 300)
    kept.keep(timeline_of(engine, ids))
    (path,) = tmp_path.glob("*.kv")
    whole = path.read_bytes()
    for i in range(60):
        data = bytearray(whole)
        if i % 3:
            at = int(rng.integers(48 if i % 3 == 1 else 48 + 2400, len(data)))
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[int(rng.integers(len(data))) :]
        path.write_bytes(data)
        timeline = timeline_of(engine, [])
        n = kept.restore(timeline, np.array(ids))
        assert n < 300 and timeline.length == timeline.session.length == n


def test_a_context_that_is_too_small_is_no_damage(engine, tmp_path):
    kept = KvFiles.of(MODEL, where=tmp_path)
    ids = some_ids(engine, 400)
    kept.keep(timeline_of(engine, ids))
    assert kept.restore(timeline_of(engine, [], 300), np.array(ids)) == 0
    assert kept.restore(timeline_of(engine, []), np.array(ids)) == 400


def test_a_document_that_is_asked_about_again_is_not_read_again(ms4, tmp_path):
    text = " ".join(f"Item {i} costs {i * 7} dollars." for i in range(60))
    (tmp_path / "list.txt").write_text(text)
    ask = ("run", "-q", "--greedy", "--format", "json", "-n", 4, "-f", tmp_path / "list.txt", "--no-stdin")
    first, second, third = (
        json.loads(ms4(*ask, *more, "What costs 70 dollars?")[1]) for more in ((), (), ("--no-session",))
    )
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    n = second["usage"]["prompt_tokens"]
    assert n >= 1024 and second["usage"]["prompt_tokens_details"]["cached_tokens"] == n - 1
    assert third["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert first["choices"] == second["choices"] == third["choices"]


# --- killed


def killed_chats(n):
    """Chats that are killed at random moments: after each, every session can be read."""
    random_ = random.Random(SEED)
    turns = 0
    for _ in range(n):
        more = ["-c"] if files() and random_.random() < 0.7 else []
        process = subprocess.Popen(
            [Path(sys.executable).with_name("ms4"), "chat", "-q", "--greedy", *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        process.stdin.write("".join(LINES * 4).encode())
        process.stdin.flush()
        time.sleep(random_.random() * 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdin.close()
        for session in sessions.sessions():
            assert not isinstance(session, SessionError), session
        turns = sum(len(session.turns) for session in sessions.sessions())
    return turns


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_answer_that_is_ended_from_outside_is_kept(number):
    """A window that is closed, a machine that is shut down: what was asked and written is there the next day."""
    code = "import sys; from ms4.cli import start; sys.exit(start.main())"
    command = [sys.executable, "-c", code, "chat", "-q", "-m", MODEL]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdin.write(b"Spell the word planet.\n")
    process.stdin.flush()
    assert process.stdout.read(1)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == -number
    turn = only_turn()
    assert turn.message == "Spell the word planet." and turn.cut and turn.text


@pytest.mark.slow
@pytest.mark.rare
def test_a_hundred_killed_chats_leave_files_that_can_be_read():
    assert killed_chats(100) > 0
