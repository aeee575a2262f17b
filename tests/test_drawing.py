"""Pictures of lines: what is drawn, where each character is said to stand, and which texts are held out."""

from random import Random

import numpy as np
import pytest

from ms4.models.training import drawing

BLACK, WHITE = (0, 0, 0), (255, 255, 255)
STYLE = drawing.Style("Aileron", 24)


def ink(line: drawing.Line) -> np.ndarray:
    """How far each pixel is from the picture's corner, [height, width]."""
    rows = np.asarray(line.picture).astype(int)
    return np.abs(rows - rows[0, 0]).sum(-1)


def some_lines(n: int, **how) -> list[drawing.Line]:
    rng = Random(5)
    return [
        drawing.random_line(rng, rng.choice((5, 12)), rng.choice((1, 2)), fonts=["Aileron"], **how) for _ in range(n)
    ]


def test_a_character_stands_in_the_column_of_its_middle():
    # An H that starts at 30 is 17 pixels wide: its middle lies in the second token, whose pixels are 28 to 55.
    line = drawing.draw_line("H", STYLE, (84, 28), (30, 24))
    assert line.cells == (1,)
    columns = np.flatnonzero(ink(line).sum(0))
    assert 30 <= columns[0] and columns[-1] < 56


def test_all_of_a_line_stands_in_the_row_in_which_its_capitals_begin():
    # Capitals of 24 pixels are 17 or 18 high: with the baseline at 40 they begin at 22, in the first of two rows.
    assert drawing.draw_line("Hgh", STYLE, (84, 56), (2, 40)).cells == (0, 0, 1)
    assert drawing.draw_line("Hgh", STYLE, (84, 56), (2, 50)).cells == (3, 3, 4)


def test_the_characters_are_where_their_cells_say():
    """What changes in the picture without the last character lies around the middle of that character's token."""
    at = (5, 40)
    for end in range(2, 9):
        text = "Wmil8@gH"[:end]
        whole, less = (drawing.draw_line(t, STYLE, (196, 56), at) for t in (text, text[:-1]))
        changed = np.flatnonzero((ink(whole) != ink(less)).any(0))
        middle = (changed[0] + changed[-1]) / 2
        assert abs(middle - (whole.cells[-1] + 0.5) * drawing.CELL) <= drawing.CELL / 2 + 3


def test_a_picture_made_of_whole_tokens_is_only_normalised():
    line = drawing.draw_line("ab", drawing.Style("Aileron", 20, BLACK, WHITE), (56, 28), (3, 22))
    assert line.pixels.shape == (3, 28, 56) and line.pixels.dtype == np.float32
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    wanted = (np.asarray(line.picture).transpose(2, 0, 1) / 255 - np.reshape(mean, (3, 1, 1))) / np.reshape(
        std, (3, 1, 1)
    )
    assert np.abs(line.pixels - wanted).max() < 1e-6


def test_odd_sizes_become_whole_tokens():
    sizes = set()
    for line in some_lines(20, odd_sizes=1.0):
        sizes.add(line.picture.size)
        assert all(side % drawing.CELL == 0 for side in line.pixels.shape[1:])
        assert line.pixels[0].size // drawing.CELL**2 > max(line.cells)
    assert any(width % drawing.CELL for width, _ in sizes)


def test_nothing_is_cut_off():
    for line in some_lines(30):
        height, width = ink(line).shape
        assert np.count_nonzero(ink(line)) > 10
        assert line.text == line.text.strip() and 2 <= len(line.text) == len(line.cells) <= 12
        assert max(line.cells) < height // drawing.CELL * (width // drawing.CELL)


def test_reading_order_is_the_order_of_the_cells():
    for line in some_lines(30):
        assert list(line.cells) == sorted(line.cells)


@pytest.mark.parametrize("held_out", [False, True])
def test_held_out_texts_are_never_trained_on(held_out: bool):
    assert {drawing.is_held_out(line.text) for line in some_lines(40, held_out=held_out)} == {held_out}


def test_about_one_text_in_sixteen_is_held_out():
    rng = Random(3)
    share = sum(drawing.is_held_out(drawing.random_text(rng, 6)) for _ in range(4000)) / 4000
    assert 0.045 < share < 0.08


def test_a_seed_draws_the_same_line_again():
    first, again = (drawing.random_line(Random(9), 8, 2, fonts=["Aileron"]) for _ in range(2))
    assert first.text == again.text and first.cells == again.cells
    assert first.picture.tobytes() == again.picture.tobytes()


def test_both_dark_on_light_and_light_on_dark():
    papers = [np.asarray(line.picture)[0, 0].mean() for line in some_lines(40)]
    assert min(papers) < 100 < 160 < max(papers)


def test_every_printable_character_has_a_look_of_its_own():
    for name in drawing.installed_fonts():
        looks = {}
        for char in drawing.CHARS[1:]:
            line = drawing.draw_line(char, drawing.Style(name, 28), (56, 56), (8, 40))
            look = line.picture.tobytes()
            assert look not in looks, f"{name}: {char} looks like {looks[look]}"
            looks[look] = char


def test_hard_lines_are_small_and_of_look_alikes_and_never_held_out():
    rng, style = Random(3), drawing.Style("Aileron", 28)
    made = [drawing.harder(rng, ["Aileron", "DejaVu Sans"], style, "quartz 47") for _ in range(200)]
    assert {font.font for font, _ in made} == {"Aileron"}
    assert {font.size for font, _ in made} == {18, 19, 20, 28}
    changed = [text for _, text in made if text != "quartz 47"]
    assert 90 < len(changed) < 150
    assert all(len(text) == 9 and text[6] == " " for text in changed)
    assert not any(drawing.is_held_out(line.text) for line in some_lines(100, hard=1.0))
