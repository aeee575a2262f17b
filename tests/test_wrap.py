"""Text that is broken between words while it comes."""

import random

import pytest
import standins

from ms4.cli.wrap import Wrap, cells, reflow

PROSE = (
    "The quick brown fox jumps over the lazy dog, and then it has to wait a moment.\n\n"
    "* a list whose first item is longer than any narrow terminal, so it goes on below\n"
    "  1. another list, inside of it, with words enough to fill a line and some more\n"
    "> a quotation of somebody who could not be brief and so went on and on and on\n"
    "東京大阪は日本の都市です。「引用」も、句読点も、行の頭に来てはいけません。そして長い文が続きます。\n"
    "Voil\u00e0\u00a0: na\u0308ive \u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 "
    "Приве́т мир, как дела сегодня? שלום עולם\n"
)


def wrapped(text, width, rng=None):
    """The text as it is written if it comes in pieces."""
    wrap = Wrap(lambda: width)
    return "".join(map(wrap.feed, standins.cut(text, rng))) + wrap.flush()


@pytest.mark.parametrize("width", [19, 39, 79, 199])
def test_c8_words_stay_whole_and_lines_within_the_width(width):
    shown = wrapped(PROSE, width)
    assert all(cells(line) <= width for line in shown.split("\n"))
    assert "".join(shown.split()) == "".join(PROSE.split()), "nothing is lost"
    for line in PROSE.split("\n"):
        for word in line.split(" "):
            assert not word.isascii() or cells(word) > width or word in shown
    lines = shown.split("\n")
    assert not any(line.lstrip()[:1] in tuple("、。」") for line in lines if line.strip())
    assert not any(line.endswith("「") for line in lines)


@pytest.mark.parametrize("width", [19, 79])
def test_c8_the_pieces_in_which_a_text_comes_do_not_matter(width):
    whole = wrapped(PROSE, width)
    for seed in range(20):
        assert wrapped(PROSE, width, random.Random(seed)) == whole


def test_c8_a_line_is_filled():
    assert wrapped("aa bb cc dd", 5) == "aa bb\ncc dd"
    assert wrapped("aa  bb", 4) == "aa\nbb"
    assert wrapped("日本語です", 4) == "日本\n語で\nす"
    assert wrapped("日本語。です", 6) == "日本\n語。で\nす"
    assert wrapped("abc 日本", 6) == "abc 日\n本"


def test_c8_what_continues_an_item_is_indented():
    assert wrapped("* one two three four five\nand six", 14) == "* one two\n  three four\n  five\nand six"
    assert wrapped("12. one two three four", 16) == "12. one two\n    three four"
    assert wrapped("    so far so good it is", 16) == "    so far so\n    good it is"
    assert wrapped("* one two three", 9) == "* one two\nthree", "but not where there is no room for it"


def test_c8_code_and_tables_are_left_as_they_are():
    code = "```python\nprint('a rather long line of code', and_more)\n\n    x = 1\n```"
    table = "| a | column of the table | another |\n|---|---|---|\n| 1 | 2 | 3 and more of it |"
    text = f"{code}\n{table}\n~~~\n```\nstill inside, as long as it is not closed\n~~~"
    assert wrapped(text, 12) == text
    assert wrapped(f"{text}\nwords that are wrapped", 12) == f"{text}\nwords that\nare wrapped"


def test_c8_a_word_wider_than_a_line_is_whole():
    """So that it can be copied.  A terminal of 11 cells breaks it, and has 8 of it on the last line."""
    assert wrapped("see https://example.org/a/long/pat o k", 10) == "see\nhttps://example.org/a/long/pat o\nk"


def test_c8_help_is_set_anew_with_its_columns():
    text = "/new   begin a new conversation\n/undo  take back\nA sentence that is long"
    assert reflow(text, 20) == "/new   begin a new\n       conversation\n/undo  take back\nA sentence that is\nlong"
    assert reflow(text, 80) == text


def test_c8_blanks_at_the_edge_begin_no_line():
    assert wrapped("abcde  \nf", 5) == "abcde\nf"
    assert wrapped("abc  \nf", 5) == "abc  \nf"


def test_c9_a_width_that_changes_holds_from_the_next_word_on():
    width = [20]
    wrap = Wrap(lambda: width[0])
    out = wrap.feed("one two three four five ")
    width[0] = 9
    out += wrap.feed("six seven eight ")
    width[0] = 20
    assert out + wrap.feed("nine ten") + wrap.flush() == "one two three four\nfive six\nseven\neight nine ten"


def test_a_word_that_is_held_comes_out_in_the_end():
    wrap = Wrap(lambda: 10)
    assert (wrap.feed("ab"), wrap.feed("c"), wrap.feed(" d"), wrap.flush(), wrap.flush()) == ("", "", "abc", " d", "")


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_c9_the_help_of_a_command_fits_the_terminal(ms4, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for command in ("run", "chat", "bench", "plan", "sessions"):
        lines = ms4(command, "--help")[1].splitlines()
        assert len(lines) > 10 and max(map(len, lines)) < columns
