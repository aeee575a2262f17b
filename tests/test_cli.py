"""The command line: what is accepted, what is said, on which stream, with which exit code.

Commands run in this process on a small checkpoint; what only a process of its own can show is in test_cli_process.py.
"""

import io
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from fixtures import bravo

from ms4.cli import errors, start
from ms4.cli.main import app, command

ROOT = Path(__file__).parents[1]
MODEL = str(ROOT / "tests" / "data" / "bravo-Q4_K_M.gguf")
ONE_LINE = re.compile(r"ms4: error: [^\x00-\x1f\x7f]{1,300}\n(hint: [^\x00-\x1f\x7f]{1,300}\n)?")


class Result:
    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def __repr__(self):
        return f"exit {self.code}\nstdout {self.out!r}\nstderr {self.err!r}"


@pytest.fixture
def ms4(ms4):
    """ms4(arguments..., stdin=bytes) -> Result; the standard streams are pipes with an unhelpful encoding."""
    return lambda *arguments, **more: Result(*ms4(*arguments, **more))


@pytest.fixture
def run(ms4):
    """The same, for `ms4 run -m MODEL --greedy`."""
    return lambda *arguments, **more: ms4("run", "-m", MODEL, "--greedy", *arguments, **more)


def refused(result, code, pattern):
    """True if it ended in one clear line on stderr, and nothing on stdout."""
    assert result.code == code, result
    assert result.out == "", result
    assert ONE_LINE.fullmatch(result.err), result
    assert re.search(pattern, result.err), result
    return True


# --- help, usage


def test_the_readme_shows_the_help_text(ms4):
    result = ms4("--help")
    assert result.code == 0 and result.err == ""
    assert f"```text\n{result.out}```" in (ROOT / "README.md").read_text()


def test_the_help_text_lists_every_command():
    commands = {command.callback.__name__ for command in app.registered_commands}
    assert commands == set(
        re.findall(r"^  (\w+)  +\w", start.HELP.partition("commands:")[2].partition("options:")[0], re.M)
    )


def test_without_a_command_the_help_is_on_stderr(ms4):
    result = ms4()
    assert (result.code, result.out, result.err) == (2, "", start.HELP)


@pytest.mark.parametrize("command", [c.callback.__name__ for c in app.registered_commands])
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_has_help(ms4, command, flag):
    result = ms4(command, flag)
    assert result.code == 0 and result.err == ""
    assert result.out.startswith(f"ms4 {command}: ") and f"\nUsage: ms4 {command}" in result.out


@pytest.mark.parametrize("name", start.COMMANDS)
def test_a_command_is_neither_quiet_nor_verbose_unless_it_is_told_to_be(name):
    """-q is True and -v False: a default of False would be -v."""
    assert {param.default for param in command(name).params if param.name == "quiet"} <= {None}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["walk"], "no such command walk"),
        (["run", "--speed", "x"], "no such option: --speed"),
        (["run", "-n"], "-n needs N behind it"),
        (["run", "x", "--temp", "nan"], r"--temp: nan is outside 0 to 10"),
        (["run", "x", "--temp", "inf"], r"--temp: inf is outside 0 to 10"),
        (["run", "x", "--temp=-1"], r"--temp: -1 is outside 0 to 10"),
        (["run", "x", "--top-p", "0"], r"--top-p: 0 is not above 0"),
        (["run", "x", "--top-p", "1.1"], r"--top-p: 1.1 is outside"),
        (["run", "x", "--min-p", "x"], r"--min-p: x is not a number such as 0.7, 0 to 1"),
        (["run", "x", "--seed", str(2**64)], r"--seed: \d+ is outside 0 to 18446744073709551615"),
        (["run", "x", "--ctx", "0"], r"--ctx: 0 is outside 1 to 1048576"),
        (["run", "x", "--ctx", "-1"], "--ctx: -1 is outside 1 to 1048576"),
        (["run", "x", "--ctx", "1e12"], r"--ctx: 1e12 is not a whole number .*1 to 1048576"),
        (["run", "x", "--ram", "lots"], r"--ram: lots is no size of memory such as 24G, 1.5G or 24GB"),
        (["run", "x", "--ram", "0.5"], r"--ram: 0.5 is outside 1 to \d+ bytes"),
        (["run", "x", "--vram=-1G"], r"--vram: -1G is no size of memory"),
        (["run", "x", "--threads", "0"], r"--threads: 0 is outside 1 to 1024"),
        (["run", "x", "--threads", "100000"], r"--threads: 100000 is outside 1 to 1024"),
        (["run", "x", "-n", "0"], r"--max-tokens: 0 is outside"),
        (["run", "x", "-n", str(2**63)], r"--max-tokens: \d+ is outside"),
        (["run", "x", "-r", "extreme"], r"--effort: extreme is not one of none, low, medium, high"),
        (["run", "x", "--temp", "1", "--temp", "2"], "--temp is given twice"),
        (["run", "x", "--stop", ""], "--stop needs a text"),
        (["run", "x", "--logprobs", "2"], "--logprobs needs --format json"),
        (["run", "x", "--greedy", "--temp", "1"], "exclude each other"),
        (["info"], "missing argument PATH"),
        (["logits", "-m", MODEL], "missing option --ids"),
    ],
)
def test_wrong_usage_is_one_line(ms4, arguments, says):
    assert refused(ms4(*arguments), 2, says)


@pytest.mark.parametrize(
    "text, value",
    [
        *(("24G", 24 << 30), ("24g", 24 * 10**9), ("24GB", 24 * 10**9), ("24 GiB", 24 << 30), ("1.5G", 3 << 29)),
        *(("1T", 1 << 40), ("0.5t", 5 * 10**11), ("800000", 800000), ("800000B", 800000), ("24gb", 24 * 10**9)),
        *(("1.1M", 1153433), ("4k", 4000), ("4K", 4096), ("4kib", 4096)),
    ],
)
def test_sizes_of_memory_are_spelled_as_people_do(text, value):
    from ms4.cli.options import memory_size

    assert memory_size(text) == value


@pytest.mark.parametrize("text", ["", "G", "1.G", ".5G", "1,5G", "1e9", "-1G", "24GX", "inf", "24 G B", "٣G"])
def test_what_is_no_size_of_memory(text):
    from ms4.cli.options import memory_size

    with pytest.raises(ValueError, match="no size of memory"):
        memory_size(text)


def test_sizes_have_units():
    from ms4.cli.options import size

    assert [size(text) for text in ("512", "32k", "32K", "1m", "1M")] == [512, 32000, 32768, 10**6, 2**20]
    for text in ("", "k", "-1", "1.5k", "0x10", "1kk", "１"):
        with pytest.raises(ValueError):
            size(text)


# --- errors


def test_a_message_is_escaped_and_cut():
    assert errors.escape("a\x1b[31m\n\x7f\udcff") == r"a\x1b[31m\x0a\x7f\xff"
    assert errors.escape("é 中") == "é 中"
    assert len(errors.escape("x" * 1000)) == errors.LONGEST


def test_exceptions_of_the_engine_have_their_codes():
    import ms4

    assert errors.describe(ms4.ContextFull("full", -6))[0] == 3
    assert errors.describe(ms4.Canceled("canceled", -7))[:2] == (130, "")
    assert errors.describe(ms4.NotFinite("nan", -8))[:2] == (1, "nan")
    assert errors.describe(MemoryError("no room"))[:2] == (6, "no room")
    assert errors.describe(KeyboardInterrupt())[:2] == (130, "")


def test_the_table_of_codes_names_classes_that_exist():
    import importlib

    for name in errors.CODES:
        module, _, kind = name.rpartition(".")
        assert issubclass(getattr(importlib.import_module(module), kind), Exception), name


def test_an_unexpected_exception_is_one_line_too(ms4, monkeypatch):
    monkeypatch.setattr("ms4.cli.doctor.check_memory", lambda: {}["gone"])
    assert refused(ms4("doctor"), 1, r"internal error, please report: KeyError at test_cli.py:\d+: 'gone'")


def test_debug_shows_the_traceback(ms4, monkeypatch):
    monkeypatch.setenv("MS4_DEBUG", "1")
    assert "Traceback" in ms4("run", "-m", "none.gguf", "x").err


# --- the model


def test_the_model_can_come_from_the_environment(ms4, monkeypatch):
    monkeypatch.setenv("MS4_MODEL", MODEL)
    assert ms4("run", "--count", "Hi").out.strip().isdigit()


@pytest.mark.parametrize("command", [["run", "Hi"], ["info"], ["bench"], ["tokenize"], ["chat"]])
def test_a_missing_or_damaged_file_is_refused(ms4, tmp_path, command):
    damaged = tmp_path / "a\x1b[31mb.gguf"
    damaged.write_bytes(b"<html>not here</html>" * 10)
    for path, says in ((tmp_path / "none.gguf", "[Nn]o such file"), (damaged, "HTML"), (tmp_path, "directory")):
        arguments = [*command, str(path)] if command == ["info"] else [*command, "-m", str(path)]
        assert refused(ms4(*arguments, stdin=b"x"), 5, says)


# --- run: input


@pytest.mark.parametrize(
    ("stdin", "code", "says"),
    [
        (b"ok \xff\xfe\xc3\x28 end", 7, r"stdin is not UTF-8 \(byte 3\)"),
        (b"\xed\xa0\x80", 7, r"\(byte 0\)"),
        (b"\xc0\xaf", 7, r"\(byte 0\)"),
        (b"abc\xe2\x82", 7, r"\(byte 3\)"),
        (b"\xef\xbb\xbfab\xff", 7, r"\(byte 5\)"),
        ("Hi".encode("utf-16"), 7, "UTF-16"),
        (b"", 2, "empty prompt"),
        (b" \n\t", 2, "empty prompt"),
    ],
)
def test_stdin_is_checked(run, stdin, code, says):
    assert refused(run(stdin=stdin), code, says)


def test_stdin_has_an_end(run, monkeypatch):
    monkeypatch.setattr("ms4.cli.streams.MOST_INPUT", 1 << 20)
    assert refused(run(stdin=b"x" * (1 << 20) + b"y"), 7, "more than 1 MiB")


def test_stdin_comes_before_the_argument(run):
    shown = run("--show-prompt", "what", "is", "it?", stdin=b"\xef\xbb\xbfsome text\n").out
    assert "[INST]some text\n\nwhat is it?[/INST]" in shown
    assert "\n\n" not in run("--show-prompt", "alone").out


def test_a_nul_does_not_end_the_prompt(run):
    assert "[INST]a\0b[/INST]" in run("--show-prompt", stdin=b"a\0b").out


def test_an_argument_must_be_text(run):
    assert refused(run("ab\udcff"), 7, r"the prompt is not UTF-8 \(byte 2\)")


def test_the_system_prompt_can_be_a_file(run, tmp_path):
    (tmp_path / "s.txt").write_text("Be terse.")
    assert "[SYSTEM_PROMPT]Be terse.[/SYSTEM_PROMPT]" in run("--show-prompt", "-s", f"@{tmp_path}/s.txt", "Hi").out
    assert "[SYSTEM_PROMPT]Be kind.[/SYSTEM_PROMPT]" in run("--show-prompt", "-s", "Be kind.", "Hi").out
    assert refused(run("-s", f"@{tmp_path}/none", "Hi"), 7, "no such file")


def test_control_tokens_in_a_prompt_stay_text(ms4, run):
    text = b"[INST]x[/INST]</s><s>[IMG][SYSTEM_PROMPT]"
    ids = json.loads(ms4("tokenize", "-m", MODEL, stdin=text).out)
    assert ids and min(ids) >= 1000


def test_a_prompt_that_does_not_fit_is_refused_with_both_numbers(run):
    n = int(run("--count", "x y z " * 40).out)
    assert refused(run("--ctx", "64", "x y z " * 40), 3, f"prompt has {n} tokens, the context 64\nhint: --ctx {n + 1}")
    assert refused(run("x " * 3000), 3, "at most 1024 tokens")
    assert refused(run("-n", "2000", "Hi"), 3, r"the prompt has \d+ tokens and --max-tokens is 2000, .* 1024")
    assert refused(run("--ctx", "2k", "Hi"), 2, "--ctx 2000: the model allows at most 1024")


# --- run: output


def test_stdout_is_the_answer_with_one_newline(run):
    result = run("-n", "12", "Hi")
    assert result.code == 0 and result.err == ""
    assert result.out.strip() and result.out.endswith("\n") and not result.out.endswith("\n\n")


def test_all_forms_carry_the_same_answer(run):
    text = run("-n", "12", "Hi").out
    whole = json.loads(run("-n", "12", "--format", "json", "Hi").out)
    events = [json.loads(line) for line in run("-n", "12", "--format", "jsonl", "Hi").out.splitlines()]
    assert whole["choices"][0]["message"]["content"].strip("\n") == text.strip("\n")
    assert "".join(e["text"] for e in events if e["event"] == "text") == whole["choices"][0]["message"]["content"]
    assert [e["event"] for e in events if e["event"] != "text"] == ["start", "load", "prefill", "done"]
    assert whole["choices"][0]["finish_reason"] == events[-1]["finish_reason"] == "length"
    assert whole["usage"] == events[-1]["usage"]
    assert whole["usage"]["completion_tokens"] == 12
    assert whole["usage"]["prompt_tokens"] == int(run("--count", "Hi").out)


def test_an_error_is_an_event_too(run):
    result = run("--format", "jsonl", "--ctx", "8", "Hi")
    assert result.code == 3 and ONE_LINE.fullmatch(result.err)
    assert json.loads(result.out.splitlines()[-1]) == {
        "event": "error",
        "code": 3,
        "message": "the prompt has 24 tokens, the context 8",
        "hint": "--ctx 25",
    }


def test_log_probabilities(run):
    whole = json.loads(run("-n", "3", "--format", "json", "--logprobs", "2", "Hi").out)
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 3
    for token in tokens:
        first, second = token["top_logprobs"]
        # Greedy: the token is the likeliest one.
        assert (token["id"], token["logprob"]) == (first["id"], first["logprob"])
        assert second["logprob"] <= first["logprob"] < 0


def test_the_same_seed_gives_the_same_text(ms4):
    texts = [ms4("run", "-m", MODEL, "--temp", "1", "--seed", s, "-n", "8", "Hi").out for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_a_prefill_begins_the_answer(run):
    assert run("--prefill", "Sure, ", "-n", "4", "Hi").out.startswith("Sure,")


def test_output_goes_to_a_file(run, tmp_path):
    path = tmp_path / "answer"
    path.write_text("old " * 100)
    result = run("-n", "12", "-o", path, "Hi")
    assert (result.code, result.out) == (0, "")
    assert path.read_text() == run("-n", "12", "Hi").out
    assert refused(run("-o", tmp_path / "no" / "where", "Hi"), 1, "No such file")


def test_statistics_are_on_stderr(run):
    result = run("-n", "5", "--stats", "Hi")
    assert re.fullmatch(r"ms4: read 24 tok \d+\.\d s · wrote 5 tok \d+\.\d tok/s · ctx 28/1K\n", result.err), result


def test_a_cut_answer_fails_only_if_strict(run):
    assert run("-n", "4", "Hi").code == 0
    result = run("-n", "4", "--strict", "Hi")
    assert result.code == 3 and result.out.strip() and "after 4 tokens" in result.err


def test_a_full_context_keeps_the_text_and_says_so(run):
    result = run("--ctx", "32", "Hi")
    assert result.code == 3 and result.out.strip()
    assert "the context of 32 tokens is full" in result.err


# --- the other commands


def test_tokenize_is_lossless(ms4):
    text = "Hello, world!\n\tdef f(x): return x  # é 中 🙂"
    ids = json.loads(ms4("tokenize", "-m", MODEL, stdin=text.encode()).out)
    from ms4.cli.loading import open_tokenizer

    assert open_tokenizer(MODEL).text(ids) == text
    assert ms4("tokenize", "-m", MODEL, "--count", stdin=text.encode()).out == f"{len(ids)}\n"
    assert ms4("tokenize", "-m", MODEL).out == "[]\n"


def test_tokenize_takes_a_text_on_the_line(ms4, tmp_path):
    piped = ms4("tokenize", "-m", MODEL, stdin=b"some text").out
    assert json.loads(piped)
    assert ms4("tokenize", "-m", MODEL, "some text").out == piped
    assert ms4("tokenize", "some", "text", "-m", MODEL, stdin=b"what a loop reads").out == piped
    assert ms4("tokenize", "-m", MODEL, "").out == "[]\n"
    assert refused(ms4("tokenize", "-m", MODEL, "hi", "--chat", tmp_path / "no"), 2, "only one of the two")


def test_tokenize_takes_conversations(ms4, run, tmp_path):
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": "Hi\u2028"}], "reasoning_effort": effort}, ensure_ascii=False
        )
        for effort in ("none", "high")
    ]
    path = tmp_path / "chat.jsonl"
    path.write_text("\n".join(lines) + "\n\n")
    none, high = (json.loads(line) for line in ms4("tokenize", "-m", MODEL, "--chat", path).out.splitlines())
    assert none[0] == 1 and none[-1] == 4 and none != high
    assert ms4("tokenize", "-m", MODEL, "--chat", path, "--count").out == f"{len(none)}\n{len(high)}\n"
    path.write_text(lines[0] + "\n{}\n")
    assert refused(ms4("tokenize", "-m", MODEL, "--chat", path), 7, "chat.jsonl, line 2: ")


def test_logits_do_not_depend_on_the_chunks(ms4, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(list(range(1000, 1020))))
    found = []
    for chunk in (["--chunk", "7"], []):
        assert ms4("logits", "-m", MODEL, "--ids", ids, "-o", tmp_path / "o.npy", *chunk).code == 0
        found.append(np.load(tmp_path / "o.npy"))
    assert found[0].shape == (20, 2304) and found[0].dtype == np.float32
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("ids", "code", "says"),
    [("", 7, "not JSON"), ("[]", 7, "list of token ids"), ('["a"]', 7, "list"), ("[2304]", 7, "outside 0 to 2303")],
)
def test_logits_checks_its_ids(ms4, tmp_path, ids, code, says):
    (tmp_path / "ids.json").write_text(ids)
    assert refused(ms4("logits", "-m", MODEL, "--ids", tmp_path / "ids.json", "-o", tmp_path / "o.npy"), code, says)


def test_logits_holds_no_more_than_the_model(ms4, tmp_path):
    (tmp_path / "ids.json").write_text(json.dumps([1] * 1025))
    result = ms4("logits", "-m", MODEL, "--ids", tmp_path / "ids.json", "-o", tmp_path / "o.npy")
    assert refused(result, 3, "1025 ids, but the model holds at most 1024")


FLAG = object()


class EvenSession:
    """A model that thinks every one of 8 tokens as likely as another."""

    def __init__(self):
        self.fed = []
        self.n_logits = 0

    def rewind(self, length):
        del self.fed[length:]

    def feed(self, ids, n_logits=1, all_logits=False, stop=None):
        assert stop is FLAG
        self.fed += list(ids)
        self.n_logits += len(ids) if all_logits else n_logits
        return np.zeros((len(ids) if all_logits else n_logits, 8), np.float32)


def test_perplexity_by_hand():
    from ms4.cli.perplexity import logits, summarize
    from ms4.models.sampling import surprise

    session = EvenSession()
    losses = surprise(logits(session, [1, 5, 6, 7, 5, 4], FLAG), [7, 5, 4])
    # Judged are the tokens 7, 5, 4; the last one is never fed, and no other logits are asked for.
    assert session.fed == [1, 5, 6, 7, 5] and session.n_logits == 3
    assert np.allclose(losses, np.log([8, 8, 8]))
    assert summarize([losses]).perplexity == pytest.approx(8)
    two = summarize([np.log([4.0]), np.log([16.0])])
    # The mean of log 4 and log 16 is log 8; the spread of two values log 2 from it is log 2.
    assert (two.perplexity, two.error) == (pytest.approx(8), pytest.approx(8 * np.log(2)))


def test_perplexity_of_a_file(ms4, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    arguments = ["perplexity", tmp_path / "text", "-m", MODEL, "--ctx", "64"]
    value = json.loads(ms4(*arguments, "--json").out)
    assert value["segments"] > 1 and value["tokens"] == 32 * value["segments"] and value["perplexity"] > 1
    assert ms4(*arguments).out.startswith(f"perplexity {value['perplexity']:.4f} +- {value['error']:.4f}")
    assert refused(ms4("perplexity", tmp_path / "text", "-m", MODEL, "--ctx", "1k"), 7, "less than one segment of 1000")


@pytest.mark.slow
def test_another_model_is_compared_at_the_same_tokens(ms4, tmp_path):
    other_model = bravo("Q8_0")
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    ref = tmp_path / "ref"
    common = ("perplexity", tmp_path / "text", "--ctx", "64", "--segments", "2", "--json")
    plain = ms4(*common, "-m", MODEL, "--write-ref", ref)
    assert plain.code == 0 and "kl_mean" not in json.loads(plain.out)
    itself = json.loads(ms4(*common, "-m", MODEL, "--ref", ref).out)
    assert (itself["kl_mean"], itself["kl_most"], itself["kl_same"]) == (0, 0, 1)
    other = ms4(*common, "-m", other_model, "--ref", ref)
    value = json.loads(other.out)
    # By the definition, from what `ms4 logits` writes of the first segment.
    ids = json.loads(ms4("tokenize", "-m", MODEL, stdin=(tmp_path / "text").read_bytes()).out)
    (tmp_path / "ids").write_text(json.dumps([1, *ids[1:64]]))
    rows = []
    for model in (MODEL, other_model):
        assert ms4("logits", "-m", model, "--ids", tmp_path / "ids", "-o", tmp_path / "rows.npy").code == 0
        rows.append(np.load(tmp_path / "rows.npy")[31:63].astype(np.float64))
    p, q = (np.exp(r - r.max(1, keepdims=True)) / np.exp(r - r.max(1, keepdims=True)).sum(1)[:, None] for r in rows)
    kl = (p * np.log(p / q)).sum(1)
    first = json.loads(ms4(*common[:-3], "--segments", "1", "--json", "-m", MODEL, "--write-ref", tmp_path / "r1").out)
    again = json.loads(ms4(*common[:-3], "--segments", "1", "--json", "-m", other_model, "--ref", tmp_path / "r1").out)
    assert first["tokens"] == 32 and again["kl_mean"] == pytest.approx(kl.mean(), rel=1e-9)
    assert again["kl_most"] == pytest.approx(kl.max()) and 0 < value["kl_mean"] and value["kl_same"] <= 1
    assert "KL from the reference" in ms4(*common[:-1], "-m", other_model, "--ref", ref).out


@pytest.mark.slow
def test_a_reference_of_something_else_is_refused(ms4, tmp_path):
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    (tmp_path / "text2").write_text("The quick brown fox jumped over the lazy dog. " * 20)
    ref, common = tmp_path / "ref", ("-m", MODEL, "--segments", "2")
    assert ms4("perplexity", tmp_path / "text", *common, "--ctx", "64", "--write-ref", ref).code == 0
    again = ms4("perplexity", tmp_path / "text", *common, "--ctx", "64", "--write-ref", ref)
    assert refused(again, 2, "is there already")
    for text, ctx, says in (("text", "60", "another --ctx"), ("text2", "64", "another text")):
        assert refused(ms4("perplexity", tmp_path / text, *common, "--ctx", ctx, "--ref", ref), 7, says)
    ref.write_bytes(ref.read_bytes()[:-1])
    assert refused(ms4("perplexity", tmp_path / "text", *common, "--ctx", "64", "--ref", ref), 7, "is cut")
    for data in (b"", b"[]\n", b"\xff" * 9000):
        ref.write_bytes(data)
        assert refused(ms4("perplexity", tmp_path / "text", *common, "--ctx", "64", "--ref", ref), 7, "no file of")


def test_info(ms4):
    assert "weights       7.6 million" in ms4("info", MODEL).out
    value = json.loads(ms4("info", MODEL, "--json", "--kv", "--tensors").out)
    assert value["shape"]["n_layer"] == 3 and value["kv"]["general.architecture"] == "mistral4"
    assert {t["name"] for t in value["tensors"]} >= {"token_embd.weight", "output_norm.weight"}
    shown = ms4("info", MODEL, "--kv", "--tensors").out
    assert "mistral4.expert_count = 8" in shown and "token_embd.weight" in shown


def test_doctor(ms4, monkeypatch):
    result = ms4("doctor", "-m", MODEL)
    assert result.code == 0 and re.search(r"^ok kernels", result.out, re.M), result
    result = ms4("doctor", "-m", "/nowhere.gguf", "--json")
    levels = {check["name"]: check["level"] for check in json.loads(result.out)["checks"]}
    assert result.code == 1 and levels["model"] == "bad" and levels["tokenizer"] == "ok"
    monkeypatch.setenv("MS4_ISA", "z80")
    assert ms4("doctor").code == 1


def test_bench_counts_against_the_limits(ms4):
    value = json.loads(ms4("bench", "-m", MODEL, "--pp", "32", "--tg", "4", "-r", "2", "--format", "json").out)
    prefill, decode = value["rows"]
    assert [prefill["phase"], decode["phase"]] == ["prefill", "decode"]
    assert 0 < decode["bytes_per_token"] <= prefill["bytes_per_token"] * 32 < 32 * decode["bytes_per_token"]
    assert 0 < decode["share_of_read_bandwidth"] and 0 < value["read_bytes_per_s"]
    assert decode["median_tokens_per_s"] <= decode["best_tokens_per_s"]
    assert refused(ms4("bench", "-m", MODEL, "--pp", "1025"), 2, "the model has 1024")


def test_shares_are_of_the_limits_around_each_repetition():
    from ms4 import Limits
    from ms4.cli.bench import Disk, Timing, phase_row

    # a machine that drifts: half as fast in the second and third repetition, which take twice as long
    timings = [(1.0, 80.0), (2.0, 40.0), (2.0, 50.0)]
    rounds = tuple(Timing(seconds, 40, Limits(read, 1000.0, 1.0)) for seconds, read in timings)
    row = phase_row("decode", 0, 10, rounds, macs=10.0)
    assert row.bytes_per_token == 4
    assert (row.best_tokens_per_s, row.median_tokens_per_s) == (10, 5)
    assert row.share_of_read_bandwidth == 0.5  # of 0.5, 0.5 and 0.4
    assert row.share_of_int8_peak == 0.05
    assert row.bottleneck == "memory bandwidth"
    rounds = tuple(Timing(t.seconds, 10, t.limits) for t in rounds)
    assert phase_row("decode", 0, 10, rounds, macs=1.0).bottleneck == "attention or overhead"
    rounds = tuple(Timing(t.seconds, 40, t.limits, Disk(80, 20, 500, 10**9)) for t in rounds)
    row = phase_row("decode", 0, 10, rounds, macs=10.0)
    assert (row.share_of_experts_in_memory, row.disk_bytes_per_token, row.share_waited_for_disk) == (0.25, 50, 0.5)
    assert row.bottleneck == "disk"


def test_shares_of_a_gpu_are_of_its_own_limits():
    """In 2 seconds: 600 bytes of weights, 400 of them in its memory, and 60 brought to it."""
    from ms4 import Limits
    from ms4.cli.bench import Card, Timing, phase_row, table

    limits = Limits(1000.0, 10.0, 1.0, 400.0, 40.0)
    row = phase_row("decode", 0, 10, (Timing(2.0, 600, limits, card=Card(400, 60, 30, 40)),), macs=10.0)
    shares = row.share_of_read_bandwidth, row.share_of_vram_bandwidth, row.share_of_bus, row.share_of_experts_on_gpu
    assert shares == (0.1, 0.5, 0.75, 0.75) and row.share_of_int8_peak == 0 and row.bottleneck == "bus"
    about = dict.fromkeys(("model", "version", "device", "isa", "threads", "load"), "x")
    text = table(about, [row], limits)
    assert "50 % of its memory's bandwidth, 75 % of the bus, 75 % of the experts" in text
    assert "GPU: 0 GB/s its memory" in text
    row = phase_row("decode", 0, 10, (Timing(20.0, 600, limits, card=Card(400, 60, 30, 40)),), macs=10.0)
    assert row.bottleneck == "GPU arithmetic, launches or waits"
    unknown = Limits(1000.0, 10.0, 1.0, 0.0, 0.0)  # a card with no room left to measure it
    row = phase_row("decode", 0, 10, (Timing(2.0, 600, unknown, card=Card(400, 60, 30, 40)),), macs=10.0)
    assert (row.share_of_vram_bandwidth, row.share_of_int8_peak) == (0, 0)


def test_multiply_adds_by_hand():
    import ms4
    from ms4.models.mistral4 import macs_per_token

    small = ms4.Shape(
        n_layer=2, n_dense_layer=1, n_vocab=9, n_ctx_train=9, d_model=10, d_dense=7, d_expert=3, d_shared=4, n_head=2,
        d_nope=5, d_rope=2, d_value=6, q_rank=8, kv_rank=4, n_expert=16, n_expert_used=2, norm_eps=1e-6,
        router_scale=1.0, router_norm=True, attn_scale=1.0, temp_beta=0.0, temp_length=1, rope_freq=(1.0,),
    )  # fmt: skip
    # q_a 10x8, kv_a 10x6, q_b 8x14, kv_b 4x22, output 12x10; dense 3x10x7; router 10x16, 2 experts and the shared one
    attention = 80 + 60 + 112 + 88 + 120
    assert macs_per_token(small) == 2 * attention + 210 + 160 + 180 + 120
    # Half of the tokens skip the last layer, but for the latents that they leave in the cache.
    latents = small.d_model * (small.kv_rank + small.d_rope)
    assert macs_per_token(small, 0.5) == macs_per_token(small) - (attention - latents + 160 + 180 + 120) / 2


def test_thoughts_stay_off_stdout(monkeypatch):
    from ms4.cli import streams
    from ms4.cli.writers import TextWriter
    from ms4.models.answer_parser import Text, Thinking

    for think, beside in (("auto", ""), ("hide", ""), ("show", "hm, hm\n")):
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        writer = TextWriter(streams.Output(), think, "")
        for event in (Thinking("hm,"), Thinking(" hm"), Text("\n\nYes."), Text("\n")):
            writer.event(event)
        writer.done(None, 0)
        err.flush()
        assert (out.buffer.getvalue(), err.buffer.getvalue()) == (b"Yes.\n", beside.encode())


def test_thought_without_an_answer_is_incomplete():
    from ms4.cli.run import verdict as judged
    from ms4.models.answer import Done, Statistics

    def done(reason, n_thinking=0):
        return Done(reason, Statistics(9, 0, 50, n_thinking, 1.0, 1.0, 49, 58, 100))

    def verdict(done, answered, strict):
        return judged(done, answered, strict, 1 << 18)

    assert verdict(done("stop"), True, False) == (0, "")
    assert verdict(done("length", 50), False, False)[0] == 3
    assert verdict(done("length", 40), True, False)[0] == 0
    assert verdict(done("length"), True, True)[0] == 3
    assert verdict(done("context"), True, False)[0] == 3
    assert verdict(done("interrupted"), True, True) == (130, "")
