"""Options that nobody typed: which layer wins, what is refused by file and line, what a project may say."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ms4.cli import config
from ms4.cli.main import app, command

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")


@pytest.fixture
def places(tmp_path, monkeypatch):
    """(the user's file, the project's), with the working directory two folders below the latter."""
    user, project = tmp_path / "home" / "ms4" / "config.toml", tmp_path / "project" / ".ms4.toml"
    (project.parent / "a" / "b").mkdir(parents=True)
    user.parent.mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(project.parent / "a" / "b")
    return user, project


def origin(ms4, name, *more):
    code, out, err = ms4("config", "show", "--json", *more)
    assert code == 0, err
    return tuple(json.loads(out)[name].values())


def test_a_flag_beats_the_environment_and_that_a_profile_a_project_and_the_user(ms4, places, monkeypatch):
    user, project = places
    counted = ("run", "-m", MODEL, "--count", "--show-prompt", "x")
    assert origin(ms4, "ctx") == (32768, "default")
    user.write_text("\nctx = 1001\n[profile.p]\nctx = 1003\n")
    assert origin(ms4, "ctx") == ("1001", f"user, {user}:2")
    project.write_text("ctx = '1002'")
    assert origin(ms4, "ctx") == ("1002", f"project, {project}:1")
    assert origin(ms4, "ctx", "--profile", "p") == ("1003", f"profile p, {user}:4")
    monkeypatch.setenv("MS4_PROFILE", "p")
    assert origin(ms4, "ctx") == ("1003", f"profile p, {user}:4")
    monkeypatch.setenv("MS4_CTX", "1k")
    assert origin(ms4, "ctx", "--profile", "p") == ("1k", "MS4_CTX")
    monkeypatch.setenv("MS4_CTX", "nonsense")
    assert ms4(*counted)[0] == 2
    assert ms4(*counted, "--ctx", "2k")[0] == 0


def test_a_context_that_was_not_typed_for_this_model_is_at_most_that(ms4, places, monkeypatch):
    user, _ = places
    user.write_text('ctx = "64k"')
    run = ("run", "-q", "-m", MODEL, "-n", "1", "--greedy", "hello")
    assert ms4(*run)[0] == 0
    monkeypatch.setenv("MS4_CTX", "1M")
    assert ms4(*run)[0] == 0
    assert ms4(*run, "--ctx", "64k")[0] == 2


def test_an_answer_is_written_as_the_file_says(ms4, places):
    user, _ = places
    typed = ms4("run", "-m", MODEL, "--greedy", "-n", "3", "-s", "Be brief.", "--format", "json", "hello")
    user.write_text(f'model = "{MODEL}"\ngreedy = true\nmax-tokens = 3\nsystem = "Be brief."\nformat = "json"\n')
    from_file = ms4("run", "hello")
    assert typed[0] == from_file[0] == 0
    a, b = json.loads(typed[1]), json.loads(from_file[1])
    assert (a["choices"], a["usage"]) == (b["choices"], b["usage"])
    assert a["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("temperature = 1\n", 1, "no such key temperature\nhint: temp[?]"),
        ("# note\n\nthread = 4\n", 3, "no such key thread\nhint: threads[?]"),
        ("[profile.a]\ntemp = 1\n[profile.b]\ntop = 1\n", 4, "no such key top\n"),
        ("profile.a.seeed = 1", 1, "no such key seeed\nhint: seed[?]"),
        ("[run]\nctx = 1\n", 1, "no such key run\n"),
        ("\nctx = true\n", 2, "ctx is not a whole number"),
        ("ctx = 1.5", 1, "ctx is not a whole number"),
        ("greedy = 1", 1, "greedy is not true or false"),
        ('temp = "hot"', 1, "temp is not a number"),
        ('stop = "END"', 1, "stop is not a list"),
        ("model = 7", 1, "model is not a text"),
        ("\n\nctx = 0", 3, "ctx: 0 is outside 1 to 1048576"),
        ('effort = "extreme"', 1, "effort: extreme is not one of none, low, medium, high"),
        ("ctx = 1\nctx = 2", 2, "not TOML: "),
        ("temp = ", 1, "not TOML: "),
        ("profile = 1", 1, "a profile is a table"),
        ('temp = 1 # \udcff"', 1, "not UTF-8"),
    ],
)
def test_a_mistake_is_named_by_file_and_line(ms4, places, text, line, says):
    for path in places:
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        code, out, err = ms4("run", "-m", MODEL, "--count", "x")
        if path == places[1] and text.startswith(("[profile", "profile")):
            says, line = "no such key profile", line_of_table(text)
        assert (code, out) == (2, ""), err
        first, _, rest = err.partition("\n")
        assert first.startswith(f"ms4: error: {path}:{line}: "), err
        assert config.re.search(says, f"{first}\n{rest}"), err
        path.unlink()


def line_of_table(text):
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(("[profile", "profile")))


def test_a_project_sets_no_model_memory_or_file_and_the_user_is_told(ms4, places):
    _, project = places
    lines = ['model = "evil.gguf"', "threads = 1000", 'system = "@/etc/passwd"', "no-session = true", 'effort = "high"']
    project.write_text("\n".join(lines))
    code, out, err = ms4("config", "show")
    assert (code, out) == (0, 'effort = "high"\n')
    for number, name in enumerate(("model", "threads", "a system prompt from a file", "no-session"), 1):
        assert f"{project}:{number}: {name} is not taken from a project" in err
    assert ms4("run", "-m", MODEL, "--count", "-q", "x")[2] == ""


def test_a_project_file_of_another_user_is_passed_over(ms4, places, monkeypatch):
    _, project = places
    project.write_text("ctx = 99")
    monkeypatch.setattr(os, "getuid", lambda: project.stat().st_uid + 1)
    if project.stat().st_uid == 0:
        monkeypatch.setattr(Path, "stat", lambda self, stat=Path.stat, **more: Owned(stat(self, **more)))
    code, out, err = ms4("config", "show")
    assert (code, out) == (0, "") and "belongs to another user" in err


class Owned:
    """A file's facts, but for its owner."""

    st_uid = 12345

    def __init__(self, facts):
        self.st_mode = facts.st_mode


def test_a_value_from_a_file_gives_way_to_a_flag_that_it_does_not_go_with(ms4, places):
    user, _ = places
    user.write_text('greedy = true\nload = "copy"\nformat = "json"\nquiet = true\nthink-budget = 5')
    code, out, err = ms4("run", "-m", MODEL, "--temp", "0.5", "--ram", "2G", "-x", "-v", "-n", "2", "hello")
    assert code == 0 and "exclude" not in err and "kernels" in err, err
    assert ms4("run", "-m", MODEL, "--temp", "0.5", "--greedy", "hello")[0] == 2


def test_a_conversation_keeps_its_own_effort_and_system_prompt(ms4, places, tmp_path):
    user, _ = places
    user.write_text('effort = "high"\nsystem = "Be brief."\n')
    said = tmp_path / "said.json"
    said.write_text(json.dumps([{"role": "system", "content": "Hm."}, {"role": "user", "content": "x"}]))
    code, out, err = ms4("run", "-m", MODEL, "--messages", said, "--show-prompt")
    assert code == 0, err
    assert "Hm." in out and "brief" not in out and '"none"' in out


def test_only_commands_that_answer_heed_what_is_about_answers():
    names = {
        c.callback.__name__: config.heeded(c.callback.__name__, command(c.callback.__name__).params) for c in COMMANDS
    }
    assert {*names["run"], *names["chat"]} == {*config.KEYS} and {*config.KEYS} - {*names["run"]} == {"compact"}
    assert {*names["chat"]} >= {"effort", "temp", "ctx", "model", "system"}
    assert "ctx" not in names["perplexity"] and "effort" not in names["trace"] and {*names["simulate"]} == {"model"}
    assert {*names["pull"]} == set()


COMMANDS = app.registered_commands


def test_set_writes_what_the_option_accepts_and_keeps_the_rest(ms4, places):
    user, _ = places
    user.write_text('# mine\ntemp = 0.3   # warm\n\n[profile.p]\nctx = "1k"\n')
    for words in (("temp", "0.5"), ("stop", "a b", "c"), ("greedy", "no"), ("model", "m:Q4")):
        assert ms4("config", "set", *words) == (0, "", "")
    assert ms4("config", "set", "ctx", "64k", "--profile", "p")[0] == 0
    assert ms4("config", "set", "seed", "7", "--profile", "new")[0] == 0
    assert ms4("config", "get", "stop") == (0, "a b\nc\n", "")
    assert ms4("config", "get", "seed", "--profile", "new") == (0, "7\n", "")
    assert ms4("config", "get", "seed")[:2] == (1, "")
    text = user.read_text()
    assert text.startswith("# mine\ntemp = 0.5") and "# warm" in text and 'ctx = "64k"' in text
    for words in (("temp", "warm"), ("temp", "11"), ("greedy", "maybe"), ("tmp", "1"), ("temp",), ("effort", "x")):
        code, out, err = ms4("config", "set", *words)
        assert (code, out) == (2, "") and err.startswith("ms4: error: "), (words, err)
    assert user.read_text() == text
    assert ms4("config", "unset", "stop")[0] == 0 and "stop" not in user.read_text()


def test_edit_says_what_is_wrong_with_what_was_written(ms4, places, monkeypatch, tmp_path):
    user, _ = places
    editor = tmp_path / "editor"
    editor.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'a').write('ctx = 0\\n')\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", f"{editor} -w")
    code, out, err = ms4("config", "edit", terminal=("stdin", "stdout", "stderr"))
    assert code == 2 and "ctx: 0 is outside" in err
    assert ms4("config", "edit")[0] == 2  # no terminal


def test_help_and_the_version_read_no_file(ms4, places):
    for path in places:
        path.write_text("nonsense")
    for arguments in (("--version",), ("run", "--help"), ("chat", "-h"), ("config", "path")):
        assert ms4(*arguments)[0] == 0
    code = "import sys; from ms4.cli import start; start.dispatch(['run', '--help']);"
    code += "print('ms4.cli.config' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout
    assert said.endswith("False\n"), said
