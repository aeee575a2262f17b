"""The help of each command and the manual page: examples that can be typed, every option, nothing slow."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ms4.cli import guide, man, start
from ms4.cli.main import command

ROOT = Path(__file__).parents[1]
EXAMPLES = [(name, line) for name, lines in guide.EXAMPLES.items() for line in lines]


def test_every_command_has_examples():
    assert {*guide.EXAMPLES} == {*start.COMMANDS} and all(guide.EXAMPLES.values())


@pytest.mark.parametrize(("name", "line"), EXAMPLES, ids=[line for _, line in EXAMPLES])
def test_an_example_is_a_command_line_that_is_accepted(name, line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "ms4" / "templates").mkdir(parents=True)
    (tmp_path / "ms4" / "templates" / "review.toml").write_text("temp = 1\n")
    for file in ("invoice.png", "report.pdf", "letter.txt", "photo.jpg"):
        (tmp_path / file).write_bytes(b"")
    lexer = shlex.shlex(re.sub(r'^eval "\$\((.*)\)"$', r"\1", line), posix=True, punctuation_chars="|<>")
    lexer.whitespace_split = True
    words = [*lexer]
    words = words[words.index("ms4") :]
    ends = [n for n, word in enumerate(words) if word in ("|", "<", ">")]
    assert words[1] == name
    arguments = words[2 : ends[0] if ends else None]
    command(name).make_context(f"ms4 {name}", arguments, help_option_names=["-h", "--help"])  # raises if it is none


@pytest.mark.parametrize("name", start.COMMANDS)
def test_examples_come_first_and_every_option_stands_in_one_place(ms4, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, err = ms4(name, "--help")
    assert (code, err) == (0, "")
    places = [out.index(f"  {line}\n") for line in guide.EXAMPLES[name]]
    assert places == sorted(places) and places[-1] < out.index("\nUsage: ms4 ")
    for param in command(name).params:
        if param.param_type_name == "option" and not param.hidden:
            (option, *_) = [o for o in param.opts if o.startswith("--")] or param.opts
            assert len(re.findall(rf"^  (?:-\w, )?{option}(?![\w-])", out, re.MULTILINE)) == 1, option


def test_a_group_names_options_that_there_are():
    there = {param.name for name in start.COMMANDS for param in command(name).params}
    named = [name for names in guide.GROUPS.values() for name in names]
    assert {*named} <= there and len({*named}) == len(named)
    titles = [title for title, _ in guide.grouped(command("run").params)]
    assert titles[: len(guide.GROUPS)] == [*guide.GROUPS]
    assert [title for title, _ in guide.grouped(command("ls").params)] == [guide.OTHERS]


def test_what_has_to_be_given_stands_in_no_brackets(ms4):
    assert "\nUsage: ms4 rm [OPTIONS] NAME\n" in ms4("rm", "--help")[1]


def test_no_help_imports_what_takes_time():
    code = (
        "import sys; from ms4.cli import start\n"
        "for name in start.COMMANDS:\n"
        "    sys.argv = ['ms4', name, '--help']\n"
        "    assert start.main() == 0\n"
        "print({'typer.rich_utils', 'rich', 'pydantic', 'numpy', 'PIL', 'tiktoken', 'gguf', 'httpx', 'llguidance',"
        " 'prompt_toolkit', 'pypdfium2', 'ms4.models.model', 'ms4.models.sampling'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("set()\n")


# --- the manual page
@pytest.fixture(scope="module")
def page():
    return man.page()


def test_the_manual_page_has_every_command_option_and_exit_code(page):
    text = page.replace("\\-", "-")
    for name in start.COMMANDS:
        assert f".SH MS4 {name.upper()}\n\\fBms4 {name}\\fR" in text
        for param in command(name).params:
            if param.param_type_name == "option" and not param.hidden:
                assert all(option in text for option in (*param.opts, *param.secondary_opts))
    exits = text.partition(".SH EXIT STATUS\n")[2].partition(".SH")[0]
    assert re.findall(r"^\\fB(\d+)\\fR$", exits, re.MULTILINE) == ["0", "1", "2", "3", "4", "5", "6", "7", "130"]


def test_its_variables_are_in_the_readme():
    readme = {*re.findall(r"^\| `(MS4_[A-Z_]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)}
    assert man.ENVIRONMENT and {*man.ENVIRONMENT} <= readme


def test_no_text_is_taken_for_a_command_of_roff(page):
    known = {".TH", ".SH", ".SS", ".PP", ".TP", ".nf", ".fi", ".RS", ".RE"}
    for line in page.splitlines():
        assert line[:1] != "'" and (line[:1] != "." or line.split()[0] in known), line
        assert not re.search(r"\\(?![-&e]|f[BIR]|\((?:aq|ga|ha|ti))", line), line
    assert man.plain(".a 'b' \\c --d\n~e") == "\\&.a \\(aqb\\(aq \\ec \\-\\-d \\(tie"


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff here")
def test_groff_has_nothing_to_say_about_it(page):
    done = subprocess.run(
        ["groff", "-man", "-ww", "-Tutf8", "-P-c"], input=page.encode(), capture_output=True, check=True
    )
    shown = re.sub("(.)\b", "", done.stdout.decode())
    assert done.stderr == b"" and "-r, --effort none|low|medium|high" in shown
    assert "ms4 run --schema 'name, age int' -f letter.txt" in shown


def test_the_command_prints_it(ms4, page):
    assert ms4("man") == (0, page, "")
