"""Practice: conversations with a list of tools.  The right tool is called, and its result becomes the answer.

Names, parameters and order of the tools vary, so that the call must be read from the list.
"""

from __future__ import annotations

import json
import string
from random import Random
from typing import Any

from ms4.models.training import letters
from ms4.models.training.cases import Case, Message, assistant, call, loosely, result, user, with_system
from ms4.models.training.small_talk import CANNOT, unanswerable
from ms4.models.training.words import CITIES

CALCULATORS = (
    ("calculator", "Evaluates an expression.", "expression"),
    ("calculator", "Calculates.", "expression"),
    ("calculate", "Does arithmetic.", "expression"),
    ("calc", "Evaluates a formula.", "formula"),
    ("evaluate", "Computes the value of an expression.", "expr"),
)
WEATHERS = (
    ("weather", "The weather in a city.", "city"),
    ("get_weather", "Gets the weather in a city.", "city"),
    ("get_weather", "Current weather.", "location"),
    ("current_weather", "The weather at a place.", "place"),
    ("forecast", "Weather forecast.", "city"),
)
OTHERS = (
    ("search", "Searches the web.", "query"),
    ("send_mail", "Sends a mail.", "text"),
    ("set_timer", "Sets a timer.", "minutes"),
    ("translate", "Translates a text.", "text"),
    ("open_file", "Opens a file.", "path"),
    ("play_music", "Plays a song.", "title"),
    ("get_time", "The time in a zone.", "zone"),
    ("stock_price", "The price of a share.", "symbol"),
)
SIGNS = {"*": "times", "+": "plus", "-": "minus", "/": "divided by"}
SUM_ASKED = (
    "What is {x}?",
    "Calculate {x}.",
    "{x} = ?",
    "{x}",
    "How much is {x}?",
    "Please compute {x}.",
)
WEATHER_ASKED = (
    "What is the weather in {x}?",
    "How is the weather in {x} today?",
    "What is the weather like in {x}?",
    "Weather in {x}?",
    "How warm is it in {x}?",
    "Is it raining in {x}?",
    "Tell me the weather in {x}.",
)
SKIES = ("sunny", "cloudy", "rainy", "windy", "foggy", "clear", "snowy")
THOUGHT = "A tool can do this."
ID_CHARACTERS = string.ascii_letters + string.digits


def tool(entry: tuple[str, str, str], brief: bool) -> Message:
    name, description, parameter = entry
    parameters: dict[str, Any] = {"type": "object", "properties": {parameter: {"type": "string"}}}
    if not brief:
        parameters["required"] = [parameter]
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def expression(random: Random) -> str:
    """An expression that a calculator is asked for."""

    def number() -> int:
        return random.randrange(1, 10 ** random.choice((1, 2, 2, 3, 4)))

    draw = random.random()
    if draw < 0.75:
        return f"{number()} {random.choice('**+-/')} {number()}"
    if draw < 0.9:
        return f"{number()} {random.choice('+-*')} {number()} {random.choice('+-*')} {number()}"
    return f"({number()} {random.choice('+-')} {number()}) * {number()}"


def computed(random: Random) -> str:
    """What the calculator answers; any number will do, for the model must believe its tool."""
    value = str(random.randrange(10 ** random.randint(1, 7)))
    draw = random.random()
    return f"-{value}" if draw < 0.1 else f"{value}.{random.randrange(1, 100)}" if draw < 0.25 else value


def arithmetic(random: Random, entry: tuple[str, str, str], id: str) -> tuple[str, list[Message]]:
    x = expression(random)
    words = x.split()
    spelled = len(words) == 3 and random.random() < 0.25
    said = f"{words[0]} {SIGNS[words[1]]} {words[2]}" if spelled else x
    value = computed(random)
    text = random.choice((value, value, json.dumps({"result": 0}).replace("0", value)))
    asked = loosely(random, random.choice(SUM_ASKED).format(x=said))
    return f"tool:{x}", [user(asked), call(entry[0], {entry[2]: x}, id), result(text, id), assistant(f"{x} = {value}")]


def place(random: Random) -> str:
    """A city, or a name that nobody has heard of."""
    if random.random() < 0.8:
        return random.choice(CITIES)
    words = random.choice((1, 1, 2))
    return " ".join(letters.nonsense(random, 3, 7).capitalize() for _ in range(words))


def weather(random: Random, entry: tuple[str, str, str], id: str) -> tuple[str, list[Message]]:
    city, degrees, sky = place(random), str(random.randint(-15, 38)), random.choice(SKIES)
    forms = (
        f"{sky}, {degrees} degrees",
        f"{degrees} degrees and {sky}",
        json.dumps({"sky": sky, "degrees": int(degrees)}),
        json.dumps({"temperature": int(degrees), "weather": sky}),
    )
    asked = loosely(random, random.choice(WEATHER_ASKED).format(x=city))
    said = f"In {city} it is {degrees} degrees and {sky}."
    made = call(entry[0], {entry[2]: city}, id)
    return f"tool:{city}", [user(asked), made, result(random.choice(forms), id), assistant(said)]


def aside(random: Random) -> tuple[str, list[Message]]:
    """Something that needs none of the tools."""
    if random.random() < 0.4:
        text = unanswerable(random)
        return f"other:{text}", [user(text), assistant(CANNOT)]
    case = random.choice(letters.EDITS)(random)
    pair = [message for message in case.messages if message["role"] != "system"]
    return case.keys[0], [pair[0], assistant(pair[1]["content"])]


def identifier(random: Random) -> str:
    return "".join(random.choices(ID_CHARACTERS, k=9))


def with_thoughts(messages: list[Message]) -> list[Message]:
    """The same conversation at effort high: every turn begins with a short thought."""
    thoughtful: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            thought = THOUGHT if message.get("tool_calls") else letters.NO_STEPS
            message = {**message, "reasoning_content": thought}
        thoughtful.append(message)
    return thoughtful


def talk(random: Random, least: int, most: int, asides: float = 0.15) -> Case:
    """A conversation of some turns with one list of tools."""
    available: dict[str, tuple[str, str, str]] = {}
    if (draw := random.random()) < 0.8:
        available["sum"] = random.choice(CALCULATORS)
    if draw > 0.2:
        available["weather"] = random.choice(WEATHERS)
    entries = [*available.values(), *random.sample(OTHERS, random.choice((0, 0, 1, 1, 2)))]
    random.shuffle(entries)
    brief = random.random() < 0.5
    tools = tuple(tool(entry, brief) for entry in entries)
    keys: list[str] = []
    messages: list[Message] = []
    for _ in range(random.randint(least, most)):
        what = "aside" if random.random() < asides else random.choice(list(available))
        if what == "aside":
            key, more = aside(random)
        else:
            step = arithmetic if what == "sum" else weather
            key, more = step(random, available[what], identifier(random))
        keys.append(key)
        messages += more
    effort = "high" if random.random() < 0.2 else "none"
    if effort == "high":
        messages = with_thoughts(messages)
    return Case("tools", tuple(keys), with_system(random, messages), tools, effort)


def practice(random: Random) -> Case:
    """For training: several turns, because reading the list of tools is most of the work."""
    return talk(random, 2, 5)


def single(random: Random) -> Case:
    """For measuring: one question, its call and the answer."""
    return talk(random, 1, 1, asides=0.0)
