"""What is looked for in the words of a command line before its options are parsed: slips that would pass in silence."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ms4.cli.errors import MissingError, UsageError

# Typographic quotes -> what may end what they begin.
QUOTES = {"\u201c": "\u201c\u201d", "\u201d": "\u201d", "\u201e": "\u201c\u201d", "\u2018": "\u2019"}
# In what stands for a value that names something; a file without a name is an error already, where it is no option.
NAMES = re.compile(r"(?<!@)FILE|PATH(?!.*\.\.\.)|FOLDER|NAME|OUT|REV|ID")


def refuse_torn(args: Sequence[str], ours: Mapping[str, str | None]) -> None:
    """UsageError for a value in typographic quotes, of which an option would get the first word only.

    ours: the option -> the name of its value; None for a flag.
    """
    rest = list(args)
    while rest and rest[0] != "--":
        arg = rest.pop(0)
        name, given, value = arg.partition("=")
        if ours.get(arg) is not None and rest:
            value = rest.pop(0)
        elif not given or ours.get(name) is None:
            continue
        closing = QUOTES.get(value[:1], "")
        if closing and value[-1] not in closing and any(word and word[-1] in closing for word in rest):
            reason = f"{value} begins with a typographic quote, which holds no words together"
            raise UsageError(reason, "type the quotes again, as \" or '")


def refuse_missing(args: Sequence[str], ours: Mapping[str, str | None], command: str) -> None:
    """UsageError for an option without its value: at the end, or before another option, which would be the value."""
    rest = list(args)
    while rest and rest[0] != "--":
        name = rest.pop(0)
        if ours.get(name) is None:
            continue
        said = f"{name} needs {ours[name]} behind it"
        if not rest:
            raise UsageError(said, f"{command} --help")
        if (value := rest.pop(0)) in ours:
            meant = f"   or, if it is meant, {name}={value}" if name.startswith("--") else ""
            raise UsageError(f"{said}, and {value} is an option", f"{command} --help{meant}")


def refuse_empty(params: Sequence[Any], given: Mapping[str, Any], command: str) -> None:
    """UsageError for an empty value where something is to be named, as by a variable that is not set: -m "$MODEL"."""
    for param in params:
        values = given.get(param.name)
        if param.param_type_name == "argument" and param.metavar not in ("ID", "NAME"):
            continue
        if NAMES.search(param.metavar or "") and "" in (values if isinstance(values, (list, tuple)) else [values]):
            name = param.opts[-1] if param.param_type_name == "option" else param.metavar
            raise UsageError(f"{name} is empty: it names nothing", f"{command} --help")


def refuse_extra(words: Sequence[str], ours: Mapping[str, str | None], command: str) -> None:
    """UsageError for words of which a command has no use; elsewhere, many name a model without an option."""
    if words and "-m" in ours and words[0].lower().endswith(".gguf"):
        raise UsageError(f"{words[0]}: a model is named after -m", f"{command} -m {shlex.quote(words[0])}")
    if words:
        raise UsageError(f"one word too many: {words[0]}", f"{command} --help")


def refuse_model(words: Sequence[str], command: str, what: str) -> None:
    """UsageError for a model file among the words of a prompt, as other programs name it: run MODEL PROMPT."""
    for word in words:
        if word.lower().endswith(".gguf") and os.path.isfile(word):
            right = shlex.join(["-m", word, *(other for other in words if other is not word)])
            raise UsageError(f"{word} is a model, not a word of the {what}", f"{command} {right}")


def refuse_folder(path: str) -> None:
    """MissingError for a folder in the place of a model, with the model in it, if there is one."""
    if not os.path.isdir(path):
        return
    try:
        names = sorted(os.listdir(path))
    except OSError:
        names = []
    models = [name for name in names if name.lower().endswith(".gguf") and "mmproj" not in name.lower()]
    hint = "ms4 ls lists the models that are here by name"
    if models:
        hint = f"-m {shlex.quote(os.path.join(path, models[0]))}"
    elif any(name.endswith(".safetensors") for name in names):
        hint = f"ms4 convert {shlex.quote(path)} model.gguf   makes one of it"
    raise MissingError(f"{path}: is a directory; give the .gguf file in it", hint)


def refuse_messages(words: Sequence[str]) -> None:
    """UsageError for a message among the files of a chat, as `ollama run` and others take one."""
    text = " ".join(words)
    if re.search(r"\s", text) and not any(os.path.lexists(word.partition(":")[0]) or "://" in word for word in words):
        said = f"no file {words[0]}: a chat takes files to attach, and messages at its prompt"
        raise UsageError(said, f"ms4 run {shlex.quote(text[:120])}   or   ms4 chat")


def local_path(text: str) -> str:
    """The path in a file:// address of this machine; anything else as it is."""
    if not text.lower().startswith("file://"):
        return text
    from urllib.parse import unquote

    host, _, path = text[7:].partition("/")
    return "/" + unquote(path) if host in ("", "localhost") else text


def fill_resume(args: list[str]) -> list[str]:
    """--resume without an id asks for one from a list."""
    filled: list[str] = []
    for arg, after in zip(args, [*args[1:], "--"], strict=False):  # without arguments there is nothing to fill
        filled.append(arg)
        if arg == "--resume" and after.startswith("-"):
            filled.append("?")
    return filled
