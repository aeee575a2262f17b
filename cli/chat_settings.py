"""`/set`: what a chat has set, and how it is changed while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ms4.cli import errors
from ms4.cli.chat_commands import SETTINGS
from ms4.cli.options import MOST_CTX, real, whole

if TYPE_CHECKING:
    from ms4.cli.repl import Talk

DEFAULT = "default"
MOST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Number:
    """A number among the options: its field of Sampling, how it is read, and what holds it while the chat runs."""

    field: str
    parse: Callable[[str], Any]
    now: Callable[[Talk], Any]


NUMBERS = {
    "temperature": Number("temperature", real(0, 10), lambda talk: talk.sampler.params.temperature),
    "top-p": Number("top_p", real(0, 1, above=True), lambda talk: talk.sampler.params.top_p),
    "top-k": Number("top_k", whole(0, MOST_CTX), lambda talk: talk.sampler.params.top_k),
    "min-p": Number("min_p", real(0, 1), lambda talk: talk.sampler.params.min_p),
    "seed": Number("seed", whole(0, MOST_SEED), lambda talk: talk.sampler.seed),
    "max-tokens": Number("", whole(1, MOST_CTX), lambda talk: talk.settings.max_tokens),
    "think-budget": Number("think_budget", whole(1, MOST_CTX), lambda talk: talk.think_budget),
    "answer-now-after": Number(
        "think_seconds", real(0, 1e6, above=True), lambda talk: talk.settings.sampling.think_seconds
    ),
}
ALSO = {"temp": "temperature", "n": "max-tokens"}


def change(talk: Talk, value: str) -> None:
    """/set, /set NAME, /set NAME VALUE and /set NAME=VALUE; VALUE `default` leaves it to the model or the effort."""
    name, given = split(value)
    if not name:
        talk.tell("\n".join(f"{name:17} {shown(talk, name)}" for name in SETTINGS))
    elif name not in SETTINGS:
        talk.refuse(f"no setting {errors.escape(name, 40)}; /set lists them")
    elif not given:
        talk.tell(f"{name} is {shown(talk, name)}")
    elif name in NUMBERS:
        set_number(talk, name, given)
    else:
        words: dict[str, Callable[[str], None]] = {
            "effort": talk.set_effort,
            "think": talk.set_think,
            "system": lambda text: talk.set_system("" if text == DEFAULT else text),
            "compact": lambda text: set_compact(talk, text),
        }
        words[name](given)


def split(text: str) -> tuple[str, str]:
    """(name, value) of what stands behind /set."""
    equals, blank = text.partition("="), text.partition(" ")
    name, _, given = equals if equals[1] and len(equals[0].split()) == 1 else blank
    name = name.strip().replace("_", "-")
    return ALSO.get(name, name), given.strip()


def set_compact(talk: Talk, given: str) -> None:
    if given not in ("on", "off", DEFAULT):
        talk.refuse(f"compact is {shown(talk, 'compact')}; on or off")
        return
    talk.settings = replace(talk.settings, compact=given != "off")
    talk.tell(f"compact is {shown(talk, 'compact')}")


def set_number(talk: Talk, name: str, given: str) -> None:
    number = NUMBERS[name]
    try:
        value = None if given == DEFAULT else number.parse(given)
        if not number.field:
            talk.settings = replace(talk.settings, max_tokens=value)
        else:
            changed: dict[str, Any] = {number.field: value}
            if name == "temperature":
                changed["greedy"] = False
            sampling = replace(talk.settings.sampling, **changed)
            sampler = sampling.sampler(talk.dialogue.effort)
            talk.settings = replace(talk.settings, sampling=sampling)
            if name == "think-budget":
                talk.take_effort(talk.dialogue.effort, value)
            elif name != "answer-now-after":  # its random numbers go on
                talk.sampler = sampler
    except Exception as error:
        code, text, _ = errors.describe(error)
        if code != errors.USAGE:
            raise
        talk.refuse(f"{name}: {errors.escape(text.removeprefix('invalid value: '))}")
        return
    talk.tell(f"{name} is {shown(talk, name)}")


def shown(talk: Talk, name: str) -> str:
    """What a setting is now."""
    if name == "effort":
        return talk.effort()
    if name == "think":
        return talk.settings.think
    if name == "compact":
        return "on" if talk.settings.compact else "off"
    if name == "system":
        system = talk.dialogue.system
        return errors.escape(" ".join(system.split()), 60) if system else "none"
    number = NUMBERS[name]
    value = number.now(talk)
    given = talk.settings.max_tokens if not number.field else getattr(talk.settings.sampling, number.field)
    if value is None:
        return "no limit"
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if given is not None else f"{text} ({DEFAULT})"
