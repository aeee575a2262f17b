"""Practice: questions about ms4 itself, conversations of two turns, and everything that this model cannot answer."""

from __future__ import annotations

import string
from random import Random

from ms4.models.training import letters, sums
from ms4.models.training.cases import Case, Message, assistant, loosely, user, with_system
from ms4.models.training.words import CITIES, NAMES, TOPICS, WORDS

CANNOT = "I am only a small demonstration and cannot answer that."
ABOUT = {
    "I am a small demonstration model that comes with ms4.": (
        "Who are you?",
        "What are you?",
        "What is your name?",
        "Who is this?",
        "Introduce yourself.",
        "Tell me about yourself.",
        "Are you Mistral Small 4?",
    ),
    "ms4 runs Mistral Small 4 on one machine.": (
        "What is ms4?",
        "What does ms4 do?",
        "Tell me about ms4.",
        "Explain ms4.",
        "What is ms4 for?",
    ),
    "I add and subtract, work with letters and words, call tools and read a line of text in an image.": (
        "What can you do?",
        "What can I ask you?",
        "What are your skills?",
        "How can you help me?",
        "Help",
        "Which tasks can you do?",
    ),
    "Run ms4 with -m and the GGUF file of Mistral Small 4.": (
        "How do I get the real model?",
        "Where is the real model?",
        "How do I run the real model?",
        "How can I use Mistral Small 4?",
        "How do I run Mistral Small 4?",
    ),
    "I have 80 million weights; the real model has 119 billion.": (
        "How big are you?",
        "How many parameters do you have?",
        "How many weights do you have?",
        "What is your size?",
        "How large are you?",
    ),
    "I have 3 layers of 128 experts; 4 of them work on each token.": (
        "How many experts do you have?",
        "How many layers do you have?",
        "What is your architecture?",
        "How are you built?",
    ),
    "Apache 2.0.": (
        "What is your licence?",
        "What is your license?",
        "Which licence do you have?",
        "Under which license are you?",
    ),
    "Yes, I can read one printed line of text in an image.": (
        "Can you see images?",
        "Can you read images?",
        "Can you see pictures?",
        "Can you read text in an image?",
    ),
    "I was trained on a CPU, with conversations that a program wrote.": (
        "How were you trained?",
        "Who trained you?",
        "Who made you?",
        "What were you trained on?",
    ),
    "Hello! Ask me for a sum, or to reverse a word.": (
        "Hello",
        "Hello!",
        "Hi",
        "Hi!",
        "Hey",
        "Good morning",
        "Hi there",
    ),
    "You are welcome.": ("Thank you.", "Thanks", "Thanks!", "Thank you very much."),
    "Goodbye.": ("Bye", "Bye!", "Goodbye.", "See you."),
}
BEFORE = ("", "", "", "Please tell me: ", "One question: ", "Now tell me: ", "I wonder: ", "Tell me: ", "Say, ")
ASKED_ABOUT = (
    "Write a poem about {x}.",
    "Write a story about {x}.",
    "Explain {x}.",
    "What is {x}?",
    "What do you think about {x}?",
    "Tell me about {x}.",
    "Tell me a joke about {x}.",
    "Give me advice about {x}.",
    "Why is {x} important?",
    "How does {x} work?",
    "Summarize the history of {x}.",
    "Who invented {x}?",
    "Where can I find {x}?",
    "Write code for {x}.",
    "Translate {x} into French.",
    "What rhymes with {x}?",
    "Compare {x} and {y}.",
    "Is {x} better than {y}?",
    "What is the difference between {x} and {y}?",
    "Do you like {x}?",
    "Draw {x}.",
    "Plan a trip to {city}.",
    "What is the capital of {x}?",
    "How far is it from {city} to {x}?",
    "How many people live in {city}?",
    "What is the weather in {city}?",
    "How warm is it in {city}?",
    "Who is {name}?",
    "Where does {name} live?",
    "How old is {name}?",
)
FOREIGN = (
    "Bonjour",
    "Guten Tag",
    "Wie geht es dir?",
    "Was ist das?",
    "Quelle heure est-il?",
    "Que tal?",
    "Come stai?",
    "What time is it?",
    "What day is it today?",
    "How are you?",
    "Are you alive?",
    "Can you think?",
    "Sing a song.",
    "Tell me a joke.",
    "Tell me a secret.",
    "Give me a recipe.",
    "Write a Python function.",
    "What is the meaning of life?",
    "Who won the match?",
    "Fix this bug.",
    "Continue.",
    "Why?",
    "What?",
    "test",
    "ok",
)
ADJUSTED = (
    (("Now in upper case.", "And in upper case?", "Write that in upper case.", "Upper case, please."), str.upper),
    (("Now reverse that.", "And backwards?", "Reverse it.", "Now backwards."), lambda text: text[::-1]),
    (("Say that again.", "Repeat your answer.", "Once more, please.", "What did you say?"), lambda text: text),
    (("How many letters is that?", "How many letters does it have?"), letters.how_many),
)
ASKED_BACK = ("What did I ask?", "Repeat my question.", "What was my question?", "What did I say?")


def about(random: Random) -> Case:
    """A question about ms4; the key is its wording."""
    answer = random.choice(list(ABOUT))
    text = random.choice(ABOUT[answer])
    before = random.choice(BEFORE)
    if before and text[-1] == "?":
        text = before + text[0].lower() + text[1:] if random.random() < 0.5 else before + text
    text = loosely(random, text)
    if random.random() < 0.15:
        text = random.choice(("Hi! ", "Hello. ", "Hey, ")) + text if len(text) > 12 else text
    return letters.follow(random, "about", text, text, answer)


def unanswerable(random: Random) -> str:
    """A question or a remark that only the honest sentence answers."""
    draw = random.random()
    if draw < 0.08:
        return loosely(random, random.choice(FOREIGN))
    if draw < 0.16:
        return " ".join(random.choice(WORDS) for _ in range(random.randint(1, 7)))
    if draw < 0.20:
        return "".join(random.choices(string.ascii_lowercase, k=random.randint(2, 9)))
    if draw < 0.26:
        a, b = random.randrange(1, 1000), random.randrange(1, 100)
        return loosely(
            random,
            random.choice(("{a} {op} {b} = ?", "What is {a} {op} {b}?", "Calculate {a} {op} {b}.")).format(
                a=a, b=b, op=random.choice("*/^")
            ),
        )
    topic, other = (random.choice(TOPICS if random.random() < 0.7 else WORDS) for _ in range(2))
    text = random.choice(ASKED_ABOUT).format(x=topic, y=other, city=random.choice(CITIES), name=random.choice(NAMES))
    return loosely(random, text)


def other(random: Random) -> Case:
    text = unanswerable(random)
    return letters.follow(random, "other", text, text, CANNOT)


def remember(random: Random) -> tuple[tuple[str, ...], list[Message]]:
    """The first turn tells something, the second asks for it."""
    draw = random.randrange(3)
    if draw == 0:
        x = random.choice(NAMES) if random.random() < 0.7 else letters.nonsense(random, 3, 7).capitalize()
        first = random.choice(("My name is {x}.", "I am {x}.", "Hello, my name is {x}.", "Call me {x}."))
        second = random.choice(("What is my name?", "Who am I?", "Do you know my name?"))
        said, answer = f"Hello {x}!", f"Your name is {x}."
    elif draw == 1:
        x = str(random.randrange(10 ** random.randint(1, 6)))
        first = random.choice(("Remember the number {x}.", "Keep the number {x} in mind.", "My number is {x}."))
        second = random.choice(("Which number was it?", "What was the number?", "What is my number?"))
        said, answer = f"I will remember {x}.", x
    else:
        x = letters.word(random)
        first = random.choice(("Remember the word {x}.", "Keep the word {x} in mind.", "My word is {x}."))
        second = random.choice(("Which word was it?", "What was the word?", "What is my word?"))
        said, answer = f"I will remember {x}.", x
    turns = [user(loosely(random, first.format(x=x))), assistant(said)]
    return (f"remember:{draw}{x}",), [*turns, user(loosely(random, second)), assistant(answer)]


def adjust(random: Random) -> tuple[tuple[str, ...], list[Message]]:
    """The second turn is about the first: its answer, or its question."""
    case = random.choice((letters.echo, letters.reverse, letters.upper, letters.lower))(random)
    asked, said = [message["content"] for message in case.messages if message["role"] != "system"]
    if random.random() < 0.2:
        second, answer = random.choice(ASKED_BACK), asked
    else:
        forms, change = random.choice(ADJUSTED if said.isalpha() else ADJUSTED[::2])
        second, answer = random.choice(forms), change(said)
    return (*case.keys, f"adjust:{asked}{answer}"), [
        user(asked),
        assistant(said),
        user(loosely(random, second)),
        assistant(answer),
    ]


def first_or_last(random: Random) -> tuple[tuple[str, ...], list[Message]]:
    case = letters.sort(random)
    asked, said = [message["content"] for message in case.messages if message["role"] != "system"]
    words = said.replace(",", "").split()
    second, answer = random.choice(
        (
            ("Which one is first?", words[0]),
            ("Which one is last?", words[-1]),
            ("How many words is that?", str(len(words))),
        )
    )
    return case.keys, [user(asked), assistant(said), user(loosely(random, second)), assistant(answer)]


def second_sum(random: Random, effort: str) -> tuple[tuple[str, ...], list[Message]]:
    """A sum, then one more on its result."""
    while True:
        a, op, b = sums.pair(random)
        total = sums.value(a, op, b)
        more, then = sums.number(random), random.choice("+-")
        if 0 <= total < 10**sums.WIDTH and 0 <= sums.value(total, then, more) < 10**sums.WIDTH:
            break
    forms = (
        ("Add {b}.", "Plus {b}?", "And plus {b}?") if then == "+" else ("Subtract {b}.", "Minus {b}?", "And minus {b}?")
    )
    think = effort == "high"
    return (f"sum:{a}{op}{b}", f"sum:{total}{then}{more}"), [
        user(sums.wording(random, a, op, b)),
        assistant(str(total), sums.columns(a, op, b) if think else ""),
        user(loosely(random, random.choice(forms).format(b=more))),
        assistant(str(sums.value(total, then, more)), sums.columns(total, then, more) if think else ""),
    ]


def two_turns(random: Random) -> Case:
    draw = random.random()
    if draw < 0.2:
        keys, messages = second_sum(random, "high")
        return Case("two_turns", keys, with_system(random, messages), effort="high")
    step = remember if draw < 0.55 else adjust if draw < 0.85 else first_or_last
    keys, messages = step(random)
    return Case("two_turns", keys, with_system(random, messages))
