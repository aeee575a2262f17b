"""Practice: following instructions about words and their letters."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from random import Random

from ms4.models.training.cases import Case, assistant, loosely, user, with_system
from ms4.models.training.words import NAMES, WORDS

NO_STEPS = "This needs no steps."  # the thought where there is nothing to work out

ECHO = (
    "Say: {x}",
    'Say "{x}".',
    "Repeat: {x}",
    'Repeat "{x}".',
    "Echo: {x}",
    "Echo this: {x}",
    "Repeat after me: {x}",
    "Please repeat: {x}",
    'Write "{x}".',
    "Just say {x}",
)
REVERSE = (
    "Reverse: {x}",
    'Reverse "{x}".',
    "Reverse the word {x}.",
    "Reverse the letters of {x}.",
    "Write {x} backwards.",
    'Spell "{x}" backwards.',
    "What is {x} spelled backwards?",
    "Please reverse {x}.",
)
UPPER = (
    "Upper case: {x}",
    "Write {x} in upper case.",
    'Write "{x}" in capital letters.',
    "Put {x} in upper case.",
    "Make {x} upper case.",
    "Uppercase {x}.",
)
LOWER = (
    "Lower case: {x}",
    "Write {x} in lower case.",
    'Write "{x}" in small letters.',
    "Put {x} in lower case.",
    "Make {x} lower case.",
    "Lowercase {x}.",
)
COUNT = (
    'How many letters are in "{x}"?',
    "How many letters are in {x}?",
    "How many letters does {x} have?",
    "Count the letters in {x}.",
    'Count the letters of "{x}".',
)
COUNT_ONE = (
    "How many times does {c} occur in {x}?",
    'How often is the letter {c} in "{x}"?',
    "Count the letter {c} in {x}.",
    "How many {c} are in {x}?",
)
SORT = (
    "Sort: {x}",
    "Sort these words: {x}",
    "Sort the words {x}.",
    "Put these words in alphabetical order: {x}",
    "Sort alphabetically: {x}",
    "Please sort: {x}",
)


def nonsense(random: Random, least: int, most: int) -> str:
    """Random letters."""
    return "".join(random.choices(string.ascii_lowercase, k=random.randint(least, most)))


def word(random: Random) -> str:
    """A word, a name or random letters, mostly in small letters."""
    draw = random.random()
    text = random.choice(WORDS) if draw < 0.45 else random.choice(NAMES) if draw < 0.55 else nonsense(random, 3, 8)
    return random.choice((str.upper, str.capitalize))(text) if random.random() < 0.1 else text


def phrase(random: Random) -> str:
    """What may be echoed: words, letters and digits."""
    if random.random() < 0.25:
        return "".join(random.choices(string.ascii_letters + string.digits, k=random.randint(2, 10)))
    return " ".join(word(random) for _ in range(random.randint(1, 4)))


def follow(random: Random, kind: str, key: str, text: str, answer: str, steps: str = "") -> Case:
    """A case of one turn, now and then with a thought before the answer.

    `steps` are what lead to the answer: they are thought, or said before it where there is no thought.
    """
    effort = "high" if random.random() < 0.12 else "none"
    if effort == "high":
        said = assistant(answer, steps or NO_STEPS)
    else:
        said = assistant(f"{steps}: {answer}" if steps else answer)
    return Case(kind, (f"{kind}:{key}",), with_system(random, [user(loosely(random, text)), said]), effort=effort)


def echo(random: Random) -> Case:
    x = phrase(random)
    return follow(random, "echo", x, random.choice(ECHO).format(x=x), x)


def reverse(random: Random) -> Case:
    x = word(random)
    return follow(random, "reverse", x, random.choice(REVERSE).format(x=x), x[::-1])


def upper(random: Random) -> Case:
    x = " ".join(word(random) for _ in range(random.choice((1, 1, 1, 2))))
    return follow(random, "upper", x, random.choice(UPPER).format(x=x), x.upper())


def lower(random: Random) -> Case:
    x = " ".join(word(random) for _ in range(random.choice((1, 1, 1, 2))))
    x = random.choice((x.upper(), x.upper(), x.title()))
    return follow(random, "lower", x, random.choice(LOWER).format(x=x), x.lower())


def counted(x: str, wanted: str = "") -> str:
    """The letters of a word, each with how many there were so far: of all letters, or of the wanted one."""
    return " ".join(f"{letter}{x[: i + 1].count(wanted) if wanted else i + 1}" for i, letter in enumerate(x))


def how_many(x: str) -> str:
    """The answer to how many letters a word has."""
    return f"{counted(x)}: {len(x)}"


def count(random: Random) -> Case:
    x = word(random)
    return follow(random, "count", x, random.choice(COUNT).format(x=x), str(len(x)), counted(x))


def count_one(random: Random) -> Case:
    x = word(random).lower()
    c = random.choice(x if random.random() < 0.8 else string.ascii_lowercase)
    if random.random() < 0.4:
        # Random letters seldom repeat: write one of them over others.
        x = "".join(c if random.random() < 0.35 else old for old in x)
    return follow(random, "count", c + x, random.choice(COUNT_ONE).format(x=x, c=c), str(x.count(c)), counted(x, c))


def different_starts(random: Random, least: int, most: int) -> list[str]:
    """Words of which no two begin with the same letter."""
    pool: dict[str, str] = {}
    wanted = random.randint(least, most)
    while len(pool) < wanted:
        text = random.choice(WORDS) if random.random() < 0.8 else nonsense(random, 3, 6)
        pool.setdefault(text[0], text)
    found = list(pool.values())
    random.shuffle(found)
    return found


def sort(random: Random) -> Case:
    words = different_starts(random, 2, 5)
    between = random.choice((" ", ", "))
    text = random.choice(SORT).format(x=between.join(words))
    return follow(random, "sort", " ".join(sorted(words)), text, between.join(sorted(words)))


EDITS: Sequence[Callable[[Random], Case]] = (echo, reverse, upper, lower, sort)
