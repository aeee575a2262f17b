"""What people type elsewhere, and what it is here: options and commands of llama.cpp, Ollama, llm and LM Studio.

Owns the one table of them, and the search for what is none of ours on a command line.  The hints of errors and
docs/coming-from.md are made of it (`python -m ms4.cli.elsewhere > docs/coming-from.md`).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d"
COMMON = {"--help": None, "--version": None, "-h": None}
LLAMA, OLLAMA, LLM, STUDIO = "llama.cpp", "Ollama", "llm", "LM Studio"
PLACED = "not needed: what fits goes to the GPU, hot experts first; --device and --vram BYTES say where and how much"
FIXED = "not here: the engine chooses this by itself, and the answer does not depend on it"
DASHED = "text that begins with - goes after --"
FETCH = "-m USER/REPO:QUANT, after ms4 pull USER/REPO:QUANT"
PLAIN_STDOUT = "not needed: stdout is the answer alone"
NO_SERVER = "not here yet: there is no server; ms4 chat keeps a conversation"


@dataclass(frozen=True)
class Row:
    """One thing with its spellings elsewhere; `ours` says what it is here."""

    who: str
    theirs: str  # spellings, separated by blanks
    ours: str

    @property
    def spellings(self) -> list[str]:
        return self.theirs.split()

    @property
    def options(self) -> list[str]:
        """The options of ms4 that are named."""
        return re.findall(r"(?<![\w-])--?[a-z][a-z-]*", self.ours)


OPTIONS = (
    Row(f"{LLAMA}, {STUDIO}", "-c --ctx-size --context-length --num-ctx --n-ctx", "--ctx N"),
    Row(LLAMA, "--predict --n-predict --max-new-tokens --num-predict", "-n N"),
    Row(f"{LLAMA}, {LLM}", "-p --prompt", 'the prompt takes no option: ms4 run "your question"'),
    Row(f"{LLAMA}, {OLLAMA}", "--temperature -temp", "--temp T"),
    Row(LLAMA, "--system-prompt -sys --system_prompt", "-s TEXT"),
    Row(LLAMA, "-sysf --system-prompt-file", "-s @FILE"),
    Row(LLAMA, "-hf -hfr --hf-repo -hff --hf-file -mu --model-url -dr --docker-repo --hf-token", FETCH),
    Row(LLAMA, "-mm", "--mmproj FILE"),
    Row(LLAMA, "-mmu --mmproj-url", "not needed: ms4 pull gets the tower, too, and it is found"),
    Row(LLAMA, "--no-mmproj --no-mmproj-offload --mmproj-offload", "not needed: the tower is opened for images only"),
    Row(
        f"{LLAMA}, {STUDIO}",
        "-ngl --gpu-layers --n-gpu-layers --gpu -dev -sm --split-mode -ts --tensor-split -mg --main-gpu "
        "-ot --override-tensor -cmoe --cpu-moe -ncmoe --n-cpu-moe --moe-cache-mib --fit --num-gpu",
        PLACED,
    ),
    Row(
        LLAMA,
        "-b --batch-size -ub --ubatch-size -fa --flash-attn -ctk --cache-type-k -ctv --cache-type-v -np --parallel "
        "--numa --rope-scaling --rope-freq-base --yarn-orig-ctx --keep --swa-full --no-warmup --warmup --jinja",
        FIXED,
    ),
    Row(LLAMA, "-tb --threads-batch --n-threads --num-threads --num-thread", "-t N, for reading and writing"),
    Row(LLAMA, "--no-mmap --mlock -nommap", "--load copy"),
    Row(LLAMA, "--mmap -lm --load-mode", "--load map"),
    Row(LLAMA, "--reverse-prompt --stop-sequence", "--stop TEXT"),
    Row(LLAMA, "--reasoning -rea --reasoning-effort --reasoning_effort --effort-level --enable-thinking", "-r high"),
    Row(LLAMA, "--reasoning-budget --thinking-budget", "--think-budget N, or -r low, -r medium"),
    Row(LLAMA, "--reasoning-format --hide-thinking --no-thinking-output", "--think show|hide"),
    Row(LLAMA, "-cnv --conversation --interactive --interactive-first -mli --multiline-input", "a command: ms4 chat"),
    Row(LLAMA, "-no-cnv --no-conversation -st --single-turn", "a command: ms4 run"),
    Row(
        LLAMA,
        "--no-display-prompt --simple-io -co --color --no-color --log-disable --log-file -lv --verbosity "
        "--show-timings --no-perf",
        f"{PLAIN_STDOUT}, and -q leaves out progress and notes",
    ),
    Row(f"{LLAMA}, {LLM}", "-j --json-schema -jf --json-schema-file --schema-multi", "--schema FILE|FIELDS"),
    Row("", "--json-mode --response-format --json_object", "--json-object"),
    Row(LLAMA, "--grammar --grammar-file", "not here: --schema holds an answer to a JSON schema"),
    Row(
        LLAMA,
        "--repeat-penalty --presence-penalty --frequency-penalty --repeat-last-n --samplers --mirostat --typical "
        "--xtc-probability --dry-multiplier --dynatemp-range --top-nsigma --logit-bias -l",
        "not here: --temp, --top-k, --top-p and --min-p choose the token",
    ),
    Row(LLAMA, "--chat-template --chat-template-file --no-jinja", "not here: ms4 writes the model's own chat format"),
    Row(LLAMA, "--lora --control-vector --model-draft -md --spec-type", "not here: one model, as its file is"),
    Row(
        LLAMA, "--prompt-cache --slot-save-path --session", "not needed: what was read is kept; -c or --resume goes on"
    ),
    Row(LLAMA, "--ignore-eos", "not here: an answer ends where the model ends it"),
    Row(LLAMA, "-e --escape --no-escape", "not needed: \"$'a\\nb'\" is a line end in the shell"),
    Row(f"{LLAMA}, {STUDIO}", "--host --port --api-key --ttl", NO_SERVER),
    Row(OLLAMA, "--hidethinking", "--think hide"),
    Row(OLLAMA, "--keepalive --insecure --experimental", "not needed: nothing keeps running"),
    Row(OLLAMA, "--nowordwrap --dimensions --truncate", "not needed: from a pipe, the answer comes as it is written"),
    Row(LLM, "-a --attachment --at --attachment-type", "-i IMAGE or -f FILE"),
    Row(LLM, "--fragment --sf --system-fragment --files", "-f FILE"),
    Row(LLM, "-u --usage", "--stats"),
    Row(LLM, "--no-stream --stream --async", "not needed: into a pipe or a file the answer is the same"),
    Row(LLM, "--cid --conversation-id", "--resume ID, or -c for the last one"),
    Row(LLM, "--log --no-log", "not needed: chats are kept, and run -c goes on with them; --no-session leaves nothing"),
    Row(LLM, "-d --database", "not here: XDG_DATA_HOME says where sessions are kept"),
    Row(LLM, "--extract-last --xl", "-x, --extract"),
    Row(LLM, "-T --tool --functions", "--tools FILE lists them, and the answer has the calls: ms4 makes none"),
    Row(LLM, "--td --ta --chain-limit", "not here: ms4 makes no calls itself"),
    Row(LLM, "--key --option", "not needed: --temp, --top-p, --seed and the like are options of their own"),
    Row("", "--max_tokens --max-length --num_predict --tokens", "-n N"),
    Row("", "--top_p", "--top-p P"),
    Row("", "--top_k", "--top-k K"),
    Row("", "--min_p", "--min-p P"),
    Row("", "--num_ctx --context --context-size --ctx_size", "--ctx N"),
    Row("", "--img --picture --images", "-i IMAGE"),
    Row("", "--pdf-file --document --attach", "-f FILE"),
    Row("", "--json", "--format json"),
    Row("", "--out --outfile --output-file", "-o FILE"),
    Row("", "--quiet-mode --silent", "-q"),
    Row("", "--time-limit --max-time", "--timeout S"),
    Row("", "--version -V", "ms4 --version, without a command"),
)

COMMANDS = (
    Row(OLLAMA, "serve start server", NO_SERVER),
    Row(STUDIO, "get download", "ms4 pull USER/REPO:QUANT"),
    Row(f"{OLLAMA}, {STUDIO}", "push cp create search", "not here: ms4 pull --list has the known repositories"),
    Row(f"{OLLAMA}, {STUDIO}", "list models", "ms4 ls"),
    Row(f"{OLLAMA}, {STUDIO}", "ps status", "not needed: nothing keeps running"),
    Row(f"{OLLAMA}, {STUDIO}", "stop unload load import", "not needed: a model is a file, opened by the command"),
    Row("", "remove delete", "ms4 rm NAME"),
    Row(OLLAMA, "show inspect", "ms4 info FILE"),
    Row(f"{LLM}, {LLAMA}", "prompt ask generate complete cli", 'ms4 run "your question"'),
    Row(LLM, "logs", "ms4 sessions, and ms4 sessions search WORDS"),
    Row(LLM, "schemas keys plugins aliases install embed", "not here: --schema takes a file or fields; no plugins"),
    Row(LLAMA, "quantize imatrix", "ms4 convert FOLDER OUT.gguf --type TYPE, from the folder of Hugging Face"),
    Row(LLAMA, "ppl", "ms4 perplexity FILE"),
    Row(LLAMA, "benchmark", "ms4 bench"),
    Row(LLAMA, "tokenise", "ms4 tokenize"),
    Row("", "check diagnose", "ms4 doctor"),
    Row("", "repl interactive talk", "ms4 chat"),
)
_OPTIONS = {spelling: row for row in OPTIONS for spelling in row.spellings}
_COMMANDS = {spelling: row for row in COMMANDS for spelling in row.spellings}


def stranger(args: Sequence[str], ours: Mapping[str, str | None]) -> str | None:
    """The first argument that looks like an option and is none of ours; with a dash of a typesetter, too.

    ours: the option -> the name of its value; None for a flag.
    """
    rest = list(args)
    while rest:
        arg = rest.pop(0)
        if arg == "--":
            return None
        if plain_dashes(arg, ours):
            return arg.partition("=")[0]
        if len(arg) < 2 or arg[0] != "-":
            continue
        name, given, _ = arg.partition("=")
        if arg in ours or (given and name in ours and name.startswith("--")):
            if ours[name] is not None and not given:
                del rest[:1]
        elif name.startswith("--") or name in _OPTIONS or not _short(arg, ours):
            return name if name in _OPTIONS or not re.search(r"\s", arg) else arg
    return None


def plain_dashes(arg: str, ours: Mapping[str, str | None]) -> str:
    """The option that is meant by one whose dashes an editor or a web page has made typographic; "" for none."""
    name = arg.partition("=")[0]
    bare = name.lstrip(DASHES + "-")
    if not bare or name[0] not in DASHES:
        return ""
    # What was one hyphen never becomes the longest dash.
    meant = ["--" + bare] if name[0] == "\u2014" else ["--" + bare, "-" + bare]
    if re.fullmatch("[a-z][0-9]+", bare):  # with its value
        meant.append("-" + bare[0])
    return next((option for option in meant if option in ours or (len(option) > 2 and option in _OPTIONS)), "")


def _short(arg: str, ours: Mapping[str, str | None]) -> bool:
    """True for one-letter options of ours in one word: flags, or one with its value."""
    for at, letter in enumerate(arg[1:], 1):
        value = ours.get(f"-{letter}", "no such")
        if f"-{letter}" not in ours or (letter == "h" and len(arg) > 2):  # -h among others hides a mistake
            return False
        if value is not None:
            given = arg[at + 1 :]
            words = value.split("|") if value.islower() else ()
            return given[:1].isdigit() if value == "N" else given in words if words else bool(given)
    return True


def option_hint(name: str, command: str, ours: Mapping[str, str | None]) -> str:
    """What to type instead of an option that `command` does not have."""
    more = f"{command} --help"
    texts = command.endswith(" run")  # the one command whose words are text
    if plain := plain_dashes(name, ours):
        if plain not in ours:
            return option_hint(plain, command, ours)
        return f"{plain}, with {'plain hyphens' if plain[1] == '-' else 'a plain hyphen'}; {more}"
    if re.search(r"\s", name) or not re.match(r"--?[a-zA-Z]", name):
        return f"{DASHED}: {command} -- {quoted(name[:120])}" if texts else more
    row = _OPTIONS.get(name)
    if row is not None and set(row.options) <= {*ours, "--version"}:
        return f"{row.ours}; {more}"
    import difflib  # here, as only a mistake needs it

    long = [option for option in ours if option.startswith("--")]
    near = [o for o in long if len(name) > 4 and (o.startswith(name) or name.startswith(o + "-"))]
    near = near or difflib.get_close_matches(name, long, 1, 0.75)
    if near:
        return f"{' or '.join(near)}? {more} lists them all"
    return f"{more}; {DASHED}: {command} -- {name[:40]}" if texts else more


def command_hint(args: Sequence[str], ours: Sequence[str]) -> str:
    """What to type instead of `ms4 ARGS...`, the first of which is no command."""
    first, rest = args[0], list(args[1:])
    if first and first[0] in DASHES:
        first = plain_dashes(first, COMMON) or first
    if first in COMMON:
        return f"ms4 {first}, with plain hyphens; ms4 --help"
    if first.startswith("-"):
        if row := _OPTIONS.get(first.partition("=")[0]):
            return f"{row.ours}; ms4 --help"
        named = [at for at, word in enumerate(args) if word in ours][:1]
        words = [word for at, word in enumerate(args) if at not in named]
        line = " ".join(["ms4", args[named[0]] if named else "run", *map(quoted, words)])
        return f"options go after a command: {line[:120]}   or   ms4 --help"
    if first.lower().endswith(".gguf"):
        return f"ms4 chat -m {quoted(first)}   or   ms4 info {quoted(first)}"
    if first in _COMMANDS:
        return f"{_COMMANDS[first].ours}; ms4 --help"
    near = [] if first[:1].isupper() and first.lower() not in ours else _near(first, ours)
    if near and len(args) < 3 and not re.search(r"\s", first):
        return f"{' '.join(['ms4', near[0], *map(quoted, rest)])[:120]}   or   ms4 --help"
    text = first if not rest or any(word.startswith("-") for word in rest) else " ".join(args)
    return f"ms4 run {quoted(text[:120], always=True)}   or   ms4 --help"


def _near(word: str, ours: Sequence[str]) -> list[str]:
    """The command that was meant: a question may begin with a word that is like one."""
    import difflib

    word = word.lower()
    close = difflib.get_close_matches(word, ours, 1, 0.65)
    return [name for name in close if name[0] == word[0] or word in name or sorted(name) == sorted(word)]


def quoted(text: str, always: bool = False) -> str:
    """A word as it is typed in a shell."""
    if not re.search(r'["$`\\!]', text) and (always or re.search(r"[^\w@%+=:,./-]", text)):
        return f'"{text}"'
    return shlex.quote(text)


def page() -> str:
    """docs/coming-from.md."""
    lines = [
        "# Coming from llama.cpp, Ollama, llm or LM Studio",
        "",
        "Made from the table in `cli/elsewhere.py`, which also gives the hints of error messages:",
        "`python -m ms4.cli.elsewhere > docs/coming-from.md`. What is typed there stands on the left.",
    ]
    for title, rows in (("Options", OPTIONS), ("Commands", COMMANDS)):
        lines += ["", f"## {title}", "", "| from | there | here |", "|---|---|---|"]
        for row in rows:
            theirs = ", ".join(f"`{spelling}`" for spelling in row.spellings)
            lines.append(f"| {row.who or 'anywhere'} | {theirs} | {row.ours.replace('|', chr(92) + '|')} |")
    return "\n".join([*lines, "", *SAME, ""])


SAME = (
    "## The same letter, another meaning",
    "",
    "* `-s` is the system prompt, as in llm; llama.cpp's seed is `--seed` here.",
    "* `-i` attaches an image, `-r` sets the effort, `-o` names a file for the answer, `-t` the number of threads, or",
    "  with a name instead of a number a template, as in llm.",
    "* `-f FILE` attaches a file under its name; `ms4 run < FILE` takes its text as the prompt.",
    "* `--think` only shows or hides thoughts; whether the model thinks is `-r none|high`.",
    "* `-v` says more about the file and ends with the statistics, as `--verbose` of Ollama does.",
    "* `--format json` is how the answer is reported; it does not make the model write JSON.",
)

if __name__ == "__main__":
    print(page(), end="")
