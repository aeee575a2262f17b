"""`ms4 batch`: the answers of single runs, in one process; what is done stays done, whatever stops it."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ms4.cli import batch

MODEL = str(Path(__file__).parent / "data" / "bravo-Q4_K_M.gguf")
FIXED = ("-m", MODEL, "-n", "8", "--seed", "5", "-q")


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def said(answer):
    return answer["choices"], {k: v for k, v in answer["usage"].items() if k != "prompt_tokens_details"}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is {n} times {n}?\n\n" for n in range(6)))
    return path


def test_the_answers_are_those_of_single_runs(ms4, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    assert ms4("batch", prompts, "-o", out, *FIXED, "-s", "Be brief.") == (0, "", "")
    answers = {line["id"]: line for line in lines(out)}
    assert sorted(answers) == [1, 3, 5, 7, 9, 11]
    for id, answer in answers.items():
        prompt = prompts.read_text().splitlines()[id - 1]
        code, single, err = ms4("run", *FIXED, "-s", "Be brief.", "--format", "json", prompt)
        assert code == 0, err
        assert said(json.loads(single)) == said(answer), prompt
    alone = tmp_path / "alone.jsonl"
    assert ms4("batch", prompts, "-o", alone, *FIXED, "-s", "Be brief.", "-j", "1")[0] == 0
    assert {line["id"]: said(line) for line in lines(alone)} == {id: said(line) for id, line in answers.items()}


def test_lines_of_json_have_their_own_settings_also_in_the_form_of_openai(ms4, tmp_path):
    asked, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    rows = [
        {"id": "a", "prompt": "hello", "seed": 9, "temperature": 2, "max_tokens": 5},
        {
            "custom_id": "b",
            "method": "POST",
            "body": {"model": "x", "messages": [{"role": "user", "content": "hello"}]},
        },
        {"id": "c", "prompt": "hello", "schema": "sure bool", "max_tokens": 40},
        {"prompt": "hello", "reasoning_effort": "high"},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = ms4("batch", asked, "-o", out, *FIXED)
    answers = {line["id"]: line for line in lines(out)}
    assert set(answers) == {"a", "b", "c", 4}, err
    single = json.loads(
        ms4("run", *FIXED[:2], "-q", "-n", "5", "--seed", "9", "--temp", "2", "--format", "json", "hello")[1]
    )
    assert said(answers["a"]) == said(single)
    assert json.loads(answers["c"]["choices"][0]["message"]["content"]).keys() == {"sure"}
    assert code == max(line["exit"] for line in answers.values())


def test_what_is_answered_is_not_asked_again_and_half_a_line_is_repaired(ms4, prompts, tmp_path):
    out = tmp_path / "out.jsonl"
    ms4("batch", prompts, "-o", out, *FIXED)
    whole = {line["id"]: said(line) for line in lines(out)}
    kept = out.read_bytes().splitlines(keepends=True)[:3]
    for cut in (b"", b"{", kept[2][:40], kept[2][:-1]):
        out.write_bytes(b"".join(kept[:2]) + cut)
        assert ms4("batch", prompts, "-o", out, *FIXED) == (0, "", "")
        assert out.read_bytes().startswith(b"".join(kept[:2]))
        assert {line["id"]: said(line) for line in lines(out)} == whole and len(lines(out)) == 6
    before = out.read_bytes()
    code, _, err = ms4("batch", prompts, "-o", out, *FIXED[:-1])
    assert (code, out.read_bytes()) == (0, before) and "6 of 6 are answered already" in err
    code, _, err = ms4("batch", prompts, "-o", out, *FIXED, "--temp", "1.5")
    assert code == 2 and "another question" in err and out.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        ("", 7, "no prompts"),
        ('{"prompt": "x"}\nplain\n', 7, "line 2: not JSON"),
        ('{"id": 2, "prompt": "x"}\n{"prompt": "y"}\n', 7, "line 2: the id 2 is that of line 1"),
        ('{"prompt": "x", "temprature": 1}', 7, "line 1: no such field temprature"),
        ('{"prompt": "x", "temperature": 99}', 7, "line 1: temperature is 99"),
        ('{"prompt": "x", "messages": []}', 7, "line 1: either prompt or messages"),
        ('{"messages": [{"role": "king", "content": "x"}]}', 7, "line 1: "),
        ('{"prompt": "x", "schema": {"type": 7}}', 7, "line 1: no answer can be held"),
        ('{"prompt": "x", "max_tokens": 0}', 7, "line 1: max_tokens"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', 7, "line 1: images are not taken"),
    ],
)
def test_a_mistake_is_named_by_its_line_before_anything_is_answered(ms4, tmp_path, text, code, says):
    asked, out = tmp_path / "asked", tmp_path / "out"
    asked.write_text(text)
    got, stdout, err = ms4("batch", asked, "-o", out, *FIXED)
    assert (got, stdout, out.exists()) == (code, "", False) and says in err, err


def test_a_file_of_something_else_stays_as_it_is(ms4, prompts, tmp_path):
    for text in ("my notes", "my notes\n", '{"id": 1}\n'):
        other = tmp_path / "notes"
        other.write_text(text)
        assert ms4("batch", prompts, "-o", other, *FIXED)[0] == 7
        assert other.read_text() == text
    before = prompts.read_text()
    assert ms4("batch", prompts, "-o", prompts, *FIXED)[0] == 2 and prompts.read_text() == before


def test_one_that_does_not_fit_is_said_and_the_others_are_answered(ms4, tmp_path):
    asked, out = tmp_path / "asked", tmp_path / "out"
    asked.write_text("short\n" + "long " * 400 + "\nshort, too\n")
    code, _, err = ms4("batch", asked, "-o", out, *FIXED, "--ctx", "128")
    assert code == 3 and "line 2: the prompt has" in err
    assert sorted(line["id"] for line in lines(out)) == [1, 3]


def test_where_memory_does_not_do_for_all_fewer_are_answered_together(ms4, prompts, tmp_path, monkeypatch):
    out, plain = tmp_path / "out.jsonl", batch.Work.answer

    def scarce(work, item, scheduler, timeline):
        if work.active > 1:
            return batch.Result(item, error=MemoryError("no room"))
        return plain(work, item, scheduler, timeline)

    monkeypatch.setattr(batch.Work, "answer", scarce)
    assert ms4("batch", prompts, "-o", out, *FIXED) == (0, "", "")
    assert sorted(line["id"] for line in lines(out)) == [1, 3, 5, 7, 9, 11]


def test_ctrl_c_keeps_what_is_done(tmp_path):
    asked, out = tmp_path / "asked", tmp_path / "out"
    asked.write_text("".join(f"Say {n}.\n" for n in range(400)))
    again = [sys.executable, "-m", "ms4_command"]
    code = "import sys, ms4_command; sys.exit(ms4_command.main())"
    again = [sys.executable, "-c", code, "batch", str(asked), "-o", str(out), "-m", MODEL, "-n", "60", "--seed", "1"]
    process = subprocess.Popen(again, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    n = len(lines(out))
    assert process.returncode == 130 and 3 <= n < 400, err
    assert f"{n} of 400 answered; the same command goes on" in err and "Traceback" not in err
    assert all(line["choices"][0]["finish_reason"] != "interrupted" for line in lines(out))
