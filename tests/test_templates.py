"""Templates: what --save keeps, what -t makes of it, and what is refused by file and line."""

import json
from pathlib import Path

import pytest

from ms4.cli import completion, templates

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where templates lie, with a working directory beside it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "config" / "ms4" / "templates"


@pytest.fixture
def put(folder):
    """put(name, text) writes a template."""

    def write(name, text):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.toml").write_text(text)

    return write


@pytest.fixture
def prompt(ms4):
    """prompt(arguments..., stdin) -> the prompt that the model would get."""

    def shown(*arguments, **more):
        code, out, err = ms4("run", "-m", MODEL, "--show-prompt", *arguments, **more)
        assert code == 0, err
        return out

    return shown


def test_what_was_typed_is_kept_and_used(ms4, folder, prompt):
    more = ("-s", "Be terse.", "-r", "low", "--temp", "0.5", "-n", "7", "--stop", "END", "--stop", "FIN", "--ctx", "2k")
    code, out, err = ms4("run", "--save", "review", *more, "Review this", "for $who: $input", stdin=b"never read")
    path = folder / "review.toml"
    assert (code, out) == (0, "") and err == f"ms4: saved as {path}; ms4 run -t review --param who=VALUE uses it\n"
    there = folder.parent / "one.toml"
    assert ms4("run", "--save", there, "hi")[2] == f"ms4: saved as {there}; ms4 run -t {there} uses it\n"
    assert templates.read("review").settings["ctx"].value == "2k"
    kept = {key: setting.value for key, setting in templates.read("review").settings.items()}
    assert kept == {
        **{"system": "Be terse.", "effort": "low", "temp": "0.5", "max-tokens": "7", "stop": ["END", "FIN"]},
        **{"ctx": "2k", "prompt": "Review this for $who: $input"},
    }
    shown = prompt("-t", "review", "--param", "who=Ann", "too", stdin=b"x = 1\n")
    assert "[SYSTEM_PROMPT]Be terse.[/SYSTEM_PROMPT]" in shown and '"high"' in shown
    assert "[INST]Review this for Ann: x = 1\n\ntoo[/INST]" in shown
    assert "Be brief." in prompt("-s", "Be brief.", "--template", "review", "--param", "who=Ann", "x")
    code, out, err = ms4("run", "-t", "review", "--save", "kind", "--param", "who=Bob", "-r", "none")
    assert code == 0 and templates.read("kind").defaults == {"who": "Bob"}, err
    assert "for Bob: y" in (shown := prompt("-t", "kind", "y")) and '"none"' in shown


def test_an_answer_is_that_of_the_options_and_the_prompt(ms4, put):
    put("t", 'greedy = true\nmax-tokens = 3\nformat = "json"\nprompt = "Say $input twice."\n')
    typed = ms4("run", "-m", MODEL, "--greedy", "-n", "3", "--format", "json", "Say hi twice.")
    used = ms4("run", "-m", MODEL, "-t", "t", "hi")
    assert typed[0] == used[0] == 0, used
    assert json.loads(typed[1])["choices"] == json.loads(used[1])["choices"]
    assert json.loads(used[1])["usage"]["completion_tokens"] == 3


def test_a_flag_beats_a_template_and_that_the_environment_and_files(ms4, put, monkeypatch, tmp_path):
    put("t", "max-tokens = 2\n")
    (tmp_path / "config" / "ms4" / "config.toml").write_text("max-tokens = 4\n")
    monkeypatch.setenv("MS4_MAX_TOKENS", "3")
    for arguments, n in ((("-t", "t", "-n", "1"), 1), (("-t", "t"), 2), ((), 3)):
        code, out, err = ms4("run", "-m", MODEL, "--greedy", "--format", "json", *arguments, "Hello")
        assert json.loads(out)["usage"]["completion_tokens"] == n, err


def test_t_with_a_number_is_the_number_of_threads(ms4, put, prompt):
    put("t", 'system = "Be terse."')
    assert "terse" not in prompt("-t", "2", "hi") and "terse" in prompt("-t", "2", "-t", "t", "hi")
    assert "-t" in prompt("--system=-t", "t")  # the value of another option
    assert "[INST]-t t[/INST]" in prompt("--", "-t", "t")
    code, _, err = ms4("bench", "-m", MODEL, "-t", "t")
    assert code == 2 and "t is not a whole number" in err.replace("'", "")


@pytest.mark.parametrize(
    ("text", "typed", "want"),
    [
        ("$input!", "a", "a!"),
        ("${input}s, $$5 and $5", "a", "as, $5 and $5"),
        ("in $language: $input", "say $language", "in French: say $language"),
        ("Summarize.", "a", "a\n\nSummarize."),
        ("Summarize.", "", "Summarize."),
        ("in $language", "", "in French"),
    ],
)
def test_a_prompt_is_filled_in(put, prompt, text, typed, want):
    put("t", f'prompt = "{text}"\n[defaults]\nlanguage = "French"\n')
    assert f"[INST]{want}[/INST]" in prompt("-t", "t", stdin=typed.encode())
    if "language" in text:
        assert "in Latin" in prompt("-t", "t", "--param", "language=Latin", stdin=typed.encode())


def test_attachments_stand_before_the_prompt(put, prompt, tmp_path):
    put("t", 'prompt = "Summarize."\n')
    (tmp_path / "a.txt").write_text("Long.")
    assert "a.txt:\nLong.\n\nSummarize.[/INST]" in prompt("-t", "t", "-f", tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("text", "arguments", "code", "says"),
    [
        ('prompt = "$input"', (), 2, "template t wants an input"),
        ('prompt = "$a $input"', ("x",), 2, "a variable without a value\nhint: --param a=VALUE"),
        ('prompt = "$a"', ("--param", "b=1"), 2, "has no variable b\nhint: it has a"),
        ('prompt = "$a"', ("--param", "a"), 2, "is not NAME=VALUE"),
        ('prompt = "$input"', ("--param", "input=1", "x"), 2, "is not NAME=VALUE"),
        ("temp = 1\ntemperature = 1", ("x",), 2, "t.toml:2: no such key temperature\nhint: temp"),
        ("\ntemp = 99", ("x",), 2, "t.toml:2: temp: 99 is outside 0 to 10"),
        ("prompt = 1", ("x",), 2, "t.toml:1: prompt is not a text"),
        ("\n[defaults]\na = []", ("x",), 2, "t.toml:2: defaults is not a table of texts and numbers"),
        ('schema = "name, age int"\nextract = true', ("x",), 2, "--schema and --extract exclude each other"),
    ],
)
def test_a_mistake_is_one_line(ms4, put, text, arguments, code, says):
    put("t", text)
    found, out, err = ms4("run", "-m", MODEL, "-t", "t", *arguments)
    assert (found, out) == (code, "") and says in err and err.count("\n") <= 2, err


def test_a_template_that_is_not_there_is_missing(ms4, put):
    put("review", "temp = 1")
    assert ms4("run", "-t", "reviw", "x")[::2] == (
        5,
        "ms4: error: no template reviw\nhint: review? ms4 templates lists them; ms4 run --save NAME makes one\n",
    )
    assert ms4("run", "-t", "./none.toml", "x")[0] == 5
    assert ms4("run", "--template", "a b", "x")[0] == ms4("run", "--param", "a=1", "x")[0] == 2


OF_A_CALL = (("-i", "a.png"), ("-o", "out"), ("--plain",), ("-c",), ("--messages", "m"))


@pytest.mark.parametrize("more", [*OF_A_CALL, ("-t", "2")])
def test_what_belongs_to_a_call_is_not_kept(ms4, folder, more):
    kept = more == ("-t", "2")  # threads can be set in files
    code, out, err = ms4("run", "--save", "t", *more, "x")
    assert code == (0 if kept else 2) and (folder / "t.toml").exists() == kept, err
    assert kept or "a template keeps no --" in err


def test_what_is_there_is_not_overwritten_and_nothing_is_no_template(ms4, put):
    put("t", "temp = 1")
    code, _, err = ms4("run", "--save", "t", "x")
    assert code == 2 and "there is a template t already" in err
    assert "nothing to save" in ms4("run", "--save", "u")[2]
    assert "no variable who" in ms4("run", "--save", "u", "--param", "who=1", "x")[2]
    assert ms4("run", "--save", "u", "--temp", "hot", "x")[0] == 2 and templates.names() == ["t"]


def test_files_are_found_from_other_folders(ms4, folder, prompt, monkeypatch, tmp_path):
    Path("brief.txt").write_text("Be brief.")
    Path("s.json").write_text('{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}')
    assert ms4("run", "--save", "t", "-s", "@brief.txt", "--schema", "s.json", "-m", MODEL)[0] == 0
    monkeypatch.chdir(tmp_path)
    assert "Be brief." in prompt("-t", "t", "x")
    assert ms4("run", "-t", "t", "--greedy", "-n", "1", "x")[0] == 4  # cut before it fits the schema
    (folder / "beside.toml").write_text('system = "@b.txt"\nschema = "@s.json"\n')
    (folder / "b.txt").write_text("Beside.")
    assert "Beside." in prompt("-t", str(folder / "beside.toml"), "--schema", "a int", "x")


def test_texts_come_back_as_they_were(ms4, folder):
    for n, text in enumerate(("a\nb", "\na\n\nb\n", 'x """ y\n\\', "tab\there", "'''\n\"\"\"", "\x01\n\x02")):
        assert ms4("run", "--save", f"t{n}", text)[0] == 0
        assert templates.read(f"t{n}").prompt == text


@pytest.mark.slow
def test_a_chat_takes_the_options_and_says_what_it_leaves_out(ms4, put):
    put("t", 'system = "Be terse."\neffort = "low"\nprompt = "$input"\n')
    code, out, err = ms4("chat", "-m", MODEL, "-t", "t", "--no-session", stdin=b"/effort\n/set system\n")
    assert code == 0 and "effort is low" in err and "system is Be terse." in err
    assert "t.toml:3: prompt is not for ms4 chat, and is left out" in err
    assert "left out" not in ms4("chat", "-q", "-m", MODEL, "-t", "t", "--no-session", stdin=b"")[2]


def test_a_batch_fills_in_every_prompt(ms4, put, tmp_path):
    put("t", 'prompt = "Say $input $how."\nmax-tokens = 2\ngreedy = true\n')
    (tmp_path / "p.txt").write_text("a\nb\n")
    code, out, err = ms4("batch", tmp_path / "p.txt", "-m", MODEL, "-t", "t", "--param", "how=twice", "-q")
    assert code == 0, err
    (tmp_path / "q.txt").write_text("Say a twice.\nSay b twice.\n")
    plain = ms4("batch", tmp_path / "q.txt", "-m", MODEL, "-n", "2", "--greedy", "-q")[1]
    by_id = [{row["id"]: row["choices"] for row in map(json.loads, text.splitlines())} for text in (out, plain)]
    assert by_id[0] == by_id[1] and len(by_id[0]) == 2


def test_templates_are_listed_shown_and_removed(ms4, put, folder):
    assert ms4("templates") == (0, "", "ms4: there is none yet; ms4 run --save NAME makes one\n")
    put("b", 'prompt = "In $language:\\n $input"\n')
    put("long", "temp = 1\nctx = 5\n")
    put("bad", "temp = \n")
    code, out, err = ms4("templates")
    assert (code, out) == (0, "b     In $language: $input\nlong  temp 1, ctx 5\n") and "bad.toml:1: not TOML" in err
    rows = json.loads(ms4("templates", "ls", "--json")[1])
    assert [(row["name"], row["variables"]) for row in rows] == [("b", ["language"]), ("long", [])]
    assert ms4("templates", "show", "long")[1] == "temp = 1\nctx = 5\n"
    assert ms4("templates", "path", "b")[1] == f"{folder / 'b.toml'}\n"
    assert ms4("templates", "rm", "b")[0] == 0 and ms4("templates", "rm", "bad")[0] == 0
    assert ms4("templates", "rm", "b")[0] == 5 and templates.names() == ["long"]
    for arguments in (("frob",), ("rm",), ("ls", "x"), ("show",), ("edit", "a", "b"), ("show", "../x y")):
        code, out, err = ms4("templates", *arguments)
        assert code in (2, 5) and out == "" and "error" in err, arguments


def test_names_are_completed(put, folder):
    put("review", "temp = 1")
    (folder.parent / "config.toml").write_text("[profile.fast]\ntemp = 0.1\n")

    def found(*words):
        return [word for word, _ in completion.answer(words)[1]]

    assert found("run", "--template", "") == found("templates", "show", "") == ["review"]
    assert found("run", "--profile", "") == found("config", "--profile", "") == ["fast"]
    assert "effort" in found("config", "set", "") and found("config", "show", "") == []
