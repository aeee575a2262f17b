"""`ms4 config`: shows which options hold and where each comes from, and writes the user's file."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ms4.cli import config, errors, streams
from ms4.cli.config import KEYS, Layer, Setting
from ms4.cli.errors import CliError, UsageError
from ms4.models import atomic

ACTIONS = ("show", "get", "set", "unset", "edit", "path")


def carry_out(action: str, words: Sequence[str], profile: str | None, ctx: Any, *, origin: bool, as_json: bool) -> int:
    """ctx: the context of `ms4 run`, whose options are all that can be set."""
    if action not in ACTIONS:
        raise UsageError(f"no such action {errors.escape(action, 40)}", f"ms4 config {'|'.join(ACTIONS)}")
    most = {"get": 1, "unset": 1, "set": 1000}.get(action, 0)
    if len(words) > most or len(words) < min(most, 1) or action == "set" and len(words) < 2:
        takes = {"get": " KEY", "unset": " KEY", "set": " KEY VALUE"}.get(action, "")
        raise UsageError(f"ms4 config {action} takes {takes.strip() or 'no more words'}", f"ms4 config {action}{takes}")
    if words and words[0] not in KEYS:
        raise UsageError(f"no such key {errors.escape(words[0], 40)}", config.nearest(words[0], KEYS))
    if action == "path":
        streams.Output().write(f"{config.user_file()}\n")
    elif action == "edit":
        edit(config.user_file(), ctx)
    elif action == "show":
        show(profile, ctx, origin=origin, as_json=as_json)
    elif action == "get":
        return get(words[0], profile, ctx)
    else:
        change(words[0], words[1:] if action == "set" else None, profile, ctx)
    return errors.OK


# --- what holds


def options(ctx: Any) -> dict[str, Any]:
    """Those that can be set, by their keys: of `ms4 run`, and what `ms4 chat` has beside them."""
    from ms4.cli import main

    return config.heeded("chat", main.command("chat").params) | config.heeded("run", ctx.command.params)


def checked_layers(profile: str | None, ctx: Any) -> list[Layer]:
    """All layers, every value of which the option itself has accepted."""
    found, params = config.layers(profile), options(ctx)
    for layer in found:
        for name, setting in layer.settings.items():
            config.value_for(params[name], name, setting, ctx)
    return found


def everything(profile: str | None, ctx: Any) -> dict[str, tuple[Any, str]]:
    """By the key: (value, where from) of what holds, in the order of KEYS; None for what nothing sets."""
    found = config.effective((), checked_layers(profile, ctx))
    params = options(ctx)
    rows: dict[str, tuple[Any, str]] = {}
    for name in KEYS:
        if name in found:
            setting, layer = found[name]
            rows[name] = setting.value, described(setting, layer)
        else:
            value = None if name in ("quiet", "verbose") else params[name].default
            rows[name] = None if value == "" or value == [] else value, "default"
    return rows


def described(setting: Setting, layer: Layer) -> str:
    return setting.where if layer.name == "environment" else f"{layer.name}, {setting.where}"


def show(profile: str | None, ctx: Any, *, origin: bool, as_json: bool) -> None:
    """What is set, as TOML; with --origin all that can be set, and where each value comes from."""
    output = streams.Output()
    rows = everything(profile, ctx)
    if as_json:
        whole = {name: {"value": value, "origin": where} for name, (value, where) in rows.items()}
        output.write(json.dumps(whole, ensure_ascii=False) + "\n")
        return
    lines = []
    for name, (value, where) in rows.items():
        if where != "default" or origin:
            line = f"# {name}" if value is None else f"{name} = {as_toml(KEYS[name].kind, value)}"
            lines.append((line, f"  # {where}" if origin else ""))
    width = min(40, max((len(line) for line, _ in lines), default=0))
    shown = "".join(f"{line:{width}}{where}".rstrip() + "\n" if where else f"{line}\n" for line, where in lines)
    output.write(shown)
    if not shown:
        errors.note(f"nothing is set; ms4 config set KEY VALUE writes {config.user_file()}")


def as_toml(kind: str, value: Any) -> str:
    """A value as it would stand in the file."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if kind in ("whole", "number") and is_number(kind, str(value)):
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def is_number(kind: str, text: str) -> bool:
    """True if the file may hold it without quotes."""
    if kind == "whole":
        return text.isascii() and text.isdigit() and str(int(text)) == text
    try:
        return kind == "number" and float(text) * 0 == 0
    except ValueError:
        return False


def get(name: str, profile: str | None, ctx: Any) -> int:
    """The value alone; nothing and exit code 1 where there is none."""
    value, _ = everything(profile, ctx)[name]
    if value is None:
        return errors.FAILURE
    lines = value if isinstance(value, list) else [as_toml("", value) if isinstance(value, bool) else str(value)]
    streams.Output().write("".join(f"{line}\n" for line in lines))
    return errors.OK


# --- the user's file


def change(name: str, words: Sequence[str] | None, profile: str | None, ctx: Any) -> None:
    """Sets a key, or with None removes it; in the profile, if one is named.  Comments and order stay as they are."""
    import tomlkit

    path = config.user_file()
    _, text = config.read(path)  # refuses what is no TOML, by its line
    document: Any = tomlkit.parse(text)
    table = document
    for part in ("profile", profile) if profile else ():
        if part not in table:
            table[part] = tomlkit.table(is_super_table=part == "profile")
        table = table[part]
    if words is None:
        if name not in table:
            raise UsageError(f"{name} is not set in {path}", "ms4 config show --origin")
        del table[name]
    else:
        setting = Setting(config.typed(KEYS[name], words, name), name)
        config.value_for(options(ctx)[name], name, setting, ctx)
        table[name] = native(KEYS[name].kind, setting.value)
    write(path, tomlkit.dumps(document))


def native(kind: str, value: str | bool | list[str]) -> Any:
    """The value in the type that the file has for it."""
    if not isinstance(value, str) or not is_number(kind, value):
        return value
    return int(value) if value.isdigit() else float(value)


def write(path: Path, text: str) -> None:
    """Whole or not at all, and with the rights that it had."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing(path, durable=True) as file:
        file.write(text.encode())
        if path.exists():
            os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)


FIRST = """\
# Options of ms4 by their long names, for every call that does not give them:
# model = "model.gguf"
# ctx = "64k"
# effort = "low"
#
# [profile.fast]        # with --profile fast
# effort = "none"
"""


def edit(path: Path, ctx: Any) -> None:
    """Opens the file in the editor of the user, and says what is wrong with it afterwards."""
    edit_file(path, FIRST)
    checked_layers(None, ctx)


def edit_file(path: Path, first: str) -> None:
    """Opens a file in $VISUAL or $EDITOR; `first` is what a new one begins with, and it stays only if it is saved."""
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    if not streams.is_terminal(sys.stdin):
        raise UsageError("an editor needs a terminal", f"the file is {path}")
    new = not path.exists()
    if new:
        write(path, first)
    try:
        code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        raise CliError(f"{editor}: {getattr(error, 'strerror', error)}", "export EDITOR=nano names another") from None
    if new and path.exists() and path.read_text("utf-8", "replace") == first:
        path.unlink()
    if code:
        raise CliError(f"{editor} ended with {code}")
