"""`ms4 man`: the manual page, in roff, made of the help texts and the options of every command."""

from __future__ import annotations

import re
from typing import Any

import ms4
from ms4.cli import errors, guide, start, streams

ENVIRONMENT = {
    "MS4_MODEL": "The model, where -m is not given.",
    "MS4_NO_HISTORY": "Not empty: nothing that is typed or read is kept: no history, no sessions, no kv caches.",
    "MS4_DEBUG": "1: errors come with a traceback.",
    "MS4_ISA": "The kernels to use: ref, avx2, avxvnni, avx512, neon; else the best that the processor has.",
}
OF_OTHERS = (
    "NO_COLOR, TERM=dumb, HF_TOKEN, HF_HOME, HF_HUB_CACHE, HF_ENDPOINT and HF_HUB_OFFLINE mean here what they mean to "
    "other programs."
)
FILES = {
    "~/.config/ms4": "Options: config.toml; and templates, a file each.",
    "~/.cache/huggingface/hub": "Models; other programs share it.",
    "~/.local/share/ms4/sessions": "Conversations.",
    "~/.local/state/ms4": "What is remembered between calls: history, which experts were used, how fast runs were.",
    "~/.cache/ms4": "What can be found out again: kv caches, the index of the sessions, the rates of this machine.",
}


def man() -> int:
    """Prints the page."""
    streams.Output().write(page())
    return errors.OK


def page() -> str:
    commands, exits = parts_of_help()
    title = start.HELP.partition("\n")[0].removeprefix("ms4 ").rstrip(".")
    lines = [
        f'.TH MS4 1 "" "ms4 {ms4.__version__}" "User Commands"',
        ".SH NAME",
        plain(f"ms4 - {title}"),
        ".SH SYNOPSIS",
        bold("ms4") + plain(" COMMAND [OPTIONS]"),
        ".SH EXAMPLES",
        *example("\n".join(re.findall(r"^  ((?:ms4|git) .*)$", start.HELP, re.MULTILINE))),
        ".SH COMMANDS",
    ]
    for name, about in commands:
        lines += entry(bold(name), about)
    lines += [".PP", plain(start.HELP.partition("--version")[2].partition("\n\n")[2].partition("\n\n")[0])]
    for name, _ in commands:
        lines += section(name)
    lines += [".SH EXIT STATUS"]
    for code, about in exits:
        lines += entry(bold(code), about)
    lines += [".SH ENVIRONMENT"]
    for name, about in ENVIRONMENT.items():
        lines += entry(bold(name), about)
    lines += [".PP", plain(OF_OTHERS), ".SH FILES"]
    for name, about in FILES.items():
        lines += entry(italic(name), about)
    lines += [".PP", plain("The variables of XDG (XDG_CACHE_HOME and the like) are respected."), ""]
    return "\n".join(lines)


def parts_of_help() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The commands, and the exit codes by number, as `ms4 --help` has them."""
    from ms4.cli.completion import commands

    text = start.HELP.partition("exit codes:\n")[2]
    codes = re.findall(r"(?:^  |  )(\d+) +(\S+(?: \S+)*)", text, re.MULTILINE)
    return commands(), sorted(codes, key=lambda code: int(code[0]))


def section(name: str) -> list[str]:
    """A command: what it does, examples, options."""
    from ms4.cli import main

    made = main.command(name)
    ctx = made.context_class(made, info_name=f"ms4 {name}")
    lines = [
        f".SH MS4 {name.upper()}",
        bold(f"ms4 {name}") + plain(f" {guide.usage(made, ctx)}"),
        ".PP",
        plain(made.help or ""),
    ]
    lines += example("\n".join(guide.EXAMPLES.get(name, ())))
    for param in (p for p in made.params if p.param_type_name == "argument"):
        lines += entry(italic(guide.record(param, ctx)[0]), guide.record(param, ctx)[1])
    groups = guide.grouped(made.params)
    for title, members in groups:
        lines += [f".SS {plain(title)}"] if len(groups) > 1 else []
        for param in members:
            typed, about = guide.record(param, ctx)
            lines += entry(option(param, typed), about)
    return lines


def option(param: Any, typed: str) -> str:
    """An option as it is typed: its names bold, what it takes in italics."""
    names, _, value = typed.partition(f" {param.metavar}") if param.metavar else (typed, "", "")
    return bold(names) + (f" {italic(param.metavar)}" if param.metavar else "") + plain(value)


# --- roff
def plain(text: str) -> str:
    """Text in which nothing is a command of roff, on one line."""
    text = re.sub(r"\s+", " ", text)
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    text = text.replace("^", "\\(ha").replace("~", "\\(ti")
    return f"\\&{text}" if text.startswith(".") else text


def bold(text: str) -> str:
    return f"\\fB{plain(text)}\\fR"


def italic(text: str) -> str:
    return f"\\fI{plain(text)}\\fR"


def entry(typed: str, about: str) -> list[str]:
    """Something, and indented below it what it is."""
    return [".TP", typed, plain(about) or "\\&"]


def example(text: str) -> list[str]:
    """Lines that stand as they are."""
    if not text:
        return []
    return [".PP", ".nf", ".RS 4", *("\\&" + plain(line) for line in text.splitlines()), ".RE", ".fi"]
