"""Markdown that is rendered while it comes: what a person sees, and that nothing of it is lost."""

import random
import re

import pyte
import pytest
import standins

from ms4.cli import code_colours, inline, palette, render, streams
from ms4.cli.markdown import Markdown
from ms4.cli.wrap import cells

DOCUMENT = """# Title of **all**

Some prose with **bold words**, *italics*, `code span`, ~~gone~~ and snake_case_names, 2 * 3 * 4, a
[link](http://example.org/x) that goes on until the line is full. <https://example.org/y>
A second line, **bold that
spans lines** here.

## Second
- item one that is longer than any narrow terminal would like it to be
  - nested *item*
    - deeper
- [ ] task
- [x] done
1. first
   ```python
   def f(x):
       \"\"\"doc
       string\"\"\"
       return x + 1  # comment
   ```
2. second

   its paragraph
10. tenth

> quoted text that is long enough to be wrapped somewhere
> - with item
>
> > deeper quote

Before it:
| Name | Value | What |
|:-----|------:|------|
| `a` | 1 | the first of **all** |
| b | 20000 | something that is much longer than the others |

---
Inline \\(a_1 + b_1\\) and $x*y*z$.
\\[
x = y
- z
\\]
Setext
======

    indented code
東京大阪は**日本の都市**です。「引用」も、句読点も、行の頭に来てはいけません。
end **unclosed and `more"""
STYLE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def rng(rng):
    return random.Random(int(rng.integers(1 << 32)))


def rendered(text, width=79, rng=None):
    """What is written for a text that comes in pieces."""
    markdown = Markdown(lambda: width, palette.Palette(True))
    return "".join(map(markdown.feed, standins.cut(text, rng))) + markdown.end()


def plain(text, width=79):
    return STYLE.sub("", rendered(text, width))


def styled(out):
    """(character, the sequence that holds for it), blanks at the ends of lines left out."""
    found, style = [], palette.PLAIN
    for part in re.split(f"({STYLE.pattern})", out):
        if STYLE.fullmatch(part):
            style = part
        else:
            found += [(c, style) for c in part if not c.isspace()]
    return found


@pytest.mark.parametrize("width", [19, 39, 79, 199])
def test_pieces_of_any_size_give_the_same_and_nothing_but_styles(width, rng):
    whole = rendered(DOCUMENT, width)
    for _ in range(5):
        out = rendered(DOCUMENT, width, rng)
        assert STYLE.sub("", out) == STYLE.sub("", whole)
        assert styled(out) == styled(whole)
    assert "\x1b" not in STYLE.sub("", whole), "nothing is ever drawn again"
    assert width < 39 or all(cells(line) <= width for line in whole.split("\n")), "addresses are not broken"


@pytest.mark.parametrize("width", [19, 39, 79, 199])
def test_every_word_is_there(width):
    document = re.sub(r"^\|(?!.*Name).*\n|- \[.\]", "", DOCUMENT, flags=re.MULTILINE)  # cells stand side by side
    shown = re.sub(r"[\s│]", "", plain(document, width))
    at = 0
    for word in re.findall(r"[^\W_]+", document):
        assert word in shown[at:], word
        at = shown.index(word, at) + len(word)


def test_no_style_goes_on_below():
    for line in rendered(DOCUMENT, 30).split("\n"):
        assert (STYLE.findall(line) or [palette.PLAIN])[-1] == palette.PLAIN, line


@pytest.mark.parametrize(
    "source, shown",
    [
        ("# A\ntext", "A\ntext"),
        ("a\n\n\n\nb", "a\n\nb"),
        ("a *b* **c** `d` ~~e~~", "a b c d e"),
        ("2 * 3 * 4, a_b_c, **open", "2 * 3 * 4, a_b_c, **open"),
        (r"\*no\* \(x_1\) $a*b*c$ 5$ and 6$", r"*no* \(x_1\) $a*b*c$ 5$ and 6$"),
        ("[a](http://b) <http://c>", "a (http://b) http://c"),
        ("![chart](x.png)", "[image: chart] (x.png)"),
        ("- a\n  - b\n    - c\n- d", "• a\n  ◦ b\n    ▪ c\n• d"),
        ("1. a\n   - b\n\n   c\n2. d\n\ne", "1. a\n   ◦ b\n\n   c\n2. d\n\ne"),
        ("- a\n```\nx\n```\nb", "• a\n```\nx\n```\nb"),
        ("- ```\n  x\n  ```", "• ```\n  x\n  ```"),
        ("In\n1984. It was\n- so", "In\n1984. It was\n• so"),
        ("- [ ] a\n- [x] b\n- [c] d", "• ☐ a\n• ☑ b\n• [c] d"),
        ("> a\n> - b\n\nc", "│ a\n│ • b\n\nc"),
        ("> ```\n> x > y\n> ```\nz", "│ ```\n│ x > y\n│ ```\nz"),
        ("~~~\n# no heading\n```\n~~~\n**b**", "~~~\n# no heading\n```\n~~~\nb"),
        ("    a  b\n\n\tc", "    a  b\n\n\tc"),
        ("-", "•"),
        ("|", "|"),
        ("| a | no table\nb", "| a | no table\nb"),
        ("<b>x</b> &amp; \x1b[31mred", r"<b>x</b> & \x1b[31mred"),
        ("```", "```"),
        ("-5 degrees, +3, *, #hash, 1.5", "-5 degrees, +3, *, #hash, 1.5"),
    ],
)
def test_what_is_shown(source, shown):
    assert "\n".join(line.rstrip() for line in plain(source).split("\n")) == shown


def test_a_table_fits_or_becomes_a_list():
    table = "| Name | Value |\n|---|--:|\n| one | **1** |\n| two and more | 22222 |\n\nend"
    assert plain(table).split("\n") == [
        "Name           Value",
        "────────────────────",
        "one                1",
        "two and more   22222",
        "",
        "end",
    ]
    assert plain(table, 12).split("\n")[:3] == ["Name: one", "Value: 1", "─"]
    assert all(cells(line) <= 16 for line in plain(table, 16).split("\n"))


def test_words_come_when_they_are_certain():
    markdown = Markdown(lambda: 79, palette.Palette(True))
    assert STYLE.sub("", markdown.feed("One two **three")) == "One two"
    assert STYLE.sub("", markdown.feed(" four")) == ""
    assert STYLE.sub("", markdown.feed("** five six")) == " three four five"
    assert markdown.feed("\n```python\nx = ") == " six\n\x1b[0;2m```python\x1b[0m"
    assert STYLE.sub("", markdown.feed("1\n")) == "\nx = 1"
    assert STYLE.sub("", markdown.feed("```\n| a |\n|---|\n| b |\n")) == "\n```"
    assert STYLE.sub("", markdown.feed("\n")) == "\na\n─\nb"


def test_styles_as_a_terminal_takes_them():
    screen = pyte.Screen(80, 24)
    pyte.Stream(screen).feed(
        rendered("**bold** *it* `code` [l](x)\n# Head\n```py\nif 1: 'a'\n```").replace("\n", "\r\n")
    )
    first, head, code = (screen.buffer[y] for y in (0, 1, 3))
    assert first[0].bold and first[5].italics and first[8].fg != "default" and first[13].underscore
    assert head[0].bold and head[0].underscore
    assert len({code[x].fg for x in (0, 3, 6)}) == 3, "keyword, number, string"


def test_a_comment_of_many_lines_keeps_its_colour():
    lines = rendered("```c\n/* one\n two\n three */\nint x;\n```").split("\n")
    dim = palette.Palette(True).begin(code_colours.STYLES["Comment"])
    assert all(line.startswith(dim) for line in lines[1:4]) and not lines[4].startswith(dim)


@pytest.mark.parametrize("background", [(0, 0, 0), (255, 255, 255)])
def test_the_colours_can_be_read_on_black_and_on_white(background):
    def channel(value):
        value /= 255
        return value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4

    def light(colour):
        return sum(part * channel(c) for part, c in zip((0.2126, 0.7152, 0.0722), colour, strict=True))

    for colour in palette.MANY.values():
        levels = (0, 95, 135, 175, 215, 255)
        n = colour - 16
        dark, bright = sorted((light(background), light((levels[n // 36], levels[n // 6 % 6], levels[n % 6]))))
        assert (bright + 0.05) / (dark + 0.05) >= 3.5, colour


def test_what_it_costs_grows_with_the_text_alone(monkeypatch):
    seen = {"parsed": 0, "lexed": 0}
    parse, lexer_for = inline.parse, code_colours.lexer_for

    def counting(text):
        seen["parsed"] += len(text)
        return parse(text)

    def counting_lexer(language):
        lexer = lexer_for(language)
        take = lexer.get_tokens

        def get_tokens(text):
            seen["lexed"] += len(text)
            return take(text)

        lexer.get_tokens = get_tokens
        return lexer

    monkeypatch.setattr(inline, "parse", counting)
    monkeypatch.setattr(code_colours, "lexer_for", counting_lexer)
    costs = []
    for n in (100, 200):
        seen.update(parsed=0, lexed=0)
        prose = "never **closed and " * n
        rendered(f"{prose}\n\n```c\n/*\n{'int x; // in a comment' * 2}\n" + "more\n" * n, rng=random.Random(1))
        costs.append(dict(seen))
        assert seen["parsed"] <= len(prose) * inline.HELD and seen["lexed"] > 0
    for name in seen:
        assert costs[1][name] <= 2.2 * costs[0][name], costs


FRAGMENTS = ["**", "*", "_", "`", "```", "\n", "\n\n", "  ", "> ", "- ", "1. ", "# ", "| ", "|---|", "~~", "---", "==="]
FRAGMENTS += ["\\", "<", "&", "\t", "    ", "word ", "two words", "日本", "\x1b", "☐"]
TANGLED = [*FRAGMENTS, "[", "](", ")", "$$", "\\(", "\\]"]  # a formula may end within a link, and the like


@pytest.mark.parametrize("before", ["\\*", "`code`", "*so*", "&amp;", "[a](b)", "a\n"])
def test_an_emphasis_may_begin_behind_punctuation_that_was_parsed(before):
    for mark in ("*", "**", "~~", "_*"):
        text = f"{before}{mark}☐ two words{mark} end"
        assert styled(rendered(text, 60, random.Random(1))) == styled(rendered(text, 60)), text


@pytest.mark.parametrize("fragments", [FRAGMENTS, TANGLED])
def test_whatever_comes_is_shown_the_same_in_any_pieces(rng, fragments):
    for _ in range(100):
        text = "".join(rng.choice(fragments) + (f"w{rng.randrange(99)}" * rng.randrange(2)) for _ in range(25))
        whole, pieces = rendered(text, 30), rendered(text, 30, rng)
        assert fragments is TANGLED or styled(pieces) == styled(whole), text
        shown = re.sub(r"\s", "", STYLE.sub("", pieces))
        assert "\x1b" not in shown
        words = re.findall(r"w\d+|日本", text)
        info = re.findall(r"(?:`{3,}|~{3,}).*", text)  # what stands behind a fence, a part of a link
        if not info and "](" not in text and "|" not in text:
            assert all(word in shown for word in words), text


@pytest.mark.parametrize("markdown", [True, False])
def test_a_screen_renders_on_a_colour_terminal_if_it_is_to(monkeypatch, markdown):
    written = []
    output = streams.Output()
    monkeypatch.setattr(output, "terminal", True)
    monkeypatch.setattr(output, "colour", True)
    monkeypatch.setattr(output, "write", written.append)
    screen = render.Screen(output, markdown)
    screen.thinking("Hm **b**\n")
    for piece in ("\n\nSo **", "bold** it", " is\n\n", "- x\n\n"):
        screen.text(piece)
    screen.end()
    shown = STYLE.sub("", "".join(written))
    assert shown == ("Hm **b**\n\nSo bold it is\n\n• x\n" if markdown else "Hm **b**\n\nSo **bold** it is\n\n- x\n")
