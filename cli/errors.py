"""What goes wrong, as one line and an exit code.

Owns the exceptions of the command line and the table that gives every exception of ms4 its exit code.  It imports
nothing of ours that takes time to load, so that an error costs none.  Printing is the business of `start.py`.
"""

import os
import sys
import traceback

from ms4.quant import visible

OK, FAILURE, USAGE, INCOMPLETE, FORM, MISSING, NO_ROOM, UNREADABLE = 0, 1, 2, 3, 4, 5, 6, 7
INTERRUPTED, BROKEN_PIPE = 130, 141
LONGEST = 300  # characters of an error line after "ms4: error: "


class CliError(Exception):
    """An error with the exit code `code`; `hint` is what to type instead."""

    code = FAILURE

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(CliError):
    code = USAGE


class IncompleteError(CliError):
    code = INCOMPLETE


class MissingError(CliError):
    code = MISSING


class UnreadableError(CliError):
    code = UNREADABLE


class ReaderGone(CliError):
    """Nobody reads stdout any more.  Not a BrokenPipeError, because Typer would end the process with 1."""

    code = BROKEN_PIPE

    def __init__(self) -> None:
        super().__init__("")


# The exceptions of the layers below, by name: looking one up must not import its module.
CODES = {
    "ms4.quant.gguf_file.FileError": MISSING,
    "ms4.models.tokenizer.TokenizerError": MISSING,
    "ms4.models.conversation.PromptError": USAGE,
    "ms4.models.sampling.SamplingError": USAGE,
    "ms4.models.schema.SchemaError": USAGE,
    "ms4.models.constraint.ConstraintError": FORM,
    "ms4.models.image.ImageError": UNREADABLE,
    "ms4.models.document.EncodingError": UNREADABLE,
    "ms4.models.document.PasswordError": UNREADABLE,
    "ms4.models.untrusted.InputError": UNREADABLE,
    "ms4.models.sessions.NoSessionError": MISSING,
    "ms4.models.sessions.UnknownSessionError": MISSING,
    "ms4.models.sessions.SessionError": UNREADABLE,
    "ms4.models.answer.ContextError": INCOMPLETE,
    "ms4.models.vision.NoTowerError": MISSING,
    "ms4.models.stored.NotStoredError": MISSING,
    "ms4.models.acquire.DoesNotFitError": NO_ROOM,
    "ms4.models.web.UnreachableError": MISSING,
    "ms4.models.web.ChangedError": MISSING,
    "ms4.models.web.DownloadError": FAILURE,
    "ms4.ContextFull": INCOMPLETE,
    "ms4.Canceled": INTERRUPTED,
    "ms4.DeviceError": FAILURE,
    "ms4.EngineError": FAILURE,
}
ENCODING_HINT = "--encoding NAME says what it is (latin-1, utf-16), --lossy shows what is no text as U+FFFD"
HINTS = {
    "ms4.models.sessions.NoSessionError": "ms4 chat begins one",
    "ms4.models.sessions.UnknownSessionError": "ms4 sessions ls lists them",
    "ms4.models.sessions.SessionError": "ms4 sessions ls lists the others",
    "ms4.models.document.EncodingError": ENCODING_HINT,
    "ms4.models.document.PasswordError": "--pdf-password TEXT gives it; at a terminal, ms4 asks for it",
    "ms4.models.vision.NoTowerError": "the mmproj GGUF comes from where the model came from; put it beside the model, "
    "or name it with --mmproj FILE",
}


def escape(text: str, longest: int = LONGEST) -> str:
    """The text on one line, with what could command a terminal written as an escape, cut to `longest` characters."""
    shown = visible.line(text[: longest + 1])
    return shown if len(shown) <= longest else shown[: longest - 1] + "…"


def describe(error: BaseException) -> tuple[int, str, str]:
    """(exit code, message, hint).  An empty message means: say nothing."""
    if isinstance(error, CliError):
        return error.code, str(error), error.hint
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "", ""
    if hasattr(error, "format_message"):  # a usage error of Typer
        return USAGE, _sentence(error.format_message()), _help_hint(error)
    for kind in type(error).__mro__:
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in CODES:
            code = CODES[name]
            hint = getattr(error, "hint", "") or HINTS.get(name, "") or _device_hint(name, str(error))
            return code, "" if code == INTERRUPTED else str(error), hint
    if isinstance(error, MemoryError):
        return NO_ROOM, str(error) or "not enough memory", "a smaller --ctx needs less; ms4 doctor shows what is free"
    if isinstance(error, OSError) and error.strerror:
        name = f"{os.fsdecode(error.filename)}: " if error.filename is not None else ""
        return FAILURE, f"{name}{error.strerror}", ""
    frames = traceback.extract_tb(error.__traceback__)
    where = f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}" if frames else "?"
    message = f"internal error, please report: {type(error).__name__} at {where}: {error}".rstrip(": ")
    return FAILURE, message, "MS4_DEBUG=1 shows the traceback"


def _device_hint(name: str, message: str) -> str:
    """What to type where there is no GPU that can be used."""
    if name != "ms4.DeviceError":
        return ""
    from ms4.cli import gpu_advice

    advice = gpu_advice.advice(message) or "ms4 doctor shows the GPU and its driver"
    return advice if "--device cpu" in message else f"{advice}; --device cpu works without"


def _sentence(message: str) -> str:
    """Typer's text, in the style of ours."""
    message = message.replace("Invalid value for ", "").replace("'", "").rstrip(".")
    return message[:1].lower() + message[1:]


def _help_hint(error: BaseException) -> str:
    context = getattr(error, "ctx", None)
    return f"{context.command_path} --help" if context is not None else "ms4 --help"


def note(text: str) -> None:
    """One line on stderr; a closed stderr is no reason to fail."""
    try:
        print(f"ms4: {escape(text)}", file=sys.stderr, flush=True)
    except (OSError, ValueError, AttributeError):
        pass
