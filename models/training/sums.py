"""Practice: adding and subtracting numbers of up to four digits, at once or column by column in a thought."""

from __future__ import annotations

from random import Random

from ms4.models.training.cases import Case, assistant, loosely, user, with_system

WIDTH = 4  # digits of a number
SIGNED = ("{a} {op} {b} = ?", "{a} {op} {b}", "{a}{op}{b}=?", "{a}{op}{b}", "{a} {op} {b} =", "{a} {op} {b}?")
ASKED = (
    "What is {a} {op} {b}?",
    "What is {a}{op}{b}?",
    "Calculate {a} {op} {b}.",
    "Compute {a} {op} {b}.",
    "How much is {a} {op} {b}?",
    "What is {a} {word} {b}?",
    "How much is {a} {word} {b}?",
    "Please calculate {a} {word} {b}.",
)
ADD_FIRST = ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "Add {b} to {a}.")
TAKE_FIRST = ("Subtract {b} from {a}.", "Take {b} from {a}.", "What is the difference of {a} and {b}?")
WORDS = {"+": "plus", "-": "minus"}


def value(a: int, op: str, b: int) -> int:
    return a + b if op == "+" else a - b


def columns(a: int, op: str, b: int) -> str:
    """The thought: the numbers with leading zeros, a line for every column from the right, the digits of the result.

    A line is digit, digit and carry, then the new carry and the digit of the result; for a difference the carry is
    what was borrowed.  A difference below zero is worked out the other way round, with a minus before it.
    """
    sign = "+"
    if op == "-" and a < b:
        a, b, sign = b, a, "-"
    lines = [f"{sign}{a:0{WIDTH}}{op}{b:0{WIDTH}}"]
    carry, digits = 0, ""
    for place in range(WIDTH):
        x, y = a // 10**place % 10, b // 10**place % 10
        total = value(x, op, value(y, "+", carry))
        after = 1 if total < 0 or total > 9 else 0
        lines.append(f"{x}{op}{y}{op}{carry}={after}{total % 10}")
        carry, digits = after, f"{total % 10}{digits}"
    return "\n".join([*lines, f"{sign}{carry}{digits}"])


def number(random: Random) -> int:
    """Numbers of all lengths, the long ones more often."""
    return random.randrange(10 ** random.choice((1, 2, 3, 3, 4, 4, 4)))


def pair(random: Random) -> tuple[int, str, int]:
    a, b, op = number(random), number(random), random.choice("+-")
    if op == "-" and a < b and random.random() < 0.7:
        a, b = b, a
    return a, op, b


def wording(random: Random, a: int, op: str, b: int) -> str:
    forms = random.choice((SIGNED, SIGNED, ASKED, ADD_FIRST if op == "+" else TAKE_FIRST))
    return loosely(random, random.choice(forms).format(a=a, b=b, op=op, word=WORDS[op]))


def make(random: Random, effort: str) -> Case:
    a, op, b = pair(random)
    text = wording(random, a, op, b)
    thought = columns(a, op, b) if effort == "high" else ""
    messages = with_system(random, [user(text), assistant(str(value(a, op, b)), thought)])
    return Case("sum", (f"sum:{a}{op}{b}",), messages, effort=effort)


def reasoned(random: Random) -> Case:
    return make(random, "high")


def at_once(random: Random) -> Case:
    return make(random, "none")
