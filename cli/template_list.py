"""`ms4 templates`: lists, shows, edits and removes what `--save` has kept."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ms4.cli import config_command, errors, streams, templates
from ms4.cli.errors import CliError, UsageError
from ms4.quant import visible

ACTIONS = ("ls", "show", "edit", "rm", "path")
FIRST = """\
# A template: options by their long names, and a prompt around what is typed.
# system = "You are terse."
# effort = "low"
# temp = 0.3
# prompt = "Translate into $language: $input"
#
# [defaults]              # else --param language=VALUE has to give it
# language = "French"
"""


def carry_out(action: str, names: Sequence[str], *, as_json: bool) -> int:
    if action not in ACTIONS:
        raise UsageError(f"no such action {errors.escape(action, 40)}", f"ms4 templates {'|'.join(ACTIONS)}")
    if (action == "ls") != (not names) and action != "path" or len(names) > 1 and action in ("edit", "path"):
        takes = {"ls": "no name", "edit": "one name", "path": "one name or none"}.get(action, "a name")
        raise UsageError(f"ms4 templates {action} takes {takes}", "ms4 templates lists them")
    if action == "ls":
        ls(as_json)
    elif action == "path":
        streams.Output().write(f"{templates.path_of(names[0]) if names else templates.folder()}\n")
    elif action == "edit":
        config_command.edit_file(templates.path_of(names[0]), FIRST)
        if templates.path_of(names[0]).exists():
            templates.read(names[0])  # a mistake is said now
    elif action == "rm":
        for path in [templates.find(name) for name in names]:
            path.unlink(missing_ok=True)
    else:
        show(names, as_json)
    return errors.OK


def ls(as_json: bool) -> None:
    """Each with its variables and how it begins; of one that cannot be read, why."""
    output, rows = streams.Output(), []
    known = templates.names()
    width = max((len(name) for name in known), default=0)
    for name in known:
        try:
            template = templates.read(name)
        except CliError as error:
            errors.note(str(error))
            continue
        rows.append({"name": name, "path": str(template.path), **about(template)})
        if not as_json:
            output.write(f"{name:{width}}  {described(template)}\n")
    if as_json:
        output.write(json.dumps(rows, ensure_ascii=False) + "\n")
    elif not known:
        errors.note("there is none yet; ms4 run --save NAME makes one")


def about(template: templates.Template) -> dict[str, object]:
    settings = {key: setting.value for key, setting in template.settings.items()}
    return {"settings": settings, "variables": template.variables, "defaults": template.defaults}


def described(template: templates.Template) -> str:
    """Its prompt, else its system prompt, else its options, in one line."""
    values = {key: str(setting.value) for key, setting in template.settings.items()}
    text = values.get("prompt") or values.get("system") or ", ".join(f"{k} {v}" for k, v in values.items())
    return errors.escape(" ".join(text.split()), 70)


def show(names: Sequence[str], as_json: bool) -> None:
    """The files as they are."""
    output = streams.Output()
    for template in [templates.read(name) for name in names]:
        if as_json:
            output.write(json.dumps({"name": template.name, **about(template)}, ensure_ascii=False) + "\n")
            continue
        text = template.path.read_text("utf-8")
        output.write(visible.text(text) if output.terminal else text)
