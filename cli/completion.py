"""`ms4 completion SHELL`: what a shell needs to complete a command line of ms4, and the answers to its questions.

The script that is printed asks ms4 itself at each Tab, so that it stays right when ms4 changes: `ms4 completion --ask
SHELL LINE`, with the line up to the cursor.  The answer is a line that says whether the shell is to add files, then a
line for each word that may follow: the word, a tab, what it is.  No model is opened for that, and nothing is imported
that takes time.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from ms4.cli import errors, start, streams
from ms4.models import places

SHELLS = ("bash", "zsh", "fish")
BASH = """\
# ms4: completion for bash.  In ~/.bashrc:  eval "$(ms4 completion bash)"
_ms4() {
    local line kind=
    COMPREPLY=()
    while IFS= read -r line; do
        if [ -z "$kind" ]; then kind=$line; else COMPREPLY+=("$line"); fi
    done < <("$1" completion --ask bash "${COMP_LINE:0:$COMP_POINT}" "$COMP_WORDBREAKS" 2>/dev/null)
    if [ "$kind" = files ]; then compopt -o default; fi
    case ${COMPREPLY[0]} in *[=:]) compopt -o nospace ;; esac
}
complete -F _ms4 ms4
"""
ZSH = """\
#compdef ms4
# ms4: completion for zsh.  In ~/.zshrc, after compinit:  eval "$(ms4 completion zsh)"
_ms4() {
    local -a answer found
    answer=("${(@f)$("${words[1]}" completion --ask zsh "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    found=("${(@)answer[2,-1]}")
    if (( ${#found} )) && [[ -n "${found[1]}" ]]; then _describe ms4 found; fi
    if [[ "${answer[1]}" = files ]]; then _files; fi
}
compdef _ms4 ms4
"""
FISH = """\
# ms4: completion for fish.  In ~/.config/fish/config.fish:  ms4 completion fish | source
function __ms4_complete
    set -l answer (ms4 completion --ask fish (commandline -cp | string collect) 2>/dev/null)
    if test "$answer[1]" = files
        __fish_complete_path (commandline -ct)
    end
    if test (count $answer) -gt 1
        printf '%s\\n' $answer[2..-1]
    end
end
complete -c ms4 -f -a '(__ms4_complete)'
"""
SCRIPTS = dict(zip(SHELLS, (BASH, ZSH, FISH), strict=True))
MOST_SESSIONS, MOST_READ = 30, 1 << 16  # the newest; bytes of one in which its first message is looked for
FILES = re.compile(r"\[?(@?FILE|PATH|FOLDER|TRACE|OUT\.gguf)\b|.*@FILE")

Found = list[tuple[str, str]]  # words that may follow, each with what it is


def completion(shell: str) -> int:
    """Prints the script."""
    streams.Output().write(SCRIPTS[shell])
    return errors.OK


def answered(question: Sequence[str]) -> int:
    """Answers what a script asks: the shell, the line, and for bash the characters that part words for it."""
    shell, line, breaks = [*question, "", "", ""][:3]
    words = split(line)
    files, found = answer(words)
    lines = [written(shell, words[-1], word, about, breaks) for word, about in found if word.startswith(words[-1])]
    streams.Output().write("".join(f"{line}\n" for line in ("files" if files else "words", *lines)))
    return errors.OK


def split(line: str) -> list[str]:
    """The words behind `ms4`, as the shell would read them; the last is the one that is being typed, maybe empty."""
    for end in ("", '"', "'"):
        try:
            words = shlex.split(f"{line}\1{end}")
            break
        except ValueError:
            continue
    else:
        words = f"{line}\1".split()
    words[-1] = words[-1].rstrip("\1")
    names = [n for n, word in enumerate(words[:-1]) if word.rpartition("/")[2] == "ms4"]
    return words[names[0] + 1 if names else 1 :] or [""]


def written(shell: str, typed: str, word: str, about: str, breaks: str) -> str:
    """A line of the answer.  bash takes what stands behind the last character that parts words for it, other shells
    the whole word; zsh parts word and explanation by a colon."""
    if shell == "bash":
        cut = max((typed.rfind(c) + 1 for c in ":=" if c in breaks), default=0)
        return shlex.quote(word)[cut:] if cut == 0 else word[cut:]
    about = " ".join(about.split())
    return f"{word.replace(':', chr(92) + ':')}:{about}" if shell == "zsh" else f"{word}\t{about}"


# --- what may follow
def answer(words: Sequence[str]) -> tuple[bool, Found]:
    """(whether files may follow, the words that may)."""
    first, rest, typed = words[0], [*words[1:]], words[-1]
    if not rest:
        options = [("--help", "show what there is"), ("--version", "show the version")]
        return False, options if typed.startswith("-") else commands()
    if first == "help":
        return False, commands() if len(rest) == 1 else []
    if first not in start.COMMANDS:
        return False, []
    from ms4.cli import main

    params = [param for param in main.command(first).params if not getattr(param, "hidden", False)]
    return _argument(first, params, rest[:-1], typed)


def commands() -> Found:
    text = start.HELP.partition("commands:")[2].partition("options:")[0]
    return [(name, about) for name, about in re.findall(r"^  (\w+)  +(.+)$", text, re.MULTILINE)]


def _argument(command: str, params: Sequence[Any], before: Sequence[str], typed: str) -> tuple[bool, Found]:
    """What may stand at the end of a command with these parameters, behind the words `before`."""
    options = {name: p for p in params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}
    arguments = [p for p in params if p.param_type_name == "argument"]
    waiting, last, given, values, ended = None, None, set(), [], False
    for word in before:
        if waiting is not None:
            waiting = None
        elif word == "--":
            ended, last = True, None
        elif word.startswith("-") and not ended:
            name, has_value, _ = word.partition("=")
            param = options.get(name)
            given.add(param)
            last = param
            waiting = param if param is not None and not param.is_flag and not has_value else None
        elif not (last is not None and "..." in (last.metavar or "")):  # -i and -f take several
            values.append(word)
    name, has_value, _ = typed.partition("=")
    if waiting is not None:
        return values_of(command, waiting, values)
    if has_value and name in options:
        files, found = values_of(command, options[name], values)
        return files, [(f"{name}={word}", about) for word, about in found]
    left = [(o, p) for o, p in options.items() if o.startswith("--") and (p not in given or p.multiple)]
    able = [(option, sentence(param, option)) for option, param in left]
    able.append(("--help", "show all options"))
    if typed.startswith("-") and not ended:
        return False, able
    if last is not None and "..." in (last.metavar or ""):
        return True, []
    param = arguments[min(len(values), len(arguments) - 1)] if arguments else None
    if param is None or (len(values) >= len(arguments) and param.nargs == 1):
        return False, [] if ended else able
    return values_of(command, param, values)


def sentence(param: Any, option: str) -> str:
    """What an option is, shortly; of a pair, its own part."""
    parts = (param.help or "").split("; or ")
    return str(parts[-1 if option in param.secondary_opts else 0]).rstrip(".")


def values_of(command: str, param: Any, values: Sequence[str]) -> tuple[bool, Found]:
    """What the value of an option or of an argument may be."""
    kind, about = param.metavar or "", param.help or ""
    if words := re.search(r"One of ([^.]+)\.", about):
        return False, [(word, "") for word in words[1].split(", ")]
    if "|" in kind and kind == kind.lower():
        return False, [(word, "") for word in kind.split("|")]
    if param.name in ("template", "save") or command == "templates" and kind == "NAME":
        return False, named_templates()
    if param.name == "profile":
        return False, profiles()
    if command == "config" and kind == "KEY VALUE":
        return False, [] if values[1:] or values[:1] in (["show"], ["edit"], ["path"]) else keys()
    if "ID" in kind:
        return False, [] if command == "sessions" and values[:1] == ["search"] else [*sessions()]
    if kind in ("CARD", "MEMORY"):
        return False, in_table(kind)
    if kind == "NAME" and command == "pull":
        return False, known()
    if kind.startswith("PATH|NAME") or (kind == "NAME" and command in ("rm", "verify")):
        return kind != "NAME", models()
    return bool(FILES.match(kind)), []


def models() -> Found:
    """The models that lie here."""
    from ms4.cli.render import gigabytes
    from ms4.models import stored

    return [(model.name, gigabytes(model.bytes)) for model in stored.everything()]


def in_table(kind: str) -> Found:
    """The cards or memories that `ms4 plan` knows."""
    from ms4.models import cards

    if kind == "CARD":
        return [(name, f"{card.vram / cards.GIB:.0f} GiB") for name, card in cards.cards().items()]
    return [(name, f"{memory.rate / 1e9:.0f} GB/s") for name, memory in cards.memories().items()]


def known() -> Found:
    """What can be fetched, by the table of repositories."""
    from ms4.models import repositories

    quants = [(file.quant, repositories.DEFAULT.model) for file in repositories.DEFAULT.files]
    return quants + [(row.repo, row.model) for row in repositories.REPOSITORIES if row.has_gguf]


def named_templates() -> Found:
    from ms4.cli import templates

    return [(name, "") for name in templates.names()]


def profiles() -> Found:
    """Those of the user's file; none of one that cannot be read."""
    from ms4.cli import config

    try:
        tables = config.read(config.user_file())[0].get("profile", {})
    except errors.CliError:
        return []
    return [(name, "") for name in tables] if isinstance(tables, dict) else []


def keys() -> Found:
    """What can be set in files."""
    from ms4.cli import config

    return [(key.name, config.KINDS[key.kind]) for key in config.KEYS.values()]


def sessions() -> Iterator[tuple[str, str]]:
    """The ids of the newest sessions, with how they begin.  `ms4.models.sessions` takes longer to import."""
    found = []
    for path in (places.ours("DATA") / "sessions").glob("*.jsonl"):
        try:
            found.append((path.stat().st_mtime_ns, path))
        except OSError:
            continue
    for _, path in sorted(found, reverse=True)[:MOST_SESSIONS]:
        try:
            with open(path, "rb") as file:
                lines = file.read(MOST_READ).splitlines()
            message = json.loads(lines[1])["message"]
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            message = ""
        yield path.stem, errors.escape(message, 60) if isinstance(message, str) else ""
