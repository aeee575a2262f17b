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


def folder(kind: str) -> Path:
    """The folder of all programs for files of a kind, one of KINDS."""
    return Path(os.environ.get(f"XDG_{kind}_HOME") or os.path.join(os.path.expanduser("~"), *KINDS[kind]))


def ours(kind: str) -> Path:
    """That of ms4 in it."""
    return folder(kind) / "ms4"
