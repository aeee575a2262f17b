"""What `ms4 run` asks and how the answer may be cut to size: --messages, --tools, --extract, --timeout."""

import json

import pytest

from ms4.cli.writers import last_block

TURNS = [{"role": "user", "content": "What is 2+3?"}, {"role": "assistant", "content": "5"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def prompt_of(ms4, *arguments, **more):
    code, out, err = ms4("run", "--show-prompt", *arguments, **more)
    assert code == 0, err
    return out


def test_messages_go_on_with_the_prompt(ms4, tmp_path):
    file = write(tmp_path / "turns.json", TURNS)
    assert prompt_of(ms4, "--messages", file, "and 4+4?", "--no-stdin").endswith(
        "[INST]What is 2+3?[/INST]5</s>[INST]and 4+4?[/INST]\n"
    )
    whole = write(tmp_path / "whole.json", [*TURNS, {"role": "user", "content": "and 4+4?"}])
    assert prompt_of(ms4, "--messages", whole) == prompt_of(ms4, "--messages", file, "and 4+4?", "--no-stdin")
    assert prompt_of(ms4, "--messages", "-", stdin=whole.read_bytes()) == prompt_of(ms4, "--messages", whole)


def test_messages_leave_stdin_alone_without_a_prompt(ms4, tmp_path):
    file = write(tmp_path / "turns.json", TURNS[:1])
    assert "not mine" not in prompt_of(ms4, "--messages", file, stdin=b"not mine")


def test_an_object_of_messages_brings_tools_and_effort(ms4, tmp_path):
    file = write(tmp_path / "a.json", {"messages": TURNS[:1], "tools": [TOOL], "reasoning_effort": "high"})
    shown = prompt_of(ms4, "--messages", file)
    assert '"weather"' in shown and '{"reasoning_effort": "high"}' in shown
    assert '{"reasoning_effort": "none"}' in prompt_of(ms4, "--messages", file, "-r", "none")


def test_a_system_prompt_goes_before_the_messages(ms4, tmp_path):
    file = write(tmp_path / "turns.json", TURNS[:1])
    assert "[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]" in prompt_of(ms4, "--messages", file, "-s", "Be brief.")
    twice = write(tmp_path / "s.json", [{"role": "system", "content": "x"}, *TURNS[:1]])
    code, out, err = ms4("run", "--messages", twice, "-s", "Be brief.")
    assert (code, out) == (2, "") and "--system" in err


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"messages": 3}', '["hi"]', "[" * 100_000])
def test_what_is_no_list_of_messages_is_said(ms4, tmp_path, text):
    code, out, err = ms4("run", "--messages", write(tmp_path / "bad.json", text), "hi")
    assert (code, out) == (7, "") and "bad.json: not " in err and err.count("\n") <= 2


def test_a_message_that_is_wrong_is_named(ms4, tmp_path):
    file = write(tmp_path / "odd.json", [{"role": "robot", "content": "x"}])
    code, out, err = ms4("run", "--messages", file)
    assert (code, out) == (2, "") and "message 1" in err
    code, out, err = ms4(
        "run", "--messages", write(tmp_path / "low.json", {"messages": TURNS[:1], "reasoning_effort": "?"})
    )
    assert (code, out) == (7, "") and "effort" in err


def test_a_file_that_is_not_there(ms4, tmp_path):
    for option in ("--messages", "--tools"):
        code, out, err = ms4("run", option, tmp_path / "none.json", "--format", "json", "hi")
        assert (code, out) == (7, "") and "none.json: no such file or directory" in err


def test_tools_are_announced_and_need_json(ms4, tmp_path):
    file = write(tmp_path / "tools.json", [TOOL])
    assert '[AVAILABLE_TOOLS][{"type": "function", "function": {"name": "weather"' in prompt_of(
        ms4, "--tools", file, "hi"
    )
    assert '"weather"' in prompt_of(ms4, "--tools", write(tmp_path / "o.json", {"tools": [TOOL]}), "hi")
    code, out, err = ms4("run", "--tools", file, "hi")
    assert (code, out) == (2, "") and "--format json" in err
    code, out, err = ms4("run", "--tools", file, "--format", "json", "-n", 4, "hi")
    assert code == 0 and json.loads(out)["choices"]


@pytest.mark.parametrize(
    "text, block",
    [
        ("no block", None),
        ("```\na\n```", "a"),
        ("x\n```python\na\nb\n```\ny\n~~~\nc\n~~~\n", "c"),
        ("````\n```\nin\n```\n````", "```\nin\n```"),
        ("```\nopen\nend", "open\nend"),
        ("```\n\n```", ""),
        ("```a`b\nnot a fence", None),
        ("```sh\r\nx\r\n```\r\n", "x\r"),
        ("    ```\nindented", None),
    ],
)
def test_the_last_block_of_code(text, block):
    assert last_block(text) == block


def test_extract_gives_the_block_alone(ms4):
    code, out, err = ms4("run", "-x", "--greedy", "-n", 8, "--prefill", "Here:\n```sh\nls -l\n```\n", "list files")
    assert (code, out) == (0, "ls -l\n")
    code, out, err = ms4("run", "-q", "-x", "--greedy", "-n", 8, "hello")
    assert code == 0 and "no block of code" in err and out.strip()


def test_a_timeout_ends_in_3_and_keeps_what_there_is(ms4):
    code, out, err = ms4("run", "-q", "--timeout", "0.001", "hello")
    assert code == 3 and err == "ms4: error: --timeout 0.001 cut the answer\n"
    code, out, err = ms4("run", "-q", "--timeout", "1000", "-n", 2, "hello")
    assert code == 0 and out.strip()
