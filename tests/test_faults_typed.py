"""Slips on the command line of the kinds that users met, found by trying; each test is named after its row."""

import errno
import socket

import httpx
import pytest
import test_cli

from ms4.cli import options as opt
from ms4.cli.errors import MissingError
from ms4.models import variants, web
from ms4.models.variants import Wanted

# --- C5, A3: slips that would pass in silence


@pytest.mark.parametrize(
    "arguments, name, hint",
    [
        (["run", "\u2014count", "Hi"], "\u2014count", "--count, with plain hyphens"),
        (["run", "Hi", "\u2013n", "3"], "\u2013n", "-n, with a plain hyphen"),
        (["run", "Hi", "\u2013n3"], "\u2013n3", "-n, with a plain hyphen"),
        (["run", "Hi", "\u2013\u2013greedy"], "\u2013\u2013greedy", "--greedy, with plain hyphens"),
        (["run", "Hi", "\u2212-seed=3"], "\u2212-seed", "--seed, with plain hyphens"),
        (["run", "Hi", "\u2014temperature", "0"], "\u2014temperature", "--temp T"),
        (["chat", "\u2014resume"], "\u2014resume", "--resume, with plain hyphens"),
    ],
)
def test_c5_typographic_dashes_are_no_words_of_the_prompt(ms4, arguments, name, hint):
    code, out, err = ms4(*arguments)
    assert (code, out) == (2, "") and err.startswith(f"ms4: error: no such option: {name}\nhint: {hint}"), err


@pytest.mark.parametrize(
    "words",
    [["he said \u2014count on me"], ["\u2014no"], ["\u2014 yes"], ["\u2014c"], ["\u20135"], ["--", "\u2014count"]],
)
def test_c5_text_may_begin_with_a_dash(ms4, words):
    code, out, err = ms4("run", "-m", test_cli.MODEL, "--show-prompt", *words)
    assert code == 0 and out.endswith(f"[INST]{words[-1]}[/INST]\n"), err


def test_c5_a_value_in_typographic_quotes_is_not_torn(ms4):
    run = ("run", "-m", test_cli.MODEL, "--show-prompt")
    for arguments in (["-s", "\u201cBe", "brief.\u201d"], ["--system=\u201eSei", "knapp.\u201c"]):
        code, out, err = ms4(*run, *arguments, "Hi")
        assert (code, out) == (2, "") and "typographic quote" in err
    for arguments in (["-s", "\u201cBe brief.\u201d"], ["-s", "\u201c"], ["-s", "Be", "\u201cbrief", "one\u201d"]):
        assert ms4(*run, *arguments, "Hi")[0] == 0


@pytest.mark.parametrize("option", ["-m", "-o", "--mmproj", "--schema", "--messages", "--tools", "--resume"])
def test_c5_an_empty_value_names_nothing(ms4, option):
    """As of a variable that is not set: -m "" ran the demonstration, -o "" wrote to stdout."""
    for arguments in ([option, ""], [option + "="] if option.startswith("--") else [option, ""]):
        code, out, err = ms4("run", *arguments, "Hi")
        assert (code, out) == (2, "") and "is empty: it names nothing" in err
    assert ms4("run", "-m", test_cli.MODEL, "-s", "", "--show-prompt", "Hi")[0] == 0
    for arguments in (["sessions", "rm", ""], ["pull", ""], ["rm", ""]):
        assert ms4(*arguments)[0] == 2


@pytest.mark.parametrize(
    "arguments, said, hint",
    [
        (["run", "hi", "-n"], "-n needs N behind it", "ms4 run --help"),
        (["chat", "-m"], "-m needs PATH|NAME behind it", "ms4 chat --help"),
        (["run", "hi", "-i"], "-i needs PATH... behind it", "ms4 run --help"),
        (["run", "-s", "--greedy", "hi"], "-s needs TEXT|@FILE behind it, and --greedy is an option", "ms4 run --help"),
        (["run", "--stop", "-q", "hi"], "--stop needs TEXT behind it, and -q is an option", "ms4 run --help   or, if"),
    ],
)
def test_c5_a_value_that_is_missing_is_not_taken_from_the_next_option(ms4, arguments, said, hint):
    code, out, err = ms4(*arguments)
    assert (code, out) == (2, "") and err.startswith(f"ms4: error: {said}\nhint: {hint}"), err
    assert ms4("run", "-m", test_cli.MODEL, "--show-prompt", "--stop=-q", "-s", "-1", "--", "-n")[0] == 0


@pytest.mark.parametrize("words", [["what is this?"], ["what", "is", "this?"]])
def test_c5_a_message_among_the_files_of_a_chat_is_named_as_such(ms4, tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = ms4("chat", *words)
    assert (code, out) == (2, "") and err == (
        f"ms4: error: no file {words[0]}: a chat takes files to attach, and messages at its prompt\n"
        "hint: ms4 run 'what is this?'   or   ms4 chat\n"
    )
    (tmp_path / "is").touch()
    assert "no such file" in ms4("chat", "what", "is")[2] and "no such file" in ms4("chat", "nofile.txt")[2]


def test_b3_a_folder_in_the_place_of_a_model_names_what_is_in_it(ms4, tmp_path):
    def hint_for(*names):
        for name in names:
            (tmp_path / name).touch()
        code, out, err = ms4("run", "-m", str(tmp_path), "Hi")
        assert (code, out) == (5, "") and err.startswith(f"ms4: error: {tmp_path}: is a directory"), err
        return err.split("hint: ")[1].rstrip("\n")

    assert "ms4 ls" in hint_for("notes.txt")
    assert hint_for("m.safetensors", "mmproj-F16.gguf") == f"ms4 convert {tmp_path} model.gguf   makes one of it"
    assert hint_for("b.gguf", "a file.gguf") == f"-m '{tmp_path}/a file.gguf'"


@pytest.mark.parametrize(
    "arguments, said, hint",
    [
        (["Explain"], "no such command Explain", 'ms4 run "Explain"   or'),
        (["explain"], "no such command explain", 'ms4 run "explain"   or'),
        (["Run", "hi"], "no such command Run", "ms4 run hi   or"),
        (["hcat"], "no such command hcat", "ms4 chat   or"),
        ([""], "no such command ", "ms4 run"),
        (["version", "--json"], "version takes no options", "ms4 version; as JSON, ms4 doctor --json"),
        (["-V"], "no such option: -V", "ms4 --version"),
        (["-q", "chat", "a.pdf"], "no such option: -q", "options go after a command: ms4 chat -q a.pdf   or"),
        (["-q", "hi"], "no such option: -q", "options go after a command: ms4 run -q hi   or"),
        (["\u2014version"], "no such option: \u2014version", "ms4 --version, with plain hyphens"),
        (["\u2013h"], "no such option: \u2013h", "ms4 -h, with plain hyphens"),
        (["run", "-V"], "no such option: -V", "ms4 --version, without a command"),
        (["run", "- item"], "no such option: - item", 'text that begins with - goes after --: ms4 run -- "- item"'),
        (["bench", "-n", "1"], "no such option: -n", "ms4 bench --help\n"),
    ],
)
def test_c5_what_is_near_a_command_and_what_is_none(ms4, arguments, said, hint):
    code, out, err = ms4(*arguments)
    assert (code, out) == (2, "") and err.startswith(f"ms4: error: {said}\nhint: {hint}"), err


def test_c5_a_model_is_named_after_its_option(ms4, tmp_path, monkeypatch):
    """ollama run MODEL PROMPT; what takes no words at all says the same."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    said = "ms4: error: a.gguf is a model, not a word of the prompt\nhint: ms4 run -m a.gguf 'Why not?'\n"
    assert ms4("run", "a.gguf", "Why not?") == (2, "", said)
    assert ms4("run", "--count", "b.gguf", "Why?")[0] == 0, "there is no such file"
    said = "ms4: error: a.gguf is a model, not a word of the text\nhint: ms4 tokenize -m a.gguf 'Why not?'\n"
    assert ms4("tokenize", "a.gguf", "Why not?") == (2, "", said)
    assert ms4("tokenize", "a.gguf") == (2, "", said.replace(" 'Why not?'", ""))
    for command in ("doctor", "bench"):
        said = f"ms4: error: a.gguf: a model is named after -m\nhint: ms4 {command} -m a.gguf\n"
        assert ms4(command, "a.gguf") == (2, "", said)
    assert ms4("doctor", "x") == (2, "", "ms4: error: one word too many: x\nhint: ms4 doctor --help\n")
    code, out, err = ms4("chat", "a.gguf")
    assert code == 7 and "a model, not an attachment" in err


@pytest.mark.parametrize(
    "before", ["", "hf:", "hf.co/", "huggingface.co/", "https://huggingface.co/", "https://HF.co/"]
)
def test_b13_the_address_of_a_repository_is_its_name(before):
    assert variants.parse(f"{before}u/r:Q4_K_M") == Wanted("u/r", "Q4_K_M")
    assert variants.parse(f"{before}u/r") == Wanted("u/r", "")
    if before.startswith("http"):
        assert variants.parse(f"{before}u/r/") == variants.parse(f"{before}u/r/tree/main") == Wanted("u/r", "")


def test_b13_a_model_is_named_by_addresses_of_files_and_a_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my model.gguf").write_bytes(b"GGUF")
    for name in (f"file://{tmp_path}/my%20model.gguf", "~/my model.gguf"):
        assert opt.model_path(name) == f"{tmp_path}/my model.gguf"
    with pytest.raises(MissingError, match="a.gguf: not on this machine"):
        opt.model_path("https://example.org/a.gguf")


# --- C1: waiting without need


@pytest.mark.parametrize(
    "cause, said",
    [
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), "no network, or no such server"),
        (OSError(errno.ENETUNREACH, "unreachable"), "no network, or no such server"),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "nobody answers there"),
    ],
)
def test_c1_without_a_network_nobody_waits_for_more_attempts(cause, said):
    waited, n_asked = [], 0

    def ask():
        nonlocal n_asked
        n_asked += 1
        with web._as_transient():
            try:
                raise cause
            except OSError as error:
                raise httpx.ConnectError(str(error)) from error

    client = web.Web("https://hub.invalid")
    with pytest.raises(web.DownloadError, match=said) as caught:
        client.patiently(ask, waited.append)
    client.close()
    assert n_asked == 2 and sum(waited) < 1 and "ms4 ls" in caught.value.hint


def test_c1_who_waits_for_another_attempt_is_told_once():
    told, n_asked = [], 0

    def ask():
        nonlocal n_asked
        n_asked += 1
        raise web.Transient("the server is silent")

    client = web.Web("https://hub.invalid")
    client.trying_again = lambda reason: told.append(str(reason))
    with pytest.raises(web.DownloadError, match="6 attempts failed"):
        client.patiently(ask, lambda seconds: None)
    client.close()
    assert n_asked == 6 and told == ["the server is silent"]


def test_c1_a_hub_that_is_no_address_is_named(ms4, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "mirror.example")
    code, out, err = ms4("pull", "Q4_K_M")
    assert (code, out) == (1, "")
    assert err == "ms4: error: HF_ENDPOINT=mirror.example: not an address such as https://huggingface.co\n"
