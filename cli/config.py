"""Where options come from that nobody typed: the environment, profiles, the project's file, the user's file.

Owns which options can be set there, how the files are found and checked, and which layer wins.  `Command` of `main.py`
asks for the values that a call lacks; no command knows of them.  Nothing is read for --help and --version.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms4.cli.errors import UsageError, note
from ms4.models import places

PROJECT_FILE = ".ms4.toml"
ANSWERING = ("run", "chat", "batch")
MOST_BYTES = 1 << 20  # of a file


@dataclass(frozen=True)
class Key:
    """An option that can be set without being typed; its name is that of the long flag."""

    name: str
    kind: str  # what a file may hold: one of KINDS
    project: bool = False  # also by a project's file: it costs nobody memory, opens no file and hides nothing
    commands: tuple[str, ...] = ANSWERING  # that heed it; empty: all that have the option


KINDS = {
    "text": "a text in quotes",
    "whole": 'a whole number, or a size in quotes such as "32k"',
    "number": "a number such as 0.7",
    "flag": "true or false",
    "texts": 'a list such as ["END"]',
}
KEYS = {
    key.name: key
    for key in (
        Key("model", "text", commands=()),
        Key("threads", "whole", commands=()),
        Key("load", "text", commands=()),
        Key("ram", "whole", commands=()),
        Key("device", "text", commands=()),
        Key("vram", "whole", commands=()),
        Key("attn-scale", "text", commands=()),
        Key("mmproj", "text", commands=()),
        Key("image-max-tokens", "whole", True, commands=()),
        Key("ctx", "whole", True, (*ANSWERING, "plan")),
        Key("system", "text", True),
        Key("effort", "text", True),
        Key("think", "text", True),
        Key("think-budget", "whole", True),
        Key("max-tokens", "whole", True),
        Key("temp", "number", True),
        Key("top-p", "number", True),
        Key("top-k", "whole", True),
        Key("min-p", "number", True),
        Key("seed", "whole", True),
        Key("greedy", "flag", True),
        Key("stop", "texts", True),
        Key("pdf", "text", True),
        Key("encoding", "text", True),
        Key("lossy", "flag", True),
        Key("timeout", "number"),
        Key("format", "text"),
        Key("compact", "flag", True, commands=("chat",)),
        Key("stats", "flag"),
        Key("strict", "flag"),
        Key("no-session", "flag"),
        Key("quiet", "flag"),
        Key("verbose", "flag"),
    )
}
# Where the option is a question, not a wish: simulate's card and memory are imagined ones.
EXCEPT = {"simulate": ("ram", "vram", "ctx")}
# A value of a lower layer is left out where a higher one gives an option that it does not go with.
YIELDS = {
    "effort": ("messages", "continue", "resume"),  # a conversation has its own
    "system": ("messages", "continue", "resume"),
    "think-budget": ("effort",),
    "load": ("ram",),
    "ram": ("load",),
    "greedy": ("temp",),
    "temp": ("greedy",),
    "format": ("extract",),
    "quiet": ("verbose",),
    "verbose": ("quiet",),
}


@dataclass(frozen=True)
class Setting:
    """A value that was checked for its kind: a text as it would be typed, a bool, or a list of texts."""

    value: str | bool | list[str]
    where: str  # "file:line", or the name of a variable


@dataclass(frozen=True)
class Layer:
    name: str
    settings: dict[str, Setting]


# --- where files lie


def user_file() -> Path:
    return places.ours("CONFIG") / "config.toml"


def project_file() -> Path | None:
    """The next file of a project, from the working directory upwards; none of another user's."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    for folder in (here, *here.parents):
        path = folder / PROJECT_FILE
        try:
            owner = path.stat().st_uid
        except OSError:
            continue
        if owner in (0, os.getuid()):
            return path
        note(f"{path} belongs to another user and is passed over")
        return None
    return None


# --- reading


def read(path: Path) -> tuple[dict[str, Any], str]:
    """(the tables of a file, its text); nothing of one that is not there."""
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except OSError as error:
        # The home of another user, as after sudo: what lies there is not this one's.
        if isinstance(error, PermissionError) and not os.access(path.parent, os.X_OK):
            return {}, ""
        raise UsageError(f"{path}: {error.strerror}") from None
    if len(data) > MOST_BYTES:
        raise UsageError(f"{path}: larger than {MOST_BYTES >> 20} MiB, so it is no file of options")
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        text = data.decode("utf-8-sig")  # some editors write a mark of UTF-8
        return tomllib.loads(text), text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}:{line}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        found = re.search(r" \(at (?:line (\d+), column \d+|end of document)\)$", str(error))
        said = str(error)[: found.start()] if found else str(error)
        line = int(found[1]) if found and found[1] else len(text.splitlines())
        raise UsageError(f"{path}:{line}: not TOML: {said[:1].lower()}{said[1:]}") from None


def line_of(text: str, *names: str) -> int:
    """The line on which a key stands, as names from the outermost table to the key; 1 if it cannot be found.

    A reader of TOML gives no lines, so this looks for one that says so, by itself or below the table's header.
    """
    table: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([^\]]+?)\s*\]", line):
            table = split_key(header[1])
            if table[: len(names)] == [*names]:
                return number
        elif key := re.match(r"\s*((?:[\w.\s-]|\"[^\"]*\"|'[^']*')+?)\s*=", line):
            if [*table, *split_key(key[1])][: len(names)] == [*names]:
                return number
    return 1


def split_key(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def settings_of(
    table: Mapping[str, Any], path: Path, text: str, *inside: str, known: Mapping[str, Key] = KEYS
) -> dict[str, Setting]:
    """The settings of a table of a file: each is known and of its kind."""
    found = {}
    for name, value in table.items():
        where = f"{path}:{line_of(text, *inside, name)}"
        if name not in known:
            raise UsageError(f"{where}: no such key {name}", nearest(name, known))
        found[name] = Setting(checked(known[name], value, where, path.parent), where)
    return found


def nearest(name: str, known: Iterable[str], more: str = "ms4 config show --origin lists them all") -> str:
    import difflib  # here, as only a mistake needs it

    known = [*known]
    begun = [one for one in known if len(one) > 2 and (name.startswith(one) or one.startswith(name))]
    near = begun[:1] or difflib.get_close_matches(name, known, 1, 0.6)
    return f"{near[0]}? {more}" if near else more


def checked(key: Key, value: Any, where: str, folder: Path) -> str | bool | list[str]:
    """The value of a file, as it would be typed."""
    kind, number = key.kind, isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind == "flag" and isinstance(value, bool):
        return value
    if kind == "texts" and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    if kind == "whole" and number and isinstance(value, int) or kind == "number" and number:
        return str(value)
    if kind in ("text", "whole") and isinstance(value, str):
        if key.name in ("model", "mmproj"):  # no shell has seen it
            return os.path.expanduser(value)
        if key.name == "system" and value.startswith("@"):
            return "@" + str(folder / os.path.expanduser(value[1:]))
        return value
    raise UsageError(f"{where}: {key.name} is not {KINDS[kind]}", "ms4 config set KEY VALUE writes it as it has to be")


def from_user(path: Path, profile: str | None) -> Iterator[Layer]:
    """The profile, if one is wanted, and what stands before it in the user's file."""
    whole, text = read(path)
    tables = whole.pop("profile", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"{path}:{line_of(text, 'profile')}: a profile is a table", "[profile.NAME]")
    for name in tables:  # a mistake is said before the profile is needed
        checked_profile = Layer(f"profile {name}", settings_of(tables[name], path, text, "profile", name))
        if name == profile:
            yield checked_profile
    if profile is not None and profile not in tables:
        there = f"there are {', '.join(tables)}" if tables else f"[profile.{profile}] in that file makes it"
        raise UsageError(f"no profile {profile} in {path}", there)
    yield Layer("user", settings_of(whole, path, text))


def from_project(path: Path, quiet: bool = False) -> Layer:
    """What a project may say: others have written it, so what costs memory or opens files is not taken from there."""
    whole, text = read(path)
    settings = settings_of(whole, path, text)
    for name, setting in [*settings.items()]:
        opens = name == "system" and str(setting.value).startswith("@")
        if opens or not KEYS[name].project:
            del settings[name]
            if not quiet:
                what = "a system prompt from a file" if opens else name
                note(f"{setting.where}: {what} is not taken from a project; it belongs into {user_file()}")
    return Layer("project", settings)


def from_environment() -> Layer:
    found = {}
    for key in KEYS.values():
        variable = f"MS4_{key.name.replace('-', '_').upper()}"
        if value := os.environ.get(variable):
            found[key.name] = Setting(typed(key, [value], variable), variable)
    return Layer("environment", found)


def typed(key: Key, words: Sequence[str], where: str) -> str | bool | list[str]:
    """The value of a key, from words that somebody has typed."""
    if key.kind == "texts":
        return [*words]
    if key.kind != "flag":
        return " ".join(words)
    word = " ".join(words).lower()
    if word not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise UsageError(f"{where}: {' '.join(words)} is neither 1 (true) nor 0 (false)")
    return word in ("1", "true", "yes", "on")


def layers(profile: str | None, quiet: bool = False) -> list[Layer]:
    """All of them, the one that wins first."""
    profile = profile or os.environ.get("MS4_PROFILE") or None
    mine = [*from_user(user_file(), profile)]
    project = project_file()
    theirs = [] if project is None else [from_project(project, quiet)]
    return [from_environment(), *mine[:-1], *theirs, mine[-1]]


# --- what a call gets


def heeded(command: str, params: Sequence[Any], known: Mapping[str, Key] = KEYS) -> dict[str, Any]:
    """The options of a command that can be set elsewhere, by their keys."""
    found = {}
    for param in params:
        for spelling in (*param.opts, *param.secondary_opts):
            key = known.get(spelling[2:]) if spelling.startswith("--") else None
            if key and command in (key.commands or (command,)) and key.name not in EXCEPT.get(command, ()):
                found[key.name] = param
    return found


def effective(given: Iterable[str], found: Iterable[Layer]) -> dict[str, tuple[Setting, Layer]]:
    """What holds, of all layers: by the key, with the layer that says so.

    given: the long names of the options that were typed.
    """
    above, result = {*given}, {}
    for layer in found:
        for name, setting in layer.settings.items():
            if name not in above and above.isdisjoint(YIELDS.get(name, ())):
                result[name] = setting, layer
        above |= {*layer.settings}
    return result


def value_for(param: Any, name: str, setting: Setting, ctx: Any) -> Any:
    """The value for the parser of a command, after a look at it: an error names the place it comes from."""
    from ms4.cli.options import AtMost

    value: Any = setting.value
    if name in ("quiet", "verbose"):  # one option with two names, and neither of them
        return (name == "quiet") if value else None
    try:
        made = param.process_value(ctx, value)
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        where = setting.where if setting.where == name else f"{setting.where}: {name}"
        raise UsageError(f"{where}: {error.message}", "ms4 config show --origin") from None  # type: ignore[attr-defined]
    return AtMost(made) if name == "ctx" else value  # of a file for all models, a typed --ctx is for this one


def defaults(command: str, params: Sequence[Any], given: Mapping[str, Any], ctx: Any) -> dict[str, Any]:
    """What a call of a command gets beside what was typed, by the names of its parameters."""
    spelled = {spelling for param in params if param.name in given for spelling in param.opts + param.secondary_opts}
    names = {spelling[2:] for spelling in spelled if spelling.startswith("--")}
    quiet = any(given.get(param.name) is True for param in params if "--quiet" in param.opts)
    all_layers, known = layers(given.get("profile"), quiet), KEYS
    if given.get("template"):
        from ms4.cli import templates

        all_layers.insert(0, templates.lay(given["template"], command, quiet))
        known = templates.KEYS
    keys, found = heeded(command, params, known), effective(names, all_layers)
    return {
        keys[name].name: value_for(keys[name], name, setting, ctx)
        for name, (setting, _) in found.items()
        if name in keys
    }
