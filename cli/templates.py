"""Templates: options, a system prompt and a prompt under one name, in a TOML file of their own.

Owns what may stand in such a file, how its prompt is filled in, and what `--save` writes.  Its options are a layer of
`config.py` right below what was typed; `template_list.py` is the command that lists and edits them.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ms4.cli import config, config_command, errors
from ms4.cli.config import Key, Layer, Setting
from ms4.cli.errors import CliError, MissingError, UsageError
from ms4.models import atomic, places

NAME = re.compile(r"[A-Za-z_][\w.-]{0,79}", re.ASCII)
INPUT = "input"  # the variable that stands for stdin and what was typed
VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)
# What a template may hold beside what any file of options may; `prompt` is no option, but what a call is about.
MORE = {
    key.name: key
    for key in (
        Key("prompt", "text", commands=("run", "batch")),
        Key("schema", "text", commands=("run", "batch")),
        Key("json-object", "flag", commands=("run",)),
        Key("extract", "flag", commands=("run",)),
        Key("prefill", "text", commands=("run",)),
    )
}
KEYS = config.KEYS | MORE
OF_TEMPLATES = ("template", "param", "save")  # parameters that say which one, and are not kept in it


@dataclass(frozen=True)
class Template:
    name: str
    path: Path
    settings: dict[str, Setting]
    defaults: dict[str, str]  # of its variables

    @property
    def prompt(self) -> str | None:
        return str(self.settings["prompt"].value) if "prompt" in self.settings else None

    @property
    def variables(self) -> list[str]:
        """Those of its prompt, in their order, without what stands for the input."""
        return [name for name in dict.fromkeys(variables(self.prompt or "")) if name != INPUT]

    @property
    def layer(self) -> Layer:
        return Layer(f"template {self.name}", self.settings)


def variables(text: str) -> Iterator[str]:
    return (match[2] or match[3] for match in VARIABLE.finditer(text) if not match[1])


# --- where they lie


def folder() -> Path:
    return places.ours("CONFIG") / "templates"


def path_of(name: str) -> Path:
    """The file of a name, or the file that is named itself: that has a slash in it."""
    if "/" in name:
        return Path(os.path.expanduser(name))
    name = name.removesuffix(".toml")
    if not NAME.fullmatch(name):
        raise UsageError(f"{errors.escape(name, 40)} is no name of a template", "letters, digits, - _ . such as review")
    return folder() / f"{name}.toml"


def names() -> list[str]:
    """Of all that lie in their folder."""
    try:
        return sorted(path.stem for path in folder().iterdir() if path.suffix == ".toml" and NAME.fullmatch(path.stem))
    except OSError:
        return []


def find(name: str) -> Path:
    """The file of a template.  MissingError: there is none."""
    path = path_of(name)
    if not path.is_file():
        hint = config.nearest(name, names(), "ms4 templates lists them; ms4 run --save NAME makes one")
        raise MissingError(f"no template {errors.escape(name, 80)}", hint)
    return path


def read(name: str) -> Template:
    """The template of that name.  UsageError names file and line of a mistake."""
    path = find(name)
    table, text = config.read(path)
    defaults = table.pop("defaults", {})
    where = f"{path}:{config.line_of(text, 'defaults')}"
    if not isinstance(defaults, dict) or not all(isinstance(v, (str, int, float)) for v in defaults.values()):
        raise UsageError(f"{where}: defaults is not a table of texts and numbers", '[defaults] and language = "French"')
    settings = config.settings_of(table, path, text, known=KEYS)
    schema = settings.get("schema")
    if schema and str(schema.value).startswith("@"):  # beside the template, as that of system
        beside = path.parent / os.path.expanduser(str(schema.value)[1:])
        settings["schema"] = Setting(f"@{beside}", schema.where)
    return Template(path.stem, path, settings, {key: str(value) for key, value in defaults.items()})


# --- on a command line


def named(args: Sequence[str], ours: Mapping[str, str | None]) -> list[str]:
    """The arguments of a command that has templates, where -t takes a name too: what begins with a letter is one.

    ours: the options of the command -> the name of their value; None for a flag.
    """
    made: list[str] = []
    waits = False  # for the value of an option
    for at, arg in enumerate(args):
        if arg == "--" and not waits:
            return [*made, *args[at:]]
        after = args[at + 1] if at + 1 < len(args) else ""
        made.append("--template" if arg == "-t" and not waits and re.match(r"[A-Za-z_./~]", after) else arg)
        waits = not waits and ours.get(arg) is not None
    return made


def lay(name: str, command: str, quiet: bool) -> Layer:
    """The options of a template for a call of `command`; what that has no use for is said."""
    template = read(name)
    for key in template.settings:
        heeded = KEYS[key].commands
        if heeded and command not in heeded and not quiet:
            errors.note(f"{template.settings[key].where}: {key} is not for ms4 {command}, and is left out")
    return template.layer


# --- its prompt


@dataclass(frozen=True)
class Filling:
    """A template with the values of its variables, as one call has them."""

    template: Template
    values: dict[str, str]

    @classmethod
    def of(cls, name: str | None, params: Sequence[str] | None) -> Filling | None:
        """From --template and --param; None where the call has no template, or one without a prompt."""
        given = given_params(params or ())
        if name is None:
            if given:
                raise UsageError("--param gives a variable of a template", "--template NAME")
            return None
        template = read(name)
        known = template.variables
        for key in given:
            if key not in known:
                there = f"it has {', '.join(known)}" if known else "its prompt has no variables but $input"
                raise UsageError(f"template {template.name} has no variable {errors.escape(key, 40)}", there)
        values = template.defaults | given
        for key in known:
            if key not in values:
                raise UsageError(f"template {template.name} has a variable without a value", f"--param {key}=VALUE")
        return cls(template, values) if template.prompt is not None else None

    @property
    def needs_input(self) -> bool:
        return INPUT in variables(self.template.prompt or "")

    def __call__(self, text: str) -> str:
        """The prompt, with the text of the call in its place: where $input stands, else before it."""
        prompt = self.template.prompt or ""
        if self.needs_input and not text.strip():
            raise UsageError(f"template {self.template.name} wants an input", "on stdin or as words behind it")
        values = self.values | {INPUT: text}
        filled = VARIABLE.sub(lambda match: match[1] or values[match[2] or match[3]], prompt)
        return filled if self.needs_input or not text else f"{text}\n\n{filled}"


def given_params(params: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE, any number of them."""
    given: dict[str, str] = {}
    for param in params:
        name, equals, value = param.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) or name == INPUT:
            raise UsageError(f"--param {errors.escape(param, 40)} is not NAME=VALUE", "--param language=French")
        given[name] = value
    return given


# --- what --save writes


def save(name: str, given: Mapping[str, Any], params: Sequence[Any], ctx: Any) -> int:
    """Keeps what was typed as a template, instead of carrying it out.

    given: the parameters that were typed, as they were, by their names; those of --template are kept, too.
    """
    path = path_of(name)
    base = read(given["template"]) if given.get("template") else None
    table = {key: config_command.native(KEYS[key].kind, s.value) for key, s in base.settings.items()} if base else {}
    table |= typed(given, params)
    defaults = (base.defaults if base else {}) | given_params(given.get("param") or ())
    known = {*variables(str(table.get("prompt", "")))}
    if strange := [key for key in defaults if key not in known]:
        hint = f"${strange[0]} in it, in single quotes, so that the shell leaves it"
        raise UsageError(f"the prompt has no variable {strange[0]}", hint)
    if not table:
        raise UsageError("nothing to save", "ms4 run --save NAME -s TEXT -r low 'Summarize for $who: $input'")
    write(path, table, defaults)
    rest = f" {' '.join(f'--param {key}=VALUE' for key in known - {INPUT, *defaults})}".rstrip()
    named = name if "/" in name else path.stem
    errors.note(f"saved as {path}; ms4 {ctx.info_name.split()[-1]} -t {shlex.quote(named)}{rest} uses it")
    return errors.OK


def typed(given: Mapping[str, Any], params: Sequence[Any]) -> dict[str, Any]:
    """What was typed, as a file has it; an error for what no template keeps."""
    table: dict[str, Any] = {}
    for param in params:
        value = given.get(param.name)
        if value is None or value == () or value == [] or param.name in OF_TEMPLATES:
            continue
        if param.param_type_name == "argument":
            table["prompt"] = " ".join(value)
            continue
        option = next(one for one in [*param.opts, *param.secondary_opts] if one.startswith("--"))
        key = "verbose" if option == "--quiet" and value is False else option[2:]
        if key not in KEYS or KEYS[key].kind == "flag" and value is False and key != "verbose":
            raise UsageError(f"a template keeps no {option}", "it belongs to a call; leave it out of --save")
        value = list(value) if isinstance(value, (list, tuple)) else config_command.native(KEYS[key].kind, value)
        table[key] = True if key == "verbose" else whole_path(key, value)
    return table


def whole_path(key: str, value: Any) -> Any:
    """The path of a file, so that it is found from other folders."""
    if key in ("system", "schema") and value.startswith("@"):
        return f"@{os.path.abspath(value[1:])}"
    if key == "schema" and os.path.exists(value):
        return f"@{os.path.abspath(value)}"
    return os.path.abspath(value) if key in ("model", "mmproj") and os.path.exists(value) else value


def write(path: Path, table: Mapping[str, Any], defaults: Mapping[str, str]) -> None:
    """A new file; one that is there is left alone."""
    import tomlkit

    document: Any = tomlkit.document()
    for key, value in table.items():
        lines = isinstance(value, str) and "\n" in value.strip("\n") and value.replace("\n", "").isprintable()
        document[key] = tomlkit.string(value, multiline=True) if lines and value[0] != "\n" else value
    if defaults:
        document["defaults"] = dict(defaults)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.creating(path) as file:
            file.write(tomlkit.dumps(document).encode())
    except FileExistsError:
        raise UsageError(f"there is a template {path.stem} already", f"ms4 templates edit {path.stem}, or rm") from None
    except OSError as error:
        raise CliError(f"{path}: {error.strerror}") from None
