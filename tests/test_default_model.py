"""Commands without -m: they use the checkpoint that comes with ms4, say so in one line, and give way to any other."""

import shutil
from pathlib import Path

import pytest

from ms4.cli import options

DATA = Path(__file__).parent / "data"
MODEL, MMPROJ, IMAGE = (DATA / f"bravo-{name}" for name in ("Q4_K_M.gguf", "mmproj-f16.gguf", "image.png"))
NOTE = "ms4: the demonstration model answers, a toy; -m FILE names a real one\n"
PROMPT = ("run", "--greedy", "-n", "3", "Hi")


@pytest.fixture
def ms4(ms4, monkeypatch, tmp_path):
    """The same, where a small random checkpoint is the shipped."""
    shutil.copy(MODEL, tmp_path / "ms4-demo.gguf")
    shutil.copy(MMPROJ, tmp_path / "ms4-demo-mmproj.gguf")
    monkeypatch.setattr(options, "DEMO", str(tmp_path / "ms4-demo.gguf"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return ms4


def test_the_answer_is_that_of_the_file_and_one_line_says_whose_it_is(ms4):
    code, out, err = ms4(*PROMPT)
    assert (code, err) == (0, NOTE)
    assert ms4(*PROMPT, "-m", MODEL) == (0, out, "")


@pytest.mark.parametrize(
    ("arguments", "stdin"),
    [
        (("chat", "--greedy", "-n", "2"), b"Hi\nAgain\n"),
        (("perplexity", "-", "--ctx", "32"), b"word " * 100),
    ],
)
def test_every_command_that_takes_a_model_says_so_once(ms4, arguments, stdin):
    code, out, err = ms4(*arguments, stdin=stdin)
    assert (code, err) == (0, NOTE) and out


def test_quiet_is_quiet(ms4):
    assert [ms4(*PROMPT, "-q")[i] for i in (0, 2)] == [0, ""]
    assert ms4("run", "-q", "--count", "Hi")[2] == ""


def test_a_model_that_is_named_wins(ms4, monkeypatch, tmp_path):
    other = tmp_path / "other.gguf"
    code, out, err = ms4(*PROMPT, "-m", other)
    assert code == 5 and not out and "other.gguf" in err and "demonstration" not in err
    monkeypatch.setenv("MS4_MODEL", str(other))
    code, out, err = ms4(*PROMPT)
    assert code == 5 and not out and "other.gguf" in err and "demonstration" not in err


def test_its_vision_tower_is_found(ms4):
    code, out, err = ms4(*PROMPT, "-i", IMAGE)
    price, note = err.splitlines(True)
    assert (code, note) == (0, NOTE) and price.endswith("bravo-image.png 140x84 -> 140x84, 18 tokens\n")


def test_without_it_a_model_must_be_named(ms4, monkeypatch, tmp_path):
    monkeypatch.setattr(options, "DEMO", str(tmp_path / "none" / "ms4-demo.gguf"))
    code, out, err = ms4(*PROMPT)
    assert (code, out) == (5, "")
    assert err == "ms4: error: no model is named\nhint: add -m model.gguf   or   export MS4_MODEL=model.gguf\n"


def test_it_lies_in_the_package_of_the_models():
    assert Path(options.DEMO).parts[-3:-1] == ("models", "demo")
    import ms4.models

    assert Path(options.DEMO).parents[1].samefile(Path(ms4.models.__file__).parent)
