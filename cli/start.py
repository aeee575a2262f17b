"""Entry of the `ms4` command: the text of `ms4 --help`, and the one place that prints errors and chooses exit codes.

Answers --version and --help without importing Typer, numpy or the engine.  The commands are in `main.py`.
"""

import os
import re
import sys
from typing import TextIO

import ms4
from ms4.cli import errors, streams

HELP = """\
ms4 runs Mistral Small 4 on this machine.

usage: ms4 COMMAND [OPTIONS]

  ms4 run -m model.gguf "Explain mixture of experts in three sentences"
  git diff | ms4 run -m model.gguf "Write a commit message, one line"
  ms4 run -m model.gguf -i invoice.png "Total and due date?"
  ms4 chat -m model.gguf
  ms4 pull Q4_K_M

commands:
  run         answer one prompt, from the arguments or stdin
  chat        talk with the model
  batch       answer a file of prompts, and go on after an interruption
  pull        get a model from Hugging Face
  ls          list the models on this machine
  rm          remove one of them
  verify      compare their checksums, and repair what is damaged
  sessions    list, show, export, search, remove conversations
  templates   list, show, edit, remove what --save has kept
  config      show and set what options are where they are not typed
  info        show what is in a model file
  plan        say whether a model fits, and how fast it will be
  doctor      check this machine and say what to change
  selftest    compare the GPU with the CPU, to the bit
  bench       measure reading and writing speed
  perplexity  measure how well the model predicts a text
  tokenize    turn text or conversations into token ids
  trace       record which experts a model chooses
  simulate    predict speed from such a record, for cards and memories
  logits      write the logits of given token ids to a file
  convert     make a GGUF file of a folder from Hugging Face
  completion  print a script for bash, zsh or fish
  man         print the manual page

options:
  -h, --help  show this text; after a command, show its options
  --version   show the version

-m takes a GGUF file or a name of ms4 ls.  MS4_MODEL names the model where -m is not given;
without both, a small demonstration model answers that comes with ms4.

exit codes:
  0  finished                    5    model missing or damaged
  1  failed while running        6    not enough memory
  2  wrong usage                 7    unreadable input
  3  the answer is incomplete    130  interrupted
  4  it does not fit the schema
"""
COMMANDS = re.findall(r"^  (\w+)  +\w", HELP.partition("commands:")[2].partition("options:")[0], re.MULTILINE)


def main() -> int:
    """Runs the command line of this process and returns its exit code."""
    try:
        streams.prepare()
        code = dispatch(sys.argv[1:])
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if os.environ.get("MS4_DEBUG") == "1":
            import traceback

            traceback.print_exc()
        code = report(error)
    silence()
    return code


def shown(text: str, stream: TextIO) -> str:
    """A text with columns for a terminal of any width; for anything else as it is."""
    if not streams.is_terminal(stream):
        return text
    from ms4.cli import wrap

    return wrap.reflow(text, streams.columns(stream) - 1)


def dispatch(args: list[str]) -> int:
    if not args and streams.is_terminal(sys.stdin) and streams.is_terminal(sys.stdout):
        from ms4.cli import first_run

        return first_run.begin()
    if not args:
        print(shown(HELP, sys.stderr), end="", file=sys.stderr)
        return errors.USAGE
    if args[0] in ("-h", "--help", "--version"):
        streams.Output().write(f"ms4 {ms4.__version__}\n" if args[0] == "--version" else shown(HELP, sys.stdout))
        return errors.OK
    if args[0] == "help":
        return dispatch([args[1], "--help"] if args[1:] else ["--help"])
    if args[0] == "version":
        if args[1:]:
            raise errors.UsageError("version takes no options", "ms4 version; as JSON, ms4 doctor --json has it")
        return dispatch(["--version"])
    if args[:2] == ["completion", "--ask"]:  # at each Tab: without what it takes to check options
        from ms4.cli import completion

        return completion.answered(args[2:])
    if args[0] not in COMMANDS:
        from ms4.cli import elsewhere

        kind = "option:" if args[0][:1] in ("-", *elsewhere.DASHES) else "command"
        raise errors.UsageError(f"no such {kind} {args[0]}", elsewhere.command_hint(args, COMMANDS))
    os.environ["TYPER_USE_RICH"] = "0"
    from ms4.cli import main as commands

    return commands.carry_out(args[0], args[1:])


def report(error: BaseException) -> int:
    """Says in one line what went wrong, and returns the exit code for it."""
    code, message, hint = errors.describe(error)
    if message:
        errors.note(f"error: {message}")
    if message and hint:
        try:
            print(f"hint: {errors.escape(hint)}", file=sys.stderr, flush=True)
        except (OSError, ValueError, AttributeError):
            pass
    return code


def silence() -> None:
    """Lets the interpreter end without a second complaint about a stream that cannot be written."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
