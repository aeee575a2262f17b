"""The first module of ours that the `ms4` command runs: from here on, Ctrl-C ends it silently with 130.

Everything else, the package itself included, takes time to import, and an interrupt in there would be a traceback.
"""

import os

# `signal` itself takes time to import.
from _signal import SIG_DFL, SIG_IGN, SIGINT, default_int_handler, getsignal, signal  # type: ignore[import-not-found]

INTERRUPTED = 130


def leave(number: int, frame: object) -> None:
    os._exit(INTERRUPTED)  # nothing has been written yet


def main() -> int:
    if watched := getsignal(SIGINT) not in (SIG_IGN, SIG_DFL):  # as in `nohup` or `&` of a script: stays ignored
        signal(SIGINT, leave)
    from ms4.cli import start

    try:
        if watched:
            signal(SIGINT, default_int_handler)
        return start.main()
    except KeyboardInterrupt:  # between two lines of start.main, outside of what it catches
        return INTERRUPTED
    finally:
        if watched:
            signal(SIGINT, SIG_IGN)  # what is left is the end of the interpreter
