"""`ms4 completion`: what a shell is told, and bash, zsh and fish themselves, as far as they are installed."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

from ms4.cli import completion, start
from ms4.cli.main import command

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "models" / "demo" / "ms4-demo.gguf"
REPO, QUANT = "unsloth/Mistral-Small-4-119B-2603-GGUF", "Q4_K_M"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache with one model, and one session."""
    for kind in ("CACHE", "STATE", "DATA"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / f"Model-{QUANT}.gguf").symlink_to(DEMO)
    sessions = tmp_path / "DATA" / "ms4" / "sessions"
    sessions.mkdir(parents=True)
    lines = [{"event": "begin"}, {"event": "turn", "message": "Good\nmorning"}]
    (sessions / "20260101-120000-abcd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (sessions / "20260102-120000-torn.jsonl").write_text("{")
    return tmp_path


@pytest.fixture
def asked(ms4):
    """asked(line, shell) -> (whether files may follow, the lines)."""

    def ask(line, shell="fish", breaks=""):
        code, out, err = ms4("completion", "--ask", shell, line, breaks)
        assert (code, err) == (0, "")
        kind, *lines = out.splitlines()
        return kind == "files", lines

    return ask


def words(answer):
    return [line.partition("\t")[0] for line in answer[1]]


def test_a_line_with_nothing_on_it_has_the_commands_of_the_help(asked):
    assert words(asked("ms4 ")) == start.COMMANDS
    assert words(asked("ms4 to")) == ["tokenize"]
    assert asked("ms4 help pu") == (False, ["pull\tget a model from Hugging Face"])
    assert words(asked("ms4 -")) == ["--help", "--version"]


@pytest.mark.parametrize("name", start.COMMANDS)
def test_every_long_option_of_a_command_is_offered_and_no_hidden_one(asked, name):
    params = [p for p in command(name).params if p.param_type_name == "option"]
    want = {o for p in params if not p.hidden for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}
    assert {*words(asked(f"ms4 {name} -"))} == want | {"--help"}


def test_an_option_is_offered_once_unless_it_may_be_repeated(asked):
    assert "--seed" not in words(asked("ms4 run --seed 1 --"))
    assert "--stop" in words(asked("ms4 run --stop x --"))
    assert "--verbose\tmore, about file and run" in asked("ms4 run --verb")[1]


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("ms4 run -r ", ["none", "low", "medium", "high"]),
        ("ms4 run --format js", ["json", "jsonl"]),
        ("ms4 run --format=js", ["--format=json", "--format=jsonl"]),
        ("ms4 simulate --gpu 507", ["5070", "5070 Ti"]),
        ("ms4 plan --memory DDR5-6", ["DDR5-6000", "DDR5-6400"]),
        ("ms4 run 'an open quote", []),
        ("ms4 run -- --", []),
        ("FOO=1 /usr/bin/ms4 sessions ex", ["export"]),
        ("ms4 completion ", ["bash", "zsh", "fish"]),
        ("ms4 pull Q8", ["Q8_0"]),
        ("ms4 pull unslo", [REPO]),
        ("ms4 walk ", []),
    ],
)
def test_values_are_those_that_the_option_takes(asked, line, want):
    files, lines = asked(line)
    assert not files and [line.partition("\t")[0] for line in lines] == want


@pytest.mark.parametrize(
    "line",
    ["ms4 run -i ", "ms4 run -i a.png b", "ms4 run -s @", "ms4 run --schema ", "ms4 chat ", "ms4 tokenize --chat x"],
)
def test_where_files_are_meant_the_shell_adds_them(asked, line):
    assert asked(line) == (True, [])


def test_models_and_sessions_are_those_that_are_here(asked, home):
    name = f"{REPO}:{QUANT}"
    for line in ("ms4 run -m ", "ms4 rm ", "ms4 verify uns", "ms4 plan unsloth/Mistral-Small-4-119B-2603-GGUF:Q4"):
        assert words(asked(line)) == [name]
    both = ["20260102-120000-torn", "20260101-120000-abcd"]
    assert sorted(words(asked("ms4 chat --resume "))) == sorted(both) == sorted(words(asked("ms4 sessions rm ")))
    assert "20260101-120000-abcd\tGood\\x0amorning" in asked("ms4 sessions show ")[1]
    assert words(asked("ms4 sessions search ")) == []


def test_bash_gets_what_stands_behind_the_last_break_and_zsh_no_bare_colon(asked, home):
    line = f"ms4 run -m {REPO}:Q"
    assert asked(line, "bash", ":=")[1] == [QUANT]
    assert asked(line, "bash", "=")[1] == [f"{REPO}:{QUANT}"]
    assert asked("ms4 simulate --gpu 507", "bash", ":=")[1] == ["5070", "'5070 Ti'"]
    assert asked(line, "zsh")[1][0].startswith(f"{REPO}\\:{QUANT}:")


def test_nothing_that_takes_time_is_imported():
    code = (
        "import sys; sys.argv = ['ms4', 'completion', '--ask', 'bash', 'ms4 chat --resume ']; "
        "from ms4.cli.start import main; main();"
        "print({'rich', 'tiktoken', 'PIL', 'gguf', 'prompt_toolkit', 'numpy', 'httpx', 'pydantic', 'ms4.models.model'}"
        " & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_script_is_one_that_the_shell_reads(ms4, shell, tmp_path):
    code, out, err = ms4("completion", shell)
    assert (code, err, out) == (0, "", completion.SCRIPTS[shell])
    if not (found := shutil.which(shell)):
        pytest.skip(f"no {shell} here")
    (tmp_path / "script").write_text(out)
    assert subprocess.run([found, "-n", tmp_path / "script"]).returncode == 0


def test_an_unknown_shell_is_one_line(ms4):
    code, out, err = ms4("completion", "tcsh")
    assert (code, out) == (2, "") and "tcsh is not one of bash, zsh, fish" in err


# --- the shells themselves
SETUP = {  # how each is started, and made ready: its script, a prompt to wait for, nothing that guesses what is typed
    "bash": (
        ["--norc", "--noprofile"],
        'bind "set enable-bracketed-paste off"; eval "$(ms4 completion bash)"; PS1="{}"',
    ),
    "zsh": (
        ["-i"],
        'bindkey -e; unset zle_bracketed_paste; setopt nonomatch; autoload -U compinit; compinit -u -D; PROMPT="{}"; '
        'RPROMPT=; PROMPT_EOL_MARK=; eval "$(ms4 completion zsh)"',
    ),
    "fish": (
        ["--no-config"],
        "set -g fish_autosuggestion_enabled 0; set -g fish_greeting; function fish_prompt; echo '{}'; end; "
        "ms4 completion fish | source",
    ),
}


class Shell:
    """An interactive shell with its script, in which keys are typed and the line is read back."""

    def __init__(self, name, folder):
        bin = folder / "bin"
        bin.mkdir()
        code = "import sys; from ms4.cli.start import main; sys.exit(main())"
        (bin / "ms4").write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        (bin / "ms4").chmod(0o755)
        env = {**os.environ, "PATH": f"{bin}:{os.environ['PATH']}", "PS1": "$ ", "TERM": "dumb", "INPUTRC": "/dev/null"}
        env |= {"HOME": str(folder), "XDG_CONFIG_HOME": str(folder / "config"), "ZDOTDIR": str(folder)}
        (folder / ".zshrc").touch()
        options, setup = SETUP[name]
        self.process = pexpect.spawn(name, options, env=env, cwd=folder, timeout=30, encoding="utf-8")
        self.process.setwinsize(24, 400)
        self.process.sendline(setup.format("READY> "))
        self.process.expect(r"READY> +$")

    def completes(self, line):
        """The line after Tab, as its command would get it."""
        self.process.send(f"{line}\t")
        time.sleep(1.5)
        self.process.send("\x01echo '[' \x05 ']'\r")  # Ctrl-A, Ctrl-E
        self.process.expect(r"\r\n\[ ([^\r\n]*) \]\s*\r\n")
        return self.process.match[1].strip()


@pytest.mark.slow
@pytest.mark.parametrize("name", SETUP)
def test_a_real_shell_completes(home, name):
    if not shutil.which(name):
        pytest.skip(f"no {name} here")
    (home / "an image.png").write_bytes(b"")
    shell = Shell(name, home)
    assert shell.completes("ms4 tok") == "ms4 tokenize"
    assert shell.completes("ms4 run --schem") == "ms4 run --schema"
    assert shell.completes("ms4 run --format=jsonl --effort=hi") == "ms4 run --format=jsonl --effort=high"
    assert shell.completes("ms4 run -i an") == "ms4 run -i an image.png"
    assert shell.completes("ms4 chat -m uns") == f"ms4 chat -m {REPO}:{QUANT}"
    assert shell.completes(f"ms4 chat -m {REPO}:Q") == f"ms4 chat -m {REPO}:{QUANT}"
    assert shell.completes("ms4 sessions show 20260101") == "ms4 sessions show 20260101-120000-abcd"
    assert shell.completes("HF_DEBUG=1 ms4 perpl") == "HF_DEBUG=1 ms4 perplexity"
    shell.process.close(force=True)
