"""Where a user's files of a kind lie, by the rules of XDG."""

from __future__ import annotations

import os
from pathlib import Path

KINDS = {
    "CACHE": (".cache",),  # what can be found out again
    "CONFIG": (".config",),  # what is wished
    "DATA": (".local", "share"),  # what somebody has made
    "STATE": (".local", "state"),  # what is remembered between calls
}


def home() -> Path:
    """The user's folder; / for a user who has none, as in a container: nothing of theirs may land where they stand."""
    named = os.environ.get("HOME", "")
    if os.path.isabs(named):
        return Path(named)
    import pwd

    try:
        return Path("/", pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return Path("/")


def folder(kind: str) -> Path:
    """The folder of all programs for files of a kind, one of KINDS.  By the rules, a path that is relative is none."""
    named = os.environ.get(f"XDG_{kind}_HOME", "")
    return Path(named) if os.path.isabs(named) else home().joinpath(*KINDS[kind])


def ours(kind: str) -> Path:
    """That of ms4 in it."""
    return folder(kind) / "ms4"
